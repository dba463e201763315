"""Labelled images: what a loader reads from, normalisation and augmentation.

Pixels are uint8 until a batch is made. Small sets are decoded once and kept as one tensor; large ones are decoded
batch by batch in threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..extras import require

_KEEP_BYTES = 1 << 30  # sets that decode to at most this are kept in memory
_SAMPLE = 4096  # images from which mean and deviation are taken, evenly spread over the train split


class Source(Protocol):
    """Where pixels come from: item numbers int64 [B] -> uint8 [B, C, S, S]."""

    def __call__(self, items: np.ndarray) -> Tensor: ...


@dataclass(frozen=True)
class ImageSet:
    """Images of one split.

    pixels(items): item numbers, int64 array [B] -> uint8 [B, C, S, S]. labels: int64 [N]. mean, std: float32 [C] of the
    train split, in units of 0..1. mirror: whether a mirrored image keeps its label (not so for digits).
    """

    pixels: Source
    labels: Tensor
    mean: Tensor
    std: Tensor
    mirror: bool

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageData:
    """Both splits, and the sizes that a model for them needs."""

    name: str
    train: ImageSet
    val: ImageSet
    num_classes: int
    image_size: int
    channels: int

    def describe(self) -> str:
        """One line: name, images of both splits, classes, shape."""
        return (
            f"{self.name}: train {len(self.train):,} images, val {len(self.val):,}; {self.num_classes} classes; "
            f"{self.channels} x {self.image_size} x {self.image_size}"
        )


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B, C, S, S] -> float32, (pixel / 255 - mean) / std per channel."""
    return (pixels.float() / 255 - mean[:, None, None]) / std[:, None, None]


def augment(pixels: Tensor, shift: Tensor, flip: Tensor, margin: int) -> Tensor:
    """Random crop with padding, and flip: uint8 [B, C, S, S] in and out.

    The image is padded with ``margin`` black pixels on every side and cut at row shift[:, 0], column shift[:, 1]
    (int64 [B, 2] in 0 .. 2 * margin; margin is the middle); where flip (bool [B]), columns are mirrored.
    """
    batch, _, size, _ = pixels.shape
    padded = F.pad(pixels, (margin,) * 4)
    span = torch.arange(size)
    rows = shift[:, :1] + span  # [B, S]
    columns = shift[:, 1:] + torch.where(flip[:, None], size - 1 - span, span)
    picked = padded[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # [B, S, S, C]
    return picked.permute(0, 3, 1, 2).contiguous()


def resize(pixels: Tensor, size: int) -> Tensor:
    """uint8 [N, C, H, W] -> [N, C, size, size]: shorter side scaled (bilinear, antialiased), middle cut out."""
    height, width = pixels.shape[2:]
    if height == width == size:
        return pixels
    scale = size / min(height, width)
    shape = (max(size, round(height * scale)), max(size, round(width * scale)))
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    parts = [
        F.interpolate(part.float(), shape, mode="bilinear", antialias=True)[:, :, top : top + size, left : left + size]
        for part in pixels.split(1024)
    ]
    return torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])


class ArraySource:
    """Pixels held in memory, uint8 [N, C, S, S]."""

    def __init__(self, pixels: Tensor) -> None:
        self.held = pixels

    def __call__(self, items: np.ndarray) -> Tensor:
        return self.held[torch.from_numpy(items)]


class DecodedSource:
    """Images opened by number and decoded with Pillow when they are read.

    ``open_image(i)`` gives a PIL image; it is converted to ``channels`` (1 grey, 3 RGB), its shorter side is scaled
    to ``size`` (bicubic) and its middle cut out.
    """

    def __init__(self, open_image: Callable[[int], Any], size: int, channels: int) -> None:
        self._open, self._size, self._mode = open_image, size, "L" if channels == 1 else "RGB"
        self._fit = require("PIL.ImageOps", "decoding images").fit

    def __call__(self, items: np.ndarray) -> Tensor:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            arrays = list(pool.map(self._read, items.tolist(), chunksize=16))
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()

    def _read(self, item: int) -> np.ndarray:
        with self._open(item) as image:
            image = image.convert(self._mode)
            if image.size != (self._size, self._size):
                image = self._fit(image, (self._size, self._size))
            array = np.asarray(image)
        return array.reshape(self._size, self._size, -1)


def make_data(
    name: str, splits: Sequence[tuple[Source, np.ndarray]], *, image_size: int, channels: int, mirror: bool = True
) -> ImageData:
    """ImageData of [(train source, labels), (val source, labels)]; mean and deviation from the train split.

    Grey sets are never mirrored, whatever ``mirror`` says: most of them are digits and letters. Labels of any
    kind become 0 .. classes - 1 in sorted order of the train labels. Raises ValueError when a split is empty or
    val has a label that train has not.
    """
    classes = np.unique(splits[0][1])
    bytes_each = channels * image_size * image_size
    parts = []
    for split, (source, labels) in zip(("train", "val"), splits, strict=True):
        if not len(labels):
            raise ValueError(f"data {name} must hold {split} images, got none")
        numbers = np.minimum(np.searchsorted(classes, labels), len(classes) - 1)
        unknown = np.asarray(labels)[classes[numbers] != labels]
        if len(unknown):
            raise ValueError(f"val labels of data {name} must occur in train, got {unknown[0]}")
        if not isinstance(source, ArraySource) and len(labels) * bytes_each <= _KEEP_BYTES:
            source = ArraySource(source(np.arange(len(labels))))
        parts.append((source, torch.from_numpy(numbers.astype(np.int64))))
    train_source, train_labels = parts[0]
    count = len(train_labels)
    sample = train_source(np.arange(min(count, _SAMPLE), dtype=np.int64) * count // min(count, _SAMPLE)).double() / 255
    mean, std = sample.mean((0, 2, 3)), sample.std((0, 2, 3), correction=0).clamp_min(1 / 255)
    train, val = (
        ImageSet(source, labels, mean.float(), std.float(), mirror and channels == 3) for source, labels in parts
    )
    return ImageData(name, train, val, len(classes), image_size, channels)
