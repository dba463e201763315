"""Inline PTX of the sm_90 weight gradient: TMA copies, wgmma on transposed tiles, the split counters. Epilogues: sm90_links.py.

Conventions (shared-memory offsets, names of kernel parameters) and the barriers are those of ../spmm/sm90_ptx.py.
"""

from __future__ import annotations

from ...gluon_compat import DESC_PARAMS, asm_scalar, asm_tied, builtin, gl, pack_tuple, unwrap

KERNEL = "chts_weight_grad_sm90"
PARAM_DY, PARAM_X = 0, DESC_PARAMS
STEP = 64  # tokens of a K block, and columns of one 128-byte swizzled slab
SLAB = STEP * 128  # bytes of a slab [64 tokens, 64 columns]


def splat(sem, like, value):
    return sem.splat(sem.to_tensor(value), like.shape, like.type.layout)


def _multi(sem, asm, constraints, args, count):
    """Scalar inline asm with several int32 results."""
    handles = [sem.to_tensor(a).handle for a in args]
    call = sem.builder.create_inline_asm(asm, constraints, handles, [gl.int32.to_ir(sem.builder)] * count, False, 1)
    return pack_tuple(gl.tensor(call.get_result(i), gl.int32) for i in range(count))


def ties(count):
    return ",".join(["=f"] * count + [str(i) for i in range(count)])


# --- work ------------------------------------------------------------------------------------------------------------
@builtin
def warpgroup_index(_semantic=None):
    """Index of the warpgroup in the CTA, uniform over the warp."""
    asm = "{ .reg .b32 t; mov.u32 t, %tid.x; shr.u32 t, t, 7; shfl.sync.idx.b32 $0, t, 0, 31, -1; }"
    return asm_scalar(_semantic, asm, "=r")


@builtin
def read4(ptr, index, _semantic=None):
    """Four int32 at ptr + 4 * index (16-byte aligned), the same for every thread."""
    asm = "{ .reg .b64 a; mul.wide.s32 a, $5, 16; add.s64 a, a, $4; ld.global.nc.v4.b32 {$0, $1, $2, $3}, [a]; }"
    return _multi(_semantic, asm, "=r,=r,=r,=r,l,r", [ptr, index], 4)


@builtin
def prefetch_maps(_semantic=None):
    """One lane fetches the tensor maps ahead of their first use."""
    asm = "{ .reg .pred p; .reg .b64 t; elect.sync _|p, 0xffffffff;"
    for index in (PARAM_DY, PARAM_X):
        asm += f"mov.b64 t, {KERNEL}_param_{index}; cvta.param.u64 t, t; @p prefetch.tensormap [t];"
    return asm_scalar(_semantic, asm + "mov.b32 $0, 0; }", "=r")


@builtin
def stamp(ptr, slot, _semantic=None):
    """Profiling: the warpgroup's first thread stores the global timer."""
    asm = (
        "{ .reg .pred p; .reg .b32 t, x; .reg .b64 a, v; mov.u32 t, %tid.x; and.b32 x, t, 127; setp.eq.u32 p, x, 0; shr.u32 t, t, 7;"
        "mov.u32 x, %ctaid.x; shl.b32 x, x, 1; add.u32 x, x, t; shl.b32 x, x, 4; add.u32 x, x, $2; mul.wide.u32 a, x, 8; add.u64 a, a, $1;"
        "mov.u64 v, %globaltimer; @p st.global.u64 [a], v; mov.b32 $0, 0; }"
    )
    return asm_scalar(_semantic, asm, "=r,l,r", [ptr, slot])


# --- copies ----------------------------------------------------------------------------------------------------------
@builtin
def load_stage(stage, full, tok, row, col, rank, BM, BN, CL, SHARE, _semantic=None):
    """One lane: expect the stage's bytes; copy dY's slabs [64 tokens, 64 columns], then X's. In a cluster the CTAs share the
    tile of SHARE ("dy" or "x"): each copies its part and multicasts it to all."""
    bm, bn, cluster, share = map(unwrap, (BM, BN, CL, SHARE))
    cp = "@p cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
    lines = [
        "{ .reg .pred p; .reg .b32 base, bar, d, c, o; .reg .b64 ta, tb; .reg .b16 m;",
        f"mov.u16 m, {(1 << cluster) - 1}; mov.u32 base, global_smem; add.u32 bar, base, $2; add.u32 base, base, $1;",
        f"mov.b64 ta, {KERNEL}_param_{PARAM_DY}; cvta.param.u64 ta, ta;",
        f"mov.b64 tb, {KERNEL}_param_{PARAM_X}; cvta.param.u64 tb, tb;",
        "elect.sync _|p, 0xffffffff;",
        f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {(bm + bn) * 128};",
    ]
    for name, column, slabs, first in (("ta", "$4", bm // 64, 0), ("tb", "$5", bn // 64, bm // 64)):
        shared = cluster > 1 and share == ("dy" if name == "ta" else "x")
        multicast, mask = (".multicast::cluster", ", m") if shared else ("", "")
        own = slabs // cluster if shared else slabs
        lines.append(f"mul.lo.u32 o, $6, {own if shared else 0};")
        for i in range(own):
            lines.append(
                f"mad.lo.u32 d, o, {SLAB}, base; add.u32 d, d, {(first + i) * SLAB}; mad.lo.u32 c, o, 64, {column}; add.u32 c, c, {i * 64};"
                f"{cp}{multicast} [d], [{name}, {{c, $3}}], [bar]{mask};"
            )
    asm = "\n".join(lines) + "mov.b32 $0, 0; }"
    return asm_scalar(_semantic, asm, "=r" + ",r" * 6, [stage, full, tok, row, col, rank])


@builtin
def load_sparse_stage(stage, full, step, row, col, rank, BN, CL, _semantic=None):
    """The MVUE product's stage: X's slabs (in a cluster shared as in `load_stage`), then 128 rows of 32 kept values of dY^T."""
    bn, cluster = unwrap(BN), unwrap(CL)
    cp = "@p cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
    multicast, mask = (".multicast::cluster", ", m") if cluster > 1 else ("", "")
    lines = [
        "{ .reg .pred p; .reg .b32 base, bar, d, c, k; .reg .b64 ta, tb; .reg .b16 m;",
        f"mov.u16 m, {(1 << cluster) - 1}; mov.u32 base, global_smem; add.u32 bar, base, $2; add.u32 base, base, $1;",
        f"mov.b64 ta, {KERNEL}_param_{PARAM_DY}; cvta.param.u64 ta, ta;",
        f"mov.b64 tb, {KERNEL}_param_{PARAM_X}; cvta.param.u64 tb, tb;",
        "elect.sync _|p, 0xffffffff;",
        f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {128 * 64 + bn * 128};",
        f"add.u32 d, base, {bn * 128}; shl.b32 k, $3, 5; {cp} [d], [ta, {{k, $4}}], [bar]; shl.b32 k, $3, 6;",
    ]
    own = bn // 64 // cluster
    part = own if cluster > 1 else 0
    for i in range(own):
        lines.append(
            f"mad.lo.u32 d, $6, {part * SLAB}, base; add.u32 d, d, {i * SLAB}; mad.lo.u32 c, $6, {part * 64}, $5; add.u32 c, c, {i * 64};"
            f"{cp}{multicast} [d], [tb, {{c, k}}], [bar]{mask};"
        )
    asm = "\n".join(lines) + "mov.b32 $0, 0; }"
    return asm_scalar(_semantic, asm, "=r" + ",r" * 6, [stage, full, step, row, col, rank])


# --- wgmma -----------------------------------------------------------------------------------------------------------
@builtin
def wgmma(accs, ab, MB, BM, BN, DT, _semantic=None):
    """One 64-token block for MB stacked m64 blocks; leaves it in flight and waits for the block before.

    accs: tuple of [128, pack] f32, one row a thread. ab: int32 scalar, byte offset of the warpgroup's first dY slab / 16
    | accumulate flag << 15 | offset of the first X slab / 16 << 16.

    Both operands are transposed (tokens are the slow axis in shared memory): a slab row is one token's 64 columns in 128
    bytes, swizzled. Descriptor: leading offset = slab (next 64 columns), stride offset = 1024 (next 8 tokens).
    """
    accs = list(accs)
    MB, BN, DT, pack = unwrap(MB), unwrap(BN), unwrap(DT), int(unwrap(accs[0].shape[1]))
    regs, n = BN // 2, unwrap(MB) * BN // 2
    ab_reg = f"${2 * n}"
    lead, hi = (SLAB >> 4) << 16, (1 << 30) | (1024 >> 4)
    lines = [
        "{ .reg .b32 base, alo, blo, tmp; .reg .b64 da, db; .reg .pred p, q; setp.eq.u32 p, 1, 1;",
        f"and.b32 tmp, {ab_reg}, 0x8000; setp.ne.u32 q, tmp, 0; mov.u32 base, global_smem; shr.u32 base, base, 4;",
        f"and.b32 alo, {ab_reg}, 0x3fff; add.u32 alo, alo, base; and.b32 alo, alo, 0x3fff; or.b32 alo, alo, {lead:#x};",
        f"shr.u32 blo, {ab_reg}, 16; add.u32 blo, blo, base; and.b32 blo, blo, 0x3fff; or.b32 blo, blo, {lead:#x};",
        "wgmma.fence.sync.aligned;",
    ]
    for k in range(STEP // 16):  # 16 tokens = 2048 bytes of every slab
        lines.append(f"add.u32 tmp, blo, {k * 128}; mov.b64 db, {{tmp, {hi:#x}}};")
        for m in range(MB):
            acc = ", ".join(f"${i}" for i in range(m * regs, (m + 1) * regs))
            lines += [
                f"add.u32 tmp, alo, {k * 128 + m * (SLAB >> 4)}; mov.b64 da, {{tmp, {hi:#x}}};",
                f"wgmma.mma_async.sync.aligned.m64n{BN}k16.f32.{DT}.{DT} {{{acc}}}, da, db, {'pq'[k == 0]}, 1, 1, 1, 1;",
            ]
    lines.append("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1; }")
    extra = [splat(_semantic, accs[0], ab)]
    return asm_tied(_semantic, "\n".join(lines), ties(n) + ",r" * pack, accs, extra, pack)


@builtin
def wgmma_wait_all(accs, _semantic=None):
    """Everything in flight is finished; tied, so that no use of an accumulator moves above it."""
    accs = list(accs)
    pack = int(unwrap(accs[0].shape[1]))
    return asm_tied(_semantic, "wgmma.wait_group.sync.aligned 0;", ties(pack * len(accs)), accs, [], pack)


# --- counters of the split tiles -------------------------------------------------------------------------------------
_WARPGROUP_BARRIER = "mov.u32 t, %tid.x; shr.u32 b, t, 7; add.u32 b, b, 12; and.b32 t, t, 127; setp.eq.u32 p, t, 0;"


@builtin
def counter_arrive(ptr, last, _semantic=None):
    """After a warpgroup's stores (or loads): one increment of the counter, which wraps to 0 after `last`."""
    asm = (
        "{ .reg .pred p; .reg .b32 t, b;" + _WARPGROUP_BARRIER + "bar.sync b, 128;"
        "@p fence.acq_rel.gpu; @p red.relaxed.gpu.global.inc.u32 [$1], $2; mov.b32 $0, 0; }"
    )
    return asm_scalar(_semantic, asm, "=r,l,r", [ptr, last])


@builtin
def counter_wait(ptr, count, _semantic=None):
    """The warpgroup waits until the counter has reached `count`: all partials of the tile are visible to it."""
    asm = (
        "{ .reg .pred p, more; .reg .b32 t, b, v;" + _WARPGROUP_BARRIER + "@!p bra DW_READY;\n"
        "DW_SPIN: ld.relaxed.gpu.global.u32 v, [$1]; setp.lt.u32 more, v, $2;\n@more bra DW_SPIN;\n"
        "fence.acq_rel.gpu;\nDW_READY: bar.sync b, 128; mov.b32 $0, 0; }"
    )
    return asm_scalar(_semantic, asm, "=r,l,r", [ptr, count])
