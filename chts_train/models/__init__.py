"""Dense models to sparsify from outside: :class:`Llama` (text) and :class:`ViT` (images)."""

from .llama import Llama, LlamaConfig
from .vit import ViT, ViTConfig

__all__ = ["Llama", "LlamaConfig", "ViT", "ViTConfig"]
