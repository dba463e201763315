"""The sm_90 sparse product Y[T, N] = X[T, K] W[N, K]^T as a persistent, warp-specialised Gluon kernel around wgmma.sp.

The instruction's sparse operand is its left one, so a tile is Y^T = W X^T: bm rows of W by bn tokens; the epilogue stores the transpose.
One CTA (or cluster) per multiprocessor walks over the tiles. A loader warp fills a ring of stages with TMA and runs ahead into the next
tile; one or two warpgroups multiply.

A tile's results are stored while the next products run; the tensor cores never wait for the conversion and the stores:
* one m64 block a warpgroup (up to 128 accumulators): the finished block is converted, two results to a register, and these registers are
  written out under the next tile's first products;
* two blocks (up to 192 accumulators, no registers left for that): the last four steps of a tile, and the first four of the next, are
  multiplied block by block, and each block is written out while the other's products run:

      ... | block 0: 4 steps | block 1: 4 steps || next tile, block 0: 4 steps | block 1: 4 steps | ...
                              store block 0             store block 1 (of the tile before)

Metadata words are fetched from global memory four steps ahead. A register that feeds a wgmma must not be written while any wgmma is in
flight, or ptxas serialises them all (C7513): so four steps run on four fixed registers, then the pipe drains, then the words move.
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
    product,
    product_half,
    product_wait,
    store_drain,
    store_pack,
    store_start,
    store_wait,
    store_write,
    store_write_half,
    warp_in_group,
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
def _load_partition(steps, num_m, num_n, STAGES: gl.constexpr, RING: gl.constexpr, BARRIERS: gl.constexpr, BM: gl.constexpr,
                    BN: gl.constexpr, GROUP: gl.constexpr, CLUSTER: gl.constexpr, HINTS: gl.constexpr):
    STAGE: gl.constexpr = BM * 64 + BN * 128
    rank = 0
    if CLUSTER > 1:
        cluster_sync()
        rank = cluster_rank()
    if warp_in_group() == 0:
        prefetch_maps()
        s = 0
        phase = 1
        for t in range(gl.program_id(0) // CLUSTER, num_m * num_n, gl.num_programs(0) // CLUSTER):
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


# --- slots: a stage (low 8 bits) and the parity of the visit to it (bit 8), in one register ---------------------------
@gluon.jit
def _next(slot, STAGES: gl.constexpr):
    slot += 1
    return gl.where(slot % 256 == STAGES, (slot & 256) ^ 256, slot)


@gluon.jit
def _await(slot, BARRIERS: gl.constexpr):
    mbar_wait(BARRIERS + slot % 256 * 8, slot // 256)


@gluon.jit
def _release(slot, BARRIERS: gl.constexpr, STAGES: gl.constexpr, CLUSTER: gl.constexpr):
    mbar_arrive(BARRIERS + (STAGES + slot % 256) * 8, CLUSTER)


@gluon.jit
def _operands(accs, slot, flag, RING: gl.constexpr, ROW: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):
    """The slot's W and X offsets in 16-byte units and the accumulate flag (0x8000; 0: overwrite), as `product` wants them."""
    STAGE: gl.constexpr = BM * 64 + BN * 128
    at = slot % 256 * (STAGE // 16 * 65537) + (RING // 16 * 65537 + (BN * 128 + ROW * 64) // 16)
    return gl.full(accs[0].shape, at | flag, gl.int32, accs[0].type.layout)


# --- metadata --------------------------------------------------------------------------------------------------------
@gluon.jit
def _words(meta_ptr, row, step, steps, tid):
    """Metadata of four steps from `step` on, of the m64 block whose words begin at `row`; nothing is read past the last step."""
    p = meta_ptr + (row + step * 128) + tid
    yes = gl.full(tid.shape, True, gl.int1, tid.type.layout)
    return (gl.load(p), gl.load(p + 128, mask=yes & (step + 1 < steps), other=0),
            gl.load(p + 256, mask=yes & (step + 2 < steps), other=0), gl.load(p + 384, mask=yes & (step + 3 < steps), other=0))


@gluon.jit
def _words_ahead(meta_ptr, row, next_row, step, steps, tid):
    """`_words` from `step` on, or the next tile's first if that is past the last step."""
    inside = step < steps
    return _words(meta_ptr, gl.where(inside, row, next_row), gl.where(inside, step, 0), steps, tid)


@gluon.jit
def _meta_row(t, steps, num_m, num_n, tiles, ROW: gl.constexpr, BM: gl.constexpr, GROUP: gl.constexpr, CLUSTER: gl.constexpr):
    """Where the metadata words of the block at row ROW of tile t begin (past the last tile: any legal place)."""
    pm, _ = _tile(gl.minimum(t, tiles - 1), num_m, num_n, GROUP)
    return (_row_tile(pm, CLUSTER) * (BM // 64) + ROW // 64) * steps * 128


# --- multiplying, one m64 block a warpgroup --------------------------------------------------------------------------
@gluon.jit
def _bias_of(bias_ptr, row, n_out, tid, HAS_BIAS: gl.constexpr):
    """() or the bias of the two rows a thread holds: the D fragment has 16 rows a warp, g and g + 8 a lane."""
    bias = ()
    if HAS_BIAS:
        low = row + tid // 32 * 16 + tid % 32 // 4
        b0 = gl.load(bias_ptr + low, mask=low < n_out, other=0.0).to(gl.float32)
        b1 = gl.load(bias_ptr + low + 8, mask=low + 8 < n_out, other=0.0).to(gl.float32)
        bias = (gl.expand_dims(b0, 1), gl.expand_dims(b1, 1))
    return bias


@gluon.jit
def _store_packed(packed, t, num_m, num_n, ROW: gl.constexpr, WG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, Y_OFFSET: gl.constexpr,
                  Y_TOKENS: gl.constexpr, Y_BUFFERS: gl.constexpr, GROUP: gl.constexpr, CLUSTER: gl.constexpr, HINTS: gl.constexpr):
    """Store the packed block of tile t, in passes of Y_TOKENS tokens through Y_BUFFERS buffers in turn; the last stores run on."""
    pm, pn = _tile(t, num_m, num_n, GROUP)
    row = _row_tile(pm, CLUSTER) * BM + ROW
    for first in gl.static_range(0, BN, Y_TOKENS):
        buffer = Y_OFFSET + first // Y_TOKENS % Y_BUFFERS * Y_TOKENS * 128
        store_wait(Y_BUFFERS - 1, WG)
        packed = store_write(packed, first, Y_TOKENS, buffer)
        store_start(buffer, row, pn * BN + first, WG, HINTS)


@gluon.jit
def _multiply_one(meta_ptr, bias_ptr, n_out, steps, num_m, num_n, WG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
                  STAGES: gl.constexpr, RING: gl.constexpr, Y_OFFSET: gl.constexpr, Y_TOKENS: gl.constexpr, Y_BUFFERS: gl.constexpr,
                  BARRIERS: gl.constexpr, GROUP: gl.constexpr, CLUSTER: gl.constexpr, CHUNK: gl.constexpr, HAS_BIAS: gl.constexpr,
                  DTYPE: gl.constexpr, HINTS: gl.constexpr):
    """Warpgroup WG: rows [WG * 64, WG * 64 + 64) of the tile."""
    ROW: gl.constexpr = WG * 64
    L: gl.constexpr = gl.BlockedLayout([1, CHUNK], [32, 1], [4, 1], [1, 0])
    tid = gl.arange(0, 128, gl.SliceLayout(1, L))
    start = gl.program_id(0) // CLUSTER
    stride = gl.num_programs(0) // CLUSTER
    tiles = num_m * num_n
    if CLUSTER > 1:
        cluster_sync()
    zero = gl.zeros([128, CHUNK], gl.float32, L)
    accs = copies(zero, BN // 2 // CHUNK)
    accs = product_wait(accs, 0, -1)        # without it ptxas carries products in flight around Triton's worker loop (C7517)
    packed = copies(zero, BN // 4 // CHUNK)
    row = _meta_row(start, steps, num_m, num_n, tiles, ROW, BM, GROUP, CLUSTER)
    x0, x1, x2, x3 = _words(meta_ptr, row, 0, steps, tid)
    slot = 0
    for t in range(start, tiles, stride):
        first = 0
        if steps >= 4:
            # the first four steps; under the first one the tile before is stored, and what comes next is looked up
            back = slot
            for v in gl.static_range(4):
                _await(slot, BARRIERS)
                ab = _operands(accs, slot, 0x8000 if v > 0 else 0, RING, ROW, BM, BN)
                x = x0 if v == 0 else (x1 if v == 1 else (x2 if v == 2 else x3))
                accs = product(accs, ab, (gl.expand_dims(x, 1), ), BN, 1, DTYPE)
                if v == 0:
                    next_row = _meta_row(t + stride, steps, num_m, num_n, tiles, ROW, BM, GROUP, CLUSTER)
                    n0, n1, n2, n3 = _words_ahead(meta_ptr, row, next_row, 4, steps, tid)
                    if t != start:
                        _store_packed(packed, t - stride, num_m, num_n, ROW, WG, BM, BN, Y_OFFSET, Y_TOKENS, Y_BUFFERS, GROUP, CLUSTER, HINTS)
                if v > 0:
                    _release(back, BARRIERS, STAGES, CLUSTER)
                back = slot
                slot = _next(slot, STAGES)
            accs = product_wait(accs, 0, -1)
            _release(back, BARRIERS, STAGES, CLUSTER)
            x0, x1, x2, x3 = n0, n1, n2, n3
            first = 4
        else:
            next_row = _meta_row(t + stride, steps, num_m, num_n, tiles, ROW, BM, GROUP, CLUSTER)
            if t != start:
                _store_packed(packed, t - stride, num_m, num_n, ROW, WG, BM, BN, Y_OFFSET, Y_TOKENS, Y_BUFFERS, GROUP, CLUSTER, HINTS)
        for step in range(first, steps // 4 * 4, 4):
            n0, n1, n2, n3 = _words_ahead(meta_ptr, row, next_row, step + 4, steps, tid)
            back = slot
            for v in gl.static_range(4):
                _await(slot, BARRIERS)
                ab = _operands(accs, slot, 0x8000, RING, ROW, BM, BN)
                x = x0 if v == 0 else (x1 if v == 1 else (x2 if v == 2 else x3))
                accs = product(accs, ab, (gl.expand_dims(x, 1), ), BN, 1, DTYPE)
                if v > 0:
                    _release(back, BARRIERS, STAGES, CLUSTER)
                back = slot
                slot = _next(slot, STAGES)
            accs = product_wait(accs, 0, -1)
            _release(back, BARRIERS, STAGES, CLUSTER)
            x0, x1, x2, x3 = n0, n1, n2, n3
        if steps % 4 > 0:
            # what does not fill a group of four: one step at a time
            n0, n1, n2, n3 = _words_ahead(meta_ptr, row, next_row, steps, steps, tid)
            for v in range(steps % 4):
                _await(slot, BARRIERS)
                ab = _operands(accs, slot, gl.where((v > 0) | (steps >= 4), 0x8000, 0), RING, ROW, BM, BN)
                accs = product(accs, ab, (gl.expand_dims(x0, 1), ), BN, 0, DTYPE)
                _release(slot, BARRIERS, STAGES, CLUSTER)
                slot = _next(slot, STAGES)
                x0, x1 = x1, x2
            x0, x1, x2, x3 = n0, n1, n2, n3
        pm, _ = _tile(t, num_m, num_n, GROUP)
        packed = store_pack(accs, _bias_of(bias_ptr, _row_tile(pm, CLUSTER) * BM + ROW, n_out, tid, HAS_BIAS), DTYPE)
        row = next_row
    if start < tiles:
        _store_packed(packed, start + (tiles - 1 - start) // stride * stride, num_m, num_n, ROW, WG, BM, BN, Y_OFFSET, Y_TOKENS, Y_BUFFERS,
                      GROUP, CLUSTER, HINTS)
    store_drain()
    if CLUSTER > 1:
        cluster_sync()


# --- multiplying, two m64 blocks a warpgroup -------------------------------------------------------------------------
@gluon.jit
def _store_half(accs, bias_ptr, n_out, t, num_m, num_n, tid, HALF: gl.constexpr, ROW: gl.constexpr, WG: gl.constexpr, BM: gl.constexpr,
                BN: gl.constexpr, Y_OFFSET: gl.constexpr, Y_TOKENS: gl.constexpr, Y_BUFFERS: gl.constexpr, GROUP: gl.constexpr,
                CLUSTER: gl.constexpr, HAS_BIAS: gl.constexpr, DTYPE: gl.constexpr, HINTS: gl.constexpr):
    """Convert and store block HALF of tile t, in passes of Y_TOKENS tokens through Y_BUFFERS buffers in turn; the last stores run on."""
    PASSES: gl.constexpr = BN // Y_TOKENS
    pm, pn = _tile(t, num_m, num_n, GROUP)
    row = _row_tile(pm, CLUSTER) * BM + ROW + HALF * 64
    bias = _bias_of(bias_ptr, row, n_out, tid, HAS_BIAS)
    for i in gl.static_range(PASSES):
        buffer = Y_OFFSET + (HALF * PASSES + i) % Y_BUFFERS * Y_TOKENS * 128
        store_wait(Y_BUFFERS - 1, WG)
        accs = store_write_half(accs, HALF, i * Y_TOKENS, Y_TOKENS, buffer, bias, DTYPE)
        store_start(buffer, row, pn * BN + i * Y_TOKENS, WG, HINTS)
    return accs


@gluon.jit
def _half_group(accs, w0, w1, w2, w3, slot, flag, AWAIT: gl.constexpr, HALF: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
                STAGES: gl.constexpr, RING: gl.constexpr, BARRIERS: gl.constexpr, ROW: gl.constexpr, DTYPE: gl.constexpr):
    """Four steps of block HALF, from `slot` on, left in flight; flag 0: the first overwrites."""
    for v in gl.static_range(4):
        if AWAIT:
            _await(slot, BARRIERS)
        ab = _operands(accs, slot, 0x8000 if v > 0 else flag, RING, ROW, BM, BN)
        w = w0 if v == 0 else (w1 if v == 1 else (w2 if v == 2 else w3))
        accs = product_half(accs, ab, gl.expand_dims(w, 1), HALF, BN, DTYPE)
        slot = _next(slot, STAGES)
    return accs, slot


@gluon.jit
def _multiply_two(meta_ptr, bias_ptr, n_out, steps, num_m, num_n, WG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
                  STAGES: gl.constexpr, RING: gl.constexpr, Y_OFFSET: gl.constexpr, Y_TOKENS: gl.constexpr, Y_BUFFERS: gl.constexpr,
                  BARRIERS: gl.constexpr, GROUP: gl.constexpr, CLUSTER: gl.constexpr, CHUNK: gl.constexpr, HAS_BIAS: gl.constexpr,
                  DTYPE: gl.constexpr, HINTS: gl.constexpr):
    """Warpgroup WG: rows [WG * 128, WG * 128 + 128) of the tile, in two blocks."""
    ROW: gl.constexpr = WG * 128
    L: gl.constexpr = gl.BlockedLayout([1, CHUNK], [32, 1], [4, 1], [1, 0])
    tid = gl.arange(0, 128, gl.SliceLayout(1, L))
    start = gl.program_id(0) // CLUSTER
    stride = gl.num_programs(0) // CLUSTER
    tiles = num_m * num_n
    if CLUSTER > 1:
        cluster_sync()
    accs = copies(gl.zeros([128, CHUNK], gl.float32, L), BN // CHUNK)
    accs = product_wait(accs, 0, -1)        # without it ptxas carries products in flight around Triton's worker loop (C7517)
    block = steps * 128                     # metadata words from block to block
    row = _meta_row(start, steps, num_m, num_n, tiles, ROW, BM, GROUP, CLUSTER)
    x0, x1, x2, x3 = _words(meta_ptr, row, 0, steps, tid)
    y0, y1, y2, y3 = _words(meta_ptr, row + block, 0, steps, tid)
    next_row = _meta_row(start + stride, steps, num_m, num_n, tiles, ROW, BM, GROUP, CLUSTER)
    slot = 0
    for t in range(start, tiles, stride):
        step = 0
        if steps >= 4:
            # the first four steps, block by block; block 1 of the tile before is stored under block 0's
            n0, n1, n2, n3 = _words_ahead(meta_ptr, row, next_row, 4, steps, tid)
            r0, r1, r2, r3 = _words_ahead(meta_ptr, row + block, next_row + block, 4, steps, tid)
            back = slot
            accs, slot = _half_group(accs, x0, x1, x2, x3, slot, 0, True, 0, BM, BN, STAGES, RING, BARRIERS, ROW, DTYPE)
            if t != start:
                accs = _store_half(accs, bias_ptr, n_out, t - stride, num_m, num_n, tid, 1, ROW, WG, BM, BN, Y_OFFSET, Y_TOKENS, Y_BUFFERS,
                                   GROUP, CLUSTER, HAS_BIAS, DTYPE, HINTS)
            accs, slot = _half_group(accs, y0, y1, y2, y3, back, 0, False, 1, BM, BN, STAGES, RING, BARRIERS, ROW, DTYPE)
            for v in gl.static_range(4):
                accs = product_wait(accs, 3 - v, -1)
                _release(back, BARRIERS, STAGES, CLUSTER)
                back = _next(back, STAGES)
            x0, x1, x2, x3 = n0, n1, n2, n3
            y0, y1, y2, y3 = r0, r1, r2, r3
            step = 4
        else:
            if t != start:
                accs = _store_half(accs, bias_ptr, n_out, t - stride, num_m, num_n, tid, 1, ROW, WG, BM, BN, Y_OFFSET, Y_TOKENS, Y_BUFFERS,
                                   GROUP, CLUSTER, HAS_BIAS, DTYPE, HINTS)
        if steps % 4 > 0:
            # what does not fill a group of four: one step at a time
            n0, n1, n2, n3 = _words_ahead(meta_ptr, row, next_row, step + steps % 4, steps, tid)
            r0, r1, r2, r3 = _words_ahead(meta_ptr, row + block, next_row + block, step + steps % 4, steps, tid)
            for v in range(steps % 4):
                _await(slot, BARRIERS)
                ab = _operands(accs, slot, gl.where(step > 0, 0x8000, 0), RING, ROW, BM, BN)
                accs = product(accs, ab, (gl.expand_dims(x0, 1), gl.expand_dims(y0, 1)), BN, 0, DTYPE)
                _release(slot, BARRIERS, STAGES, CLUSTER)
                slot = _next(slot, STAGES)
                step += 1
                x0, x1 = x1, x2
                y0, y1 = y1, y2
            x0, x1, x2, x3 = n0, n1, n2, n3
            y0, y1, y2, y3 = r0, r1, r2, r3
        for at in range(step, steps - 4, 4):
            n0, n1, n2, n3 = _words_ahead(meta_ptr, row, next_row, at + 4, steps, tid)
            r0, r1, r2, r3 = _words_ahead(meta_ptr, row + block, next_row + block, at + 4, steps, tid)
            back = slot
            for v in gl.static_range(4):
                _await(slot, BARRIERS)
                ab = _operands(accs, slot, 0x8000, RING, ROW, BM, BN)
                x = x0 if v == 0 else (x1 if v == 1 else (x2 if v == 2 else x3))
                y = y0 if v == 0 else (y1 if v == 1 else (y2 if v == 2 else y3))
                accs = product(accs, ab, (gl.expand_dims(x, 1), gl.expand_dims(y, 1)), BN, 1, DTYPE)
                if v > 0:
                    _release(back, BARRIERS, STAGES, CLUSTER)
                back = slot
                slot = _next(slot, STAGES)
            accs = product_wait(accs, 0, -1)
            _release(back, BARRIERS, STAGES, CLUSTER)
            x0, x1, x2, x3 = n0, n1, n2, n3
            y0, y1, y2, y3 = r0, r1, r2, r3
        if steps >= 8:
            # the last four steps, block by block; block 0 is stored under block 1's
            n0, n1, n2, n3 = _words_ahead(meta_ptr, row, next_row, steps, steps, tid)
            r0, r1, r2, r3 = _words_ahead(meta_ptr, row + block, next_row + block, steps, steps, tid)
            back = slot
            accs, slot = _half_group(accs, x0, x1, x2, x3, slot, 0x8000, True, 0, BM, BN, STAGES, RING, BARRIERS, ROW, DTYPE)
            accs, slot = _half_group(accs, y0, y1, y2, y3, back, 0x8000, False, 1, BM, BN, STAGES, RING, BARRIERS, ROW, DTYPE)
            row = next_row
            next_row = _meta_row(t + 2 * stride, steps, num_m, num_n, tiles, ROW, BM, GROUP, CLUSTER)
            accs = product_wait(accs, 4, 0)
            accs = _store_half(accs, bias_ptr, n_out, t, num_m, num_n, tid, 0, ROW, WG, BM, BN, Y_OFFSET, Y_TOKENS, Y_BUFFERS, GROUP, CLUSTER,
                               HAS_BIAS, DTYPE, HINTS)
            for v in gl.static_range(4):
                accs = product_wait(accs, 3 - v, 1)
                _release(back, BARRIERS, STAGES, CLUSTER)
                back = _next(back, STAGES)
            x0, x1, x2, x3 = n0, n1, n2, n3
            y0, y1, y2, y3 = r0, r1, r2, r3
        else:
            row = next_row
            next_row = _meta_row(t + 2 * stride, steps, num_m, num_n, tiles, ROW, BM, GROUP, CLUSTER)
            accs = _store_half(accs, bias_ptr, n_out, t, num_m, num_n, tid, 0, ROW, WG, BM, BN, Y_OFFSET, Y_TOKENS, Y_BUFFERS, GROUP, CLUSTER,
                               HAS_BIAS, DTYPE, HINTS)
    if start < tiles:
        accs = _store_half(accs, bias_ptr, n_out, start + (tiles - 1 - start) // stride * stride, num_m, num_n, tid, 1, ROW, WG, BM, BN,
                           Y_OFFSET, Y_TOKENS, Y_BUFFERS, GROUP, CLUSTER, HAS_BIAS, DTYPE, HINTS)
    store_drain()
    if CLUSTER > 1:
        cluster_sync()


@gluon.jit
def chts_spmm_sm90(w_desc, x_desc, y_desc, meta_ptr, bias_ptr, n_out, steps, num_m, num_n, BM: gl.constexpr, BN: gl.constexpr,
                   WARPGROUPS: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr, Y_OFFSET: gl.constexpr,
                   Y_TOKENS: gl.constexpr, Y_BUFFERS: gl.constexpr, BARRIERS: gl.constexpr, GROUP: gl.constexpr, CLUSTER: gl.constexpr,
                   CHUNK: gl.constexpr, HAS_BIAS: gl.constexpr, DTYPE: gl.constexpr, HINTS: gl.constexpr, SOURCE: gl.constexpr):
    """steps: 64-column steps of K; num_m counts row tiles of CLUSTER * BM rows. Shared memory from RING on: STAGES of (X tile, W tile),
    Y_BUFFERS output buffers per warpgroup at Y_OFFSET, and at BARRIERS a full and an empty mbarrier per stage. SOURCE only names the
    inline PTX this was built from: Triton's cache key does not see the builtins' code."""
    for i in gl.static_range(STAGES):
        mbar_init(BARRIERS + i * 8, 1)                                        # full: the loader's announcement
        mbar_init(BARRIERS + (STAGES + i) * 8, 4 * WARPGROUPS * CLUSTER)      # empty: every multiplying warp of the cluster
    mbar_init_fence()
    thread_barrier()
    Y_SECOND: gl.constexpr = Y_OFFSET + Y_BUFFERS * Y_TOKENS * 128
    if BLOCKS == 2:
        gl.warp_specialize([
            (_multiply_two, (meta_ptr, bias_ptr, n_out, steps, num_m, num_n, 0, BM, BN, STAGES, RING, Y_OFFSET, Y_TOKENS, Y_BUFFERS,
                            BARRIERS, GROUP, CLUSTER, CHUNK, HAS_BIAS, DTYPE, HINTS)),
            (_multiply_two, (meta_ptr, bias_ptr, n_out, steps, num_m, num_n, 1, BM, BN, STAGES, RING, Y_SECOND, Y_TOKENS, Y_BUFFERS,
                            BARRIERS, GROUP, CLUSTER, CHUNK, HAS_BIAS, DTYPE, HINTS)),
            (_load_partition, (steps, num_m, num_n, STAGES, RING, BARRIERS, BM, BN, GROUP, CLUSTER, HINTS)),
        ], [4, 4], [240, 24])
    elif WARPGROUPS == 2:
        gl.warp_specialize([
            (_multiply_one, (meta_ptr, bias_ptr, n_out, steps, num_m, num_n, 0, BM, BN, STAGES, RING, Y_OFFSET, Y_TOKENS, Y_BUFFERS,
                            BARRIERS, GROUP, CLUSTER, CHUNK, HAS_BIAS, DTYPE, HINTS)),
            (_multiply_one, (meta_ptr, bias_ptr, n_out, steps, num_m, num_n, 1, BM, BN, STAGES, RING, Y_SECOND, Y_TOKENS, Y_BUFFERS,
                            BARRIERS, GROUP, CLUSTER, CHUNK, HAS_BIAS, DTYPE, HINTS)),
            (_load_partition, (steps, num_m, num_n, STAGES, RING, BARRIERS, BM, BN, GROUP, CLUSTER, HINTS)),
        ], [4, 4], [240, 24])
    else:
        gl.warp_specialize([
            (_multiply_one, (meta_ptr, bias_ptr, n_out, steps, num_m, num_n, 0, BM, BN, STAGES, RING, Y_OFFSET, Y_TOKENS, Y_BUFFERS,
                            BARRIERS, GROUP, CLUSTER, CHUNK, HAS_BIAS, DTYPE, HINTS)),
            (_load_partition, (steps, num_m, num_n, STAGES, RING, BARRIERS, BM, BN, GROUP, CLUSTER, HINTS)),
        ], [4], [24])
