"""prune_pack_ in Triton: a dense matrix to ids, values and, if wanted, both operands with their metadata, in one kernel.

A thread owns 16 x 16 elements, as in :mod:`..pack.triton_pack`. It selects the patterns of its four block rows in turn, then
reads its own elements once more, now out of the L1 or L2 cache, and writes everything that follows from the ids: there is no
mask, no scratch and no exchange between threads. Traffic to memory: N K elements read; ids, values and operands written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...patterns import BLOCK
from .. import _triton
from ..pack.triton_compress import link_column, pick
from ..pack.triton_pack import block_table, half_word, lanes, store_four, store_metadata, store_transposed, tiling
from .triton_prune import best_of_groups, load_groups


@triton.jit
def _select(dense_ptr, block_row, block, block_columns, inside, count_k, LINKS: tl.constexpr, SQUARE: tl.constexpr,
            VECTOR_K: tl.constexpr):  # fmt: skip
    """The ids of four neighbouring blocks as the bytes of a uint32; 255 where there is no block."""
    rows = ()
    for r in tl.static_range(4):
        rows = rows + (load_groups(dense_ptr, 4 * block_row + r, block, block_columns, inside, count_k, 4, VECTOR_K),)
    four = tl.zeros_like(block_row).to(tl.uint32)
    for j in tl.static_range(4):
        best = best_of_groups(rows, j, dense_ptr.dtype.element_ty, SQUARE, LINKS)
        four |= tl.where(inside & (count_k > j), best, 255).to(tl.uint32) << (8 * j)
    return four


@triton.jit
def _link(group, facts, R: tl.constexpr, J: tl.constexpr, LINKS: tl.constexpr, DTYPE: tl.constexpr):
    """Link J of row R of a block: a float32 of a group of four, or the 16 bits (as uint32) of a group of two words."""
    column = link_column(facts, R, J, LINKS)
    if DTYPE is tl.float32:
        return pick(group, column)
    else:
        word = tl.where((column & 2) != 0, group[1], group[0])
        return (word >> ((column & 1) << 4)) & 0xFFFF


@triton.jit
def _converted(link, DTYPE: tl.constexpr, OUT: tl.constexpr):
    """The bits of a link of :func:`_link` in the 16-bit OUT."""
    if DTYPE == OUT:
        return link
    elif DTYPE is tl.float32:
        return half_word(link, OUT)
    else:
        return half_word(link.to(tl.uint16).to(DTYPE, bitcast=True), OUT)


@triton.jit
def _store_values(values_ptr, row, block, block_columns, first, second, inside, count_k, LINKS: tl.constexpr,
                  VECTOR_K: tl.constexpr):  # fmt: skip
    """The values of a row of four blocks: ``first[j]``, for 2:4 also ``second[j]``, of block j."""
    at = row.to(tl.int64) * block_columns + block
    if values_ptr.dtype.element_ty == tl.float32:
        if LINKS == 2:
            left = (first[0], second[0], first[1], second[1])
            right = (first[2], second[2], first[3], second[3])
            store_four(values_ptr + 2 * at, left, inside, 2 * count_k, VECTOR_K)
            store_four(values_ptr + 2 * at + 4, right, inside, 2 * count_k - 4, VECTOR_K)
        else:
            store_four(values_ptr + at, first, inside, count_k, VECTOR_K)
    elif LINKS == 2:
        pairs = ()
        for j in tl.static_range(4):
            pairs = pairs + (first[j] | second[j] << 16,)
        store_four(values_ptr.to(tl.pointer_type(tl.uint32)) + at, pairs, inside, count_k, VECTOR_K)
    else:
        halves = (first[0].to(tl.uint16), first[1].to(tl.uint16), first[2].to(tl.uint16), first[3].to(tl.uint16))
        store_four(values_ptr.to(tl.pointer_type(tl.uint16)) + at, halves, inside, count_k, VECTOR_K)


@triton.jit
def prune_pack_kernel(dense_ptr, ids_ptr, values_ptr, table_ptr, operand_ptr, meta_ptr, operand_t_ptr, meta_t_ptr,
                      block_rows, block_columns, programs_k,
                      LINKS: tl.constexpr, SQUARE: tl.constexpr, HAS_OPERAND: tl.constexpr, HAS_OPERANDS: tl.constexpr,
                      VECTOR_N: tl.constexpr, VECTOR_K: tl.constexpr, LANES_N: tl.constexpr, LANES_K: tl.constexpr):  # fmt: skip
    DTYPE: tl.constexpr = dense_ptr.dtype.element_ty
    OUT: tl.constexpr = operand_t_ptr.dtype.element_ty if HAS_OPERANDS else None
    program = tl.program_id(0)
    lane = tl.arange(0, LANES_N * LANES_K)
    tile_n = program // programs_k * LANES_N + lane // LANES_K
    tile_k = program % programs_k * LANES_K + lane % LANES_K
    count_n = block_rows - 4 * tile_n
    count_k = block_columns - 4 * tile_k
    if VECTOR_N:
        block_rows = block_rows // 4 * 4  # tells the compiler that rows start on 16-byte boundaries
    if VECTOR_K:
        block_columns = block_columns // 4 * 4

    # A loop, not four copies: the selection is long, and copies of it would not fit the instruction cache.
    ids0 = tl.zeros_like(lane).to(tl.uint32)
    ids1, ids2, ids3 = ids0, ids0, ids0
    for i in range(4):
        block_row = 4 * tile_n + i
        inside = count_n > i
        four = _select(dense_ptr, block_row, 4 * tile_k, block_columns, inside, count_k, LINKS, SQUARE, VECTOR_K)
        at = ids_ptr + block_row.to(tl.int64) * block_columns + 4 * tile_k
        if VECTOR_K:
            tl.store(at.to(tl.pointer_type(tl.uint32)), four, mask=inside & (count_k > 0))
        else:
            bytes_of_four = (four.to(tl.uint8), (four >> 8).to(tl.uint8), (four >> 16).to(tl.uint8), (four >> 24).to(tl.uint8))
            store_four(at, bytes_of_four, inside, count_k, False)
        ids0, ids1, ids2, ids3 = ids1, ids2, ids3, four
    ids = (ids0, ids1, ids2, ids3)

    facts, words = (), ()
    for i in tl.static_range(4):
        facts = facts + ((tl.load(table_ptr + (ids[i] & 255)), tl.load(table_ptr + ((ids[i] >> 8) & 255)),
                          tl.load(table_ptr + ((ids[i] >> 16) & 255)), tl.load(table_ptr + (ids[i] >> 24))),)  # fmt: skip
    for i in tl.static_range(4):
        row_words = ()
        for r in tl.static_range(4):
            row = 16 * tile_n + (4 * i + r)
            groups = load_groups(dense_ptr, row, 4 * tile_k, block_columns, count_n > i, count_k, 4, VECTOR_K)
            first, second, pairs = (), (), ()
            for j in tl.static_range(4):
                first = first + (_link(groups[j], facts[i][j], r, 0, LINKS, DTYPE),)
                if LINKS == 2:
                    second = second + (_link(groups[j], facts[i][j], r, 1, LINKS, DTYPE),)
                if HAS_OPERANDS:
                    pair = _converted(first[j], DTYPE, OUT)
                    if LINKS == 2:
                        pair |= _converted(second[j], DTYPE, OUT) << 16
                    else:
                        pair <<= ((link_column(facts[i][j], r, 0, LINKS) & 1) << 4).to(tl.uint32)
                    pairs = pairs + (pair,)
            _store_values(values_ptr, row, 4 * tile_k, block_columns, first, second, count_n > i, count_k, LINKS, VECTOR_K)
            if HAS_OPERAND:
                at = operand_ptr.to(tl.pointer_type(tl.uint32)) + row.to(tl.int64) * block_columns + 4 * tile_k
                store_four(at, pairs, count_n > i, count_k, VECTOR_K)
            row_words = row_words + (pairs,)
        words = words + (row_words,)
    if HAS_OPERANDS:
        store_transposed(operand_t_ptr, words, facts, tile_n, tile_k, block_rows, count_n, count_k, LINKS, VECTOR_N)
        store_metadata(meta_ptr, facts, tile_n, tile_k, block_rows, block_columns, False)
        store_metadata(meta_t_ptr, facts, tile_k, tile_n, block_columns, block_rows, True)


PRUNE_PACK = _triton.TritonKernel(prune_pack_kernel)


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
    shape: tuple[int, int] | None = None,
) -> None:
    """The reference's function; ``shape`` overrides (LANES_N, LANES_K)."""
    block_rows, block_columns = dense.shape[0] // BLOCK, dense.shape[1] // BLOCK
    lanes_n, lanes_k = lanes(block_rows, block_columns) if shape is None else shape
    programs, programs_k = tiling(block_rows, block_columns, lanes_n, lanes_k)
    constants = (
        ("LINKS", n),
        ("SQUARE", score == "square"),
        ("HAS_OPERAND", operand is not None),
        ("HAS_OPERANDS", operand_t is not None),
        ("VECTOR_N", block_rows % 4 == 0),
        ("VECTOR_K", block_columns % 4 == 0),
        ("LANES_N", lanes_n),
        ("LANES_K", lanes_k),
    )
    arguments = (
        _triton.readable(dense), ids, values, block_table(n, dense.device), operand, meta, operand_t, meta_t,
        block_rows, block_columns, programs_k,
    )  # fmt: skip
    PRUNE_PACK.launch(programs, arguments, constants, lanes_n * lanes_k // 32)
