"""Products A B^T of int8 matrices with int32 sums, for a batch: the one heavy step of the scores.

Two implementations of one contract: wgmma in Gluon for compute capability 9.0 (:mod:`.sm90_multiply`), and below a plain Triton kernel
for every other device and the interpreter. (On 9.0 Triton 3.6 waits for every int8 product before it issues the next: only
float32 accumulators are pipelined.)
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .._batch import interpreted, is_recording

TILE = 128


@triton.jit
def triangle(t, n):
    """Tile t of the n (n + 1) / 2 on and above the diagonal of an n x n grid: (row, column), row <= column.

    Line l of n - l tiles is continued by line n - 1 - l (n even) or n - l (n odd): a rectangle.
    """
    even = 1 - n % 2
    line, place = t // (n + even), t % (n + even)
    folded = place >= n - line
    return tl.where(folded, n - line - even, line), tl.where(folded, place - even, line + place)


@triton.jit
def rectangle(t, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile t of a grid, taken in bands of GROUP rows for the sake of L2."""
    band, place = t // (GROUP * tiles_n), t % (GROUP * tiles_n)
    height = tl.minimum(tiles_m - band * GROUP, GROUP)
    return band * GROUP + place % height, place // height


@triton.jit
def multiply_kernel(
    a_desc, b_desc, out_ptr, a_first, a_rows, a_column, b_first, b_rows, b_column, depth,
    out_first, out_layer, out_stride, tiles_m, tiles_n, per_layer,
    TILE: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, TRIANGLE: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    b, t = tl.program_id(0) // per_layer, tl.program_id(0) % per_layer
    if TRIANGLE:
        tile_m, tile_n = triangle(t, tiles_m)
    else:
        tile_m, tile_n = rectangle(t, tiles_m, tiles_n, 8)
    a_row, b_row = a_first + b * a_rows + tile_m * TILE, b_first + b * b_rows + tile_n * TILE
    sums = tl.zeros([TILE, TILE], tl.int32)
    if COMPILED:
        for d in tl.range(0, depth, DEPTH, num_stages=STAGES):
            left, right = a_desc.load([a_row, a_column + d]), b_desc.load([b_row, b_column + d])
            sums = tl.dot(left, right.T, sums, out_dtype=tl.int32)  # [TILE, DEPTH] @ [DEPTH, TILE]
    else:  # numpy 2.4 broke range with run-time bounds in Triton 3.6's interpreter
        d = depth * 0
        while d < depth:
            left, right = a_desc.load([a_row, a_column + d]), b_desc.load([b_row, b_column + d])
            sums = tl.dot(left, right.T, sums, out_dtype=tl.int32)
            d += DEPTH
    m, n = tile_m * TILE + tl.arange(0, TILE), tile_n * TILE + tl.arange(0, TILE)
    place = out_ptr + out_first + b.to(tl.int64) * out_layer + m.to(tl.int64)[:, None] * out_stride + n[None, :]
    tl.store(place, sums.to(out_ptr.dtype.element_ty))


def multiply(
    operands: torch.Tensor,
    result: torch.Tensor,
    layers: int,
    *,
    side: tuple[int, int, int],
    other: tuple[int, int, int] | None,
    depth: int,
    out: tuple[int, int, int],
    tiles: tuple[int, int],
    config: str | None = None,
) -> None:
    """``out[b] = A[b] B[b]^T`` for every layer b.

    Args:
        operands: int8, row-major, holding both operands.
        result: int32, or int16, which takes the low 16 bits.
        side: (first row, rows per layer, first column) of A.
        other: the same of B; None: B is A, and only tiles on and above the diagonal of the symmetric result are written.
        depth: columns to multiply over, a multiple of 128.
        out: (first element, elements per layer, elements per row) of the result.
        tiles: (rows, columns) of one layer's result, multiples of 128.
        config: a name of ``sm90_multiply.CONFIGS``, or "triton".
    """
    symmetric = other is None
    first, per, column = side
    b_first, b_per, b_column = side if symmetric else other
    problem = first, per, column, b_first, b_per, b_column
    if config != "triton" and _hopper(operands.device):
        from . import sm90_multiply

        sm90_multiply.launch(operands, result, layers, problem, depth, out, tiles, symmetric, config)
        return
    if is_recording():
        return  # Triton's own launcher compiles this one
    from triton.tools.tensor_descriptor import TensorDescriptor

    step = 64 if operands.is_cuda and torch.cuda.get_device_capability(operands.device)[0] != 9 else 128
    desc = TensorDescriptor.from_tensor(operands, [TILE, step])
    tiles_m, tiles_n = tiles[0] // TILE, tiles[1] // TILE
    per_layer = tiles_m * (tiles_m + 1) // 2 if symmetric else tiles_m * tiles_n
    multiply_kernel[(per_layer * layers,)](
        desc, desc, result, *problem, depth, *out, tiles_m, tiles_n, per_layer,
        TILE=TILE, DEPTH=step, STAGES=3 if step == 128 else 2, TRIANGLE=symmetric, COMPILED=not interpreted(), num_warps=8,
    )  # fmt: skip


@functools.cache
def _hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
