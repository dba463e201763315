"""Text and image data: reading, held-out splits, deterministic resumable batches.

::

    text = load_text("stdlib")                              # or files, folders, token arrays, a data set name
    batches = TextBatches(text.train, seq_len=256, batch_size=64, seed=0)
    tokens, targets = next(batches)
"""

from .batches import ImageBatches, TextBatches
from .image_files import load_images
from .images import ImageData, ImageSet
from .text import TextData, load_text
from .tokens import TokenDocs

__all__ = [
    "ImageBatches",
    "ImageData",
    "ImageSet",
    "TextBatches",
    "TextData",
    "TokenDocs",
    "load_images",
    "load_text",
]
