"""Gluon kernel of the scores' int8 products on compute capability 9.0, with the survivors as wgmma.sp's compressed operand.

One CTA per multiprocessor walks over output tiles of 256 x 128: a loader warp feeds a ring of STAGES stages of 128 columns by
TMA, two warpgroups of two stacked m64 blocks multiply, one stage in flight while the next is issued, and store their sums
straight from registers.

* COUNTS: ``P = M M^T`` and ``P = M^T M`` of every layer in one launch, on and above the diagonal; A is compressed.
* else: ``S``: first the term whose left operand is the survivors, compressed, then into the same registers the other one, dense
  (there the survivors are the right operand, which cannot be sparse). With two digits both once more, sums times 64 between.

Metadata words are fetched from global memory a group of GROUP stages ahead. A register that feeds a wgmma must not be written
while any wgmma is in flight, or ptxas serialises them all (C7513): so a group runs on fixed registers, then the pipe drains,
then the words move.
"""

from __future__ import annotations

from ...gluon_compat import gl, gluon, thread_barrier
from ..spmm.sm90_ptx import copies, mbar_arrive, mbar_init, mbar_init_fence, warp_in_group
from .sm90_ptx import (
    dense_product,
    load_stage,
    mbar_wait,
    sparse_product,
    store_block,
    wait_all,
    warpgroup_index,
)


@gluon.jit
def whole_tile(t, tiles, BAND: gl.constexpr):
    """Tile t of those 256 x 128 tiles of a symmetric matrix of ``tiles`` x ``tiles`` blocks of 128 whose two blocks both lie on or above
    the diagonal: (row m of 256, column j of 128), j > 2 m. In bands of BAND rows, column by column, for the sake of L2."""
    first = t * 0
    height = gl.minimum(tiles // 2, BAND)
    size = height * (tiles - height)
    while t >= size:
        t -= size
        first += BAND
        height = gl.minimum(tiles // 2 - first, BAND)
        size = height * (tiles - 2 * first - height)
    # The corner: columns 2 c + 1 and 2 c + 2 hold c + 1 rows; beyond it every column holds all.
    pair = first * 0
    for i in gl.static_range(1, BAND):
        pair += (t >= i * (i + 1)).to(gl.int32)
    in_corner = t < height * (height + 1)
    place = t - pair * (pair + 1)
    past = t - height * (height + 1)
    row = gl.where(in_corner, place % (pair + 1), past % height)
    column = gl.where(in_corner, 2 * pair + place // (pair + 1), 2 * height + past // height)
    return first + row, 2 * first + column + 1


@gluon.jit
def counted_tile(t, layers, deeper, tiles_m, tiles_n, BAND: gl.constexpr):
    """(layer, side, m, n) of tile t of all counts: the longest first, so that the last wave is short. Whole tiles of the side with the
    longer sums, of the other one, then the tiles (m, 2 m), half of which lies below the diagonal, in the same order."""
    first_tiles, second_tiles = gl.where(deeper > 0, tiles_n, tiles_m), gl.where(deeper > 0, tiles_m, tiles_n)
    whole = layers * (first_tiles * first_tiles // 4 + second_tiles * second_tiles // 4)
    half = t >= whole
    t = gl.where(half, t - whole, t)
    of_first = gl.where(half, (first_tiles + 1) // 2, first_tiles * first_tiles // 4)
    of_second = gl.where(half, (second_tiles + 1) // 2, second_tiles * second_tiles // 4)
    second = t >= layers * of_first
    t = gl.where(second, t - layers * of_first, t)
    per_layer = gl.where(second, of_second, of_first)
    side = gl.where(second, 1 - deeper, deeper)
    layer, t = t // per_layer, t % per_layer
    m, n = whole_tile(gl.where(half, 0, t), gl.where(side > 0, tiles_n, tiles_m), BAND)
    return layer, side, gl.where(half, t, m), gl.where(half, 2 * t, n)


@gluon.jit
def walk_length(tiles):
    """Tiles of this CTA: in every wave one, CTAs in order, then in reverse order: who began with a long tile ends with a short one."""
    waves, rest = tiles // gl.num_programs(0), tiles % gl.num_programs(0)
    return waves + (wave_place(waves) < rest).to(gl.int32)


@gluon.jit
def wave_place(wave):
    return gl.where(wave % 2 > 0, gl.num_programs(0) - 1 - gl.program_id(0), gl.program_id(0))


@gluon.jit
def banded_tile(t, tiles_m, tiles_n, BAND: gl.constexpr):
    """Tile t of a grid, in bands of BAND rows, column by column."""
    band, place = t // (BAND * tiles_n), t % (BAND * tiles_n)
    height = gl.minimum(tiles_m - band * BAND, BAND)
    return band * BAND + place % height, place // height


@gluon.jit
def uncut_tile(t, whole):
    """(tile, part) of entry t: after the ``whole`` first tiles come halves of tiles, a warpgroup's each: 1 the upper one, 2 the lower."""
    past = gl.maximum(t - whole, 0)
    return gl.where(t < whole, t, whole + past // 2), gl.where(t < whole, 0, 1 + past % 2)


@gluon.jit
def _where(wave, layers, deeper, whole, tiles_m, tiles_n, COUNTS: gl.constexpr, BAND: gl.constexpr):
    """(layer, side, row of 256, column of 128) of this CTA's tile of a wave; instead of a side the sums have a part of the tile."""
    t = wave * gl.num_programs(0) + wave_place(wave)
    if COUNTS:
        layer, side, m, n = counted_tile(t, layers, deeper, tiles_m, tiles_n, BAND)
    else:
        t, side = uncut_tile(t, whole)
        layer = t // (tiles_m * tiles_n)
        m, n = banded_tile(t % (tiles_m * tiles_n), tiles_m, tiles_n, BAND)
    return layer, side, m, n


@gluon.jit
def _load_partition(a_first, a_rows, b_first, b_rows, a_column, b_column, b_dense, digit_columns, sparse_steps, dense_steps,
                    tiles_m, tiles_n, layers, deeper, whole, tiles, COUNTS: gl.constexpr, DIGITS: gl.constexpr,
                    STAGES: gl.constexpr, STAGE: gl.constexpr, B_OFFSET: gl.constexpr, RING: gl.constexpr,
                    BARRIERS: gl.constexpr, BAND: gl.constexpr):  # fmt: skip
    if warp_in_group() == 0:
        s = 0
        phase = 1
        for wave in range(0, walk_length(tiles)):
            layer, side, m, n = _where(wave, layers, deeper, whole, tiles_m, tiles_n, COUNTS, BAND)
            if COUNTS:
                # A: compressed rows of the side; B: rows of the same side, uncompressed
                rows = gl.where(side > 0, b_rows, a_rows)
                a_row = layer * rows + m * 256
                b_row = gl.where(side > 0, b_first, a_first) + layer * rows + n * 128
                column = gl.where(side > 0, b_column, a_column)
                for k in range(gl.where(side > 0, dense_steps, sparse_steps)):
                    mbar_wait(BARRIERS + (STAGES + s) * 8, phase)
                    if side > 0:
                        load_stage(RING + s * STAGE, BARRIERS + s * 8, a_row, b_row, k * 32, column + k * 64, 1, 64, 256, 128, B_OFFSET)
                    else:
                        load_stage(RING + s * STAGE, BARRIERS + s * 8, a_row, b_row, k * 32, column + k * 64, 0, 64, 256, 128, B_OFFSET)
                    s += 1
                    if s == STAGES:
                        s = 0
                        phase ^= 1
            else:
                sparse_row = layer * a_rows + m * 256
                a_row = a_first + sparse_row
                b_row = b_first + layer * b_rows + n * 128
                for digit in gl.static_range(DIGITS):
                    column = b_column + digit * digit_columns
                    for k in range(sparse_steps):
                        mbar_wait(BARRIERS + (STAGES + s) * 8, phase)
                        load_stage(RING + s * STAGE, BARRIERS + s * 8, sparse_row, b_row, k * 32, column + k * 64, 0, 64, 256, 128,
                                   B_OFFSET)  # fmt: skip
                        s += 1
                        if s == STAGES:
                            s = 0
                            phase ^= 1
                    column = a_column + digit * digit_columns
                    for k in range(dense_steps):
                        mbar_wait(BARRIERS + (STAGES + s) * 8, phase)
                        load_stage(RING + s * STAGE, BARRIERS + s * 8, a_row, b_row, column + k * 64, b_dense + k * 64, 1, 128, 256,
                                   128, B_OFFSET)  # fmt: skip
                        s += 1
                        if s == STAGES:
                            s = 0
                            phase ^= 1


@gluon.jit
def _words(meta_ptr, at, step, steps, tid, STEPS: gl.constexpr):
    """Metadata of STEPS stages from ``step`` on: of each, block 0's two words, then block 1's. ``at``: block 0's first word."""
    words = ()
    for i in gl.static_range(STEPS):
        for block in gl.static_range(2):
            p = meta_ptr + (at + (block * steps + step + i) * 256) + tid
            words = words + (gl.expand_dims(gl.load(p), 1), gl.expand_dims(gl.load(p + 128), 1))
    return words


@gluon.jit
def _advance(s, phase, STAGES: gl.constexpr):
    s += 1
    return gl.where(s == STAGES, 0, s), gl.where(s == STAGES, phase ^ 1, phase)


@gluon.jit
def _stage_before(s, STAGES: gl.constexpr):
    return gl.where(s == 0, STAGES - 1, s - 1)


@gluon.jit
def _multiply_partition(meta_ptr, other_meta_ptr, out_ptr, a_rows, b_rows, sparse_steps, dense_steps, out_first, out_layer, out_stride,
                        rows, columns, tiles_m, tiles_n, layers, deeper, whole, tiles, COUNTS: gl.constexpr,
                        DIGITS: gl.constexpr, TRANSPOSED: gl.constexpr, STAGES: gl.constexpr, STAGE: gl.constexpr,
                        B_OFFSET: gl.constexpr, RING: gl.constexpr, BARRIERS: gl.constexpr, BAND: gl.constexpr,
                        GROUP: gl.constexpr):  # fmt: skip
    L: gl.constexpr = gl.BlockedLayout([1, 128], [32, 1], [8, 1], [1, 0])
    AT: gl.constexpr = STAGE // 16 * 65537
    tid = gl.arange(0, 256, gl.SliceLayout(1, L))
    wg = warpgroup_index()
    sums = copies(gl.zeros([256, 128], gl.int32, L), 1)
    sparse_base = (RING + wg * 8192) // 16 | ((RING + B_OFFSET) // 16 << 16)
    dense_base = (RING + wg * 16384) // 16 | ((RING + B_OFFSET) // 16 << 16)
    s = 0
    phase = 0
    for wave in range(0, walk_length(tiles)):
        layer, side, m, n = _where(wave, layers, deeper, whole, tiles_m, tiles_n, COUNTS, BAND)
        steps = sparse_steps
        source = meta_ptr
        slabs = a_rows // 64
        if COUNTS:
            steps = gl.where(side > 0, dense_steps, sparse_steps)
            slabs = gl.where(side > 0, b_rows, a_rows) // 64
            if side > 0:
                source = other_meta_ptr
        # A warpgroup whose block lies below the diagonal, or which another CTA computes, leaves the tensor cores to the other one.
        if COUNTS:
            size = gl.where(side > 0, tiles_n, tiles_m)
            needed = (2 * m + wg <= n) & (2 * m + wg < size)
        else:
            needed = (side == 0) | (side == 1 + wg)
        work = gl.where(needed, steps, 0)
        # The last tile may overhang by one warpgroup, whose results nobody stores: any metadata will do, but it must be metadata.
        slab = layer * slabs + gl.minimum(m * 4 + wg * 2, slabs - 2)
        at = slab * steps * 256
        lane = tid % 128
        for digit in gl.static_range(DIGITS):
            if digit > 0:
                sums = wait_all(sums, 6)
            now = _words(source, at, 0, steps, lane, GROUP)
            for step in range(0, work // GROUP * GROUP, GROUP):
                ahead = gl.minimum(step + GROUP, gl.maximum(steps - GROUP, 0))  # the last fetch is not needed
                following = _words(source, at, ahead, steps, lane, GROUP)
                before = s
                for i in gl.static_range(GROUP):
                    mbar_wait(BARRIERS + s * 8, phase)
                    flag = 0x8000
                    if digit == 0 and i == 0:
                        flag = gl.where(step > 0, 0x8000, 0)  # a tile's first product overwrites: no zeroing
                    words = (now[4 * i], now[4 * i + 1], now[4 * i + 2], now[4 * i + 3])
                    sums = sparse_product(sums, (sparse_base + s * AT) | flag, words, 2, 128)
                    if i > 0:
                        mbar_arrive(BARRIERS + (STAGES + before) * 8, 1)
                    before = s
                    s, phase = _advance(s, phase, STAGES)
                sums = wait_all(sums, 0)
                mbar_arrive(BARRIERS + (STAGES + before) * 8, 1)
                now = following
            for step in range(work // GROUP * GROUP, work):
                words = _words(source, at, step, steps, lane, 1)
                mbar_wait(BARRIERS + s * 8, phase)
                flag = 0x8000
                if digit == 0:
                    flag = gl.where(step > 0, 0x8000, 0)
                sums = sparse_product(sums, (sparse_base + s * AT) | flag, words, 2, 128)
                sums = wait_all(sums, 0)
                mbar_arrive(BARRIERS + (STAGES + s) * 8, 1)
                s, phase = _advance(s, phase, STAGES)
            for _ in range(steps - work):
                mbar_wait(BARRIERS + s * 8, phase)
                mbar_arrive(BARRIERS + (STAGES + s) * 8, 1)
                s, phase = _advance(s, phase, STAGES)
            if not COUNTS:
                work_dense = gl.where(needed, dense_steps, 0)
                # No stage before may be carried round the loop: Triton 3.6 takes two carried values that start equal for one.
                for step in range(work_dense):
                    mbar_wait(BARRIERS + s * 8, phase)
                    sums = dense_product(sums, (dense_base + s * AT) | 0x8000, 2, 128)
                    if step > 0:
                        mbar_arrive(BARRIERS + (STAGES + _stage_before(s, STAGES)) * 8, 1)
                    s, phase = _advance(s, phase, STAGES)
                sums = wait_all(sums, 0)
                if work_dense > 0:
                    mbar_arrive(BARRIERS + (STAGES + _stage_before(s, STAGES)) * 8, 1)
                for _ in range(dense_steps - work_dense):
                    mbar_wait(BARRIERS + s * 8, phase)
                    mbar_arrive(BARRIERS + (STAGES + s) * 8, 1)
                    s, phase = _advance(s, phase, STAGES)
        if COUNTS:  # tiles of 128 x 128, those on and above the diagonal only, one after the other
            i = 2 * m + wg
            valid = gl.where(needed, 128, 0)
            number = i * size - i * (i - 1) // 2 + n - i + side * (tiles_m * (tiles_m + 1) // 2)
            address = out_ptr.to(gl.int64) + (layer.to(gl.int64) * out_layer + number.to(gl.int64) * 16384) * 2
            for block in gl.static_range(2):
                sums = store_block(sums, block, address + block * 16384, 256, valid, 128, 2, False)
        else:
            row = m * 256 + wg * 128
            valid = gl.where((row < rows) & needed, columns - n * 128, 0)
            address = out_ptr.to(gl.int64) + layer.to(gl.int64) * out_layer * 4
            for block in gl.static_range(2):
                if TRANSPOSED:
                    corner = (n * 128).to(gl.int64) * out_stride + (row + block * 64)
                else:
                    corner = (row + block * 64).to(gl.int64) * out_stride + n * 128
                sums = store_block(sums, block, address + corner * 4, out_stride * 4, valid, 128, 4, TRANSPOSED)


@gluon.jit
def chts_score_sm90(map0_desc, map1_desc, map2_desc, out_ptr, meta_ptr, other_meta_ptr, a_first, a_rows, b_first, b_rows, a_column,
                    b_column, b_dense, digit_columns, sparse_steps, dense_steps, out_first, out_layer, out_stride, rows, columns,
                    tiles_m, tiles_n, layers, deeper, whole, tiles, COUNTS: gl.constexpr, DIGITS: gl.constexpr,
                    TRANSPOSED: gl.constexpr, STAGES: gl.constexpr, STAGE: gl.constexpr, B_OFFSET: gl.constexpr,
                    RING: gl.constexpr, BARRIERS: gl.constexpr, BAND: gl.constexpr, GROUP: gl.constexpr,
                    SOURCE: gl.constexpr):  # fmt: skip
    """Shared memory: at RING STAGES of (A tile, B tile), at BARRIERS a full and an empty mbarrier per stage. SOURCE only names the
    inline PTX this was built from: Triton's cache key does not see the builtins' code."""
    for i in gl.static_range(STAGES):
        mbar_init(BARRIERS + i * 8, 1)  # full: the loader's announcement
        mbar_init(BARRIERS + (STAGES + i) * 8, 8)  # empty: every multiplying warp
    mbar_init_fence()
    thread_barrier()
    gl.warp_specialize([
        (_multiply_partition, (meta_ptr, other_meta_ptr, out_ptr, a_rows, b_rows, sparse_steps, dense_steps, out_first, out_layer,
                               out_stride, rows, columns, tiles_m, tiles_n, layers, deeper, whole, tiles, COUNTS, DIGITS,
                               TRANSPOSED, STAGES, STAGE, B_OFFSET, RING, BARRIERS, BAND, GROUP)),
        (_load_partition, (a_first, a_rows, b_first, b_rows, a_column, b_column, b_dense, digit_columns, sparse_steps, dense_steps,
                           tiles_m, tiles_n, layers, deeper, whole, tiles, COUNTS, DIGITS, STAGES, STAGE, B_OFFSET, RING,
                           BARRIERS, BAND)),
    ], [4], [40])  # fmt: skip
