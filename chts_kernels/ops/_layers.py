"""Many layers in one launch: a program finds its layer in a table of pointers.

Columns of int64, the first of which, the number of each layer's first program, is searched by all threads at once. What changes from
call to call (the addresses of gradients) has a table of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

from ._batch import table

STARTS, BLOCK_ROWS, BLOCK_COLUMNS = map(tl.constexpr, range(3))
"""Columns of every table."""
FIRST_OWN = 3
"""Number of the first column that a kernel chooses for itself."""
LEAST_LAYERS, MOST_LAYERS = 64, 512
"""Layers that a table has room for; there is one kernel for each power of two."""
NEVER = 1 << 62
"""First program of a layer that is not there."""


@triton.jit
def entry(table_ptr, column: tl.constexpr, layer, LAYERS: tl.constexpr):
    return tl.load(table_ptr + column * LAYERS + layer)


@triton.jit
def layer_of(table_ptr, pid, LAYERS: tl.constexpr):
    """The layer of program ``pid``, and the program's number within it, int32."""
    starts = tl.load(table_ptr + STARTS * LAYERS + tl.arange(0, LAYERS))
    layer = tl.sum((starts <= pid).to(tl.int32), 0) - 1
    return layer, pid - entry(table_ptr, STARTS, layer, LAYERS).to(tl.int32)


@dataclass
class Tables:
    """What a launch reads of its layers; ``pinned`` when a captured graph goes on reading it."""

    fixed: torch.Tensor
    moving: torch.Tensor | None = None
    addresses: tuple[int, ...] = field(default=())
    pinned: bool = False


MOST_TABLES = 64
_TABLES: OrderedDict[tuple, Tables] = OrderedDict()


def tables(
    counts: Sequence[int], ids: Sequence[torch.Tensor], columns: Sequence[Sequence[Any]], moving: Sequence[torch.Tensor] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two tables of a launch, made anew only when an address changed: [columns, :func:`room`] and, of ``moving``, [1, layers].

    Args:
        counts: programs of every layer.
        ids: of every layer; their shapes are the columns BLOCK_ROWS and BLOCK_COLUMNS.
        columns: from FIRST_OWN on: tensors, whose addresses are kept, or numbers; empty ones are filled with 0.
        moving: tensors that may be others in the next call.
    """
    device, shapes = ids[0].device, [i.shape for i in ids]
    own = [tuple([t.data_ptr() if isinstance(t, torch.Tensor) else t for t in column]) for column in columns]
    addresses = tuple([t.data_ptr() for t in moving])
    key = device, tuple(counts), tuple(shapes), *own
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    known = _TABLES.get(key)
    if known is None:
        known = Tables(_fixed(device, counts, shapes, own))
        if not capturing:  # what a capture writes is written when the graph runs, not now
            _TABLES[key] = known
            while len(_TABLES) > MOST_TABLES:
                oldest = next((k for k, t in _TABLES.items() if not t.pinned), None)
                if oldest is None:
                    break
                del _TABLES[oldest]
    else:
        _TABLES.move_to_end(key)
    if capturing:
        known.pinned = True
        return known.fixed, table([addresses], device) if addresses else known.fixed
    if known.addresses != addresses:
        known.moving, known.addresses = table([addresses], device), addresses
    return known.fixed, known.fixed if known.moving is None else known.moving


def room(layers: int) -> int:
    """LAYERS of the kernel."""
    return max(LEAST_LAYERS, triton.next_power_of_2(layers))


def _fixed(device: torch.device, counts: Sequence[int], shapes: Sequence[torch.Size], own: Sequence[Sequence[int]]) -> torch.Tensor:
    size = room(len(counts))
    starts = [sum(counts[:i]) for i in range(len(counts))]
    rows = [starts + [NEVER] * (size - len(starts))]
    rows += [[*column, *[0] * (size - len(column))] for column in ([s[0] for s in shapes], [s[1] for s in shapes], *own)]
    return table(rows, device)
