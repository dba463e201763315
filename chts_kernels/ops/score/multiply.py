"""Products A B^T of int8 matrices with int32 sums, for a batch: the one heavy step of the scores.

Two implementations of one contract: wgmma in Gluon for compute capability 9.0 (:mod:`.sm90_multiply`), and below a plain Triton kernel
for every other device and the interpreter. (On 9.0 Triton 3.6 waits for every int8 product before it issues the next: only
float32 accumulators are pipelined.) With :data:`SPARSE`, 9.0 takes :mod:`.sm90_products` instead, where survivors are compressed.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .._batch import BatchKernel, interpreted

TILE = 128
SPARSE = True
"""Whether scores on compute capability 9.0 take the products with compressed survivors (wgmma.sp) unless told otherwise. Both give the
same integers; benchmarks/LOG.md has their times by size."""


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
def tile_number(i, j, n):
    """Place of tile (i, j), i <= j, among the tiles on and above the diagonal, row by row."""
    return i * n - i * (i - 1) // 2 + j - i


@triton.jit
def rectangle(t, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile t of a grid, taken in bands of GROUP rows for the sake of L2."""
    band, place = t // (GROUP * tiles_n), t % (GROUP * tiles_n)
    height = tl.minimum(tiles_m - band * GROUP, GROUP)
    return band * GROUP + place % height, place // height


@triton.jit
def multiply_kernel(
    operands_ptr, out_ptr, length_units, a_first, a_rows, a_column, b_first, b_rows, b_column, depth,
    first_units, layer_units, out_units, tiles_m, tiles_n, per_layer,
    TILE: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, TRIANGLE: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """Row lengths in units of 128: the compiler sees what divides them, and everything is padded, so nothing is masked."""
    b, t = tl.program_id(0) // per_layer, tl.program_id(0) % per_layer
    if TRIANGLE:
        tile_m, tile_n = triangle(t, tiles_m)
    else:
        tile_m, tile_n = rectangle(t, tiles_m, tiles_n, 8)
    m, n, d = tl.arange(0, TILE), tl.arange(0, TILE), tl.arange(0, DEPTH)
    length = length_units.to(tl.int64) * 128
    a_ptr = operands_ptr + (a_first + b * a_rows + tile_m * TILE + m)[:, None] * length + a_column // 128 * 128 + d[None, :]
    b_ptr = operands_ptr + (b_first + b * b_rows + tile_n * TILE + n)[None, :] * length + b_column // 128 * 128 + d[:, None]
    sums = tl.zeros([TILE, TILE], tl.int32)
    if COMPILED:
        for _ in tl.range(0, depth, DEPTH, num_stages=STAGES):
            sums = tl.dot(tl.load(a_ptr), tl.load(b_ptr), sums, out_dtype=tl.int32)  # [TILE, DEPTH] @ [DEPTH, TILE]
            a_ptr += DEPTH
            b_ptr += DEPTH
    else:  # numpy 2.4 broke range with run-time bounds in Triton 3.6's interpreter
        done = depth * 0
        while done < depth:
            sums = tl.dot(tl.load(a_ptr), tl.load(b_ptr), sums, out_dtype=tl.int32)
            a_ptr += DEPTH
            b_ptr += DEPTH
            done += DEPTH
    corner = (first_units + b * layer_units) * 128
    if TRIANGLE:
        corner += tile_number(tile_m, tile_n, tiles_m).to(tl.int64) * (TILE * TILE)
        place = out_ptr + corner + m[:, None] * TILE + n[None, :]
    else:
        place = out_ptr + corner + (tile_m * TILE + m).to(tl.int64)[:, None] * (out_units * 128) + (tile_n * TILE + n)[None, :]
    tl.store(place, sums.to(out_ptr.dtype.element_ty))


MULTIPLY = BatchKernel(multiply_kernel, 8, wide=("first_units", "layer_units"))


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
        other: the same of B; None: B is A, and only tiles on and above the diagonal of the symmetric result are written, 128 x 128
            each, one after the other in the order of :func:`tile_number`.
        depth: columns to multiply over, a multiple of 128.
        out: (first element, elements per layer, elements per row) of the result; rows of a symmetric result have 128.
        tiles: (rows, columns) of one layer's result, multiples of 128.
        config: a name of ``sm90_multiply.CONFIGS``, or "triton".
    """
    symmetric = other is None
    first, per, column = side
    b_first, b_per, b_column = side if symmetric else other
    problem = first, per, column, b_first, b_per, b_column
    if config != "triton" and hopper(operands.device):
        from . import sm90_multiply

        sm90_multiply.launch(operands, result, layers, problem, depth, out, tiles, symmetric, config)
        return
    tiles_m, tiles_n = tiles[0] // TILE, tiles[1] // TILE
    per_layer = tiles_m * (tiles_m + 1) // 2 if symmetric else tiles_m * tiles_n
    MULTIPLY(
        per_layer * layers, operands, result, operands.shape[1] // 128, *problem, depth, *(o // 128 for o in out),
        tiles_m, tiles_n, per_layer, TILE=TILE, DEPTH=64, STAGES=4, TRIANGLE=symmetric, COMPILED=not interpreted(),
    )  # fmt: skip


@functools.cache
def hopper(device: torch.device) -> bool:
    """Whether the kernels of compute capability 9.0 run there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
