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

One int8 buffer holds the dense operands, so that all products are row-major A B^T, and S is a single one:

    rows of layer b        [0, a)      [a, a + b)     and with two digits, from a + b on:
    side A, a rows         Q_row       M              high digits and 64 M stand in front, then low digits and M
    side B, b rows         M^T         Q_col          64 M^T and high digits, then M^T and low digits

(a and b: N and K padded to 128.) P is symmetric: only tiles of its upper triangle are computed, 128 x 128 one after the other,
and ``quantise`` writes each twice. P and then S use the same memory.

On compute capability 9.0 survivors can multiply as 2:4 compressed operands where they are the left one (:mod:`.sm90_kernel`): both P,
and the deeper half of S. ``expand`` then writes them a second time, compressed, with their metadata.

Counted at N = K = 4096: products 2 x 69 G + 275 G operations of the naive 550 G, of which the sparse tensor cores can take 275 G; bytes:
operands 67 MB written once (compressed ones: 21 MB more), P 34 MB written and read, S 67 MB written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ...patterns import BLOCK
from .._batch import BatchKernel, aligned, interpreted, on_device
from ..pack.triton_pack import join_four, split_four
from ..remove.triton_remove import bit_count
from . import multiply as products
from .multiply import hopper, multiply, tile_number, triangle

PADDING = 128
ONE_DIGIT_FROM = 2048
"""Layers with a side of at least this many features use one int8 digit."""
STRIPS_FROM = 800
"""Above this number of tiles ``quantise`` of one digit takes a whole one per program, else a strip: fewer programs would leave
multiprocessors idle."""
BASE = 64
QMAX = {1: 127.0, 2: 127.0 * BASE}
STATE = tl.constexpr(4)
"""int32 words per layer: survivors, bits of the largest W, inverted bits of the smallest W, whether a group of four held more than
two survivors (which 2:4 operands cannot: the scores are NaN then)."""
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds to the nearest integer, in the low bits
RAISED = tl.constexpr(8388608.0)  # 2**23: the low bits of it and of what is up to 2**23 more are an integer
ALL_BITS = tl.constexpr(0x7FFFFFFF)  # x ^ this turns the order of non-negative floats round
STRIP = tl.constexpr(32)  # rows of P that one step of quantise takes


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
def clamped(level, QMAX: tl.constexpr):
    return tl.minimum(tl.maximum(level, MAGIC - QMAX), MAGIC + QMAX)


@triton.jit
def level_of(weight, origin, scale, QMAX: tl.constexpr):
    """The nearest integer of the fixed-point grid, relative to ``origin``, as the low bits of a float near MAGIC. Rounds like
    ``quantise`` on the diagonal, where it multiplies by the degree + 1 and the scale, and by 1."""
    return clamped(weight * scale + (MAGIC - origin), QMAX)


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
    return tl.maximum(known + sums.to(tl.float32) * unit + own.to(tl.float32) * missing, 0.0)  # as no score is negative


@triton.jit
def expected_range(state_ptr, layer, rows, columns):
    """(lowest, highest) W expected of a random graph with as many survivors.

    The lowest are of rows (columns) of one block, which share fewer neighbours than others: of the links of a 2:4 block's columns (more
    than a quarter of all) two thirds of what independent rows would, of a 1:4 block's none. A guess: what lies outside is seen, and
    quantised again."""
    links = tl.load(state_ptr + layer * STATE).to(tl.float32)
    density = links / (rows.to(tl.float32) * columns.to(tl.float32))
    free = 1.0 - density
    expected = density / free
    spread = 8.0 * tl.sqrt((1.0 - density * density) / tl.minimum(rows, columns).to(tl.float32)) / (free * free)
    shared = tl.where(density > 0.25, density * (2.0 / 3.0), 0.0)
    lowest = tl.minimum(expected - spread, shared / (1.0 - shared) - 0.35 * spread)
    return tl.maximum(lowest, 0.0), expected + tl.where(density > 0.25, spread, 1.25 * spread)


@triton.jit
def seen_range(state_ptr, layer):
    """(lowest, highest): bounds of W off the diagonal, from the extremes of P and of the degrees tile by tile."""
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
    origin, unit = grid_of(tl.where(held, lowest, seen_lowest), tl.where(held, highest, seen_highest), QMAX)
    return origin, tl.where(tl.load(state_ptr + layer * STATE + 3) == 0, unit, float("nan"))


@triton.jit
def expand_groups(
    x, row, unit, row_ptr, words, half, values_ptr, metadata_ptr, units, DIGITS: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    """Write four groups of four columns, the nibbles of ``x``, from column ``16 unit`` of a matrix's ``row`` on: as bytes and, with
    SPARSE, as 2:4 values and metadata. Returns a number that is not zero where a group holds more than two links.

    A thread writes 16 bytes, its neighbour the next 16. Where a store instruction fills half a sector of 32 bytes, the cache seems to read
    the sector first: with two halves one after the other the whole kernel took 38 us at 4096 x 4096, so it takes 23."""
    dense = ()
    for k in tl.static_range(4):
        dense = dense + ((x >> 4 * k & 15) * 0x00204081 & 0x01010101,)
    quad = join_four(dense)
    at = (row_ptr + row.to(tl.int64) * words + unit * 4)[:, None] + tl.arange(0, 4)[None, :]
    if DIGITS == 2:
        tl.store(at + half, quad)
    if DIGITS == 1 or not SPARSE:
        tl.store(at, quad << 6 if DIGITS == 2 else quad)
    bad = x & 0
    if SPARSE:
        # Bit planes: bit 4 k of x0 ... x3 is column 0 ... 3 of group k. Slots hold columns (0, 1), or (2, 3) where only these hold links,
        # or one of either pair.
        x0, x1, x2, x3 = x & 0x1111, x >> 1 & 0x1111, x >> 2 & 0x1111, x >> 3 & 0x1111
        low, high = x0 | x1, x2 | x3
        both, above, below = low & high, high & ~low, 0x1111 & ~high
        bad = both & (x0 & x1 | x2 & x3)
        columns = both & x1 | above << 1 | (below | above | both & x3) << 2 | high << 3
        links = below & x0 | above & x2 | both | (below & x1 | above & x3 | both) << 1
        # bits 0, 1, 4, 5 to bytes
        pair = tl.join((links & 0x33) * 0x00081081 & 0x01010101, (links >> 8 & 0x33) * 0x00081081 & 0x01010101)
        place = values_ptr.to(tl.pointer_type(tl.int32)) + row.to(tl.int64) * (units * 16) + unit * 2
        tl.store(place[:, None] + tl.arange(0, 2)[None, :], pair)
        # Lane 4 g + 2 c + h of warp w holds row 16 w + 8 h + g of a slab of 64 rows, columns 32 c on of a k64 step; a half word is ours.
        within = row & 63
        thread = (within >> 4) * 32 + (within & 7) * 4 + (unit >> 1 & 1) * 2 + (within >> 3 & 1)
        word = (row >> 6) * (units * 256) + (unit >> 2) * 128 + thread
        tl.store(metadata_ptr.to(tl.pointer_type(tl.int16)) + word.to(tl.int64) * 2 + (unit & 1), columns.to(tl.int16))
    return bad


@triton.jit
def add_degrees(degrees_ptr, counts, first, blocks):
    """Add the links that eight threads each counted in the rows of 32 blocks, a byte per row, to the degrees; returns their sum."""
    counts = tl.sum(tl.reshape(counts, (32, 8)), 1)  # at most 128 in a row
    row = tl.arange(0, 4)[None, :]
    degree = counts[:, None] >> 8 * row & 0xFF
    at = first + tl.arange(0, 32)
    tl.atomic_add(degrees_ptr + at[:, None] * 4 + row, degree, mask=(at < blocks)[:, None] & (row < 4), sem="relaxed")
    return tl.sum((counts & 0xFF) + (counts >> 8 & 0xFF) + (counts >> 16 & 0xFF) + (counts >> 24 & 0xFF))


@triton.jit
def expand_kernel(
    survivors_ptr, operands_ptr, degrees_ptr, state_ptr, row_values_ptr, row_metadata_ptr, column_values_ptr, column_metadata_ptr,
    block_rows, block_columns, row_units, column_units, layers,
    DIGITS: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    """Bit masks to the int8 matrices M and M^T (as int32 words of four), compressed with SPARSE; degrees and the number of
    survivors. A program takes 128 x 128 elements, a thread four neighbouring blocks along either side."""
    pid = tl.program_id(0)
    b = (pid // (row_units * column_units)).to(tl.int64)
    first_i, first_j = pid // column_units % row_units * 32, pid % column_units * 32
    block, eighth = tl.arange(0, 256) // 8, tl.arange(0, 256) % 8
    rows_padded, columns_padded = row_units * 128, column_units * 128  # a product: the compiler sees what divides it
    survivors_ptr += b * block_rows * block_columns
    half = (rows_padded + columns_padded) // 4
    words = half * DIGITS
    operands_ptr = operands_ptr.to(tl.pointer_type(tl.int32))
    row_ptr = operands_ptr + b * rows_padded * words + rows_padded // 4
    column_ptr = operands_ptr + (layers * rows_padded + b * columns_padded) * words
    if SPARSE:
        elements = b * rows_padded * columns_padded
        row_values_ptr += elements // 2
        column_values_ptr += elements // 2
        row_metadata_ptr += elements // 32
        column_metadata_ptr += elements // 32
    degrees_ptr += b * (rows_padded + columns_padded)
    i, j = first_i + block, first_j + eighth * 4
    column = j[:, None] + tl.arange(0, 4)[None, :]
    inside = (i < block_rows)[:, None] & (column < block_columns)
    along = split_four(tl.load(survivors_ptr + i.to(tl.int64)[:, None] * block_columns + column, mask=inside, other=0))
    down, right = first_i + eighth * 4, first_j + block
    across = ()
    for k in tl.static_range(4):
        inside = (down + k < block_rows) & (right < block_columns)
        across += (tl.load(survivors_ptr + (down + k).to(tl.int64) * block_columns + right, mask=inside, other=0),)
    row_counts = block & 0
    column_counts = block & 0
    bad = block & 0
    for r in range(4):
        x = along[0] >> 4 * r & 15
        for k in tl.static_range(1, 4):
            x |= (along[k] >> 4 * r & 15) << 4 * k
        bad |= expand_groups(
            x, i * 4 + r, first_j // 4 + eighth, row_ptr, words, half, row_values_ptr, row_metadata_ptr, column_units, DIGITS, SPARSE
        )  # fmt: skip
        row_counts += bit_count(x) << 8 * r
        x = (across[0] >> r & 0x1111) * 0x1248 >> 12 & 15  # bits 0, 4, 8, 12 to a nibble
        for k in tl.static_range(1, 4):
            x |= ((across[k] >> r & 0x1111) * 0x1248 >> 12 & 15) << 4 * k
        bad |= expand_groups(
            x, right * 4 + r, first_i // 4 + eighth, column_ptr, words, half, column_values_ptr, column_metadata_ptr, row_units,
            DIGITS, SPARSE,
        )  # fmt: skip
        column_counts += bit_count(x) << 8 * r
    total = add_degrees(degrees_ptr, row_counts, first_i, block_rows)
    add_degrees(degrees_ptr + rows_padded, column_counts, first_j, block_columns)
    tl.atomic_add(state_ptr + b * STATE, total, sem="relaxed")
    if SPARSE:  # noqa: SIM102 - a constant for the compiler, and a number of the device
        if tl.max(bad) > 0:
            tl.store(state_ptr + b * STATE + 3, 1)


@triton.jit
def reciprocal(x, COMPILED: tl.constexpr):
    """rcp.approx on the device: within 1 ulp, far below the rounding that follows."""
    if COMPILED:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def quantise_kernel(
    counts_ptr, operands_ptr, degrees_ptr, state_ptr, rows, columns, row_units, column_units, layers, items, programs,
    DIGITS: tl.constexpr, QMAX: tl.constexpr, AGAIN: tl.constexpr, COMPILED: tl.constexpr, TILE: tl.constexpr,
    STRIPS: tl.constexpr,
):  # fmt: skip
    """From the counts P[u, z] of the upper triangles to the digits of W[u, z] and W[z, u], STRIPS strips of a tile at a time."""
    b, item = tl.program_id(0) // programs, tl.program_id(0) % programs
    expected_lowest, expected_highest = expected_range(state_ptr, b, rows, columns)
    lowest, highest = expected_lowest, expected_highest
    if AGAIN:
        lowest, highest = seen_range(state_ptr, b)
        if (lowest >= expected_lowest) & (highest <= expected_highest):
            return
    origin, unit = grid_of(lowest, highest, QMAX)
    scale = 1.0 / unit
    rows_padded, columns_padded = row_units * TILE, column_units * TILE
    length = (row_units + column_units) * (TILE * DIGITS)
    row_tiles = row_units * (row_units + 1) // 2
    column_tiles = column_units * (column_units + 1) // 2
    while item < items:
        tile, first_strip = item // (TILE // STRIP // STRIPS), item % (TILE // STRIP // STRIPS) * STRIPS
        on_rows = tile < row_tiles
        tiles, size = tl.where(on_rows, row_units, column_units), tl.where(on_rows, rows, columns)
        tile_u, tile_z = triangle(tl.where(on_rows, tile, tile - row_tiles), tiles)
        number = tile_number(tile_u, tile_z, tiles) + tl.where(on_rows, 0, row_tiles)
        group = tl.arange(0, STRIP // 4)
        z = tile_z * TILE + tl.arange(0, TILE)
        tile_ptr = counts_ptr + (b.to(tl.int64) * (row_tiles + column_tiles) + number) * (TILE * TILE)
        degree_ptr = degrees_ptr + (b * (row_units + column_units) + tl.where(on_rows, 0, row_units)).to(tl.int64) * TILE
        # Degrees + 1, and 2**23 higher, as P will be: exact integers, whose differences are those of the integers.
        degree_z = tl.load(degree_ptr + z).to(tl.float32) + (RAISED + 1.0)
        edge = (tile_u == tile_z) | ((tile_z + 1) * TILE > size)
        first_row = tl.where(on_rows, b * rows_padded, layers * rows_padded + b * columns_padded).to(tl.int64)
        out_ptr = operands_ptr + first_row * length + tl.where(on_rows, 0, row_units) * TILE
        most = tl.full([STRIP // 4, TILE], RAISED, tl.float32)
        least = tl.full([STRIP // 4, TILE], RAISED + 65536.0, tl.float32)
        for strip in range(STRIPS):
            first_u = tile_u * TILE + (first_strip + strip) * STRIP
            place = tile_ptr + (first_strip + strip) * (STRIP * TILE)
            corner = out_ptr + first_u.to(tl.int64) * length + tile_z * TILE
            high_word = tl.zeros([STRIP // 4, TILE], tl.int32)
            low_word = tl.zeros([STRIP // 4, TILE], tl.int32)
            loaded = ()  # all loads before the first store, which may alias them as far as the compiler knows
            for r in tl.static_range(4):
                local = group * 4 + r
                count = tl.load(place + local[:, None] * TILE + tl.arange(0, TILE)[None, :]).to(tl.int32) & 0xFFFF
                degree_u = tl.load(degree_ptr + first_u + local).to(tl.float32) + (RAISED + 1.0)
                # the integer as a float, without a conversion
                loaded = loaded + (((count | 0x4B000000).to(tl.float32, bitcast=True), degree_u),)
            if not AGAIN:
                if edge:  # the diagonal and the padding are not measured
                    for r in tl.static_range(4):
                        u = first_u + group * 4 + r
                        real = (u[:, None] != z[None, :]) & (u < size)[:, None] & (z < size)[None, :]
                        most = tl.maximum(most, tl.where(real, loaded[r][0], RAISED))
                        least = tl.minimum(least, tl.where(real, loaded[r][0], RAISED + 65536.0))
                else:
                    for r in tl.static_range(4):
                        most, least = tl.maximum(most, loaded[r][0]), tl.minimum(least, loaded[r][0])
            for r in tl.static_range(4):
                raised, degree_u = loaded[r]
                common = raised - RAISED
                linked = common + tl.minimum(common, 1.0)  # P + B
                below, left = degree_z[None, :] - raised, degree_u[:, None] - raised
                ratio = linked * scale * reciprocal(below * left, COMPILED)  # one reciprocal for both
                level, back = tl.fma(ratio, left, MAGIC - origin), tl.fma(ratio, below, MAGIC - origin)
                if edge:  # where the range need not hold them
                    level, back = clamped(level, QMAX), clamped(back, QMAX)
                # The low bits of MAGIC are zero: what counts from it is in the low bits.
                level, back = level.to(tl.int32, bitcast=True), back.to(tl.int32, bitcast=True)
                place_w = corner + (group * 4 + r)[:, None] * length + tl.arange(0, TILE)[None, :]
                if DIGITS == 1:
                    tl.store(place_w, level.to(tl.int8))
                    high_word |= (back & 0xFF) << 8 * r
                else:
                    high, back_high = level + 32 >> 6, back + 32 >> 6
                    tl.store(place_w, high.to(tl.int8))
                    tl.store(place_w + rows_padded + columns_padded, (level - (high << 6)).to(tl.int8))
                    high_word |= (back_high & 0xFF) << 8 * r
                    low_word |= (back - (back_high << 6) & 0xFF) << 8 * r
            if tile_u != tile_z:  # four neighbouring columns of Q[z, u] are one word
                words = length // 4
                word_ptr = out_ptr.to(tl.pointer_type(tl.int32)) + (tile_z * TILE).to(tl.int64) * words + first_u // 4
                mirror = word_ptr + tl.arange(0, TILE)[:, None] * words + group[None, :]
                tl.store(mirror, tl.trans(high_word))
                if DIGITS == 2:
                    tl.store(mirror + (rows_padded + columns_padded) // 4, tl.trans(low_word))
        if not AGAIN:  # W rises with P and falls with the degree: the extremes of both bound it
            u = tile_u * TILE + first_strip * STRIP + tl.arange(0, STRIP * STRIPS)
            of_u = tl.load(degree_ptr + u).to(tl.float32) + 1.0
            of_z = tl.load(degree_ptr + z).to(tl.float32) + 1.0
            largest, smallest = tl.max(most) - RAISED, tl.min(least) - RAISED
            top = tl.maximum(tl.max(tl.where(z < size, of_z, 0.0), 0), tl.max(of_u, 0))
            bottom = tl.minimum(tl.min(tl.where(z < size, of_z, 65537.0), 0), tl.min(tl.where(u < size, of_u, 65537.0), 0))
            highest = tl.where(largest > 0.0, (largest + 1.0) / tl.maximum(bottom - largest, 1.0), 0.0)
            lowest = tl.where(smallest > 0.0, (smallest + 1.0) / (top - smallest), 0.0)
            lowest = tl.where(smallest <= largest, lowest, 3.0e38)  # not one pair
            tl.atomic_max(state_ptr + b * STATE + 1, highest.to(tl.int32, bitcast=True), sem="relaxed")
            tl.atomic_max(state_ptr + b * STATE + 2, lowest.to(tl.int32, bitcast=True) ^ ALL_BITS, sem="relaxed")
        item += programs


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


EXPAND = BatchKernel(expand_kernel, 8)
QUANTISE = {  # by digits and strips: as many registers as keep from spilling
    key: BatchKernel(quantise_kernel, 8, maxnreg=registers)
    for key, registers in {(1, 1): 80, (1, 4): 96, (2, 1): 80, (2, 4): 128}.items()
}
FINISH = BatchKernel(finish_kernel, 4)


def digits_for(rows: int, columns: int) -> int:
    return 1 if max(rows, columns) >= ONE_DIGIT_FROM else 2


def padded(size: int) -> int:
    return -(-size // PADDING) * PADDING


OVERHANG = 4096
"""Bytes past the metadata that a kernel may read and not use: it fetches a group of stages ahead."""


def sm90_products() -> Any:
    """The module, imported when first wanted: it is Gluon, which a device of another kind need not be able to compile."""
    from . import sm90_products

    return sm90_products


def compressed_bytes(a: int, b: int) -> int:
    """Bytes of one side's 2:4 values and metadata."""
    return a * b // 2 + a * b // 8


def mirrored(a: int, b: int, digits: int) -> bool:
    """Whether the compressed product computes S^T: where the sum over N is the deeper one. Small layers do without that kernel."""
    return a > b and digits == 1


def count_bytes(a: int, b: int) -> int:
    """Bytes of the upper triangles of both sides' P."""
    return sum(s // PADDING * (s // PADDING + 1) // 2 * PADDING * PADDING * 2 for s in (a, b))


def strips_for(rows: int, columns: int, layers: int, digits: int) -> int:
    """Strips of a tile that a program of ``quantise`` takes."""
    tiles = count_bytes(padded(rows), padded(columns)) // (2 * PADDING * PADDING)
    return 4 if digits == 1 and tiles * layers > STRIPS_FROM else 1


def workspace_bytes(rows: int, columns: int) -> int:
    """Bytes of operands, counts and sums of one layer."""
    a, b, digits = padded(rows), padded(columns), digits_for(rows, columns)
    compressed = compressed_bytes(a, b)
    return (a + b) * (a + b) * digits + compressed + max(count_bytes(a, b) + compressed, 4 * a * b)


def score_raw(survivors: torch.Tensor, *, digits: int | None = None, config: str | None = None) -> Raw:
    """Scores of survivors int32 [B, N/4, K/4] but for their last step.

    Args:
        digits: 1 or 2 int8 digits of W, by default by size.
        config: the products: "triton" (portable), a tiling of :mod:`.sm90_multiply` or "sparse" (compute capability 9.0); by default
            the device's. The sums do not depend on it.
    """
    device = survivors.device
    layers, block_rows, block_columns = survivors.shape
    rows, columns = block_rows * BLOCK, block_columns * BLOCK
    a, b = padded(rows), padded(columns)
    digits = digits_for(rows, columns) if digits is None else digits
    sparse = config == "sparse" or (config is None and products.SPARSE and hopper(device))
    operands = torch.empty(layers * (a + b), (a + b) * digits, dtype=torch.int8, device=device)
    zeroed = torch.zeros(layers * (a + b + STATE.value), dtype=torch.int32, device=device)
    degrees, state = zeroed[: layers * (a + b)], zeroed[layers * (a + b) :]
    compressed = layers * compressed_bytes(a, b) + OVERHANG if sparse else 0
    before = layers * count_bytes(a, b)
    work = torch.empty(max(before + compressed, layers * 4 * a * b), dtype=torch.int8, device=device)
    counts, sums = work[:before].view(torch.int16), work[: layers * 4 * a * b].view(torch.int32)
    # The compressed side that S does not need lies where S will be.
    kept = torch.empty(compressed, dtype=torch.int8, device=device)
    sides = [_split(memory, layers * a * b // 2) for memory in (kept, work[before : before + compressed])]
    sides = sides[::-1] if mirrored(a, b, digits) else sides

    units = a // PADDING, b // PADDING
    EXPAND(
        units[0] * units[1] * layers, survivors, operands, degrees, state, *sides[0], *sides[1], block_rows, block_columns,
        *units, layers, DIGITS=digits, SPARSE=sparse,
    )  # fmt: skip
    if sparse:
        sm90_products().counts(operands, sides, counts, layers, a, b, digits)
    else:
        area, plain = count_bytes(a, b) // 2, (digits - 1) * (a + b)
        counted = {"other": None, "config": config}
        multiply(operands, counts, layers, side=(0, a, a + plain), depth=b, out=(0, area, PADDING), tiles=(a, a), **counted)
        first, side = count_bytes(a, 0) // 2, (layers * a, b, plain)
        multiply(operands, counts, layers, side=side, depth=a, out=(first, area, PADDING), tiles=(b, b), **counted)
    tiles, few = count_bytes(a, b) // (2 * PADDING * PADDING), strips_for(rows, columns, layers, digits)
    for again, strips, programs in ((False, few, tiles * (4 // few)), (True, 4, min(tiles, max(1, 132 // layers)))):
        QUANTISE[digits, strips](
            programs * layers, counts, operands, degrees, state, rows, columns, *units, layers, tiles * (4 // strips), programs,
            DIGITS=digits, QMAX=QMAX[digits], AGAIN=again, COMPILED=not interpreted(), TILE=PADDING, STRIPS=strips,
        )  # fmt: skip
    if sparse:
        sm90_products().sums(operands, sides, sums, layers, a, b, digits, mirrored(a, b, digits))
    else:
        depth = (a + b) * digits
        multiply(
            operands, sums, layers, side=(0, a, 0), other=(layers * a, b, 0), depth=depth, out=(0, a * b, b), tiles=(a, b), config=config
        )
    return Raw(sums, degrees, state, a, b, QMAX[digits])


def _split(memory: torch.Tensor, values: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(2:4 values, int32 metadata) of one side, or of none, which the kernel then does not look at."""
    return memory[:values], memory[values:].view(torch.int32)


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


def ranges(raw: Raw, rows: int, columns: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """(lowest, highest) W of the first layer, expected and seen, as the kernels compute them. For tests: it waits for the device."""
    count, high_bits, low_bits = raw.state[:3].tolist()
    seen = torch.tensor([low_bits ^ ALL_BITS.value, high_bits], dtype=torch.int32).view(torch.float32).tolist()
    density = count / (rows * columns)
    expected = density / (1 - density)
    spread = 8 * ((1 - density**2) / min(rows, columns)) ** 0.5 / (1 - density) ** 2
    shared = density * 2 / 3 if density > 0.25 else 0.0
    lowest = min(expected - spread, shared / (1 - shared) - 0.35 * spread)
    return (max(lowest, 0.0), expected + (spread if density > 0.25 else 1.25 * spread)), (seen[0], seen[1])


def rounding_bound(survivors: torch.Tensor, digits: int | None = None) -> torch.Tensor:
    """float64 [N, K]: the largest possible |kernel score - exact score| of survivors int32 [N/4, K/4]. For tests: it reads
    the measured range back from the device and needs memory like the reference."""
    from .reference import link_mask

    mask = link_mask(survivors, torch.float64)
    rows, columns = mask.shape
    raw = score_raw(survivors[None], digits=digits)
    scores = score_many(survivors[None], digits=digits)[0].double()
    (low, high), seen = ranges(raw, rows, columns)
    if not low <= seen[0] <= seen[1] <= high:
        low, high = seen
    unit = max((high - low) / (2 * raw.qmax), high * 2.0**-20 + 2.0**-40)
    degrees = mask.sum(1)[:, None] + mask.sum(0)[None, :]
    return (0.5 + 2.0**-6) * unit * degrees + 2.0**-21 * scores.abs()


def score(survivors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The op: a batch of one."""
    with on_device(survivors):
        return score_many(aligned(survivors)[None])[0]
