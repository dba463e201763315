"""pack_operands_ in Triton: values + ids to compute-dtype values, transposed values and both metadata orders, in one pass.

A thread owns 16 x 16 elements of W, 4 x 4 blocks: what it loads from a row of values, stores to a row of either operand
and writes as metadata are then whole vectors, and no data moves between threads. 32 threads of a warp lie 4 (along N) x 8
(along K), so that every memory sector that is touched is used in full; LANES_N x LANES_K threads make a program.

Per block the transposition is a permutation of 8 half words, read from a table of 256 pattern ids (ids beyond the last
pattern stand for padding). Metadata words come from the same table, through a 4 x 4 transposition of nibbles in registers.
The order of the metadata and its padding are those of :mod:`chts_kernels.layout.metadata`.

Traffic: N K / 2 values (n = 1: N K / 4) and N K / 16 ids read; N K / 2 of each operand and N K / 4 bytes of metadata
written (1/8 byte per element and order).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from ...lasting import to_device
from ...layout.metadata import PADDING_NIBBLE, ROW_PADDING
from ...patterns import BLOCK, pattern_table
from .. import _triton

TILE = 16
"""Elements along each side of a thread's tile: one metadata half word spans 16 columns."""
PADDING_ID = 255


@functools.cache
def block_table(n: int, device: torch.device) -> torch.Tensor:
    """int64 [256]: what a kernel needs to know of a pattern id.

    Bits 0-15 metadata of the block, 16-31 of the transposed block, and from bit 32 nibbles: for n = 2 the row-order slot of
    each of the 8 column-order slots; for n = 1 the row of each of the 4 columns, then the column of each of the 4 rows.
    Ids that are no pattern hold the metadata of padding.
    """
    table = pattern_table(n)
    padding = sum(PADDING_NIBBLE << shift for shift in range(0, 32, BLOCK))
    words = np.full(256, padding, dtype=np.uint64)
    meta = table.meta16.astype(np.uint64)
    slots = table.from_transposed_slot if n == 2 else np.concatenate([table.from_transposed_slot, table.columns[..., 0]], 1)
    nibbles = (slots.astype(np.uint64) << np.arange(32, 64, 4, dtype=np.uint64)).sum(axis=1, dtype=np.uint64)
    words[: len(table)] = meta | meta[table.transpose_id] << np.uint64(16) | nibbles
    return to_device(words.view(np.int64), device)


@triton.jit
def anchor(pointer, KIND: tl.constexpr, offset, VECTOR: tl.constexpr):
    """A thread's pointers to four consecutive elements of type KIND at ``offset``: [threads, 4] for vectors, else [threads]."""
    at = pointer.to(tl.pointer_type(KIND)) + offset
    if VECTOR:
        at = at[:, None] + tl.arange(0, 4)[None, :]
    return at


@triton.jit
def split_four(x):
    """[threads, 4] to a tuple of four [threads]."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def join_four(x):
    """The inverse of :func:`split_four`."""
    return tl.reshape(tl.join(tl.join(x[0], x[2]), tl.join(x[1], x[3])), (x[0].shape[0], 4))


@triton.jit
def load_four(at, inside, count, VECTOR: tl.constexpr):
    """Four elements at an :func:`anchor`, as a tuple; those from ``count`` on and rows not ``inside`` are not read."""
    if VECTOR:  # count is 0 or 4
        return split_four(tl.load(at, mask=(inside & (count > 0))[:, None], other=0))
    else:
        return (
            tl.load(at, mask=inside & (count > 0), other=0),
            tl.load(at + 1, mask=inside & (count > 1), other=0),
            tl.load(at + 2, mask=inside & (count > 2), other=0),
            tl.load(at + 3, mask=inside & (count > 3), other=0),
        )


@triton.jit
def store_four(at, x, inside, count, VECTOR: tl.constexpr):
    """The counterpart of :func:`load_four`."""
    if VECTOR:
        tl.store(at, join_four(x), mask=(inside & (count > 0))[:, None])
    else:
        tl.store(at, x[0], mask=inside & (count > 0))
        tl.store(at + 1, x[1], mask=inside & (count > 1))
        tl.store(at + 2, x[2], mask=inside & (count > 2))
        tl.store(at + 3, x[3], mask=inside & (count > 3))


@triton.jit
def half_word(x, DTYPE: tl.constexpr):
    """The bits of ``x`` in the 16-bit DTYPE, as uint32."""
    return x.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def load_ids(at, count_n, count_k, ROW: tl.constexpr, VECTOR_K: tl.constexpr):
    """The ids of block row ROW of the thread's tile: a tuple of four, PADDING_ID beyond the matrix."""
    if VECTOR_K:
        inside = (count_n > ROW) & (count_k > 0)
        four = tl.load(at.to(tl.pointer_type(tl.uint32)), mask=inside, other=0xFFFFFFFF)
        return four & 255, (four >> 8) & 255, (four >> 16) & 255, four >> 24
    else:
        return (
            tl.load(at, mask=(count_n > ROW) & (count_k > 0), other=255).to(tl.uint32),
            tl.load(at + 1, mask=(count_n > ROW) & (count_k > 1), other=255).to(tl.uint32),
            tl.load(at + 2, mask=(count_n > ROW) & (count_k > 2), other=255).to(tl.uint32),
            tl.load(at + 3, mask=(count_n > ROW) & (count_k > 3), other=255).to(tl.uint32),
        )


@triton.jit
def row_words(at, facts, inside, count_k, R: tl.constexpr, LINKS: tl.constexpr, CONVERT: tl.constexpr, DTYPE: tl.constexpr,
              VECTOR_K: tl.constexpr):  # fmt: skip
    """The four words (2:4 pairs of half words) of row R of a block row of the thread's tile, whose values begin ``at``."""
    if LINKS == 1:
        links = load_four(at, inside, count_k, VECTOR_K)
        words = ()
        for j in tl.static_range(4):
            column = (facts[j] >> (48 + 4 * R)).to(tl.uint32)
            words = words + (half_word(links[j], DTYPE) << ((column & 1) << 4),)
        return words
    elif CONVERT:
        a = load_four(at, inside, 2 * count_k, VECTOR_K)
        b = load_four(at + 4, inside, 2 * count_k - 4, VECTOR_K)
        return (
            half_word(a[0], DTYPE) | half_word(a[1], DTYPE) << 16,
            half_word(a[2], DTYPE) | half_word(a[3], DTYPE) << 16,
            half_word(b[0], DTYPE) | half_word(b[1], DTYPE) << 16,
            half_word(b[2], DTYPE) | half_word(b[3], DTYPE) << 16,
        )
    else:
        return load_four(at, inside, count_k, VECTOR_K)


@triton.jit
def transposed_word(low, high, facts, C: tl.constexpr, LINKS: tl.constexpr):
    """Word of column C of a block whose rows 0, 1 are the 64-bit ``low`` and rows 2, 3 ``high`` (half word s is slot s)."""
    slots = (facts >> 32).to(tl.uint32)
    if LINKS == 2:
        first = tl.where((slots & (4 << (8 * C))) != 0, high, low) >> (((slots >> (8 * C)) & 3) << 4)
        second = tl.where((slots & (64 << (8 * C))) != 0, high, low) >> (((slots >> (8 * C + 4)) & 3) << 4)
        return (first.to(tl.uint32) & 0xFFFF) | (second.to(tl.uint32) << 16)
    else:  # one of the two half words of a row is the link, the other zero: their union is the link
        row = slots >> (4 * C)
        word = (tl.where((row & 2) != 0, high, low) >> ((row & 1) << 5)).to(tl.uint32)
        return ((word | word >> 16) & 0xFFFF) << ((row & 1) << 4)


@triton.jit
def transposed_nibbles(m0, m1, m2, m3):
    """Nibble j of output i is nibble i of m_j, in each 16-bit half."""
    t = ((m0 >> 4) ^ m1) & 0x0F0F0F0F
    m1 ^= t
    m0 ^= t << 4
    t = ((m2 >> 4) ^ m3) & 0x0F0F0F0F
    m3 ^= t
    m2 ^= t << 4
    t = ((m0 >> 8) ^ m2) & 0x00FF00FF
    m2 ^= t
    m0 ^= t << 8
    t = ((m1 >> 8) ^ m3) & 0x00FF00FF
    m3 ^= t
    m1 ^= t << 8
    return m0, m1, m2, m3


@triton.jit
def store_metadata(meta_ptr, facts, tile_n, tile_k, block_rows, block_columns, TRANSPOSED: tl.constexpr):
    """The 8 metadata words of the thread's tile, rows g and g + 8 for g = 0 to 7; ``facts[i][j]`` of its 4 x 4 blocks."""
    steps = (block_columns + 15) // 16
    slabs = (block_rows + 127) // 128 * 8
    at = ((tile_n // 4).to(tl.int64) * steps + tile_k // 4) * 128 + tile_n % 4 * 32 + tile_k % 4
    inside = (tile_n < 4 * slabs) & (tile_k < 4 * steps)
    for i in tl.static_range(2):
        m = ()
        for j in tl.static_range(4):
            if TRANSPOSED:
                upper, lower = facts[j][i].to(tl.uint32), facts[j][i + 2].to(tl.uint32)
                m = m + ((upper >> 16) | (lower & 0xFFFF0000),)
            else:
                upper, lower = facts[i][j].to(tl.uint32), facts[i + 2][j].to(tl.uint32)
                m = m + ((upper & 0xFFFF) | (lower << 16),)
        words = transposed_nibbles(m[0], m[1], m[2], m[3])
        for r in tl.static_range(4):
            tl.store(meta_ptr + at + 4 * (4 * i + r), words[r].to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def store_transposed(operand_t_ptr, words, facts, tile_n, tile_k, block_rows, count_n, count_k, LINKS: tl.constexpr,
                     VECTOR_N: tl.constexpr):  # fmt: skip
    """The thread's tile of the transposed operand; ``words[i][r][j]`` of its block rows, rows and block columns."""
    at = anchor(operand_t_ptr, tl.uint32, (16 * tile_k).to(tl.int64) * block_rows + 4 * tile_n, VECTOR_N)
    for j in tl.static_range(4):
        low, high = (), ()
        for i in tl.static_range(4):
            w = words[i]
            low = low + (w[0][j].to(tl.uint64) | w[1][j].to(tl.uint64) << 32,)
            high = high + (w[2][j].to(tl.uint64) | w[3][j].to(tl.uint64) << 32,)
        for c in tl.static_range(4):
            column = ()
            for i in tl.static_range(4):
                column = column + (transposed_word(low[i], high[i], facts[i][j], c, LINKS),)
            store_four(at + (4 * j + c) * block_rows, column, count_k > j, count_n, VECTOR_N)


@triton.jit
def pack_tiles(values_ptr, ids_ptr, table_ptr, operand_ptr, meta_ptr, operand_t_ptr, meta_t_ptr,
               program, block_rows, block_columns, programs_k,
               LINKS: tl.constexpr, HAS_OPERAND: tl.constexpr, VECTOR_N: tl.constexpr, VECTOR_K: tl.constexpr,
               LANES_N: tl.constexpr, LANES_K: tl.constexpr):  # fmt: skip
    """The part of a packing that is program number ``program``'s; VECTOR_N, VECTOR_K: block_rows (block_columns) is a multiple of 4."""
    DTYPE: tl.constexpr = operand_t_ptr.dtype.element_ty
    CONVERT: tl.constexpr = values_ptr.dtype.element_ty != DTYPE
    lane = tl.arange(0, LANES_N * LANES_K)
    tile_n = program // programs_k * LANES_N + lane // LANES_K
    tile_k = program % programs_k * LANES_K + lane % LANES_K
    count_n = block_rows - 4 * tile_n
    count_k = block_columns - 4 * tile_k
    if VECTOR_N:
        block_rows = block_rows // 4 * 4  # tells the compiler that rows start on 16-byte boundaries
    if VECTOR_K:
        block_columns = block_columns // 4 * 4

    facts, words = (), ()
    at = ids_ptr + (4 * tile_n).to(tl.int64) * block_columns + 4 * tile_k
    for i in tl.static_range(4):
        ids = load_ids(at + i * block_columns, count_n, count_k, i, VECTOR_K)
        facts = facts + ((tl.load(table_ptr + ids[0]), tl.load(table_ptr + ids[1]),
                          tl.load(table_ptr + ids[2]), tl.load(table_ptr + ids[3])),)  # fmt: skip
    offset = (16 * tile_n).to(tl.int64) * block_columns + 4 * tile_k  # of the tile, in groups of four columns
    # The elements of values are words of two links where they are copied as they are.
    KIND: tl.constexpr = values_ptr.dtype.element_ty if CONVERT or LINKS == 1 else tl.uint32
    PER_GROUP: tl.constexpr = 2 if CONVERT and LINKS == 2 else 1
    source = anchor(values_ptr, KIND, offset * PER_GROUP, VECTOR_K)
    if HAS_OPERAND:
        target = anchor(operand_ptr, tl.uint32, offset, VECTOR_K)
    for i in tl.static_range(4):
        rows = ()
        for r in tl.static_range(4):
            step = (4 * i + r) * block_columns
            four = row_words(source + step * PER_GROUP, facts[i], count_n > i, count_k, r, LINKS, CONVERT, DTYPE, VECTOR_K)
            if HAS_OPERAND:
                store_four(target + step, four, count_n > i, count_k, VECTOR_K)
            rows = rows + (four,)
        words = words + (rows,)
    store_transposed(operand_t_ptr, words, facts, tile_n, tile_k, block_rows, count_n, count_k, LINKS, VECTOR_N)
    store_metadata(meta_ptr, facts, tile_n, tile_k, block_rows, block_columns, False)
    store_metadata(meta_t_ptr, facts, tile_k, tile_n, block_columns, block_rows, True)


@triton.jit
def pack_operands_kernel(values_ptr, ids_ptr, table_ptr, operand_ptr, meta_ptr, operand_t_ptr, meta_t_ptr,
                         block_rows, block_columns, programs_k,
                         LINKS: tl.constexpr, HAS_OPERAND: tl.constexpr, VECTOR_N: tl.constexpr, VECTOR_K: tl.constexpr,
                         LANES_N: tl.constexpr, LANES_K: tl.constexpr):  # fmt: skip
    pack_tiles(values_ptr, ids_ptr, table_ptr, operand_ptr, meta_ptr, operand_t_ptr, meta_t_ptr,
               tl.program_id(0), block_rows, block_columns, programs_k, LINKS, HAS_OPERAND, VECTOR_N, VECTOR_K, LANES_N, LANES_K)


PACK_OPERANDS = _triton.TritonKernel(pack_operands_kernel)


def tiling(block_rows: int, block_columns: int, lanes_n: int, lanes_k: int) -> tuple[int, int]:
    """(programs, programs along K) that cover the matrix with the padding of both metadata orders."""
    tiles_n, tiles_k = (-(-blocks * BLOCK // ROW_PADDING) * ROW_PADDING // TILE for blocks in (block_rows, block_columns))
    programs_k = -(-tiles_k // lanes_k)
    return -(-tiles_n // lanes_n) * programs_k, programs_k


def lanes() -> tuple[int, int]:
    """(LANES_N, LANES_K) of a program: one warp, as fast as four at every measured size and better spread at the small ones."""
    return (32, 32) if _triton.interpreting() else (4, 8)  # the interpreter pays per program, not per element


def _launch(
    values: torch.Tensor,
    ids: torch.Tensor,
    n: int,
    operand: torch.Tensor | None,
    meta: torch.Tensor,
    operand_t: torch.Tensor,
    meta_t: torch.Tensor,
    shape: tuple[int, int] | None,
) -> tuple[int, tuple[Any, ...], tuple[tuple[str, Any], ...], int]:
    """The arguments of :meth:`TritonKernel.launch`."""
    block_rows, block_columns = ids.shape
    lanes_n, lanes_k = lanes() if shape is None else shape
    programs, programs_k = tiling(block_rows, block_columns, lanes_n, lanes_k)
    constants = (
        ("LINKS", n),
        ("HAS_OPERAND", operand is not None),
        ("VECTOR_N", block_rows % 4 == 0),
        ("VECTOR_K", block_columns % 4 == 0),
        ("LANES_N", lanes_n),
        ("LANES_K", lanes_k),
    )
    arguments = (
        _triton.readable(values), _triton.readable(ids), block_table(n, ids.device), operand, meta, operand_t, meta_t,
        block_rows, block_columns, programs_k,
    )  # fmt: skip
    return programs, arguments, constants, lanes_n * lanes_k // 32


def pack_operands_(*args: Any, shape: tuple[int, int] | None = None) -> None:
    """The reference's function; ``shape`` overrides (LANES_N, LANES_K)."""
    PACK_OPERANDS.launch(*_launch(*args, shape))


class Packing:
    """The route of a packing of contiguous tensors on 16-byte boundaries."""

    __slots__ = ("device", "launch")

    def __init__(self, values: torch.Tensor, *rest: Any) -> None:
        self.device, self.launch = values.get_device(), PACK_OPERANDS.prepare(*_launch(values, *rest, None))

    def __call__(
        self, values: torch.Tensor, ids: torch.Tensor, n: int, operand: torch.Tensor | None, meta: torch.Tensor, operand_t: torch.Tensor,
        meta_t: torch.Tensor,
    ) -> None:  # fmt: skip
        launch = self.launch
        at = launch.values
        at[0], at[1], at[3] = values.data_ptr(), ids.data_ptr(), 0 if operand is None else operand.data_ptr()
        at[4], at[5], at[6] = meta.data_ptr(), operand_t.data_ptr(), meta_t.data_ptr()
        launch.run(torch._C._cuda_getCurrentRawStream(self.device))
