"""CH2-L3n scores on tensor cores in 8-bit integers: exact counts, fixed-point weights, exact sums.

``P = M M^T`` multiplies zeros and ones: int8 operands with int32 sums are exact. ``W = (P + B) / (E + 1)`` of a nearly
regular bipartite graph is nearly constant (4096 x 4096: 0.82 +- 0.05), so it is stored as ``W = centre + step * Q`` with
integers Q, and ``centre`` leaves the second product: ``W M = centre * degrees + step * (Q M)``. Q M is again an exact
integer sum, so the scores are the same bits whatever the tiling, and the only approximation is the rounding of W:

    |S - exact S| <= (1/2 + 2**-6) * step * (d_row[u] + d_col[v]) + 2**-21 * S      (:func:`rounding_bound`)

Large layers hold Q in one int8, layers below 2048 in two (high and low digit: ``W`` to 16 bits, twice the products).
``centre`` and ``step`` span eight standard deviations of a random graph of the same density; the first product
measures the true range, and where that is wider (structured topologies, tiny layers) a second launch of it, which otherwise
returns at once, repeats it with the measured range. The diagonal of W is an outlier (P = d, E = 0, W = d + 1) that
touches existing links alone: it is left out of Q and added exactly at the end.

One int8 buffer holds every operand, so that the four products are two launches of row-major A B^T:

    rows of layer b        columns [0, Np)   [Np, Np + Kp)   then (two digits only)
    side A, Np rows        Q_row             M               low digit of Q_row
    side B, Kp rows        M^T               Q_col           low digit of Q_col

Row overlaps multiply the M part of A by itself, column overlaps the M^T part of B, and
``S = [Q_row | M] [M^T | Q_col]^T`` is one product. P is symmetric: tiles above the diagonal alone are computed, each
written twice (W itself is not symmetric: E takes the degree of the second index).

Operations at N = K = 4096: 2 x 69 G for P, 2 x 137 G for S, of 550 G; bytes beside the tensor cores' own: survivors 4 MB,
operands 4 x 16.8 MB, S 67 MB.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ...patterns import BLOCK
from .._batch import interpreted, on_device

PADDING = 128
ONE_DIGIT_FROM = 2048
"""Layers with a side of at least this many features use one int8 digit."""
QMAX = {1: 127.0, 2: 32512.0}
STATE = tl.constexpr(4)  # int32 words per layer: survivors, bits of the largest W, inverted bits of the smallest W
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds to the nearest integer, in the low bits
MAGIC_BITS = tl.constexpr(0x4B400000)
ALL_BITS = tl.constexpr(0x7FFFFFFF)  # x ^ this turns the order of non-negative floats round


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of the two products. The scores do not depend on them."""

    overlap: int = 128
    overlap_warps: int = 8
    overlap_stages: int = 3
    rows: int = 128
    columns: int = 256
    warps: int = 8
    stages: int = 4
    depth: int = 128
    group: int = 8


TILES = {
    9: Tiles(),
    10: Tiles(),
    8: Tiles(columns=128, stages=2, overlap_stages=2, depth=64),
    12: Tiles(columns=128, stages=2, overlap_stages=2, depth=64),
}
"""By major compute capability."""


@triton.jit
def expand_kernel(
    survivors_ptr, operands_ptr, degrees_ptr, state_ptr, block_rows, block_columns,
    rows_padded, columns_padded, length, layers, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Bit masks to the int8 matrices M and M^T (as int32 words of four), degrees and the number of survivors."""
    b = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (i < block_rows)[:, None] & (j < block_columns)[None, :]
    padded = (i * 4 < rows_padded)[:, None] & (j * 4 < columns_padded)[None, :]
    survivors_ptr += b * block_rows * block_columns
    links = tl.load(survivors_ptr + i.to(tl.int64)[:, None] * block_columns + j[None, :], mask=inside, other=0)
    words = length // 4
    operands_ptr = operands_ptr.to(tl.pointer_type(tl.int32))
    row_ptr = operands_ptr + b * rows_padded * words + rows_padded // 4
    column_ptr = operands_ptr + (layers * rows_padded + b * columns_padded) * words
    for r in tl.static_range(4):
        nibble = links >> 4 * r & 15
        word = nibble * 0x00204081 & 0x01010101
        tl.store(row_ptr + (i.to(tl.int64) * 4 + r)[:, None] * words + j[None, :], word, mask=padded)
        bits = links >> r & 0x1111
        word = (bits & 1) | (bits & 0x10) << 4 | (bits & 0x100) << 8 | (bits & 0x1000) << 12
        tl.store(column_ptr + (j.to(tl.int64) * 4 + r)[None, :] * words + i[:, None], word, mask=padded)
    degrees_ptr += b * (rows_padded + columns_padded)
    pairs = (links & 0x5555) + (links >> 1 & 0x5555)
    counts = (pairs & 0x3333) + (pairs >> 2 & 0x3333)
    total = tl.sum(tl.sum((counts & 0x0F0F) + (counts >> 4 & 0x0F0F), 1), 0)
    tl.atomic_add(state_ptr + b * STATE, (total & 0xFF) + (total >> 8), sem="relaxed")
    for r in tl.static_range(4):
        degree = tl.sum(counts >> 4 * r & 15, 1)
        tl.atomic_add(degrees_ptr + i * 4 + r, degree, mask=i < block_rows, sem="relaxed")
        degree = tl.sum((links >> r & 0x1111) * 0x1111 >> 12 & 15, 0)
        tl.atomic_add(degrees_ptr + rows_padded + j * 4 + r, degree, mask=j < block_columns, sem="relaxed")


@triton.jit
def quantiser(state_ptr, rows, columns, QMAX: tl.constexpr):
    """(held, centre, step, wide centre, wide step): the a-priori range, whether it held, and the measured one."""
    density = tl.load(state_ptr).to(tl.float32) / (rows.to(tl.float32) * columns.to(tl.float32))
    free = 1.0 - density
    expected = density / free
    spread = 8.0 * tl.sqrt((1.0 - density * density) / tl.minimum(rows, columns).to(tl.float32)) / (free * free)
    low, high = tl.maximum(expected - spread, 0.0), expected + spread
    seen_high = tl.load(state_ptr + 1).to(tl.float32, bitcast=True)
    seen_low = (tl.load(state_ptr + 2) ^ ALL_BITS).to(tl.float32, bitcast=True)
    held = (seen_low >= low) & (seen_high <= high)
    wide_step = tl.maximum((seen_high - seen_low) / (2.0 * QMAX), 2.0**-60)
    return held, (low + high) * 0.5, (high - low) / (2.0 * QMAX), (seen_low + seen_high) * 0.5, wide_step


@triton.jit
def store_digits(ptr, weight, centre, scale, mask, low_digit, QMAX: tl.constexpr, DIGITS: tl.constexpr):
    """Round to the fixed-point grid and store the digits; ``low_digit`` bytes lie between the two."""
    level = tl.minimum(tl.maximum((weight - centre) * scale, -QMAX), QMAX) + MAGIC
    level = level.to(tl.int32, bitcast=True) - MAGIC_BITS
    if DIGITS == 1:
        tl.store(ptr, level.to(tl.int8), mask=mask)
    else:
        high = level + 128 >> 8
        tl.store(ptr, high.to(tl.int8), mask=mask)
        tl.store(ptr + low_digit, (level - (high << 8)).to(tl.int8), mask=mask)


@triton.jit
def multiply(
    accumulator, a_desc, a_row, a_column, b_desc, b_row, b_column, length,
    DEPTH: tl.constexpr, STAGES: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """accumulator + A B^T over ``length`` columns from (a_row, a_column) and (b_row, b_column)."""
    if COMPILED:
        for d in tl.range(0, length, DEPTH, num_stages=STAGES):
            left, right = a_desc.load([a_row, a_column + d]), b_desc.load([b_row, b_column + d])
            accumulator = tl.dot(left, right.T, accumulator, out_dtype=tl.int32)  # [M, DEPTH] @ [DEPTH, N]
    else:  # numpy 2.4 broke range with run-time bounds in Triton 3.6's interpreter
        d = length * 0
        while d < length:
            left, right = a_desc.load([a_row, a_column + d]), b_desc.load([b_row, b_column + d])
            accumulator = tl.dot(left, right.T, accumulator, out_dtype=tl.int32)
            d += DEPTH
    return accumulator


@triton.jit
def halves(x):
    """The left and the right half of a matrix."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def store_overlaps(
    counts, u, z, degree_u, degree_z, size, out_ptr, length, low_digit, centre, scale, state_ptr, mirror,
    DIGITS: tl.constexpr, QMAX: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """From the counts P[u, z] to the digits of W[u, z] and, off the diagonal, of W[z, u]."""
    common = counts.to(tl.float32)
    linked = counts > 0
    other = u[:, None] != z[None, :]
    weight = tl.where(linked, (common + 1.0) / (degree_z[None, :] - common + 1.0), 0.0)
    mirrored = tl.where(linked, (common + 1.0) / (degree_u[:, None] - common + 1.0), 0.0)
    if not AGAIN:
        real = other & (u < size)[:, None] & (z < size)[None, :]
        highest = tl.max(tl.max(tl.where(real, tl.maximum(weight, mirrored), 0.0), 1), 0)
        lowest = tl.min(tl.min(tl.where(real, tl.minimum(weight, mirrored), 3.0e38), 1), 0)
        tl.atomic_max(state_ptr + 1, highest.to(tl.int32, bitcast=True), sem="relaxed")
        tl.atomic_max(state_ptr + 2, lowest.to(tl.int32, bitcast=True) ^ ALL_BITS, sem="relaxed")
    everywhere = (u >= 0)[:, None] & (z >= 0)[None, :]
    place = out_ptr + u.to(tl.int64)[:, None] * length + z[None, :]
    store_digits(place, tl.where(other, weight, centre), centre, scale, everywhere, low_digit, QMAX, DIGITS)
    place = out_ptr + z.to(tl.int64)[None, :] * length + u[:, None]
    store_digits(place, tl.where(other, mirrored, centre), centre, scale, everywhere & mirror, low_digit, QMAX, DIGITS)


@triton.jit
def overlap_kernel(
    operands_desc, operands_ptr, degrees_ptr, state_ptr, rows, columns, rows_padded, columns_padded, length, layers,
    TILE: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, DIGITS: tl.constexpr, QMAX: tl.constexpr,
    AGAIN: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """P of both sides, tile by tile of its upper triangle, turned into Q as it leaves the accumulators."""
    b = tl.program_id(1)
    state_ptr += b * STATE
    held, centre, step, wide_centre, wide_step = quantiser(state_ptr, rows, columns, QMAX)
    if AGAIN:
        if held:
            return
        centre, step = wide_centre, wide_step
    # The triangle of an n x n grid folded to [n / 2 rounded up, n + 1]: line r also holds line n - 1 - r.
    row_tiles, column_tiles = rows_padded // TILE, columns_padded // TILE
    row_programs = (row_tiles + 1) // 2 * (row_tiles + 1)
    pid = tl.program_id(0)
    on_rows = pid < row_programs
    pid = tl.where(on_rows, pid, pid - row_programs)
    tiles = tl.where(on_rows, row_tiles, column_tiles)
    line, place = pid // (tiles + 1), pid % (tiles + 1)
    folded = place >= tiles - line
    if folded & (line * 2 + 1 == tiles):  # the middle line of an odd grid has no partner
        return
    tile_u = tl.where(folded, tiles - 1 - line, line)
    tile_z = tl.where(folded, place - 1, line + place)
    first_row = tl.where(on_rows, b * rows_padded, layers * rows_padded + b * columns_padded)
    mask_column = tl.where(on_rows, rows_padded, 0)
    depth = tl.where(on_rows, columns_padded, rows_padded)
    counts = multiply(
        tl.zeros([TILE, TILE], tl.int32), operands_desc, first_row + tile_u * TILE, mask_column,
        operands_desc, first_row + tile_z * TILE, mask_column, depth, DEPTH, STAGES, COMPILED,
    )  # fmt: skip
    u = tile_u * TILE + tl.arange(0, TILE)
    z = tile_z * TILE + tl.arange(0, TILE // 4)
    degrees_ptr += b.to(tl.int64) * (rows_padded + columns_padded) + tl.where(on_rows, 0, rows_padded)
    degree_u = tl.load(degrees_ptr + u).to(tl.float32)
    size = tl.where(on_rows, rows, columns)
    out_ptr = operands_ptr + first_row.to(tl.int64) * length + tl.where(on_rows, 0, rows_padded)
    low_digit = tl.where(on_rows, rows_padded + columns_padded, columns_padded)
    left, right = halves(counts)
    quarters = halves(left) + halves(right)  # a quarter at a time: fewer registers
    for quarter in tl.static_range(4):
        degree_z = tl.load(degrees_ptr + z).to(tl.float32)
        store_overlaps(
            quarters[quarter], u, z, degree_u, degree_z, size, out_ptr, length, low_digit, centre, 1.0 / step, state_ptr,
            tile_u != tile_z, DIGITS, QMAX, AGAIN,
        )  # fmt: skip
        z += TILE // 4


@triton.jit
def product_kernel(
    a_desc, b_desc, operands_ptr, degrees_ptr, state_ptr, scores_ptr,
    rows, columns, rows_padded, columns_padded, length, layers,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr,
    DIGITS: tl.constexpr, QMAX: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """S = [Q_row | M] [M^T | Q_col]^T and what makes scores of it."""
    columns = tl.multiple_of(columns, 4)
    b = tl.program_id(1)
    tiles_m, tiles_n = tl.cdiv(rows_padded, TILE_M), tl.cdiv(columns_padded, TILE_N)
    pid = tl.program_id(0)
    band, place = pid // (GROUP * tiles_n), pid % (GROUP * tiles_n)
    height = tl.minimum(tiles_m - band * GROUP, GROUP)
    tile_m, tile_n = band * GROUP + place % height, place // height
    row = b * rows_padded + tile_m * TILE_M
    column = layers * rows_padded + b * columns_padded + tile_n * TILE_N
    both = rows_padded + columns_padded
    sums = tl.zeros([TILE_M, TILE_N], tl.int32)
    sums = multiply(sums, a_desc, row, 0, b_desc, column, 0, both, DEPTH, STAGES, COMPILED)
    if DIGITS == 2:
        sums = sums * 256
        sums = multiply(sums, a_desc, row, both, b_desc, column, 0, rows_padded, DEPTH, STAGES, COMPILED)
        sums = multiply(sums, a_desc, row, rows_padded, b_desc, column, both, columns_padded, DEPTH, STAGES, COMPILED)

    held, centre, step, wide_centre, wide_step = quantiser(state_ptr + b * STATE, rows, columns, QMAX)
    centre, step = tl.where(held, centre, wide_centre), tl.where(held, step, wide_step)
    u = tile_m * TILE_M + tl.arange(0, TILE_M)
    v = tile_n * TILE_N + tl.arange(0, TILE_N // 4)
    degrees_ptr += b.to(tl.int64) * (rows_padded + columns_padded)
    mask_ptr = operands_ptr + (b.to(tl.int64) * rows_padded + u)[:, None] * length + rows_padded
    out_ptr = scores_ptr + (b.to(tl.int64) * rows + u)[:, None] * columns
    degree_u = tl.load(degrees_ptr + u, mask=u < rows, other=0)
    left, right = halves(sums)
    quarters = halves(left) + halves(right)
    for quarter in tl.static_range(4):
        inside = (u < rows)[:, None] & (v < columns)[None, :]
        degree_v = tl.load(degrees_ptr + rows_padded + v, mask=v < columns, other=0)
        degree = (degree_u[:, None] + degree_v[None, :]).to(tl.float32)
        own = tl.load(mask_ptr + v[None, :], mask=inside, other=0).to(tl.float32)
        score = degree * centre + quarters[quarter].to(tl.float32) * step + own * ((degree + 2.0) - 2.0 * centre)
        tl.store(out_ptr + v[None, :], score, mask=inside)
        v += TILE_N // 4


def digits_for(rows: int, columns: int) -> int:
    return 1 if max(rows, columns) >= ONE_DIGIT_FROM else 2


def padded(size: int) -> int:
    return -(-size // PADDING) * PADDING


def workspace_bytes(rows: int, columns: int) -> int:
    """Bytes of operands and scores of one layer."""
    a, b, digits = padded(rows), padded(columns), digits_for(rows, columns)
    return (a + b) * (a + b + (digits - 1) * max(a, b)) + 4 * rows * columns


def score_many(
    survivors: torch.Tensor, *, tiles: Tiles | None = None, digits: int | None = None, state: torch.Tensor | None = None
) -> torch.Tensor:
    """float32 [B, N, K] scores of survivors int32 [B, N/4, K/4].

    Args:
        tiles: tile sizes, by default those of the device.
        digits: 1 or 2 int8 digits of W, by default by size.
        state: zeroed int32 [B, 4] to leave the measured range in (:func:`rounding_bound`).
    """
    device = survivors.device
    layers, block_rows, block_columns = survivors.shape
    rows, columns = block_rows * BLOCK, block_columns * BLOCK
    a, b = padded(rows), padded(columns)
    digits = digits_for(rows, columns) if digits is None else digits
    if tiles is None:
        major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
        tiles = TILES.get(major, TILES[12])
    length = a + b + (digits - 1) * max(a, b)
    operands = torch.empty(layers * (a + b), length, dtype=torch.int8, device=device)
    counters = torch.zeros(layers * (a + b) + layers * STATE.value, dtype=torch.int32, device=device)
    degrees = counters[: layers * (a + b)]
    if state is None:
        state = counters[layers * (a + b) :]
    scores = torch.empty(layers, rows, columns, dtype=torch.float32, device=device)
    kind = dict(DIGITS=digits, QMAX=QMAX[digits], DEPTH=tiles.depth, COMPILED=not interpreted(), enable_fp_fusion=False)
    sizes = rows, columns, a, b, length, layers
    expand_kernel[(triton.cdiv(a // 4, 16), triton.cdiv(b // 4, 64), layers)](
        survivors, operands, degrees, state, block_rows, block_columns, a, b, length, layers, ROWS=16, COLUMNS=64, num_warps=4
    )
    desc = TensorDescriptor.from_tensor(operands, [tiles.overlap, tiles.depth])
    sides = a // tiles.overlap, b // tiles.overlap
    grid = sum((s + 1) // 2 * (s + 1) for s in sides), layers
    for again in (False, True):
        overlap_kernel[grid](
            desc, operands, degrees, state, *sizes, **kind,
            TILE=tiles.overlap, STAGES=tiles.overlap_stages, AGAIN=again, num_warps=tiles.overlap_warps,
        )  # fmt: skip
    left = TensorDescriptor.from_tensor(operands, [tiles.rows, tiles.depth])
    right = TensorDescriptor.from_tensor(operands, [tiles.columns, tiles.depth])
    product_kernel[(triton.cdiv(a, tiles.rows) * triton.cdiv(b, tiles.columns), layers)](
        left, right, operands, degrees, state, scores, *sizes, **kind,
        TILE_M=tiles.rows, TILE_N=tiles.columns, STAGES=tiles.stages, GROUP=tiles.group, num_warps=tiles.warps,
    )  # fmt: skip
    return scores


def rounding_bound(survivors: torch.Tensor, digits: int | None = None) -> torch.Tensor:
    """float64 [N, K]: the largest possible |kernel score - exact score| of survivors int32 [N/4, K/4]. For tests: it reads
    the measured range back from the device and needs memory like the reference."""
    from .reference import link_mask

    mask = link_mask(survivors, torch.float64)
    rows, columns = mask.shape
    digits = digits_for(rows, columns) if digits is None else digits
    state = torch.zeros(1, STATE.value, dtype=torch.int32, device=survivors.device)
    scores = score_many(survivors[None], digits=digits, state=state)[0].double()
    count, high_bits, low_bits = state[0, :3].tolist()
    as_float = lambda bits: torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()  # noqa: E731
    seen_high, seen_low = as_float(high_bits), as_float(low_bits ^ ALL_BITS.value)
    density = count / (rows * columns)
    expected = density / (1 - density)
    spread = 8 * ((1 - density**2) / min(rows, columns)) ** 0.5 / (1 - density) ** 2
    low, high = max(expected - spread, 0.0), expected + spread
    if not low <= seen_low <= seen_high <= high:
        low, high = seen_low, seen_high
    step = max((high - low) / (2 * QMAX[digits]), 2.0**-60)
    degrees = mask.sum(1)[:, None] + mask.sum(0)[None, :]
    return (0.5 + 2.0**-6) * step * degrees + 2.0**-21 * scores.abs()


def score(survivors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The op: a batch of one."""
    with on_device(survivors):
        return score_many(survivors.contiguous()[None])[0]
