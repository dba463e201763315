"""Gluon kernel of the sm_90 weight gradient: dvalues [N, K*n/4] = the links of dY^T X. Host side: sm90_wgmma.py.

One CTA per SM: two MMA warpgroups share a BM x BN tile of dW (BM along the out features), a loader warp feeds them through a
ring of STAGES stages of 64 tokens (dY slabs, then X slabs), and the links leave the accumulators straight to memory while
the loader already fills the ring for the next tile. Warpgroup 1 starts a stage late: then each warpgroup's epilogue runs
under the other's multiplications.

Work of a CTA: the first `split_tiles` tiles are cut along tokens, all their K blocks in one line divided evenly over the
CTAs (so a CTA holds at most the end of one tile and the beginning of the next); the remaining tiles are dealt whole. A
partial tile goes to the workspace as float32 links in register order; when every contributor of a tile has arrived (an
integer counter), each of them adds an equal share of it over the contributors in ascending token order: the same sums in
the same order every time.
"""

from __future__ import annotations

from ...gluon_compat import gl, gluon, thread_barrier
from ..spmm.sm90_ptx import (
    cluster_rank,
    cluster_sync,
    copies,
    mbar_arrive,
    mbar_init,
    mbar_init_fence,
    mbar_wait,
    warp_in_group,
    wgmma_wait_all,
)
from .sm90_ptx import counter_arrive, counter_wait, load_stage, selectors, store_links, store_partial, wgmma


@gluon.jit
def _tile(t, num_m, num_n, GROUP: gl.constexpr):
    """Column by column inside bands of GROUP row tiles: a band of dY stays in L2 while X streams by."""
    width = GROUP * num_n
    band = t // width
    size = gl.minimum(num_m - band * GROUP, GROUP)
    r = t % width
    return band * GROUP + r % size, r // size


@gluon.jit
def _share(cta, ctas, split_tiles, blocks, tiles, SPLIT: gl.constexpr):
    """This CTA's range [lo, hi) of the split K blocks, and its numbers of split segments and of segments in all."""
    lo = 0
    hi = 0
    pieces = 0
    if SPLIT:
        lo = cta * (split_tiles * blocks) // ctas
        hi = (cta + 1) * (split_tiles * blocks) // ctas
        pieces = (hi - 1) // blocks - lo // blocks + 1
    return lo, hi, pieces, pieces + (tiles - split_tiles - cta + ctas - 1) // ctas


@gluon.jit
def _segment(i, lo, hi, pieces, cta, ctas, split_tiles, blocks, SPLIT: gl.constexpr):
    """Segment i of a CTA: tile and K blocks [k0, k1)."""
    t = split_tiles + cta + (i - pieces) * ctas
    k0 = 0
    k1 = blocks
    if SPLIT:
        if i < pieces:
            t = lo // blocks + i
            k0 = gl.maximum(lo - t * blocks, 0)
            k1 = gl.minimum(hi - t * blocks, blocks)
    return t, k0, k1


@gluon.jit
def _load_partition(num_m, num_n, blocks, split_tiles, RING: gl.constexpr, BARRIERS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
                    STAGES: gl.constexpr, GROUP: gl.constexpr, CL: gl.constexpr, SPLIT: gl.constexpr):
    STAGE: gl.constexpr = (BM + BN) * 128
    rank = 0
    if CL > 1:
        cluster_sync()
        rank = cluster_rank()
    if warp_in_group() == 0:
        cta = gl.program_id(0) // CL
        ctas = gl.num_programs(0) // CL
        lo, hi, pieces, segments = _share(cta, ctas, split_tiles, blocks, num_m * num_n, SPLIT)
        s = 0
        phase = 1
        for i in range(segments):
            t, k0, k1 = _segment(i, lo, hi, pieces, cta, ctas, split_tiles, blocks, SPLIT)
            pm, pn = _tile(t, num_m, num_n, GROUP)
            for kb in range(k0, k1):
                mbar_wait(BARRIERS + (STAGES + s) * 8, phase)
                load_stage(RING + s * STAGE, BARRIERS + s * 8, kb * 64, (pm * CL + rank) * BM, pn * BN, rank, BM, BN, CL)
                s += 1
                if s == STAGES:
                    s = 0
                    phase ^= 1
    if CL > 1:
        cluster_sync()          # no CTA leaves while its peer may still write to it


@gluon.jit
def _mma_partition(ids_ptr, lut_ptr, out_ptr, ws_ptr, counter_ptr, num_rows, num_cols, num_m, num_n, blocks, split_tiles,
                   RING: gl.constexpr, BARRIERS: gl.constexpr, WG: gl.constexpr, MB: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
                   GROUP: gl.constexpr, CL: gl.constexpr, SPLIT: gl.constexpr, NL: gl.constexpr, DT: gl.constexpr,
                   OUT: gl.constexpr, ACCUMULATE: gl.constexpr, CHUNK: gl.constexpr, LAG: gl.constexpr):
    """Warpgroup WG: rows [WG * MB * 64, (WG + 1) * MB * 64) of the tile. num_rows = N / 4, num_cols = K / 4."""
    BM: gl.constexpr = 128 * MB
    STAGE: gl.constexpr = (BM + BN) * 128
    PIECE: gl.constexpr = BN // 16 * 128 * 2 * NL           # floats of one m64 block's links
    L: gl.constexpr = gl.BlockedLayout([1, CHUNK], [32, 1], [4, 1], [1, 0])
    tid = gl.arange(0, 128, gl.SliceLayout(1, L))
    rank = 0
    if CL > 1:
        cluster_sync()
        rank = cluster_rank()
    cta = gl.program_id(0) // CL
    ctas = gl.num_programs(0) // CL
    lo, hi, pieces, segments = _share(cta, ctas, split_tiles, blocks, num_m * num_n, SPLIT)
    accs = copies(gl.zeros([128, CHUNK], gl.float32, L), MB * BN // 2 // CHUNK)
    s = 0
    phase = 0
    # Selectors are made one segment ahead, under the products of the current one: their loads are never waited for.
    t, k0, k1 = _segment(0, lo, hi, pieces, cta, ctas, split_tiles, blocks, SPLIT)
    words = _words(tid, ids_ptr, lut_ptr, t, rank, num_rows, num_cols, num_m, num_n, WG, MB, BN, GROUP, CL)
    if LAG:
        if WG == 1:
            if hi - lo + (segments - pieces) * blocks > 1:
                mbar_wait(BARRIERS + 8, 0)
    for i in range(segments):
        t, k0, k1 = _segment(i, lo, hi, pieces, cta, ctas, split_tiles, blocks, SPLIT)
        pm, pn = _tile(t, num_m, num_n, GROUP)
        row = (pm * CL + rank) * BM + WG * MB * 64
        mbar_wait(BARRIERS + s * 8, phase)
        ab = (RING + s * STAGE + WG * MB * 8192) // 16 | ((RING + s * STAGE + BM * 128) // 16 << 16)
        accs = wgmma(accs, ab, MB, BM, BN, DT)
        nt, _, _ = _segment(gl.minimum(i + 1, segments - 1), lo, hi, pieces, cta, ctas, split_tiles, blocks, SPLIT)
        ahead = _words(tid, ids_ptr, lut_ptr, nt, rank, num_rows, num_cols, num_m, num_n, WG, MB, BN, GROUP, CL)
        for _ in range(k0 + 1, k1):
            last = s
            s += 1
            if s == STAGES:
                s = 0
                phase ^= 1
            mbar_wait(BARRIERS + s * 8, phase)
            ab = (RING + s * STAGE + WG * MB * 8192) // 16 | ((RING + s * STAGE + BM * 128) // 16 << 16) | 0x8000
            accs = wgmma(accs, ab, MB, BM, BN, DT)
            mbar_arrive(BARRIERS + (STAGES + last) * 8, CL)
        accs = wgmma_wait_all(accs)
        mbar_arrive(BARRIERS + (STAGES + s) * 8, CL)
        s += 1
        if s == STAGES:
            s = 0
            phase ^= 1
        whole = True
        if SPLIT:
            whole = k1 - k0 == blocks
        if whole:
            for m in gl.static_range(MB):
                accs = store_links(accs, m, words[4 * m:4 * m + 4], out_ptr, row + m * 64, pn * (BN * NL // 4),
                                   num_rows * 4, num_cols * NL, BN, NL, OUT, ACCUMULATE)
        else:
            if SPLIT:
                for m in gl.static_range(MB):
                    at = ws_ptr + ((cta + t) * (2 * MB) + WG * MB + m).to(gl.int64) * PIECE
                    accs = store_partial(accs, m, words[4 * m:4 * m + 4], at, BN, NL)
                first, count = _contributors(t, ctas, split_tiles, blocks)
                counter_arrive(counter_ptr + t, 4 * count - 1, 12 + WG)
        words = ahead
    if SPLIT:
        for i in range(pieces):
            t, k0, k1 = _segment(i, lo, hi, pieces, cta, ctas, split_tiles, blocks, SPLIT)
            if k1 - k0 < blocks:
                pm, pn = _tile(t, num_m, num_n, GROUP)
                first, count = _contributors(t, ctas, split_tiles, blocks)
                counter_wait(counter_ptr + t, 2 * count)
                src = ws_ptr + ((first + t) * (2 * MB) + WG * MB).to(gl.int64) * PIECE
                CHUNKS: gl.constexpr = MB * BN // 16
                c0 = (cta - first) * CHUNKS // count
                c1 = (cta - first + 1) * CHUNKS // count
                if count > 6:
                    for c in range(c0, c1):
                        _reduce(src, out_ptr, pm, pn, c, c1, count, num_rows, num_cols, WG, MB, BN, NL, OUT, ACCUMULATE,
                                1, 16)
                else:
                    for c in range(c0, c1, 4):
                        _reduce(src, out_ptr, pm, pn, c, c1, count, num_rows, num_cols, WG, MB, BN, NL, OUT, ACCUMULATE,
                                4, 4)
                counter_arrive(counter_ptr + t, 4 * count - 1, 12 + WG)
    if CL > 1:
        cluster_sync()


@gluon.jit
def _words(tid, ids_ptr, lut_ptr, t, rank, num_rows, num_cols, num_m, num_n, WG: gl.constexpr, MB: gl.constexpr,
           BN: gl.constexpr, GROUP: gl.constexpr, CL: gl.constexpr):
    """Selector words of tile t for this warpgroup's MB blocks of 64 rows, four a block."""
    pm, pn = _tile(t, num_m, num_n, GROUP)
    row = ((pm * CL + rank) * 2 + WG) * (MB * 64)
    words = selectors(tid, ids_ptr, lut_ptr, row, pn * BN, num_rows, num_cols, BN)
    if MB == 2:
        words = words + selectors(tid, ids_ptr, lut_ptr, row + 64, pn * BN, num_rows, num_cols, BN)
    return words


@gluon.jit
def _contributors(t, ctas, split_tiles, blocks):
    """First CTA that holds K blocks of split tile t, and how many do."""
    work = split_tiles * blocks
    first = ((t * blocks + 1) * ctas - 1) // work
    last = ((t + 1) * blocks * ctas - 1) // work
    return first, last - first + 1


@gluon.jit
def _reduce(src, out_ptr, pm, pn, c, c1, count, num_rows, num_cols, WG: gl.constexpr, MB: gl.constexpr, BN: gl.constexpr,
            NL: gl.constexpr, OUT: gl.constexpr, ACCUMULATE: gl.constexpr, C: gl.constexpr, P: gl.constexpr):
    """Chunks [c, min(c + C, c1)) of this warpgroup's links: sum over the contributors, P loads of each chunk in flight."""
    V: gl.constexpr = 2 * NL
    CHUNKS: gl.constexpr = BN // 16
    PIECE: gl.constexpr = CHUNKS * 128 * V
    L4: gl.constexpr = gl.BlockedLayout([1, C, P, V], [32, 1, 1, 1], [4, 1, 1, 1], [3, 2, 1, 0])
    L3: gl.constexpr = gl.SliceLayout(2, L4)
    tid = gl.arange(0, 128, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L4))))[:, None, None, None]
    ch = c + gl.arange(0, C, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L4))))[None, :, None, None]
    pp = gl.arange(0, P, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, L4))))[None, None, :, None]
    vv = gl.arange(0, V, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L4))))[None, None, None, :]
    total = gl.zeros([128, C, V], gl.float32, L3)
    for p0 in range(0, count, P):
        at = src + ((p0 + pp) * (2 * MB * PIECE) + (ch * 128 + tid) * V + vv)
        total += gl.sum(gl.load(at, mask=(ch < c1) & (p0 + pp < count), other=0.0), 2)
    tid3 = gl.arange(0, 128, gl.SliceLayout(1, gl.SliceLayout(2, L3)))[:, None, None]
    ch3 = c + gl.arange(0, C, gl.SliceLayout(0, gl.SliceLayout(2, L3)))[None, :, None]
    v3 = gl.arange(0, V, gl.SliceLayout(0, gl.SliceLayout(1, L3)))[None, None, :]
    lane = tid3 % 32
    row = pm * (128 * MB) + (WG * MB + ch3 // CHUNKS) * 64 + tid3 // 32 * 16 + lane // 4 + v3 // NL * 8
    col = (pn * (BN // 4) + ch3 % CHUNKS * 4 + lane % 2 * 2 + lane % 4 // 2) * NL + v3 % NL
    dst = out_ptr + row.to(gl.int64) * (num_cols * NL) + col
    ok = (ch3 < c1) & (row < num_rows * 4) & (col < num_cols * NL)
    if ACCUMULATE:
        total += gl.load(dst, mask=ok, other=0.0).to(gl.float32)
    gl.store(dst, total.to(dst.dtype.element_ty), mask=ok)


@gluon.jit
def chts_weight_grad_sm90(dy_desc, x_desc, ids_ptr, lut_ptr, out_ptr, ws_ptr, counter_ptr, num_rows, num_cols, num_m, num_n,
                          blocks, split_tiles, MB: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr,
                          BARRIERS: gl.constexpr, GROUP: gl.constexpr, CL: gl.constexpr, SPLIT: gl.constexpr, NL: gl.constexpr,
                          DT: gl.constexpr, OUT: gl.constexpr, ACCUMULATE: gl.constexpr, CHUNK: gl.constexpr, LAG: gl.constexpr):
    """num_m counts row tiles of CL * 128 * MB rows; blocks = K blocks of 64 tokens. Shared memory from RING on: STAGES of (dY
    slabs, X slabs), and at BARRIERS a full and an empty mbarrier per stage."""
    BM: gl.constexpr = 128 * MB
    for i in gl.static_range(STAGES):
        mbar_init(BARRIERS + i * 8, 1)                          # full: the loader's announcement
        mbar_init(BARRIERS + (STAGES + i) * 8, 8 * CL)          # empty: every MMA warp of the cluster
    mbar_init_fence()
    thread_barrier()
    gl.warp_specialize([
        (_mma_partition, (ids_ptr, lut_ptr, out_ptr, ws_ptr, counter_ptr, num_rows, num_cols, num_m, num_n, blocks, split_tiles,
                          RING, BARRIERS, 0, MB, BN, STAGES, GROUP, CL, SPLIT, NL, DT, OUT, ACCUMULATE, CHUNK, LAG)),
        (_mma_partition, (ids_ptr, lut_ptr, out_ptr, ws_ptr, counter_ptr, num_rows, num_cols, num_m, num_n, blocks, split_tiles,
                          RING, BARRIERS, 1, MB, BN, STAGES, GROUP, CL, SPLIT, NL, DT, OUT, ACCUMULATE, CHUNK, LAG)),
        (_load_partition, (num_m, num_n, blocks, split_tiles, RING, BARRIERS, BM, BN, STAGES, GROUP, CL, SPLIT)),
    ], [4, 4], [240, 24])
