"""Dense models to sparsify from outside: :class:`Llama` (text) and :class:`ViT` (images)."""

from chts_train.models.llama import Llama, LlamaConfig
from chts_train.models.vit import ViT, ViTConfig

__all__ = ["Llama", "LlamaConfig", "ViT", "ViTConfig"]
