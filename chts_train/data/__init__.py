"""Text and image data: reading, held-out splits, deterministic resumable batches.

::

    text = load_text("stdlib")                              # or files, folders, token arrays, a data set name
    batches = TextBatches(text.train, seq_len=256, batch_size=64, seed=0)
    tokens, targets = next(batches)
"""

from chts_train.data.batches import ImageBatches, TextBatches
from chts_train.data.image_files import load_images
from chts_train.data.images import ImageData, ImageSet
from chts_train.data.text import TextData, load_text
from chts_train.data.tokens import TokenDocs

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
