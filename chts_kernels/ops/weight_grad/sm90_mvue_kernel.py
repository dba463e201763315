"""Gluon kernel of the MVUE weight gradient: the links of P X, P [N, T] the pruned dY^T, on sparse tensor cores (wgmma.sp).

sm90_kernel.py with another product: the left operand is the compressed P, K-major (rows of 32 kept values for 64 tokens, 64-byte
swizzle), and its metadata words come from global memory, four steps ahead. A register that feeds a wgmma must not be
written while any is in flight (ptxas C7513): four steps run on four fixed registers, then the pipe drains, then the words move.
"""

from __future__ import annotations

from ...gluon_compat import asm_tied, builtin, gl, gluon, thread_barrier, unwrap
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
from .sm90_kernel import add_partials, finish_piece, load_selectors, tile
from .sm90_ptx import SLAB, load_sparse_stage, prefetch_maps, read4, splat, ties, warpgroup_index, wgmma_wait_all

P_DESC_HIGH = 2 << 30 | 512 >> 4  # rows of 64 bytes, 64-byte swizzle, 8-row groups 512 bytes apart
X_DESC_HIGH = 1 << 30 | 1024 >> 4


@builtin
def wgmma_sparse(accs, ab, meta, BN, DT, _semantic=None):
    """One 64-token step of an m64 block: two wgmma.sp m64nBNk32, left in flight; waits for the step before.

    ab: int32 scalar, byte offset of the warpgroup's rows of P / 16 | accumulate flag << 15 | offset of the first X slab / 16
    << 16; meta: int32 [256], a word a thread.
    """
    accs, bn, dtype = list(accs), unwrap(BN), unwrap(DT)
    pack = int(unwrap(accs[0].shape[1]))
    n = bn // 2
    ab_reg, meta_reg = f"${2 * n}", f"${2 * n + pack}"
    acc = ", ".join(f"${i}" for i in range(n))
    lines = [
        "{ .reg .b32 base, alo, blo, tmp; .reg .b64 da, db; .reg .pred p, q; setp.eq.u32 p, 1, 1;",
        f"and.b32 tmp, {ab_reg}, 0x8000; setp.ne.u32 q, tmp, 0; mov.u32 base, global_smem; shr.u32 base, base, 4;",
        f"and.b32 alo, {ab_reg}, 0x3fff; add.u32 alo, alo, base; and.b32 alo, alo, 0x3fff; or.b32 alo, alo, 0x10000;",
        f"shr.u32 blo, {ab_reg}, 16; add.u32 blo, blo, base; and.b32 blo, blo, 0x3fff; or.b32 blo, blo, {(SLAB >> 4) << 16:#x};",
        "wgmma.fence.sync.aligned;",
    ]
    for k in range(2):  # 32 tokens: 32 bytes of a row of P, 4096 bytes of every slab of X; selector k: which lanes' metadata
        lines += [
            f"add.u32 tmp, alo, {2 * k}; mov.b64 da, {{tmp, {P_DESC_HIGH:#x}}};",
            f"add.u32 tmp, blo, {256 * k}; mov.b64 db, {{tmp, {X_DESC_HIGH:#x}}};",
            f"wgmma.mma_async.sp.sync.aligned.m64n{bn}k32.f32.{dtype}.{dtype} {{{acc}}}, da, db, {meta_reg}, {k},"
            f" {'pq'[k == 0]}, 1, 1, 0, 1;",
        ]
    lines.append("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1; }")
    extra = [splat(_semantic, accs[0], ab), _semantic.broadcast_impl_shape(_semantic.expand_dims(meta, 1), accs[0].shape)]
    return asm_tied(_semantic, "\n".join(lines), ties(n) + ",r" * (2 * pack), accs, extra, pack)


@gluon.jit
def _words(meta_ptr, slab, step, steps, tid):
    """Metadata of four steps from ``step`` on (beyond the last: the last again, unused)."""
    p = meta_ptr + (slab + tid // 128) * (steps * 128) + tid % 128
    last = steps - 1
    return (gl.load(p + gl.minimum(step, last) * 128), gl.load(p + gl.minimum(step + 1, last) * 128),
            gl.load(p + gl.minimum(step + 2, last) * 128), gl.load(p + gl.minimum(step + 3, last) * 128))


@gluon.jit
def _load_partition(ids_ptr, lut_ptr, starts_ptr, pieces_ptr, num_rows, num_cols, RING: gl.constexpr, SELECTORS: gl.constexpr,
                    BARRIERS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, CL: gl.constexpr):
    STAGE: gl.constexpr = 128 * 64 + BN * 128
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
            tm, tn = tile(pm, pn, CL, "x")
            for _ in range(count):
                mbar_wait(BARRIERS + (STAGES + s) * 8, phase)
                load_sparse_stage(RING + s * STAGE, BARRIERS + s * 8, kb, tm * 128, tn * BN, rank, BN, CL)
                kb += 1
                s += 1
                if s == STAGES:
                    s = 0
                    phase ^= 1
    else:
        load_selectors(first, last, pm, pn, ids_ptr, lut_ptr, pieces_ptr, num_rows, num_cols, SELECTORS, BARRIERS + 2 * STAGES * 8, 1,
                       BN, CL, "x")
    if CL > 1:
        cluster_sync()


@gluon.jit
def _multiply(accs, base, s, phase, meta, flag, BARRIERS: gl.constexpr, STAGE: gl.constexpr, BN: gl.constexpr, DT: gl.constexpr):
    mbar_wait(BARRIERS + s * 8, phase)
    return wgmma_sparse(accs, (base + s * (STAGE // 16 * 65537)) | flag, meta, BN, DT)


@gluon.jit
def _next(s, phase, STAGES: gl.constexpr):
    s += 1
    if s == STAGES:
        s = 0
        phase ^= 1
    return s, phase


@gluon.jit
def _mma_partition(meta_ptr, out_ptr, ws_ptr, counter_ptr, starts_ptr, pieces_ptr, num_rows, num_cols, steps, RING: gl.constexpr,
                   SELECTORS: gl.constexpr, BARRIERS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, CL: gl.constexpr,
                   SPLIT: gl.constexpr, NL: gl.constexpr, DT: gl.constexpr, OUT: gl.constexpr, ACCUMULATE: gl.constexpr,
                   WIDE: gl.constexpr, CHUNK: gl.constexpr):
    STAGE: gl.constexpr = 128 * 64 + BN * 128
    EMPTY: gl.constexpr = BARRIERS + STAGES * 8
    L: gl.constexpr = gl.BlockedLayout([1, CHUNK], [32, 1], [8, 1], [1, 0])
    tid = gl.arange(0, 256, gl.SliceLayout(1, L))
    cta = gl.program_id(0) // CL
    rank = 0
    if CL > 1:
        cluster_sync()
        rank = cluster_rank()
    wg = warpgroup_index()
    pm, pn, kb, count = read4(starts_ptr, 2 * cta)
    first, last, _, _ = read4(starts_ptr, 2 * cta + 1)
    accs = copies(gl.zeros([256, CHUNK], gl.float32, L), BN // 2 // CHUNK)
    s = 0
    phase = 0
    selector_phase = 0
    base = (RING + BN * 128 + wg * 4096) // 16 | (RING // 16 << 16)
    tm, tn = tile(pm, pn, CL, "x")
    m0, m1, m2, m3 = _words(meta_ptr, tm * 2, kb, steps, tid)
    for i in range(first, last):
        pm, pn, next_kb, next_count = read4(pieces_ptr, 2 * gl.minimum(i + 1, last - 1))
        next_tm, next_tn = tile(pm, pn, CL, "x")
        whole_groups = count // 4 * 4
        for done in range(0, whole_groups, 4):
            more = done + 4 < count                         # else: fetch the next piece's first words
            n0, n1, n2, n3 = _words(meta_ptr, gl.where(more, tm, next_tm) * 2, gl.where(more, kb + done + 4, next_kb), steps, tid)
            before = s
            for v in gl.static_range(4):
                flag = 0x8000
                if v == 0:
                    flag = gl.where(done > 0, 0x8000, 0)
                m = m0 if v == 0 else (m1 if v == 1 else (m2 if v == 2 else m3))
                accs = _multiply(accs, base, s, phase, m, flag, BARRIERS, STAGE, BN, DT)
                if v > 0:
                    mbar_arrive(EMPTY + before * 8, CL)
                before = s
                s, phase = _next(s, phase, STAGES)
            accs = wgmma_wait_all(accs)
            mbar_arrive(EMPTY + before * 8, CL)
            m0, m1, m2, m3 = n0, n1, n2, n3
        if whole_groups < count:
            n0, n1, n2, n3 = _words(meta_ptr, next_tm * 2, next_kb, steps, tid)
            for done in range(whole_groups, count):
                accs = _multiply(accs, base, s, phase, m0, gl.where(done > 0, 0x8000, 0), BARRIERS, STAGE, BN, DT)
                accs = wgmma_wait_all(accs)
                mbar_arrive(EMPTY + s * 8, CL)
                s, phase = _next(s, phase, STAGES)
                m0, m1, m2 = m1, m2, m3
            m0, m1, m2, m3 = n0, n1, n2, n3
        mbar_wait(BARRIERS + 2 * STAGES * 8, selector_phase)
        accs = finish_piece(accs, i, tm, tn, wg, rank, out_ptr, ws_ptr, counter_ptr, pieces_ptr, num_rows, num_cols, SELECTORS, 1, BN,
                            CL, SPLIT, NL, OUT, ACCUMULATE, WIDE)
        mbar_arrive(BARRIERS + (2 * STAGES + 1) * 8, 1)
        selector_phase ^= 1
        tm, tn, kb, count = next_tm, next_tn, next_kb, next_count
    if SPLIT:
        add_partials(first, last, wg, rank, out_ptr, ws_ptr, counter_ptr, pieces_ptr, num_rows, num_cols, 1, BN, CL, "x", NL, OUT,
                     ACCUMULATE)
    if CL > 1:
        cluster_sync()


@gluon.jit
def chts_weight_grad_sm90(p_desc, x_desc, ids_ptr, lut_ptr, out_ptr, ws_ptr, counter_ptr, starts_ptr, pieces_ptr, meta_ptr, num_rows,
                          num_cols, steps, RING: gl.constexpr, SELECTORS: gl.constexpr, BARRIERS: gl.constexpr, BN: gl.constexpr,
                          STAGES: gl.constexpr, CL: gl.constexpr, SPLIT: gl.constexpr, NL: gl.constexpr, DT: gl.constexpr,
                          OUT: gl.constexpr, ACCUMULATE: gl.constexpr, WIDE: gl.constexpr, CHUNK: gl.constexpr):
    """Same name as the exact kernel: inline PTX names the parameters by it. steps: 64-token steps of T."""
    for i in gl.static_range(STAGES):
        mbar_init(BARRIERS + i * 8, 1)
        mbar_init(BARRIERS + (STAGES + i) * 8, 8 * CL)
    mbar_init(BARRIERS + 2 * STAGES * 8, 3)
    mbar_init(BARRIERS + (2 * STAGES + 1) * 8, 8)
    mbar_init_fence()
    thread_barrier()
    gl.warp_specialize([
        (_mma_partition, (meta_ptr, out_ptr, ws_ptr, counter_ptr, starts_ptr, pieces_ptr, num_rows, num_cols, steps, RING, SELECTORS,
                          BARRIERS, BN, STAGES, CL, SPLIT, NL, DT, OUT, ACCUMULATE, WIDE, CHUNK)),
        (_load_partition, (ids_ptr, lut_ptr, starts_ptr, pieces_ptr, num_rows, num_cols, RING, SELECTORS, BARRIERS, BN, STAGES, CL)),
    ], [4], [40])
