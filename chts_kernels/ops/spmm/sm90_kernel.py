"""The sm_90 sparse product Y[T, N] = X[T, K] W[N, K]^T as a persistent, warp-specialised Gluon kernel around wgmma.sp.

The instruction's sparse operand is its left one, so a tile is Y^T = W X^T: bm rows of W by bn tokens; the epilogue stores the transpose.
One CTA (or cluster) per multiprocessor walks over the tiles. A loader warp fills a ring of stages with TMA and runs ahead into the next
tile; the warpgroups multiply, and their stores run on under the next tile's products.

Metadata words are fetched from global memory a group of four steps ahead, or several groups where tiles are small and steps short.
A register that feeds a wgmma must not be written while any wgmma is in flight, or ptxas serialises them all (C7513): so four steps
run on four fixed registers, then the pipe drains, then the words move.

The kernel lets the one behind it start at once, and waits for the one ahead before it touches memory: launched with the attribute of
programmatic dependent launch, its start-up runs under the end of whatever is ahead.
"""
from __future__ import annotations

from ...gluon_compat import gl, gluon, thread_barrier
from .sm90_ptx import (
    cluster_rank,
    cluster_sync,
    copies,
    load_stage,
    mbar_arrive,
    mbar_init,
    mbar_init_fence,
    mbar_wait,
    prefetch_maps,
    rotated,
    shifted,
    store_block,
    store_drain,
    wait_for_predecessor,
    warp_in_group,
    wgmma_sp,
    wgmma_wait_all,
)


@gluon.jit
def _tile(t, num_m, num_n, GROUP: gl.constexpr):
    """Tile t -> (row tile, token tile): column by column inside bands of GROUP row tiles."""
    width = GROUP * num_n
    band = t // width
    size = gl.minimum(num_m - band * GROUP, GROUP)
    r = t % width
    return band * GROUP + r % size, r // size


@gluon.jit
def _row_tile(pm, CLUSTER: gl.constexpr):
    """This CTA's row tile among its cluster's. The rank is read again at every use: a register less to keep."""
    if CLUSTER > 1:
        pm = pm * CLUSTER + cluster_rank()
    return pm


@gluon.jit
def _load_partition(steps, num_m, num_n, STAGES: gl.constexpr, RING: gl.constexpr, BARRIERS: gl.constexpr,
                    BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr, CLUSTER: gl.constexpr, HINTS: gl.constexpr):
    STAGE: gl.constexpr = BM * 64 + BN * 128
    start = gl.program_id(0) // CLUSTER
    stride = gl.num_programs(0) // CLUSTER
    rank = 0
    if CLUSTER > 1:
        cluster_sync()
        rank = cluster_rank()
    if warp_in_group() == 0:
        s = 0
        phase = 1
        for t in range(start, num_m * num_n, stride):
            pm, pn = _tile(t, num_m, num_n, GROUP)
            pm = pm * CLUSTER + rank
            for step in range(steps):
                mbar_wait(BARRIERS + (STAGES + s) * 8, phase)
                load_stage(RING + s * STAGE, BARRIERS + s * 8, pm * BM, pn * BN + rank * (BN // CLUSTER), step * 32, step * 64, rank,
                           BM, BN, CLUSTER, HINTS)
                s += 1
                if s == STAGES:
                    s = 0
                    phase ^= 1
    if CLUSTER > 1:
        cluster_sync()          # no CTA leaves while its peer may still write to it


@gluon.jit
def _multiply(accs, x, y, slot, flag, STAGES: gl.constexpr, RING: gl.constexpr, BARRIERS: gl.constexpr, ROWS: gl.constexpr,
              BLOCKS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, DTYPE: gl.constexpr):
    """Issue one step's products, from the slot's stage once it is full; the step before is finished on return. flag 0: overwrite."""
    STAGE: gl.constexpr = BM * 64 + BN * 128
    s = slot % 256
    mbar_wait(BARRIERS + s * 8, slot // 256)
    at = s * (STAGE // 16 * 65537) + (RING // 16 * 65537 + (BN * 128 + ROWS * 64) // 16)
    ab = gl.full(accs[0].shape, at | flag, gl.int32, accs[0].type.layout)
    if BLOCKS == 1:
        accs = wgmma_sp(accs, ab, (gl.expand_dims(x, 1), ), BN, DTYPE)
    else:
        accs = wgmma_sp(accs, ab, (gl.expand_dims(x, 1), gl.expand_dims(y, 1)), BN, DTYPE)
    return accs


@gluon.jit
def _next(slot, STAGES: gl.constexpr):
    """A slot is a stage (low 8 bits) and the parity of the visit to it (bit 8), in one register."""
    slot += 1
    return gl.where(slot % 256 == STAGES, (slot & 256) ^ 256, slot)


@gluon.jit
def _words(meta_ptr, row, step, steps, tid, MASK_FIRST: gl.constexpr):
    """Metadata of four steps from `step` on, of the m64 block whose words begin at `row`; nothing is read past the last step."""
    p = meta_ptr + (row + step * 128) + tid
    yes = gl.full(tid.shape, True, gl.int1, tid.type.layout)
    if MASK_FIRST:
        first = gl.load(p, mask=yes & (step < steps), other=0)
    else:
        first = gl.load(p)
    return (first, gl.load(p + 128, mask=yes & (step + 1 < steps), other=0),
            gl.load(p + 256, mask=yes & (step + 2 < steps), other=0), gl.load(p + 384, mask=yes & (step + 3 < steps), other=0))


@gluon.jit
def _first_words(meta_ptr, row, steps, tid, AHEAD: gl.constexpr):
    """Metadata of a tile's first AHEAD groups of four steps."""
    words = _words(meta_ptr, row, 0, steps, tid, False)
    for group in gl.static_range(1, AHEAD):
        words = words + _words(meta_ptr, row, 4 * group, steps, tid, True)
    return words


@gluon.jit
def _multiply_partition(meta_ptr, bias_ptr, n_out, steps, num_m, num_n, WG: gl.constexpr, BM: gl.constexpr,
                        BN: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr, Y_OFFSET: gl.constexpr,
                        Y_TOKENS: gl.constexpr, BARRIERS: gl.constexpr, GROUP: gl.constexpr, CLUSTER: gl.constexpr,
                        AHEAD: gl.constexpr, CHUNK: gl.constexpr, HAS_BIAS: gl.constexpr, DTYPE: gl.constexpr,
                        HINTS: gl.constexpr):
    """Warpgroup WG: rows [WG * BLOCKS * 64, (WG + 1) * BLOCKS * 64) of the tile."""
    ROWS: gl.constexpr = WG * BLOCKS * 64
    CHUNKS: gl.constexpr = BN // 2 // CHUNK
    EMPTY: gl.constexpr = BARRIERS + STAGES * 8
    # The accumulator is [thread, register], no MMA layout: per-thread scalars broadcast along a row, and every operand of the inline
    # PTX has one shape.
    L: gl.constexpr = gl.BlockedLayout([1, CHUNK], [32, 1], [4, 1], [1, 0])
    tid = gl.arange(0, 128, gl.SliceLayout(1, L))
    start = gl.program_id(0) // CLUSTER
    stride = gl.num_programs(0) // CLUSTER
    tiles = num_m * num_n
    if CLUSTER > 1:
        cluster_sync()
    accs = copies(gl.zeros([128, CHUNK], gl.float32, L), BLOCKS * CHUNKS)
    pm, _ = _tile(start, num_m, num_n, GROUP)
    row = (_row_tile(pm, CLUSTER) * (BM // 64) + WG * BLOCKS) * steps * 128
    second = (BLOCKS - 1) * steps * 128               # the other m64 block's words; BLOCKS == 1: the same loads, merged by the compiler
    xs = _first_words(meta_ptr, row, steps, tid, AHEAD)
    ys = _first_words(meta_ptr, row + second, steps, tid, AHEAD)
    slot = 0
    for t in range(start, tiles, stride):
        nm, _ = _tile(gl.minimum(t + stride, tiles - 1), num_m, num_n, GROUP)
        next_row = (_row_tile(nm, CLUSTER) * (BM // 64) + WG * BLOCKS) * steps * 128
        for step in range(0, steps // 4 * 4, 4):
            at, ahead = row, step + 4 * AHEAD
            if AHEAD == 1:                            # at a tile's end: fetch the next tile's first words
                more = ahead < steps
                at = gl.where(more, row, next_row)
                ahead = gl.where(more, ahead, 0)
            next_xs = _words(meta_ptr, at, ahead, steps, tid, AHEAD > 1)
            next_ys = _words(meta_ptr, at + second, ahead, steps, tid, AHEAD > 1)
            before = slot % 256
            for v in gl.static_range(4):
                flag = 0x8000
                if v == 0:
                    flag = gl.where(step > 0, 0x8000, 0)    # a tile's first product overwrites: no zeroing
                accs = _multiply(accs, xs[v], ys[v], slot, flag, STAGES, RING, BARRIERS, ROWS, BLOCKS, BM, BN, DTYPE)
                if v > 0:
                    mbar_arrive(EMPTY + before * 8, CLUSTER)
                before = slot % 256
                slot = _next(slot, STAGES)
            accs = wgmma_wait_all(accs)
            mbar_arrive(EMPTY + before * 8, CLUSTER)
            xs = shifted(xs, next_xs)
            ys = shifted(ys, next_ys)
        rest = steps % 4
        if rest > 0:
            if AHEAD == 1:
                next_xs = _words(meta_ptr, next_row, 0, steps, tid, False)
                next_ys = _words(meta_ptr, next_row + second, 0, steps, tid, False)
            for v in range(rest):
                flag = gl.where((v > 0) | (steps >= 4), 0x8000, 0)
                accs = _multiply(accs, xs[0], ys[0], slot, flag, STAGES, RING, BARRIERS, ROWS, BLOCKS, BM, BN, DTYPE)
                accs = wgmma_wait_all(accs)
                mbar_arrive(EMPTY + slot % 256 * 8, CLUSTER)
                slot = _next(slot, STAGES)
                xs = rotated(xs)
                ys = rotated(ys)
            if AHEAD == 1:
                xs = next_xs
                ys = next_ys
        if AHEAD > 1:
            xs = _first_words(meta_ptr, next_row, steps, tid, AHEAD)
            ys = _first_words(meta_ptr, next_row + second, steps, tid, AHEAD)
        pm, pn = _tile(t, num_m, num_n, GROUP)
        pm = _row_tile(pm, CLUSTER)
        for block in gl.static_range(BLOCKS):
            out_row = pm * BM + ROWS + block * 64
            if HAS_BIAS:
                low = out_row + tid // 32 * 16 + tid % 32 // 4          # the D fragment's rows: 16 a warp, g and g + 8 a lane
                b0 = gl.load(bias_ptr + low, mask=low < n_out, other=0.0).to(gl.float32)
                b1 = gl.load(bias_ptr + low + 8, mask=low + 8 < n_out, other=0.0).to(gl.float32)
                accs = store_block(accs, block, CHUNKS, Y_TOKENS, Y_OFFSET + WG * Y_TOKENS * 128, out_row, pn * BN,
                                   (gl.expand_dims(b0, 1), gl.expand_dims(b1, 1)), WG, DTYPE, HINTS)
            else:
                accs = store_block(accs, block, CHUNKS, Y_TOKENS, Y_OFFSET + WG * Y_TOKENS * 128, out_row, pn * BN, (), WG, DTYPE, HINTS)
        row = next_row
    store_drain()
    if CLUSTER > 1:
        cluster_sync()


@gluon.jit
def chts_spmm_sm90(w_desc, x_desc, y_desc, meta_ptr, bias_ptr, n_out, steps, num_m, num_n, BM: gl.constexpr, BN: gl.constexpr,
                   WARPGROUPS: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr, Y_OFFSET: gl.constexpr,
                   Y_TOKENS: gl.constexpr, BARRIERS: gl.constexpr, GROUP: gl.constexpr, CLUSTER: gl.constexpr,
                   AHEAD: gl.constexpr, CHUNK: gl.constexpr, HAS_BIAS: gl.constexpr, DTYPE: gl.constexpr,
                   HINTS: gl.constexpr, SOURCE: gl.constexpr):
    """steps: 64-column steps of K; num_m counts row tiles of CLUSTER * BM rows. Shared memory from RING on: STAGES of (X tile, W tile),
    an output buffer per warpgroup at Y_OFFSET, and at BARRIERS a full and an empty mbarrier per stage. SOURCE only names the
    inline PTX this was built from: Triton's cache key does not see the builtins' code."""
    prefetch_maps()
    for i in gl.static_range(STAGES):
        mbar_init(BARRIERS + i * 8, 1)                                        # full: the loader's announcement
        mbar_init(BARRIERS + (STAGES + i) * 8, 4 * WARPGROUPS * CLUSTER)      # empty: every multiplying warp of the cluster
    mbar_init_fence()
    wait_for_predecessor()
    thread_barrier()
    if WARPGROUPS == 2:
        gl.warp_specialize([
            (_multiply_partition, (meta_ptr, bias_ptr, n_out, steps, num_m, num_n, 0, BM, BN, BLOCKS, STAGES, RING, Y_OFFSET,
                                   Y_TOKENS, BARRIERS, GROUP, CLUSTER, AHEAD, CHUNK, HAS_BIAS, DTYPE, HINTS)),
            (_multiply_partition, (meta_ptr, bias_ptr, n_out, steps, num_m, num_n, 1, BM, BN, BLOCKS, STAGES, RING, Y_OFFSET,
                                   Y_TOKENS, BARRIERS, GROUP, CLUSTER, AHEAD, CHUNK, HAS_BIAS, DTYPE, HINTS)),
            (_load_partition, (steps, num_m, num_n, STAGES, RING, BARRIERS, BM, BN, GROUP, CLUSTER, HINTS)),
        ], [4, 4], [240, 24])
    else:
        gl.warp_specialize([
            (_multiply_partition, (meta_ptr, bias_ptr, n_out, steps, num_m, num_n, 0, BM, BN, BLOCKS, STAGES, RING, Y_OFFSET,
                                   Y_TOKENS, BARRIERS, GROUP, CLUSTER, AHEAD, CHUNK, HAS_BIAS, DTYPE, HINTS)),
            (_load_partition, (steps, num_m, num_n, STAGES, RING, BARRIERS, BM, BN, GROUP, CLUSTER, HINTS)),
        ], [4], [24])
