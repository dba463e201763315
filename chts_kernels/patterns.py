"""The legal 4x4 patterns and every table that follows from them.

A *pattern* is a 4x4 block of zeros and ones with exactly ``n`` ones in each row and each column: 90 of them for n = 2
(2:4) and 24 for n = 1 (1:4, the permutation matrices). A pattern's *id* is its place in the lexicographic order of the
row-major 16-tuples, which is part of the file format; :attr:`PatternTable.hash` guards it.

Everything below is computed from that one enumeration, so no table can disagree with another.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

BLOCK = 4
ILLEGAL_ID = 255
"""What :attr:`PatternTable.id_from_mask` holds where a mask is no legal pattern."""


@dataclass(frozen=True, eq=False)
class PatternTable:
    """Tables of the P patterns with ``n`` links per row and column; ``r`` counts rows, ``c`` columns, ``j`` slots.

    A block's links have two orders of 4n *slots*: row order (slot ``r * n + j``, the j-th link of row r, columns
    ascending) and column order (slot ``c * n + i``, the i-th link of column c, rows ascending). Row order is how values
    are stored; column order is row order of the transposed block.
    """

    n: int
    masks: np.ndarray
    """bool [P, 4, 4]: the patterns."""
    mask16: np.ndarray
    """uint16 [P]: bit ``4 r + c`` (least significant first) is set when link (r, c) is active."""
    id_from_mask: np.ndarray
    """uint8 [65536]: the id of a 16-bit mask, :data:`ILLEGAL_ID` where it is no pattern."""
    transpose_id: np.ndarray
    """uint8 [P]: the id of the transposed pattern."""
    complement_id: np.ndarray | None
    """uint8 [P]: the id of the complementary pattern; None for n = 1, whose complements are 3:4."""
    columns: np.ndarray
    """uint8 [P, 4, n]: the active columns of each row, ascending."""
    to_transposed_slot: np.ndarray
    """uint8 [P, 4n]: the column-order slot of each row-order slot."""
    from_transposed_slot: np.ndarray
    """uint8 [P, 4n]: the row-order slot of each column-order slot (the inverse of :attr:`to_transposed_slot`)."""
    meta16: np.ndarray
    """uint16 [P]: 2:4 metadata, row r's nibble ``idx0 | idx1 << 2`` (idx0 < idx1) at bits 4r to 4r + 3. For n = 1 the
    link at column c is widened to 2:4 by an explicit zero at column ``c ^ 1``: the link sits in slot ``c & 1``."""
    completions: np.ndarray
    """uint8 [65536]: the number of patterns that contain all links of a 16-bit mask."""
    hash: str
    """SHA-256 of n and of :attr:`mask16`: files that store ids carry it."""

    def __len__(self) -> int:
        return len(self.mask16)

    def tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Table ``name`` as a tensor on ``device`` (cached: made once per table and device).

        Unsigned 16-bit tables become int32, since torch has few operations on uint16; the rest keep their type.

        Raises:
            ValueError: when ``name`` is not one of the array tables of this n.
        """
        import torch

        return _table_tensor(self.n, name, torch.device(device))


def _enumerate(n: int) -> np.ndarray:
    """bool [P, 4, 4] in id order."""
    rows = [row for row in itertools.product((0, 1), repeat=BLOCK) if sum(row) == n]
    # The product of sorted rows, first row slowest, is already the lexicographic order of the 16-tuples.
    blocks = np.array(list(itertools.product(rows, repeat=BLOCK)), dtype=bool)
    return blocks[(blocks.sum(axis=1) == n).all(axis=1)]


@functools.cache
def pattern_table(n: int) -> PatternTable:
    """The tables for ``n`` links per row and column of a 4x4 block (cached).

    Raises:
        ValueError: when ``n`` is neither 1 nor 2.
    """
    if n not in (1, 2):
        raise ValueError(f"n: must be 1 (1:4) or 2 (2:4), got {n!r}")
    masks = _enumerate(n)
    count = len(masks)
    weights = (1 << np.arange(BLOCK * BLOCK)).reshape(BLOCK, BLOCK)
    mask16 = (masks * weights).sum(axis=(1, 2)).astype(np.uint16)
    id_from_mask = np.full(1 << 16, ILLEGAL_ID, dtype=np.uint8)
    id_from_mask[mask16] = np.arange(count)
    transposed16 = (masks.transpose(0, 2, 1) * weights).sum(axis=(1, 2))
    columns = np.nonzero(masks)[2].reshape(count, BLOCK, n).astype(np.uint8)

    # Rank of each active link in row order and in column order, then one indexed by the other.
    row_slot = np.where(masks, masks.reshape(count, -1).cumsum(axis=1).reshape(masks.shape) - 1, -1)
    columnwise = masks.transpose(0, 2, 1)
    column_slot = (columnwise.reshape(count, -1).cumsum(axis=1).reshape(masks.shape) - 1).transpose(0, 2, 1)
    to_transposed = column_slot[masks].reshape(count, BLOCK * n).astype(np.uint8)
    from_transposed = np.argsort(to_transposed, axis=1).astype(np.uint8)
    assert (np.take_along_axis(row_slot[masks].reshape(count, -1), from_transposed.astype(int), 1) == from_transposed).all()

    if n == 2:
        first, second = columns[..., 0].astype(int), columns[..., 1].astype(int)
    else:
        first = columns[..., 0].astype(int) & 2
        second = first + 1
    meta16 = ((first | second << 2) << (4 * np.arange(BLOCK))).sum(axis=1).astype(np.uint16)

    return PatternTable(
        n=n,
        masks=masks,
        mask16=mask16,
        id_from_mask=id_from_mask,
        transpose_id=id_from_mask[transposed16],
        complement_id=id_from_mask[mask16 ^ 0xFFFF] if n == 2 else None,
        columns=columns,
        to_transposed_slot=to_transposed,
        from_transposed_slot=from_transposed,
        meta16=meta16,
        completions=((np.arange(1 << 16)[:, None] & ~mask16.astype(np.int64)) == 0).sum(axis=1).astype(np.uint8),
        hash=hashlib.sha256(bytes([n]) + mask16.astype("<u2").tobytes()).hexdigest(),
    )


@functools.cache
def _table_tensor(n: int, name: str, device: torch.device) -> torch.Tensor:
    from .lasting import to_device

    table = pattern_table(n)
    arrays = [f.name for f in fields(table) if isinstance(getattr(table, f.name), np.ndarray)]
    if name not in arrays:
        raise ValueError(f"name: must be one of {arrays} for n = {n}, got {name!r}")
    array = getattr(table, name)
    if array.dtype == np.uint16:
        array = array.astype(np.int32)
    return to_device(array, device)
