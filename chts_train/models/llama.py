"""Llama: RMSNorm, rotary positions, SwiGLU, causal attention, untied head, no biases.

Parameter names and the rotary convention (``rotate_half``: channel i turns with channel i + head_dim / 2) are
those of Hugging Face ``LlamaForCausalLM``, so a dense state dict of this model loads there as it is, and
:meth:`LlamaConfig.to_hf` gives the ``config.json`` that goes with it. Inside are plain ``nn.Linear`` layers:
:func:`chts_train.sparsify_` turns them sparse from outside.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama; the fields carry the names they have in a Hugging Face ``LlamaConfig``.

    ``max_position_embeddings`` bounds the sequence length; no parameter depends on it.
    Raises ValueError when a size is not positive, or the heads do not divide ``hidden_size`` into an even size.
    """

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1376
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                "hidden_size must be a multiple of 2 * num_attention_heads (rotary positions turn pairs of channels), "
                f"got hidden_size={self.hidden_size}, num_attention_heads={self.num_attention_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def fit(self, *, vocab_size: int) -> LlamaConfig:
        """The same network for another vocabulary."""
        return replace(self, vocab_size=vocab_size)

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` with which transformers loads this model's dense state dict."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **asdict(self),
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
        }


def rotary_table(length: int, head_dim: int, theta: float, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """(cos, sin), each float32 [length, head_dim].

    At position p, channels i and i + head_dim / 2 share the angle p * theta^(-2i / head_dim).
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [B, H, T, D] by its positions; cos, sin float32 [T, D]. Computed in float32, returned in x's dtype."""
    first, second = x.float().chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention; x [B, T, hidden] -> [B, T, hidden]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        q, k, v = (
            projection(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)  # [B, H, T, D]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, hidden))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and final norm; tokens int64 [B, T] -> hidden states [B, T, hidden]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        # Made anew in each pass, which costs next to nothing: a buffer would lose its precision in model.bfloat16().
        cos, sin = rotary_table(tokens.shape[1], self.config.head_dim, self.config.rope_theta, tokens.device)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class NextTokenLoss(nn.Module):
    """Mean cross entropy in nats, computed in float32; a module of its own, so that it can be compiled by itself.

    logits [B, T, vocab]; targets int64 [B, T], -100 where none counts -> float32 scalar.
    """

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)


class Llama(nn.Module):
    """Causal language model.

    Weights start as N(0, ``initializer_range``), norms at one; nothing is rescaled by depth or for sparsity. Draws
    come from torch's global generator: seed it before. Works under ``torch.compile`` and under autocast, where
    parameters, residual stream and loss stay float32 and the products run in the autocast type.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss = NextTokenLoss()
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocab], or with targets the mean cross entropy in nats (float32 scalar).

        tokens int64 [B, T]; targets int64 [B, T], the token that follows each position, -100 where none counts.
        The mean is over the targets that count; it is NaN when none does. Raises ValueError when T is above
        ``max_position_embeddings`` or the shapes differ.
        """
        if tokens.ndim != 2 or tokens.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"tokens must be [batch, length] with length <= max_position_embeddings="
                f"{self.config.max_position_embeddings}, got shape {tuple(tokens.shape)}"
            )
        if targets is not None and targets.shape != tokens.shape:
            raise ValueError(f"targets must have the shape of tokens {tuple(tokens.shape)}, got {tuple(targets.shape)}")
        logits = self.lm_head(self.model(tokens))
        return logits if targets is None else self.loss(logits, targets)
