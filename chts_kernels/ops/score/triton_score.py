"""CH2-L3n scores on tensor cores in 8-bit integers: exact counts, fixed-point weights, exact sums.

``P = M M^T`` multiplies zeros and ones: int8 operands with int32 sums are exact. ``W = (P + B) / (E + 1)`` of a nearly
regular bipartite graph is nearly constant (4096 x 4096: 0.82 +- 0.05), so it is stored as ``W = (origin + Q) * unit`` with
integers, and ``origin`` leaves the second product: ``W M = unit * (origin * degrees + Q M)``. Q M is again an exact
integer sum, so the scores are the same bits whatever the tiling, and the only approximation is the rounding of W:

    |S - exact S| <= (1/2 + 2**-6) * unit * (d_row[u] + d_col[v]) + 2**-21 * S      (:func:`rounding_bound`)

Large layers hold Q in one int8 digit, layers below 2048 in two, ``Q = 64 high + low`` (14 bits, twice the products).
``origin`` and ``unit`` span eight standard deviations of a random graph of the same density. The true range is measured on
the way, and where it is wider (structured topologies, tiny layers) a second launch of ``quantise``, which otherwise returns
at once, uses the measured one. The diagonal of W is an outlier (P = d, E = 0, W = d + 1) that touches existing links
alone: it is not measured, and what the grid could not hold of it is added at the end.

One int8 buffer holds every operand, so that all products are row-major A B^T, and S is a single one:

    rows of layer b        [0, a)      [a, a + b)     and with two digits, from a + b on:
    side A, a rows         Q_row       M              high digits and 64 M stand in front, then low digits and M
    side B, b rows         M^T         Q_col          64 M^T and high digits, then M^T and low digits

(a and b: N and K padded to 128.) P is symmetric: only tiles of its upper triangle are computed, and ``quantise`` writes each
twice. P and then S use the same memory.

Counted at N = K = 4096: products 2 x 69 G + 275 G operations of the naive 550 G; bytes: operands 67 MB written once and
read by the tensor cores, P 34 MB written and read, S 67 MB written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from ...patterns import BLOCK
from .._batch import BatchKernel, aligned, interpreted, on_device
from .multiply import multiply, triangle

PADDING = 128
ONE_DIGIT_FROM = 2048
"""Layers with a side of at least this many features use one int8 digit."""
BASE = 64
QMAX = {1: 127.0, 2: 127.0 * BASE}
STATE = tl.constexpr(4)  # int32 words per layer: survivors, bits of the largest W, inverted bits of the smallest W
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds to the nearest integer, in the low bits
MAGIC_BITS = tl.constexpr(0x4B400000)
ALL_BITS = tl.constexpr(0x7FFFFFFF)  # x ^ this turns the order of non-negative floats round
STRIP = tl.constexpr(32)  # rows of P that one step of quantise takes
PROGRAMS = 1056


@dataclass(frozen=True)
class Raw:
    """Scores before their last step: int32 sums [B, rows_padded, columns_padded] of ``[Q_row | M] [M^T | Q_col]^T`` and what
    :func:`raw_score` makes scores of them with."""

    sums: torch.Tensor
    degrees: torch.Tensor
    """int32 [B, rows_padded + columns_padded]."""
    state: torch.Tensor
    rows_padded: int
    columns_padded: int
    qmax: float


@triton.jit
def level_of(weight, origin, scale, QMAX: tl.constexpr):
    """The nearest integer of the fixed-point grid, relative to ``origin``, as the low bits of a float near MAGIC."""
    return tl.minimum(tl.maximum(weight * scale + (MAGIC - origin), MAGIC - QMAX), MAGIC + QMAX)


@triton.jit
def raw_score(sums, row_degree, column_degree, own, origin, unit, QMAX: tl.constexpr):
    """float32 score of a link from its sum: ``W = (origin + Q) * unit``. ``own`` is 1 for survivors: their self paths weigh d + 1
    a side, of which the sum holds what the grid could."""
    row_self, column_self = (row_degree + 1).to(tl.float32), (column_degree + 1).to(tl.float32)
    scale = 1.0 / unit
    row_held = (level_of(row_self, origin, scale, QMAX) - MAGIC + origin) * unit
    column_held = (level_of(column_self, origin, scale, QMAX) - MAGIC + origin) * unit
    missing = (row_self - row_held) + (column_self - column_held)
    known = (row_degree + column_degree).to(tl.float32) * (origin * unit)
    return known + sums.to(tl.float32) * unit + own.to(tl.float32) * missing


@triton.jit
def expected_range(state_ptr, layer, rows, columns):
    """(lowest, highest) W expected of a random graph with as many survivors."""
    links = tl.load(state_ptr + layer * STATE).to(tl.float32)
    density = links / (rows.to(tl.float32) * columns.to(tl.float32))
    free = 1.0 - density
    expected = density / free
    spread = 8.0 * tl.sqrt((1.0 - density * density) / tl.minimum(rows, columns).to(tl.float32)) / (free * free)
    return tl.maximum(expected - spread, 0.0), expected + spread


@triton.jit
def seen_range(state_ptr, layer):
    """(lowest, highest) W measured off the diagonal."""
    highest = tl.load(state_ptr + layer * STATE + 1).to(tl.float32, bitcast=True)
    lowest = (tl.load(state_ptr + layer * STATE + 2) ^ ALL_BITS).to(tl.float32, bitcast=True)
    return lowest, highest


@triton.jit
def grid_of(lowest, highest, QMAX: tl.constexpr):
    """(origin, unit) of the fixed-point grid over a range: the middle is ``origin`` units, an integer."""
    unit = tl.maximum((highest - lowest) / (2.0 * QMAX), highest * (2.0**-20) + 2.0**-40)
    return ((lowest + highest) * 0.5 * (1.0 / unit) + MAGIC) - MAGIC, unit


@triton.jit
def weight_range(state_ptr, layer, rows, columns, QMAX: tl.constexpr):
    """(origin, unit) that ``quantise`` ended up with."""
    lowest, highest = expected_range(state_ptr, layer, rows, columns)
    seen_lowest, seen_highest = seen_range(state_ptr, layer)
    held = (seen_lowest >= lowest) & (seen_highest <= highest)
    return grid_of(tl.where(held, lowest, seen_lowest), tl.where(held, highest, seen_highest), QMAX)


@triton.jit
def expand_kernel(
    survivors_ptr, operands_ptr, degrees_ptr, state_ptr, block_rows, block_columns,
    row_units, column_units, layers, programs_row, programs_column,
    DIGITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Bit masks to the int8 matrices M and M^T (as int32 words of four), degrees and the number of survivors."""
    pid = tl.program_id(0)
    b = (pid // (programs_row * programs_column)).to(tl.int64)
    i = pid // programs_column % programs_row * ROWS + tl.arange(0, ROWS)
    j = pid % programs_column * COLUMNS + tl.arange(0, COLUMNS)
    rows_padded, columns_padded = row_units * 128, column_units * 128  # a product: the compiler sees what divides it
    inside = (i < block_rows)[:, None] & (j < block_columns)[None, :]
    padded = (i * 4 < rows_padded)[:, None] & (j * 4 < columns_padded)[None, :]
    survivors_ptr += b * block_rows * block_columns
    links = tl.load(survivors_ptr + i.to(tl.int64)[:, None] * block_columns + j[None, :], mask=inside, other=0)
    half = (rows_padded + columns_padded) // 4
    words = half * DIGITS
    operands_ptr = operands_ptr.to(tl.pointer_type(tl.int32))
    row_ptr = operands_ptr + b * rows_padded * words + rows_padded // 4
    column_ptr = operands_ptr + (layers * rows_padded + b * columns_padded) * words
    for r in tl.static_range(4):
        nibble = links >> 4 * r & 15
        word = nibble * 0x00204081 & 0x01010101
        place = row_ptr + (i.to(tl.int64) * 4 + r)[:, None] * words + j[None, :]
        tl.store(place, word << 6 if DIGITS == 2 else word, mask=padded)
        if DIGITS == 2:
            tl.store(place + half, word, mask=padded)
        bits = links >> r & 0x1111
        word = (bits & 1) | (bits & 0x10) << 4 | (bits & 0x100) << 8 | (bits & 0x1000) << 12
        place = column_ptr + (j.to(tl.int64) * 4 + r)[None, :] * words + i[:, None]
        tl.store(place, word << 6 if DIGITS == 2 else word, mask=padded)
        if DIGITS == 2:
            tl.store(place + half, word, mask=padded)
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
def divide(x, y, COMPILED: tl.constexpr):
    """div.approx on the device: within 2 ulp, far below the rounding that follows."""
    return libdevice.fast_dividef(x, y) if COMPILED else x / y


@triton.jit
def quantise_kernel(
    counts_ptr, operands_ptr, degrees_ptr, state_ptr, rows, columns, row_units, column_units, layers, programs,
    DIGITS: tl.constexpr, QMAX: tl.constexpr, AGAIN: tl.constexpr, COMPILED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """From the counts P[u, z] of the upper triangles to the digits of W[u, z] and W[z, u]."""
    rows_padded, columns_padded = row_units * TILE, column_units * TILE
    row_tiles, column_tiles = row_units, column_units
    on_row_side = row_tiles * (row_tiles + 1) // 2 * (TILE // STRIP)
    per_layer = on_row_side + column_tiles * (column_tiles + 1) // 2 * (TILE // STRIP)
    length = (row_units + column_units) * (TILE * DIGITS)
    step_number = tl.program_id(0)
    while step_number < per_layer * layers:
        b = step_number // per_layer
        item = step_number % per_layer
        on_rows = item < on_row_side
        item = tl.where(on_rows, item, item - on_row_side)
        tile_u, tile_z = triangle(item // (TILE // STRIP), tl.where(on_rows, row_tiles, column_tiles))
        expected_lowest, expected_highest = expected_range(state_ptr, b, rows, columns)
        lowest, highest = expected_lowest, expected_highest
        wanted = True
        if AGAIN:
            lowest, highest = seen_range(state_ptr, b)
            wanted = (lowest < expected_lowest) | (highest > expected_highest)
        if wanted:
            origin, unit = grid_of(lowest, highest, QMAX)
            scale = 1.0 / unit
            size, side = tl.where(on_rows, rows, columns), tl.where(on_rows, row_units, column_units) * TILE
            first_u = tile_u * TILE + item % (TILE // STRIP) * STRIP
            group = tl.arange(0, STRIP // 4)
            z = tile_z * TILE + tl.arange(0, TILE)
            row_area = row_units.to(tl.int64) * row_units
            area = b * (row_area + column_units.to(tl.int64) * column_units) + tl.where(on_rows, 0, row_area)
            area *= TILE * TILE
            degree_ptr = degrees_ptr + (b.to(tl.int64) * (row_units + column_units) + tl.where(on_rows, 0, row_units)) * TILE
            degree_z = tl.load(degree_ptr + z).to(tl.float32)
            edge = (tile_u == tile_z) | ((tile_z + 1) * TILE > size)
            first_row = tl.where(on_rows, b * rows_padded, layers * rows_padded + b * columns_padded).to(tl.int64)
            out_ptr = operands_ptr + first_row * length + tl.where(on_rows, 0, row_units) * TILE
            high_word = tl.zeros([STRIP // 4, TILE], tl.int32)
            low_word = tl.zeros([STRIP // 4, TILE], tl.int32)
            most = tl.zeros([STRIP // 4, TILE], tl.float32)
            least = tl.full([STRIP // 4, TILE], 3.0e38, tl.float32)
            for r in tl.static_range(4):
                u = first_u + group * 4 + r
                count = tl.load(counts_ptr + area + u.to(tl.int64)[:, None] * side + z[None, :]).to(tl.int32) & 0xFFFF
                degree_u = tl.load(degree_ptr + u).to(tl.float32)
                common = count.to(tl.float32)
                linked = tl.where(count > 0, common + 1.0, 0.0)  # P + B; without B the quotient is 0 whatever E is
                weight = divide(linked, (degree_z[None, :] + 1.0) - common, COMPILED)
                mirrored = divide(linked, (degree_u[:, None] + 1.0) - common, COMPILED)
                if not AGAIN:
                    large, small = tl.maximum(weight, mirrored), tl.minimum(weight, mirrored)
                    if edge:  # the diagonal and the padding are not measured
                        real = (u[:, None] != z[None, :]) & (u < size)[:, None] & (z < size)[None, :]
                        large, small = tl.where(real, large, 0.0), tl.where(real, small, 3.0e38)
                    most, least = tl.maximum(most, large), tl.minimum(least, small)
                level = level_of(weight, origin, scale, QMAX).to(tl.int32, bitcast=True) - MAGIC_BITS
                back = level_of(mirrored, origin, scale, QMAX).to(tl.int32, bitcast=True) - MAGIC_BITS
                place = out_ptr + u.to(tl.int64)[:, None] * length + z[None, :]
                if DIGITS == 1:
                    tl.store(place, level.to(tl.int8))
                    high_word |= (back & 0xFF) << 8 * r
                else:
                    high, back_high = level + 32 >> 6, back + 32 >> 6
                    tl.store(place, high.to(tl.int8))
                    tl.store(place + rows_padded + columns_padded, (level - (high << 6)).to(tl.int8))
                    high_word |= (back_high & 0xFF) << 8 * r
                    low_word |= (back - (back_high << 6) & 0xFF) << 8 * r
            if not AGAIN:
                highest_bits = tl.max(tl.max(most, 1), 0).to(tl.int32, bitcast=True)
                lowest_bits = tl.min(tl.min(least, 1), 0).to(tl.int32, bitcast=True)
                tl.atomic_max(state_ptr + b * STATE + 1, highest_bits, sem="relaxed")
                tl.atomic_max(state_ptr + b * STATE + 2, lowest_bits ^ ALL_BITS, sem="relaxed")
            if tile_u != tile_z:  # four neighbouring columns of Q[z, u] are one word
                words = length // 4
                word_ptr = out_ptr.to(tl.pointer_type(tl.int32)) + first_u // 4
                mirror = word_ptr + z.to(tl.int64)[None, :] * words + group[:, None]
                tl.store(mirror, high_word)
                if DIGITS == 2:
                    tl.store(mirror + (rows_padded + columns_padded) // 4, low_word)
        step_number += programs


@triton.jit
def finish_kernel(
    sums_ptr, degrees_ptr, state_ptr, survivors_ptr, scores_ptr, block_rows, block_columns, row_units, column_units, programs,
    QMAX: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Sums to scores, [B, N, K]."""
    rows, columns = block_rows * 4, block_columns * 4
    row_number = tl.program_id(0) // programs
    b, u = row_number // rows, row_number % rows
    v = tl.program_id(0) % programs * BLOCKS + tl.arange(0, BLOCKS)
    inside = v < columns
    origin, unit = weight_range(state_ptr, b, rows, columns, QMAX)
    degrees_ptr += b.to(tl.int64) * (row_units + column_units) * 128
    row_degree, column_degree = tl.load(degrees_ptr + u), tl.load(degrees_ptr + row_units * 128 + v, mask=inside, other=0)
    links = tl.load(survivors_ptr + (row_number >> 2).to(tl.int64) * block_columns + (v >> 2), mask=inside, other=0)
    own = links >> ((u & 3) * 4 + (v & 3)) & 1
    sums = tl.load(sums_ptr + (b.to(tl.int64) * row_units * 128 + u) * column_units * 128 + v, mask=inside, other=0)
    score = raw_score(sums, row_degree, column_degree, own, origin, unit, QMAX)
    tl.store(scores_ptr + row_number.to(tl.int64) * columns + v, score, mask=inside)


EXPAND = BatchKernel(expand_kernel, 4)
QUANTISE = BatchKernel(quantise_kernel, 4)
FINISH = BatchKernel(finish_kernel, 4)


def digits_for(rows: int, columns: int) -> int:
    return 1 if max(rows, columns) >= ONE_DIGIT_FROM else 2


def padded(size: int) -> int:
    return -(-size // PADDING) * PADDING


def workspace_bytes(rows: int, columns: int) -> int:
    """Bytes of operands, counts and sums of one layer."""
    a, b, digits = padded(rows), padded(columns), digits_for(rows, columns)
    return (a + b) * (a + b) * digits + max(2 * (a * a + b * b), 4 * a * b)


def score_raw(survivors: torch.Tensor, *, digits: int | None = None, config: str | None = None) -> Raw:
    """Scores of survivors int32 [B, N/4, K/4] but for their last step.

    Args:
        digits: 1 or 2 int8 digits of W, by default by size.
        config: tiling of the products (:mod:`chts_kernels.ops.score.multiply`), by default the device's; the sums do not
            depend on it.
    """
    device = survivors.device
    layers, block_rows, block_columns = survivors.shape
    rows, columns = block_rows * BLOCK, block_columns * BLOCK
    a, b = padded(rows), padded(columns)
    digits = digits_for(rows, columns) if digits is None else digits
    length = (a + b) * digits
    operands = torch.empty(layers * (a + b), length, dtype=torch.int8, device=device)
    zeroed = torch.zeros(layers * (a + b + STATE.value), dtype=torch.int32, device=device)
    degrees, state = zeroed[: layers * (a + b)], zeroed[layers * (a + b) :]
    work = torch.empty(layers * max(2 * (a * a + b * b), 4 * a * b), dtype=torch.int8, device=device)
    counts, sums = work.view(torch.int16), work[: layers * 4 * a * b].view(torch.int32)

    kind = {"DIGITS": digits, "QMAX": QMAX[digits]}
    units = a // PADDING, b // PADDING
    programs = triton.cdiv(a // 4, 16), triton.cdiv(b // 4, 64)
    EXPAND(
        programs[0] * programs[1] * layers, survivors, operands, degrees, state, block_rows, block_columns, *units, layers,
        *programs, DIGITS=digits, ROWS=16, COLUMNS=64,
    )  # fmt: skip
    plain = (digits - 1) * (a + b)
    area = a * a + b * b
    multiply(
        operands, counts, layers, side=(0, a, a + plain), other=None, depth=b, out=(0, area, a), tiles=(a, a), config=config
    )
    multiply(
        operands, counts, layers, side=(layers * a, b, plain), other=None, depth=a, out=(a * a, area, b), tiles=(b, b),
        config=config,
    )  # fmt: skip
    per_layer = sum(s // 128 * (s // 128 + 1) // 2 * 4 for s in (a, b))
    for again, most in ((False, PROGRAMS), (True, 132)):
        programs = min(per_layer * layers, most)
        QUANTISE(
            programs, counts, operands, degrees, state, rows, columns, *units, layers, programs, **kind, AGAIN=again,
            COMPILED=not interpreted(), TILE=PADDING,
        )  # fmt: skip
    multiply(
        operands, sums, layers, side=(0, a, 0), other=(layers * a, b, 0), depth=length, out=(0, a * b, b), tiles=(a, b),
        config=config,
    )  # fmt: skip
    return Raw(sums, degrees, state, a, b, QMAX[digits])


def score_many(survivors: torch.Tensor, **options: int | str | None) -> torch.Tensor:
    """float32 [B, N, K] scores of survivors int32 [B, N/4, K/4]; options of :func:`score_raw`."""
    layers, block_rows, block_columns = survivors.shape
    rows, columns = block_rows * BLOCK, block_columns * BLOCK
    raw = score_raw(survivors, **options)
    scores = torch.empty(layers, rows, columns, dtype=torch.float32, device=survivors.device)
    programs = triton.cdiv(columns, 1024)
    FINISH(
        layers * rows * programs, raw.sums, raw.degrees, raw.state, survivors, scores, block_rows, block_columns,
        raw.rows_padded // PADDING, raw.columns_padded // PADDING, programs, QMAX=raw.qmax, BLOCKS=1024,
    )  # fmt: skip
    return scores


def rounding_bound(survivors: torch.Tensor, digits: int | None = None) -> torch.Tensor:
    """float64 [N, K]: the largest possible |kernel score - exact score| of survivors int32 [N/4, K/4]. For tests: it reads
    the measured range back from the device and needs memory like the reference."""
    from .reference import link_mask

    mask = link_mask(survivors, torch.float64)
    rows, columns = mask.shape
    raw = score_raw(survivors[None], digits=digits)
    scores = score_many(survivors[None], digits=digits)[0].double()
    count, high_bits, low_bits = raw.state[:3].tolist()
    seen = torch.tensor([low_bits ^ ALL_BITS.value, high_bits], dtype=torch.int32).view(torch.float32).tolist()
    density = count / (rows * columns)
    expected = density / (1 - density)
    spread = 8 * ((1 - density**2) / min(rows, columns)) ** 0.5 / (1 - density) ** 2
    low, high = max(expected - spread, 0.0), expected + spread
    if not low <= seen[0] <= seen[1] <= high:
        low, high = seen
    unit = max((high - low) / (2 * raw.qmax), high * 2.0**-20 + 2.0**-40)
    degrees = mask.sum(1)[:, None] + mask.sum(0)[None, :]
    return (0.5 + 2.0**-6) * unit * degrees + 2.0**-21 * scores.abs()


def score(survivors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The op: a batch of one."""
    with on_device(survivors):
        return score_many(aligned(survivors)[None])[0]
