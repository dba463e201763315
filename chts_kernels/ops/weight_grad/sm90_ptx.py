"""Inline PTX of the sm_90 weight gradient: TMA copies, dense wgmma on transposed tiles, the link epilogue, the split counters.

Conventions (shared-memory offsets, names of kernel parameters) and the barriers are those of ../spmm/sm90_ptx.py.

How an accumulator becomes compressed rows. In the fragment of wgmma m64nBN, lane ``4 g + q`` of warp w holds rows
``16 w + g`` and ``16 w + g + 8`` (h = 0, 1) and columns ``8 j + 2 q``, ``8 j + 2 q + 1``: a group of four columns lies in two
neighbouring lanes. For each pair (j, j + 1) the even lane gives its columns of j + 1 and takes its neighbour's of j: two
shuffles, after which each lane holds one whole group and picks its links by a four-bit code: bits 0-1 pick the first link
(bit 1: received or own pair, bit 0: which of the pair), bits 2-3 the second. Eight codes fill a *selector* word.
No shared memory, no barrier, and the links of a quad are neighbours in memory.
"""

from __future__ import annotations

from ...gluon_compat import DESC_PARAMS, asm_scalar, asm_tied, builtin, pack_tuple, unwrap

KERNEL = "chts_weight_grad_sm90"
PARAM_DY, PARAM_X = 0, DESC_PARAMS
STEP = 64  # tokens of a K block, and columns of one 128-byte swizzled slab
SLAB = STEP * 128  # bytes of a slab [64 tokens, 64 columns]


def _splat(sem, like, value):
    return sem.splat(sem.to_tensor(value), like.shape, like.type.layout)


def _ties(count):
    return ",".join(["=f"] * count + [str(i) for i in range(count)])


# --- copies ----------------------------------------------------------------------------------------------------------
@builtin
def load_stage(stage, full, tok, row, col, rank, BM, BN, CL, _semantic=None):
    """One lane: expect the stage's bytes; copy dY's slabs [64 tokens, 64 columns], then X's. In a cluster the CTAs share
    the X tile: each copies its part and multicasts it to all."""
    BM, BN, CL = map(unwrap, (BM, BN, CL))
    cp = "@p cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
    lines = [
        "{ .reg .pred p; .reg .b32 base, bar, d, c; .reg .b64 ta, tb; .reg .b16 m;",
        f"mov.u16 m, {(1 << CL) - 1}; mov.u32 base, global_smem; add.u32 bar, base, $2; add.u32 base, base, $1;",
        f"mov.b64 ta, {KERNEL}_param_{PARAM_DY}; cvta.param.u64 ta, ta;",
        f"mov.b64 tb, {KERNEL}_param_{PARAM_X}; cvta.param.u64 tb, tb;",
        "elect.sync _|p, 0xffffffff;",
        f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {(BM + BN) * 128};",
    ]
    for i in range(BM // 64):
        lines.append(f"add.u32 d, base, {i * SLAB}; add.u32 c, $4, {i * 64}; {cp} [d], [ta, {{c, $3}}], [bar];")
    multi, mask = (".multicast::cluster", ", m") if CL > 1 else ("", "")
    share = BN // 64 // CL
    lines.append(f"mad.lo.u32 base, $6, {share * SLAB}, base;")
    for i in range(share):
        d = f"add.u32 d, base, {BM // 64 * SLAB + i * SLAB}; mad.lo.u32 c, $6, {share * 64}, $5; add.u32 c, c, {i * 64};"
        lines.append(f"{d} {cp}{multi} [d], [tb, {{c, $3}}], [bar]{mask};")
    asm = "\n".join(lines) + "mov.b32 $0, 0; }"
    return asm_scalar(_semantic, asm, "=r" + ",r" * 6, [stage, full, tok, row, col, rank])


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
    extra = [_splat(_semantic, accs[0], ab)]
    return asm_tied(_semantic, "\n".join(lines), _ties(n) + ",r" * pack, accs, extra, pack)


# --- links -----------------------------------------------------------------------------------------------------------
# Thread coordinates: lane = 4 g + q of warp w; p = q & 1 (parity), u = q >> 1.
_COORDS = (
    "mov.u32 t, %tid.x; and.b32 t, t, 127; and.b32 q, t, 3; and.b32 par, q, 1; shr.u32 u, q, 1;"
    "shr.u32 w, t, 5; shl.b32 w, w, 4; shr.u32 g, t, 2; and.b32 g, g, 7;"
)


@builtin
def selectors(tid, ids_ptr, lut_ptr, row, col, num_rows, num_cols, BN, _semantic=None):
    """Selector words of this thread for one m64 block: tuple of 4 int32 [128] (h = 0: jj 0-7, 8-15; h = 1: the same).

    tid: any int32 [128]. row, col: first row and column of the block; num_rows = N / 4, num_cols = K / 4 (positions outside
    are clamped: their links are never stored). lut: int32 per id, row r's code at bits 4 r. An odd lane receives the lower
    pair of columns where an even lane receives the upper one: bit 1 of each link's code flips.
    """
    ids, lut, row0, col0, rows, cols = (f"${i}" for i in range(8, 14))
    lines = [
        "{ .reg .b32 t, q, par, u, w, g, r, c, s, f, x, i, last, o<4>; .reg .b64 a, b;",
        _COORDS,
        f"and.b32 s, g, 3; shl.b32 s, s, 2; mul.lo.u32 f, par, 10; sub.u32 last, {cols}, 1; sub.u32 i, {rows}, 1;",
        # column block of unit jj: 4 jj + 2 p + u
        f"shr.u32 c, {col0}, 2; shl.b32 x, par, 1; add.u32 c, c, x; add.u32 c, c, u;",
        "mov.b32 o0, 0; mov.b32 o1, 0; mov.b32 o2, 0; mov.b32 o3, 0;",
    ]
    for h in range(2):
        lines += [
            f"add.u32 r, {row0}, w; add.u32 r, r, g; add.u32 r, r, {8 * h}; shr.u32 r, r, 2; min.u32 r, r, i;",
            f"mul.wide.u32 a, r, {cols}; add.u64 a, a, {ids};",
        ]
        for jj in range(unwrap(BN) // 16):
            word = f"o{2 * h + jj // 8}"
            lines.append(
                f"add.u32 x, c, {4 * jj}; min.u32 x, x, last; cvt.u64.u32 b, x; add.u64 b, b, a; ld.global.nc.u8 x, [b];"
                f"mul.wide.u32 b, x, 4; add.u64 b, b, {lut}; ld.global.nc.u32 x, [b]; shr.u32 x, x, s; and.b32 x, x, 15;"
                f"xor.b32 x, x, f; shl.b32 x, x, {4 * (jj % 8)}; or.b32 {word}, {word}, x;"
            )
    lines.append("mov.b32 $0, o0; mov.b32 $1, o1; mov.b32 $2, o2; mov.b32 $3, o3; }")
    extra = [_splat(_semantic, tid, v) for v in (ids_ptr, lut_ptr, row, col, num_rows, num_cols)]
    return asm_tied(_semantic, "\n".join(lines), "=r,=r,=r,=r,0,1,2,3,l,l,r,r,r,r", [tid] * 4, extra, 1)


def _pick(jj, h, n, words):
    """Links of unit (jj, h) into o0 (and o1 for n = 2)."""
    a = [f"${4 * j + 2 * h + c}" for j in (2 * jj, 2 * jj + 1) for c in (0, 1)]
    word, bit = words[2 * h + jj // 8], 4 * (jj % 8)
    out = [
        f"selp.f32 s0, {a[0]}, {a[2]}, podd; selp.f32 s1, {a[1]}, {a[3]}, podd;"
        f"selp.f32 v0, {a[2]}, {a[0]}, podd; selp.f32 v1, {a[3]}, {a[1]}, podd;"
        "shfl.sync.bfly.b32 s0, s0, 1, 31, -1; shfl.sync.bfly.b32 s1, s1, 1, 31, -1;"
    ]
    for s in range(n):
        out.append(
            f"and.b32 t, {word}, {1 << (bit + 2 * s)}; setp.ne.u32 pa, t, 0;"
            f"and.b32 t, {word}, {1 << (bit + 2 * s + 1)}; setp.ne.u32 pb, t, 0;"
            f"selp.f32 x, v1, v0, pa; selp.f32 y, s1, s0, pa; selp.f32 o{s}, y, x, pb;"
        )
    return "\n".join(out)


_LINK_REGS = (
    ".reg .pred podd, pa, pb, ok, ok0, ok1; .reg .f32 s0, s1, v0, v1, x, y, o0, o1, k0, k1, c0, c1;"
    ".reg .b32 t, q, par, u, w, g, r, col, left; .reg .b64 a, a0, a1, e; .reg .b16 z;"
)


def _store_links_asm(bn, n, out, accumulate, base):
    """base: first operand after the accumulators (each operand comes `pack` times; the list gives the first of each)."""
    words, ptr, row, col, rows, cols = base[:4], *base[4:]
    size = 4 if out == "f32" else 2
    lines = [
        "{" + _LINK_REGS + _COORDS + "setp.ne.u32 podd, par, 0;",
        f"add.u32 r, {row}, w; add.u32 r, r, g; setp.lt.u32 ok0, r, {rows};",
        # compressed column of unit jj: n * (4 jj + 2 p + u)
        f"shl.b32 t, par, 1; add.u32 t, t, u; mul.lo.u32 t, t, {n}; add.u32 col, t, {col}; sub.s32 left, {cols}, col;",
        f"mul.wide.u32 a, r, {cols}; cvt.u64.u32 e, col; add.u64 a, a, e; mul.lo.u64 a, a, {size}; add.u64 a0, a, {ptr};",
        f"add.u32 r, r, 8; setp.lt.u32 ok1, r, {rows}; mul.wide.u32 e, {cols}, {8 * size}; add.u64 a1, a0, e;",
    ]
    half = {"bf16": "bf16", "f16": "f16"}.get(out)
    for jj in range(bn // 16):
        for h in range(2):
            at = f"[a{h}+{4 * n * jj * size}]"
            lines.append(_pick(jj, h, n, words))
            lines.append(f"setp.gt.and.s32 ok, left, {4 * n * jj}, ok{h};")
            if accumulate:
                if half:
                    if n == 2:
                        lines.append(f"@ok ld.global.b32 t, {at};")
                        if half == "bf16":
                            lines.append("shl.b32 r, t, 16; mov.b32 c0, r; and.b32 r, t, 0xffff0000; mov.b32 c1, r;")
                        else:
                            lines.append("{ .reg .b16 i, j; mov.b32 {i, j}, t; cvt.f32.f16 c0, i; cvt.f32.f16 c1, j; }")
                    else:
                        lines.append(f"@ok ld.global.b16 z, {at}; cvt.f32.{half} c0, z;")
                else:
                    lines.append(f"@ok ld.global.v2.f32 {{c0, c1}}, {at};" if n == 2 else f"@ok ld.global.f32 c0, {at};")
                lines.append("add.f32 o0, o0, c0;" + ("add.f32 o1, o1, c1;" if n == 2 else ""))
            if half:
                if n == 2:
                    lines.append(f"cvt.rn.{half}x2.f32 t, o1, o0; @ok st.global.b32 {at}, t;")
                else:
                    lines.append(f"cvt.rn.{half}.f32 z, o0; @ok st.global.b16 {at}, z;")
            else:
                lines.append(f"@ok st.global.v2.f32 {at}, {{o0, o1}};" if n == 2 else f"@ok st.global.f32 {at}, o0;")
    return "\n".join(lines) + "}"


def _store_partial_asm(bn, n, base):
    """Links in register order: float[2n] of chunk jj at ws + (jj * 128 + thread) * 8n."""
    words, ptr = base[:4], base[4]
    lines = [
        "{" + _LINK_REGS + _COORDS + "setp.ne.u32 podd, par, 0;",
        f"mul.wide.u32 a, t, {8 * n}; add.u64 a, a, {ptr};",
    ]
    for jj in range(bn // 16):
        at = f"[a+{jj * 128 * 8 * n}]"
        lines += [_pick(jj, 0, n, words), "mov.b32 k0, o0;" + ("mov.b32 k1, o1;" if n == 2 else ""), _pick(jj, 1, n, words)]
        lines.append(f"st.global.v4.f32 {at}, {{k0, k1, o0, o1}};" if n == 2 else f"st.global.v2.f32 {at}, {{k0, o0}};")
    return "\n".join(lines) + "}"


def _over_block(sem, every, m, count, make_asm, kinds, values):
    """Run asm over the chunks of accumulators of m64 block m; operand i comes `pack` times with constraint kinds[i]."""
    every = list(every)
    accs = every[m * count : (m + 1) * count]
    pack = int(unwrap(accs[0].shape[1]))
    regs = pack * count
    first = [f"${2 * regs + i * pack}" for i in range(len(kinds))]
    extra = [sem.broadcast_impl_shape(v, accs[0].shape) for v in values]
    constraints = ",".join([_ties(regs)] + [k for k in kinds for _ in range(pack)])
    new = asm_tied(sem, make_asm(first), constraints, accs, extra, pack)
    return pack_tuple([*every[: m * count], *new, *every[(m + 1) * count :]])


@builtin
def store_links(accs, m, words, out_ptr, row, col, num_rows, num_cols, BN, NL, OUT, ACCUMULATE, _semantic=None):
    """Links of m64 block m to the gradient [num_rows, num_cols]; row, col (compressed) of the block's corner."""
    m, BN, n = unwrap(m), unwrap(BN), unwrap(NL)
    every = list(accs)
    count = BN // 2 // int(unwrap(every[0].shape[1]))
    values = [_semantic.expand_dims(v, 1) for v in words]
    values += [_splat(_semantic, every[0], v) for v in (out_ptr, row, col, num_rows, num_cols)]
    make = lambda first: _store_links_asm(BN, n, unwrap(OUT), unwrap(ACCUMULATE), first)  # noqa: E731
    return _over_block(_semantic, every, m, count, make, "rrrrlrrrr", values)


@builtin
def store_partial(accs, m, words, ptr, BN, NL, _semantic=None):
    """Links of m64 block m, float32, in register order at ptr (an int64 address)."""
    m, BN, n = unwrap(m), unwrap(BN), unwrap(NL)
    every = list(accs)
    count = BN // 2 // int(unwrap(every[0].shape[1]))
    values = [_semantic.expand_dims(v, 1) for v in words] + [_splat(_semantic, every[0], ptr)]
    return _over_block(_semantic, every, m, count, lambda first: _store_partial_asm(BN, n, first), "rrrrl", values)


# --- reduction over the token splits -----------------------------------------------------------------------------------
@builtin
def counter_arrive(ptr, last, BAR, _semantic=None):
    """After a warpgroup's stores (or loads): one increment of the counter, which wraps to 0 after `last`."""
    asm = (
        "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; and.b32 t, t, 127; setp.eq.u32 p, t, 0;"
        f"fence.acq_rel.gpu; bar.sync {unwrap(BAR)}, 128; @p red.release.gpu.global.inc.u32 [$1], $2; mov.b32 $0, 0; }}"
    )
    return asm_scalar(_semantic, asm, "=r,l,r", [ptr, last])


@builtin
def counter_wait(ptr, count, _semantic=None):
    """Every thread waits until the counter has reached `count`: all partials of the tile are visible to it."""
    asm = (
        "{ .reg .pred p; .reg .b32 v;\nDW_SPIN: ld.acquire.gpu.global.u32 v, [$1]; setp.lt.u32 p, v, $2;\n"
        "@p bra DW_SPIN;\n mov.b32 $0, 0; }"
    )
    return asm_scalar(_semantic, asm, "=r,l,r", [ptr, count])

