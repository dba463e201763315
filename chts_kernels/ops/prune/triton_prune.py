"""prune in Triton: a dense matrix to the exact best pattern ids, one read of the matrix.

A thread owns BLOCKS neighbouring 4x4 blocks of a block row and selects in registers (:mod:`.triton_select`, about 300
instructions a 2:4 block). Traffic: N K elements read, N K / 16 ids written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...patterns import BLOCK
from .. import _triton
from .triton_select import best_pattern, score_of


@triton.jit
def _split_four(x):
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def load_groups(dense_ptr, row, block, block_columns, inside, count, BLOCKS: tl.constexpr, VECTOR: tl.constexpr):
    """A row of ``BLOCKS`` blocks from block column ``block`` on, as a tuple of one group of four elements a block.

    A group is four float32 tensors, or two uint32 words of two 16-bit elements each. Blocks from ``count`` on and rows not
    ``inside`` read as zeros. VECTOR: count is 0 or BLOCKS.
    """
    groups = ()
    at = row.to(tl.int64) * block_columns + block
    if dense_ptr.dtype.element_ty == tl.float32:
        for j in tl.static_range(BLOCKS):
            mask = (inside & (count > j))[:, None]
            x = tl.load(dense_ptr + 4 * (at[:, None] + j) + tl.arange(0, 4)[None, :], mask=mask, other=0)
            groups = groups + (_split_four(x),)
    else:
        words_ptr = dense_ptr.to(tl.pointer_type(tl.uint32))
        if VECTOR and BLOCKS > 1:
            for j in tl.static_range(BLOCKS // 2):
                mask = (inside & (count > 2 * j))[:, None]
                w = _split_four(tl.load(words_ptr + 2 * at[:, None] + (4 * j + tl.arange(0, 4)[None, :]), mask=mask, other=0))
                groups = groups + ((w[0], w[1]), (w[2], w[3]))
        else:
            for j in tl.static_range(BLOCKS):
                mask = (inside & (count > j))[:, None]
                w = tl.load(words_ptr + 2 * (at[:, None] + j) + tl.arange(0, 2)[None, :], mask=mask, other=0)
                groups = groups + (tl.split(w),)
    return groups


@triton.jit
def scores_of_group(group, DTYPE: tl.constexpr, SQUARE: tl.constexpr):
    """The four scores of a group of :func:`load_groups`."""
    if DTYPE is tl.float32:
        x = group
    elif DTYPE is tl.bfloat16:
        x = (
            (group[0] << 16).to(tl.float32, bitcast=True),
            (group[0] & 0xFFFF0000).to(tl.float32, bitcast=True),
            (group[1] << 16).to(tl.float32, bitcast=True),
            (group[1] & 0xFFFF0000).to(tl.float32, bitcast=True),
        )
    else:
        x = (
            group[0].to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32),
            (group[0] >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32),
            group[1].to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32),
            (group[1] >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32),
        )
    return score_of(x[0], SQUARE), score_of(x[1], SQUARE), score_of(x[2], SQUARE), score_of(x[3], SQUARE)


@triton.jit
def best_of_groups(rows, J: tl.constexpr, DTYPE: tl.constexpr, SQUARE: tl.constexpr, LINKS: tl.constexpr):
    """int32 id of the best pattern of block J of four rows of groups."""
    scores = (
        scores_of_group(rows[0][J], DTYPE, SQUARE)
        + scores_of_group(rows[1][J], DTYPE, SQUARE)
        + scores_of_group(rows[2][J], DTYPE, SQUARE)
        + scores_of_group(rows[3][J], DTYPE, SQUARE)
    )
    return best_pattern(scores, None, LINKS, False)


@triton.jit
def prune_kernel(dense_ptr, ids_ptr, block_rows, block_columns, programs_k,
                 LINKS: tl.constexpr, SQUARE: tl.constexpr, BLOCKS: tl.constexpr,
                 LANES_N: tl.constexpr, LANES_K: tl.constexpr):  # fmt: skip
    DTYPE: tl.constexpr = dense_ptr.dtype.element_ty
    if BLOCKS > 1:
        block_columns = block_columns // BLOCKS * BLOCKS  # tells the compiler how rows are aligned
    lane = tl.arange(0, LANES_N * LANES_K)
    block_row = tl.program_id(0) // programs_k * LANES_N + lane // LANES_K
    block = (tl.program_id(0) % programs_k * LANES_K + lane % LANES_K) * BLOCKS
    inside = block_row < block_rows
    count = block_columns - block
    rows = ()
    for r in tl.static_range(4):
        rows = rows + (load_groups(dense_ptr, 4 * block_row + r, block, block_columns, inside, count, BLOCKS, True),)
    at = ids_ptr + block_row.to(tl.int64) * block_columns + block
    for j in tl.static_range(BLOCKS):
        best = best_of_groups(rows, j, DTYPE, SQUARE, LINKS)
        tl.store(at + j, best.to(tl.uint8), mask=inside & (count > j))


PRUNE = _triton.TritonKernel(prune_kernel)


def lanes(block_columns: int) -> tuple[int, int, int]:
    """(LANES_N, LANES_K, BLOCKS) of a program."""
    lanes_k = 32 if block_columns > 8 else 8
    return 128 // lanes_k, lanes_k, 1


def prune(dense: torch.Tensor, n: int, score: str, shape: tuple[int, int, int] | None = None) -> torch.Tensor:
    """The reference's function; ``shape`` overrides (LANES_N, LANES_K, BLOCKS), BLOCKS 1 or a divisor 2 or 4 of K / 4."""
    block_rows, block_columns = dense.shape[0] // BLOCK, dense.shape[1] // BLOCK
    lanes_n, lanes_k, blocks = lanes(block_columns) if shape is None else shape
    programs_k = -(-block_columns // (lanes_k * blocks))
    ids = torch.empty(block_rows, block_columns, dtype=torch.uint8, device=dense.device)
    constants = (("LINKS", n), ("SQUARE", score == "square"), ("BLOCKS", blocks), ("LANES_N", lanes_n), ("LANES_K", lanes_k))
    arguments = (_triton.readable(dense), ids, block_rows, block_columns, programs_k)
    PRUNE.launch(-(-block_rows // lanes_n) * programs_k, arguments, constants, lanes_n * lanes_k // 32)
    return ids
