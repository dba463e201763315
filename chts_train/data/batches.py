"""Deterministic, resumable batches of token windows and of images.

What batch number i holds is a function of (seed, i) and the data alone: every epoch is a permutation drawn from
(seed, epoch), and one epoch runs into the next, so no item is dropped or seen twice within an epoch. The state is the
position; a resumed loader goes on with exactly the batches that an uninterrupted one would give.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .images import ImageSet, augment, normalise
from .tokens import TokenDocs

IGNORE_INDEX = -100  # target of padding


def random_state(*key: int) -> np.random.RandomState:
    """Generator of (seed, epoch, ...). RandomState because NumPy promises never to change its stream."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(key)))


class EpochOrder:
    """An endless order of 0..count-1: epoch after epoch, each a permutation of (seed, epoch), or sorted."""

    def __init__(self, count: int, seed: int, shuffle: bool) -> None:
        self.count, self.seed, self.shuffle = count, seed, shuffle
        self.position = 0
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def take(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The next ``number`` items and the epoch of each, int64 [number] both."""
        places = np.arange(self.position, self.position + number, dtype=np.int64)
        self.position += number
        epochs, places = np.divmod(places, self.count)
        items = np.empty(number, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            items[here] = self._permutation(int(epoch))[places[here]]
        return items, epochs

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            epoch = 0
        if epoch != self._epoch:
            order = random_state(self.seed, epoch).permutation(self.count) if self.shuffle else np.arange(self.count)
            self._epoch, self._order = epoch, order
        return self._order


class _Batches(ABC):
    """What both loaders share: iteration without end, and the state."""

    def __init__(self, count: int, batch_size: int, seed: int, shuffle: bool, **identity: Any) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed!r}")
        self.batch_size = batch_size
        self._order = EpochOrder(count, seed, shuffle)
        self._identity = {"items": count, "seed": seed, "shuffle": shuffle, **identity}

    @property
    def items(self) -> int:
        """Sequences (images) of one epoch."""
        return self._order.count

    @property
    def position(self) -> int:
        """Sequences (images) given out so far."""
        return self._order.position

    @property
    def epoch(self) -> float:
        """Epochs given out so far."""
        return self.position / self.items

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        return self._read(*self._order.take(self.batch_size))

    @abstractmethod
    def _read(self, items: np.ndarray, epochs: np.ndarray) -> tuple[Tensor, Tensor]: ...

    def state_dict(self) -> dict[str, Any]:
        """JSON values: the position, and what the order depends on. Not the batch size, which may change."""
        return {"position": self.position, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``. Raises ValueError when it was made with other data or arguments."""
        for name, mine in self._identity.items():
            if state.get(name) != mine:
                raise ValueError(f"the state has {name}={state.get(name)!r}, these batches have {name}={mine!r}")
        position = state.get("position")
        if not isinstance(position, int) or position < 0:
            raise ValueError(f"the state's position must be an integer >= 0, got {position!r}")
        self._order.position = position


class _Windows:
    """Documents cut into windows of at most ``seq_len`` targets; no window crosses a document.

    A document of L tokens gives ceil((L - 1) / seq_len) windows: window j predicts tokens j * seq_len + 1 ...
    (j + 1) * seq_len, so every token but the first of a document is a target exactly once per epoch. The last window of
    a document is padded. Only cumulative counts are kept, one per document.
    """

    def __init__(self, docs: TokenDocs, seq_len: int) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len must be at least 1, got {seq_len!r}")
        self.docs, self.seq_len = docs, seq_len
        self.ends = np.cumsum(np.maximum(docs.lengths - 1 + seq_len - 1, 0) // seq_len)
        self.count = int(self.ends[-1]) if len(self.ends) else 0
        if not self.count:
            raise ValueError(f"docs must have a document of at least 2 tokens, got {len(docs)} documents without one")

    def read(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Windows [B] -> tokens and targets, int64 [B, seq_len]; padding is token 0, target -100."""
        document = np.searchsorted(self.ends, windows, side="right")
        first = np.where(document > 0, self.ends[document - 1], 0)
        start = self.docs.starts[document] + (windows - first) * self.seq_len
        at = start[:, None] + np.arange(self.seq_len + 1)  # [B, seq_len + 1]
        inside = at < self.docs.ends[document][:, None]
        tokens = np.where(inside, self.docs.tokens[np.where(inside, at, start[:, None])], 0).astype(np.int64)
        targets = np.where(inside[:, 1:], tokens[:, 1:], IGNORE_INDEX)
        # A place without a target is padding as an input as well: the last token of a document predicts nothing.
        return torch.from_numpy(np.where(inside[:, 1:], tokens[:, :-1], 0)), torch.from_numpy(targets)


class TextBatches(_Batches):
    """Endless (tokens, targets), int64 [batch_size, seq_len] each, on the CPU.

    A sequence is a contiguous window of one document; a document of more than ``seq_len`` tokens gives several. (One
    sequence per document, the habit for short web pages, would use only the first ``seq_len`` tokens of a book;
    packing would let the model attend across documents.) Targets are the next tokens; -100 marks padding, which only a document's
    last window has. Raises ValueError for sizes below 1, a negative seed, or documents without any target.
    """

    def __init__(self, docs: TokenDocs, seq_len: int, batch_size: int, seed: int = 0, shuffle: bool = True) -> None:
        self._windows = _Windows(docs, seq_len)
        super().__init__(self._windows.count, batch_size, seed, shuffle, seq_len=seq_len, tokens=docs.total)

    def _read(self, items: np.ndarray, epochs: np.ndarray) -> tuple[Tensor, Tensor]:
        return self._windows.read(items)

    @staticmethod
    def eval_batches(
        docs: TokenDocs, seq_len: int, batch_size: int, max_tokens: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass in a fixed order; the last batch may be smaller.

        With ``max_tokens`` only ceil(max_tokens / seq_len) windows, spread evenly over all documents rather than
        the first ones. Weigh each batch's mean loss by ``(targets != -100).sum()``.
        """
        windows = _Windows(docs, seq_len)
        chosen = _spread(windows.count, None if max_tokens is None else -(-max_tokens // seq_len))
        return (windows.read(chosen[i : i + batch_size]) for i in range(0, len(chosen), batch_size))


class ImageBatches(_Batches):
    """Endless (images, labels): float32 [batch_size, C, S, S] normalised, int64 [batch_size], on the CPU.

    ``augment``: random crop after padding by an eighth of the size, and a horizontal flip where the set allows it;
    drawn per (seed, epoch, image). Raises ValueError for a size below 1 or a negative seed.
    """

    def __init__(
        self, images: ImageSet, batch_size: int, seed: int = 0, shuffle: bool = True, augment: bool = False
    ) -> None:
        super().__init__(len(images), batch_size, seed, shuffle, augment=augment)
        self._images, self._augment = images, augment
        self._draws: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _read(self, items: np.ndarray, epochs: np.ndarray) -> tuple[Tensor, Tensor]:
        pixels = self._images.pixels(items)
        if self._augment:
            margin = pixels.shape[-1] // 8
            shift, flip = np.empty((len(items), 2), np.int64), np.empty(len(items), bool)
            for epoch in np.unique(epochs):
                here = epochs == epoch
                shifts, flips = self._draw(int(epoch), margin)
                shift[here], flip[here] = shifts[items[here]], flips[items[here]]
            pixels = augment(pixels, torch.from_numpy(shift), torch.from_numpy(flip), margin)
        return normalise(pixels, self._images.mean, self._images.std), self._images.labels[torch.from_numpy(items)]

    def _draw(self, epoch: int, margin: int) -> tuple[np.ndarray, np.ndarray]:
        """Shift int [N, 2] in 0 .. 2 * margin and flip bool [N] of every image in this epoch."""
        if epoch not in self._draws:
            state = random_state(self._order.seed, epoch, 1)  # 1: another stream than the order's
            shift = state.randint(0, 2 * margin + 1, size=(self.items, 2))
            flip = (state.rand(self.items) < 0.5) & self._images.mirror
            self._draws = {key: value for key, value in self._draws.items() if key == epoch - 1} | {
                epoch: (shift, flip)
            }
        return self._draws[epoch]

    @staticmethod
    def eval_batches(
        images: ImageSet, batch_size: int, max_images: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass in a fixed order, not augmented; with ``max_images`` that many, spread evenly over the set."""
        chosen = _spread(len(images), max_images)
        for i in range(0, len(chosen), batch_size):
            part = chosen[i : i + batch_size]
            yield normalise(images.pixels(part), images.mean, images.std), images.labels[torch.from_numpy(part)]


def _spread(count: int, most: int | None) -> np.ndarray:
    """``most`` of 0..count-1 (all when None), ascending, evenly spaced."""
    if most is not None and most < 1:
        raise ValueError(f"the evaluation limit must be at least 1 or None, got {most!r}")
    number = count if most is None else min(count, most)
    return np.arange(number, dtype=np.int64) * count // number
