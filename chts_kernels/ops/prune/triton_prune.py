"""prune and prune_pack_ in Triton: a dense matrix to the exact best pattern ids, and to the values there, in one read of it.

A thread owns BLOCKS neighbouring 4x4 blocks of a block row and selects in registers (:mod:`.triton_select`, about 300
instructions a 2:4 block). Traffic: N K elements read, N K / 16 ids and N K n / 4 values written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...patterns import BLOCK
from .. import _triton
from ..pack.triton_compress import link_column
from ..pack.triton_pack import block_table, pack_operands_, split_four
from ..spmm.sm90_launch import multiprocessors
from .triton_select import best_pattern, score_of


@triton.jit
def anchor_pairs(dense_ptr, offset, PAIRS: tl.constexpr):
    """[threads, PAIRS] pointers to neighbouring pairs of elements from pair ``offset`` of the matrix on; a pair is read as one
    unsigned integer."""
    if dense_ptr.dtype.element_ty is tl.float32:
        return dense_ptr.to(tl.pointer_type(tl.uint64)) + offset[:, None] + tl.arange(0, PAIRS)[None, :]
    else:
        return dense_ptr.to(tl.pointer_type(tl.uint32)) + offset[:, None] + tl.arange(0, PAIRS)[None, :]


@triton.jit
def halves_of(pair):
    """The bits of the two elements of a pair, as uint32."""
    if pair.dtype is tl.uint64:
        return pair.to(tl.uint32), (pair >> 32).to(tl.uint32)
    else:
        return pair & 0xFFFF, pair >> 16


@triton.jit
def as_float(bits, DTYPE: tl.constexpr):
    """The element of DTYPE with these bits, in float32."""
    if DTYPE is tl.float32:
        return bits.to(tl.float32, bitcast=True)
    elif DTYPE is tl.bfloat16:
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def place_of(tile, tiles, programs_k, block_rows, block_columns, BLOCKS: tl.constexpr, LANES_N: tl.constexpr, LANES_K: tl.constexpr):
    """Of every thread in a tile: its first block; the group of four columns that this block starts at, int64; whether there is one."""
    lane = tl.arange(0, LANES_N * LANES_K)
    row = tile // programs_k * LANES_N + lane // LANES_K
    column = (tile % programs_k * LANES_K + lane % LANES_K) * BLOCKS
    group = (4 * row).to(tl.int64) * block_columns + column
    return row * block_columns + column, group, (row < block_rows) & (column < block_columns) & (tile < tiles)


@triton.jit
def load_rows(dense_ptr, group, inside, block_columns, BLOCKS: tl.constexpr):
    """The four rows of the blocks of every thread, [threads, 2 BLOCKS] pairs each."""
    at = anchor_pairs(dense_ptr, 2 * group, 2 * BLOCKS)
    return (
        tl.load(at, mask=inside[:, None], other=0),
        tl.load(at + 2 * block_columns, mask=inside[:, None], other=0),
        tl.load(at + 4 * block_columns, mask=inside[:, None], other=0),
        tl.load(at + 6 * block_columns, mask=inside[:, None], other=0),
    )


@triton.jit
def pairs_of(x, BLOCKS: tl.constexpr):
    """``rows[2 b]`` and ``[2 b + 1]`` are the pairs of block b, of a row of :func:`load_rows`."""
    return tl.split(x) if BLOCKS == 1 else split_four(x)


@triton.jit
def best_of_block(rows, B: tl.constexpr, DTYPE: tl.constexpr, SQUARE: tl.constexpr, LINKS: tl.constexpr):
    """int32 id of the best pattern of block B of :func:`pairs_of`."""
    scores = ()
    for r in tl.static_range(4):
        for p in tl.static_range(2):
            pair = rows[r][2 * B + p]
            low, high = halves_of(pair)
            scores = scores + (score_of(as_float(low, DTYPE), SQUARE), score_of(as_float(high, DTYPE), SQUARE))
    return best_pattern(scores, None, LINKS, False)


@triton.jit
def link_of_row(first, second, column):
    """The bits of element ``column`` of a row of a block, given as its two pairs."""
    low, high = halves_of(tl.where((column & 2) != 0, second, first))
    return tl.where((column & 1) != 0, high, low)


@triton.jit
def store_links(values_ptr, group, facts, rows, inside, step, B: tl.constexpr, LINKS: tl.constexpr):
    """The values of block B of :func:`pairs_of`; row r goes to group ``group + r step`` of ``LINKS`` values."""
    DTYPE: tl.constexpr = values_ptr.dtype.element_ty
    for r in tl.static_range(4):
        at = group + r * step
        first = link_of_row(rows[r][2 * B], rows[r][2 * B + 1], link_column(facts, r, 0, LINKS))
        if LINKS == 1:
            if DTYPE is tl.float32:
                tl.store(values_ptr.to(tl.pointer_type(tl.uint32)) + at, first, mask=inside)
            else:
                tl.store(values_ptr.to(tl.pointer_type(tl.uint16)) + at, first.to(tl.uint16), mask=inside)
        else:
            second = link_of_row(rows[r][2 * B], rows[r][2 * B + 1], link_column(facts, r, 1, LINKS))
            if DTYPE is tl.float32:
                tl.store(values_ptr.to(tl.pointer_type(tl.uint64)) + at, first.to(tl.uint64) | second.to(tl.uint64) << 32, mask=inside)
            else:
                tl.store(values_ptr.to(tl.pointer_type(tl.uint32)) + at, first | second << 16, mask=inside)


@triton.jit
def select_and_store(x, ids_ptr, values_ptr, table_ptr, block, group, inside, block_columns, LINKS: tl.constexpr, SQUARE: tl.constexpr,
                     HAS_VALUES: tl.constexpr, BLOCKS: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Ids and values of the blocks at :func:`place_of`, whose rows are ``x``."""
    rows = (pairs_of(x[0], BLOCKS), pairs_of(x[1], BLOCKS), pairs_of(x[2], BLOCKS), pairs_of(x[3], BLOCKS))
    for b in tl.static_range(BLOCKS):
        best = best_of_block(rows, b, DTYPE, SQUARE, LINKS)
        tl.store(ids_ptr + block + b, best.to(tl.uint8), mask=inside)
        if HAS_VALUES:
            store_links(values_ptr, group + b, tl.load(table_ptr + best), rows, inside, block_columns, b, LINKS)


@triton.jit
def prune_kernel(dense_ptr, ids_ptr, values_ptr, table_ptr, block_rows, block_columns, programs_k, tiles,
                 LINKS: tl.constexpr, SQUARE: tl.constexpr, HAS_VALUES: tl.constexpr, BLOCKS: tl.constexpr,
                 LANES_N: tl.constexpr, LANES_K: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
    """A tile is what LANES_N x LANES_K threads take. With AHEAD a program takes every num_programs-th one, and loads the next before
    it selects: programs start together, so that without it memory and arithmetic take turns. Else a program takes one."""
    DTYPE: tl.constexpr = dense_ptr.dtype.element_ty
    block_columns = block_columns // BLOCKS * BLOCKS  # tells the compiler how rows are aligned
    tile = tl.program_id(0)
    block, group, inside = place_of(tile, tiles, programs_k, block_rows, block_columns, BLOCKS, LANES_N, LANES_K)
    x0, x1, x2, x3 = load_rows(dense_ptr, group, inside, block_columns, BLOCKS)
    if AHEAD:
        step = tl.num_programs(0)
        while tile < tiles:
            tile += step
            next_block, next_group, there = place_of(tile, tiles, programs_k, block_rows, block_columns, BLOCKS, LANES_N, LANES_K)
            y0, y1, y2, y3 = load_rows(dense_ptr, next_group, there, block_columns, BLOCKS)
            select_and_store((x0, x1, x2, x3), ids_ptr, values_ptr, table_ptr, block, group, inside, block_columns, LINKS, SQUARE,
                             HAS_VALUES, BLOCKS, DTYPE)
            x0, x1, x2, x3 = y0, y1, y2, y3
            block, group, inside = next_block, next_group, there
    else:
        select_and_store((x0, x1, x2, x3), ids_ptr, values_ptr, table_ptr, block, group, inside, block_columns, LINKS, SQUARE,
                         HAS_VALUES, BLOCKS, DTYPE)


PRUNE = _triton.TritonKernel(prune_kernel)
AHEAD_WARPS = 32
"""Warps of a multiprocessor that share the tiles where a program loads ahead. Half of them run at a time; measured: 12 are 4 % slower
and 16 are 2 %. Only two 2:4 blocks a thread take long enough: 1:4 and float32 lose 3-4 % by it."""


def lanes(block_rows: int, block_columns: int) -> tuple[int, int, int]:
    """(LANES_N, LANES_K, BLOCKS) of a program. Measured on one H100: two blocks a thread pay from half a million blocks on."""
    lanes_k = 32 if block_columns > 8 else 8
    return 128 // lanes_k, lanes_k, 2 if block_columns % 2 == 0 and block_rows * block_columns >= 1 << 19 else 1


def _launch(
    dense: torch.Tensor, n: int, score: str, ids: torch.Tensor, values: torch.Tensor | None, shape: tuple[int, int, int] | None
) -> None:
    """Fill ``ids`` and, unless None, ``values``."""
    block_rows, block_columns = ids.shape
    lanes_n, lanes_k, blocks = lanes(block_rows, block_columns) if shape is None else shape
    if dense.dtype == torch.float32:
        blocks = 1  # a block's row is a vector already
    programs_k = -(-block_columns // (lanes_k * blocks))
    tiles = -(-block_rows // lanes_n) * programs_k
    warps = lanes_n * lanes_k // 32
    ahead = n == 2 and blocks == 2
    constants = (("LINKS", n), ("SQUARE", score == "square"), ("HAS_VALUES", values is not None), ("BLOCKS", blocks),
                 ("LANES_N", lanes_n), ("LANES_K", lanes_k), ("AHEAD", ahead))  # fmt: skip
    table = None if values is None else block_table(n, ids.device)
    arguments = (_triton.readable(dense), ids, values, table, block_rows, block_columns, programs_k, tiles)
    programs = tiles
    if ahead:
        programs = min(tiles, multiprocessors(dense.get_device()) * AHEAD_WARPS // warps if dense.is_cuda else 3)
    PRUNE.launch(programs, arguments, constants, warps)


def prune(dense: torch.Tensor, n: int, score: str, shape: tuple[int, int, int] | None = None) -> torch.Tensor:
    """The reference's function; ``shape`` overrides (LANES_N, LANES_K, BLOCKS), BLOCKS 1, or 2 for an even K / 4."""
    ids = torch.empty(dense.shape[0] // BLOCK, dense.shape[1] // BLOCK, dtype=torch.uint8, device=dense.device)
    _launch(dense, n, score, ids, None, shape)
    return ids


def prune_pack_(
    dense: torch.Tensor,
    n: int,
    score: str,
    ids: torch.Tensor,
    values: torch.Tensor,
    operand: torch.Tensor | None,
    meta: torch.Tensor | None,
    operand_t: torch.Tensor | None,
    meta_t: torch.Tensor | None,
    shape: tuple[int, int, int] | None = None,
) -> None:
    """The reference's function; ``shape`` as in :func:`prune`.

    Two launches, ids with values in one read of ``dense``, then the operands, whose inputs are half the size and mostly still in the
    L2 cache. One kernel for everything took 45 us at 4096 x 4096 (its 140 registers leave too few threads to hide the memory) and 16 s
    to compile."""
    _launch(dense, n, score, ids, values, shape)
    if operand_t is not None:
        pack_operands_(values, ids, n, operand, meta, operand_t, meta_t)
