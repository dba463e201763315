"""Tokens in documents: one flat array and the bounds of every document, so that splits share memory.

Token arrays on disk: ``.npy`` (any integer type), ``.bin`` and ``.u16`` (little-endian uint16), each also as
``.xz``. Uncompressed files are memory-mapped.
"""

from __future__ import annotations

import io
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ARRAY_SUFFIXES = (".npy", ".bin", ".u16")
_CHUNK = 1 << 24  # tokens scanned at a time, so that a memory-mapped array never has to fit in memory


@dataclass(frozen=True)
class TokenDocs:
    """Documents ``tokens[starts[i]:ends[i]]``.

    tokens: integers [total]; often memory-mapped, and shared with other splits. starts, ends: int64 [documents].
    """

    tokens: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def from_documents(cls, documents: Sequence[np.ndarray]) -> TokenDocs:
        """One document per array; all arrays of one integer type."""
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        ends = np.cumsum(lengths, dtype=np.int64)
        tokens = np.concatenate(documents) if len(documents) else np.empty(0, np.uint16)
        return cls(tokens, ends - lengths, ends)

    @classmethod
    def from_boundaries(cls, tokens: np.ndarray, end_of_text: int) -> TokenDocs:
        """Cut ``tokens`` after every ``end_of_text`` (which stays with the document that it ends)."""
        cuts = [np.flatnonzero(chunk == end_of_text).astype(np.int64) + offset + 1 for offset, chunk in _chunks(tokens)]
        ends = np.concatenate([*cuts, np.array([len(tokens)], np.int64)])
        if len(ends) > 1 and ends[-1] == ends[-2]:
            ends = ends[:-1]
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
        filled = ends > starts
        return cls(tokens, starts[filled], ends[filled])

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.starts[index] : self.ends[index]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]."""
        return self.ends - self.starts

    @property
    def total(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum())

    def select(self, indices: np.ndarray) -> TokenDocs:
        """The documents ``indices``, in that order, on the same memory."""
        return TokenDocs(self.tokens, self.starts[indices], self.ends[indices])

    def target_counts(self, vocab_size: int) -> np.ndarray:
        """How often each id is a target, int64 [vocab_size]: every token but the first of its document."""
        counts = np.zeros(vocab_size, np.int64)
        group: list[np.ndarray] = []
        waiting = 0
        for index in range(len(self)):  # counted in groups: a bincount per document would cost documents * vocab_size
            group.append(self[index][1:])
            waiting += len(group[-1])
            if waiting >= _CHUNK or index == len(self) - 1:
                counts += np.bincount(np.concatenate(group), minlength=vocab_size)
                group, waiting = [], 0
        return counts

    def max_id(self) -> int:
        """Largest token id; -1 when there is no token."""
        return max((int(chunk.max()) for _, chunk in _chunks(self.tokens)), default=-1)


def _chunks(tokens: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for offset in range(0, len(tokens), _CHUNK):
        yield offset, np.asarray(tokens[offset : offset + _CHUNK])


def is_array(path: Path) -> bool:
    """Whether the name is that of a token array."""
    return Path(path.name.removesuffix(".xz")).suffix in ARRAY_SUFFIXES


def read_array(path: Path) -> np.ndarray:
    """Token array of a file, 1-D, integers; memory-mapped unless compressed.

    Raises ValueError, naming the file, when it cannot be decompressed, is not whole, or holds no 1-D array of
    integers.
    """
    try:
        if path.suffix == ".xz":
            data = lzma.decompress(path.read_bytes())
            is_npy = path.name.endswith(".npy.xz")
            tokens = np.load(io.BytesIO(data), allow_pickle=False) if is_npy else np.frombuffer(data, dtype="<u2")
        elif path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        elif path.stat().st_size:
            tokens = np.memmap(path, dtype="<u2", mode="r")
        else:
            tokens = np.empty(0, np.uint16)
    except (ValueError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path} is not a whole token array: {error}") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"{path} must hold a 1-D array of integers, got {tokens.dtype} {list(tokens.shape)}")
    if tokens.dtype.kind == "i" and any((chunk < 0).any() for _, chunk in _chunks(tokens)):
        raise ValueError(f"{path} must hold token ids >= 0, got a negative one")
    return tokens


def split_documents(docs: TokenDocs, val_fraction: float, seed: int) -> tuple[TokenDocs, TokenDocs]:
    """(train, val): a held-out split by document, both in an order shuffled from ``seed``.

    In the shuffled order every document that still fits into ``val_fraction`` of all tokens goes to val (the
    shortest one when none fits), so one huge document cannot swell the validation set. A single document cannot be
    held out whole: its last ``val_fraction`` becomes val. Raises ValueError when ``val_fraction`` is outside (0, 1)
    or there are fewer than 4 tokens to share out.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must be in (0, 1), got {val_fraction!r}")
    if docs.total < 4:
        raise ValueError(f"the text must have at least 4 tokens to be split into train and val, got {docs.total}")
    if len(docs) == 1:
        start, end = int(docs.starts[0]), int(docs.ends[0])
        cut = min(max(end - int((end - start) * val_fraction), start + 2), end - 2)
        bounds = np.array([start, cut, end], np.int64)
        return (
            TokenDocs(docs.tokens, bounds[:1], bounds[1:2]),
            TokenDocs(docs.tokens, bounds[1:2], bounds[2:]),
        )
    # RandomState, not Generator: NumPy promises that its stream never changes between versions.
    order = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed))).permutation(len(docs))
    lengths, room = docs.lengths, int(docs.total * val_fraction)
    shortest = int(lengths.min())
    held_out = np.zeros(len(docs), bool)
    for index in order:
        if room < shortest:
            break
        if lengths[index] <= room:
            held_out[index] = True
            room -= int(lengths[index])
    if not held_out.any():
        held_out[order[np.argmin(lengths[order])]] = True
    return docs.select(order[~held_out[order]]), docs.select(order[held_out[order]])
