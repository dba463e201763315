"""Stacks of Llama blocks and vision transformers to take training steps with: sizes, modules, random batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from chts_train.models.llama import DecoderLayer, LlamaConfig, rotary_table
from chts_train.models.vit import ViT, ViTConfig


@dataclass(frozen=True)
class Spec:
    """``layers`` blocks are benchmarked of the ``all_layers`` that the model has."""

    config: LlamaConfig | ViTConfig
    batch: int
    length: int
    layers: int
    all_layers: int


def _llama(hidden: int, inner: int, heads: int, batch: int, length: int, layers: int, all_layers: int) -> Spec:
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=all_layers, num_attention_heads=heads,
        max_position_embeddings=length,
    )  # fmt: skip
    return Spec(config, batch, length, layers, all_layers)


def _vit(width: int, heads: int, batch: int, layers: int, all_layers: int, **sizes: int) -> Spec:
    return Spec(ViTConfig(embed_dim=width, depth=layers, num_heads=heads, **sizes), batch, 0, layers, all_layers)


SPECS = {
    "llama-60m": _llama(512, 1376, 8, 64, 256, 8, 8),
    "llama-130m": _llama(768, 2048, 12, 64, 256, 12, 12),
    "llama-1b": _llama(2048, 8192, 32, 8, 1024, 4, 16),
    "llama-8b": _llama(4096, 14336, 32, 4, 2048, 2, 32),
    "vit-b": _vit(768, 12, 64, 12, 12),
    "vit-l": _vit(1024, 16, 64, 8, 24),
    "llama-tiny": _llama(32, 64, 2, 2, 12, 2, 2),
    "vit-tiny": _vit(32, 2, 2, 2, 2, image_size=16, patch_size=4, num_classes=8),
}


class LlamaStack(nn.Module):
    """Llama's blocks alone: random hidden states in, the mean square of the last block's output as loss.

    Embedding and output head are left out: they are dense in every arm, and a 32000-word head would hide the blocks of a
    small model.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, spec: Spec, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(spec.config) for _ in range(layers))
        cos, sin = rotary_table(spec.length, spec.config.head_dim, spec.config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=spec.config.initializer_range)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return x.float().square().mean()


def stack(name: str, layers: int | None = 0) -> tuple[nn.Module, Spec]:
    """The model of that name: with the benchmark's number of layers (0), all of them (None), or so many."""
    spec = SPECS[name]
    if isinstance(spec.config, ViTConfig):
        return ViT(spec.config), spec
    return LlamaStack(spec, {0: spec.layers, None: spec.all_layers}.get(layers, layers)), spec


def random_batch(spec: Spec, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Arguments for a forward pass that returns the loss."""
    generator = torch.Generator(device).manual_seed(1)
    if isinstance(spec.config, ViTConfig):
        c = spec.config
        shape = (spec.batch, c.in_channels, c.image_size, c.image_size)
        images = torch.randn(shape, generator=generator, device=device)
        return images, torch.randint(c.num_classes, (spec.batch,), generator=generator, device=device)
    shape = (spec.batch, spec.length, spec.config.hidden_size)
    return (torch.randn(shape, generator=generator, device=device),)
