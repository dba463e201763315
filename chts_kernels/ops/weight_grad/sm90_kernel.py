"""Gluon kernel of the sm_90 weight gradient: dvalues [N, K*n/4] = the links of dY^T X. Host side: sm90_launch.py.

One CTA per SM: two MMA warpgroups share a BM x BN tile of dW (BM along the out features), a loader warp feeds them through a
ring of STAGES stages of 64 tokens (dY slabs, then X slabs), and the links leave the accumulators straight to memory while
the loader already fills the ring for the next tile. The loader's three sister warps translate the tile's pattern ids
into selectors meanwhile. Warpgroup 1 starts a stage late: then each warpgroup's epilogue runs under the other's products.
Both warpgroups are one partition, so that they run the same instructions: a cold epilogue costs its fetch from memory once.

What a CTA does is a list of *pieces* (tile, range of K blocks) that the host wrote (sm90_schedule.py). A piece that is not
the whole tile goes to the workspace as float32 links in register order; when every contributor of a tile has arrived (an
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
)
from .sm90_links import reduce_share, store_links, store_partial, write_selectors
from .sm90_ptx import (
    counter_arrive,
    counter_wait,
    load_stage,
    prefetch_maps,
    read4,
    stamp,
    warpgroup_index,
    wgmma,
    wgmma_wait_all,
)


@gluon.jit
def tile(pm, pn, CL: gl.constexpr, SHARE: gl.constexpr):
    """This CTA's tile of its cluster's: neighbours along the rows share X, along the columns dY."""
    if CL > 1:
        if SHARE == "x":
            pm = pm * CL + cluster_rank()
        else:
            pn = pn * CL + cluster_rank()
    return pm, pn


@gluon.jit
def _load_partition(ids_ptr, lut_ptr, starts_ptr, pieces_ptr, num_rows, num_cols, RING: gl.constexpr, SELECTORS: gl.constexpr,
                    BARRIERS: gl.constexpr, MB: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, CL: gl.constexpr,
                    SHARE: gl.constexpr):
    BM: gl.constexpr = 128 * MB
    STAGE: gl.constexpr = (BM + BN) * 128
    cta = gl.program_id(0) // CL
    rank = 0
    if CL > 1:
        cluster_sync()
        rank = cluster_rank()
    pm, pn, kb, count = read4(starts_ptr, 2 * cta)
    first, last, _, _ = read4(starts_ptr, 2 * cta + 1)
    if warp_in_group() == 0:
        prefetch_maps()
        s = 0
        phase = 1
        for i in range(first, last):
            if i > first:
                pm, pn, kb, count = read4(pieces_ptr, 2 * i)
            tm, tn = tile(pm, pn, CL, SHARE)
            for _ in range(count):
                mbar_wait(BARRIERS + (STAGES + s) * 8, phase)
                load_stage(RING + s * STAGE, BARRIERS + s * 8, kb * 64, tm * BM, tn * BN, rank, BM, BN, CL, SHARE)
                kb += 1
                s += 1
                if s == STAGES:
                    s = 0
                    phase ^= 1
    else:
        load_selectors(first, last, pm, pn, ids_ptr, lut_ptr, pieces_ptr, num_rows, num_cols, SELECTORS, BARRIERS + 2 * STAGES * 8, MB,
                       BN, CL, SHARE)
    if CL > 1:
        cluster_sync()          # no CTA leaves while its peer may still write to it


@gluon.jit
def load_selectors(first, last, pm, pn, ids_ptr, lut_ptr, pieces_ptr, num_rows, num_cols, SELECTORS: gl.constexpr, FULL: gl.constexpr,
                   MB: gl.constexpr, BN: gl.constexpr, CL: gl.constexpr, SHARE: gl.constexpr):
    """What the loader's sister warps do: the selectors of every piece, one piece ahead of the MMA warpgroups at most."""
    phase = 1
    for i in range(first, last):
        if i > first:
            pm, pn, kb, count = read4(pieces_ptr, 2 * i)
        tm, tn = tile(pm, pn, CL, SHARE)
        mbar_wait(FULL + 8, phase)
        write_selectors(SELECTORS, ids_ptr, lut_ptr, tm * (128 * MB), tn * BN, num_rows, num_cols, MB, BN)
        mbar_arrive(FULL, 1)
        phase ^= 1


@gluon.jit
def finish_piece(accs, i, tm, tn, wg, rank, out_ptr, ws_ptr, counter_ptr, pieces_ptr, num_rows, num_cols, SELECTORS: gl.constexpr,
                 MB: gl.constexpr, BN: gl.constexpr, CL: gl.constexpr, SPLIT: gl.constexpr, NL: gl.constexpr, OUT: gl.constexpr,
                 ACCUMULATE: gl.constexpr, WIDE: gl.constexpr):
    """Epilogue of piece i: its links to the gradient, or, of a part of a tile, to the workspace."""
    PART: gl.constexpr = MB * BN // 16 * 128 * 2 * NL       # floats of a warpgroup's links
    row = (tm * 2 + wg) * (MB * 64)
    whole = True
    if SPLIT:
        slot, first_slot, contributors, counter = read4(pieces_ptr, 2 * i + 1)
        whole = slot < 0
    if whole:
        for m in gl.static_range(MB):
            accs = store_links(accs, m, SELECTORS, out_ptr, row + m * 64, tn * (BN * NL // 4), num_rows * 4, num_cols * NL, BN, NL,
                               OUT, ACCUMULATE, WIDE)
    else:
        if SPLIT:
            at = ws_ptr + ((slot * CL + rank) * 2 + wg).to(gl.int64) * PART
            for m in gl.static_range(MB):
                accs = store_partial(accs, m, SELECTORS, at + m * (PART // MB), BN, NL)
            counter_arrive(counter_ptr + (counter * CL + rank), 4 * contributors - 1)
    return accs


@gluon.jit
def add_partials(first, last, wg, rank, out_ptr, ws_ptr, counter_ptr, pieces_ptr, num_rows, num_cols, MB: gl.constexpr,
                 BN: gl.constexpr, CL: gl.constexpr, SHARE: gl.constexpr, NL: gl.constexpr, OUT: gl.constexpr,
                 ACCUMULATE: gl.constexpr):
    """This CTA's share of every split tile to which it contributed."""
    UNITS: gl.constexpr = MB * BN // 16                     # of a thread: two rows, n links each
    PART: gl.constexpr = UNITS * 128 * 2 * NL
    for i in range(first, last):
        slot, first_slot, contributors, counter = read4(pieces_ptr, 2 * i + 1)
        if slot >= 0:
            pm, pn, kb, count = read4(pieces_ptr, 2 * i)
            tm, tn = tile(pm, pn, CL, SHARE)
            at = counter_ptr + (counter * CL + rank)
            counter_wait(at, 2 * contributors)
            src = ws_ptr + ((first_slot * CL + rank) * 2 + wg).to(gl.int64) * PART
            c0 = (slot - first_slot) * UNITS // contributors
            c1 = (slot - first_slot + 1) * UNITS // contributors
            reduce_share(src, out_ptr, (tm * 2 + wg) * (MB * 64), tn * (BN * NL // 4), contributors, c0, c1, num_rows * 4,
                         num_cols * NL, MB, BN, CL, NL, OUT, ACCUMULATE)
            counter_arrive(at, 4 * contributors - 1)


@gluon.jit
def _mma_partition(out_ptr, ws_ptr, counter_ptr, starts_ptr, pieces_ptr, stamp_ptr, num_rows, num_cols, RING: gl.constexpr,
                   SELECTORS: gl.constexpr, BARRIERS: gl.constexpr, MB: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
                   CL: gl.constexpr, SHARE: gl.constexpr, SPLIT: gl.constexpr, NL: gl.constexpr, DT: gl.constexpr,
                   OUT: gl.constexpr, ACCUMULATE: gl.constexpr, WIDE: gl.constexpr, CHUNK: gl.constexpr, LAG: gl.constexpr,
                   STAMP: gl.constexpr):
    """Warpgroup wg: rows [wg * MB * 64, (wg + 1) * MB * 64) of the tile. num_rows = N / 4, num_cols = K / 4."""
    BM: gl.constexpr = 128 * MB
    STAGE: gl.constexpr = (BM + BN) * 128
    L: gl.constexpr = gl.BlockedLayout([1, CHUNK], [32, 1], [8, 1], [1, 0])
    cta = gl.program_id(0) // CL
    rank = 0
    if CL > 1:
        cluster_sync()
        rank = cluster_rank()
    wg = warpgroup_index()
    if STAMP:
        stamp(stamp_ptr, 0)
    head_pm, head_pn, head_kb, head_count = read4(starts_ptr, 2 * cta)
    first, last, _, _ = read4(starts_ptr, 2 * cta + 1)
    accs = copies(gl.zeros([256, CHUNK], gl.float32, L), MB * BN // 2 // CHUNK)
    s = 0
    phase = 0
    selector_phase = 0
    base = (RING + wg * (MB * 8192)) // 16 | ((RING + BM * 128) // 16 << 16)
    if LAG:  # noqa: SIM102 - LAG is a constant, the rest is not
        if (wg == 1) & (head_count > 1):
            mbar_wait(BARRIERS + 8, 0)
    if STAMP:
        stamp(stamp_ptr, 1)
    for i in range(first, last):
        # Read here, not carried from piece to piece: of a loop-carried value that only bounds an inner loop, Triton 3.6 drops the
        # update, and every piece would get the first one's number of blocks.
        pm, pn, kb, count = read4(pieces_ptr, 2 * i)
        tm, tn = tile(pm, pn, CL, SHARE)
        mbar_wait(BARRIERS + s * 8, phase)
        if STAMP:
            stamp(stamp_ptr, 2)
        accs = wgmma(accs, base + s * (STAGE // 16 * 65537), MB, BM, BN, DT)
        read4(pieces_ptr, 2 * gl.minimum(i + 1, last - 1))     # into L1, for the next turn
        for _ in range(count - 1):
            before = s
            s += 1
            if s == STAGES:
                s = 0
                phase ^= 1
            mbar_wait(BARRIERS + s * 8, phase)
            accs = wgmma(accs, (base + s * (STAGE // 16 * 65537)) | 0x8000, MB, BM, BN, DT)
            mbar_arrive(BARRIERS + (STAGES + before) * 8, CL)
        accs = wgmma_wait_all(accs)
        mbar_arrive(BARRIERS + (STAGES + s) * 8, CL)
        s += 1
        if s == STAGES:
            s = 0
            phase ^= 1
        if STAMP:
            stamp(stamp_ptr, 3)
        mbar_wait(BARRIERS + 2 * STAGES * 8, selector_phase)
        accs = finish_piece(accs, i, tm, tn, wg, rank, out_ptr, ws_ptr, counter_ptr, pieces_ptr, num_rows, num_cols, SELECTORS, MB, BN,
                            CL, SPLIT, NL, OUT, ACCUMULATE, WIDE)
        mbar_arrive(BARRIERS + (2 * STAGES + 1) * 8, 1)
        selector_phase ^= 1
        if STAMP:
            stamp(stamp_ptr, 4)
    if SPLIT:
        add_partials(first, last, wg, rank, out_ptr, ws_ptr, counter_ptr, pieces_ptr, num_rows, num_cols, MB, BN, CL, SHARE, NL, OUT,
                     ACCUMULATE)
    if STAMP:
        stamp(stamp_ptr, 6)
    if CL > 1:
        cluster_sync()


@gluon.jit
def chts_weight_grad_sm90(dy_desc, x_desc, ids_ptr, lut_ptr, out_ptr, ws_ptr, counter_ptr, starts_ptr, pieces_ptr, stamp_ptr,
                          num_rows, num_cols, RING: gl.constexpr, SELECTORS: gl.constexpr, BARRIERS: gl.constexpr,
                          MB: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, CL: gl.constexpr, SHARE: gl.constexpr,
                          SPLIT: gl.constexpr, NL: gl.constexpr, DT: gl.constexpr, OUT: gl.constexpr, ACCUMULATE: gl.constexpr,
                          WIDE: gl.constexpr, CHUNK: gl.constexpr, LAG: gl.constexpr, STAMP: gl.constexpr):
    """Shared memory: at RING STAGES of (dY slabs, X slabs), the selectors, and at BARRIERS a full and an empty mbarrier per
    stage, then one pair for the selectors."""
    for i in gl.static_range(STAGES):
        mbar_init(BARRIERS + i * 8, 1)                          # full: the loader's announcement
        mbar_init(BARRIERS + (STAGES + i) * 8, 8 * CL)          # empty: every MMA warp of the cluster
    mbar_init(BARRIERS + 2 * STAGES * 8, 3)                     # selectors written, by three warps
    mbar_init(BARRIERS + (2 * STAGES + 1) * 8, 8)               # and read
    mbar_init_fence()
    thread_barrier()
    gl.warp_specialize([
        (_mma_partition, (out_ptr, ws_ptr, counter_ptr, starts_ptr, pieces_ptr, stamp_ptr, num_rows, num_cols, RING, SELECTORS,
                          BARRIERS, MB, BN, STAGES, CL, SHARE, SPLIT, NL, DT, OUT, ACCUMULATE, WIDE, CHUNK, LAG, STAMP)),
        (_load_partition, (ids_ptr, lut_ptr, starts_ptr, pieces_ptr, num_rows, num_cols, RING, SELECTORS, BARRIERS, MB, BN,
                           STAGES, CL, SHARE)),
    ], [4], [40])
