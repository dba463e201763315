"""The epilogue of the sm_90 weight gradient in inline PTX: from accumulators to compressed rows, and partial tiles to sums.

How an accumulator becomes compressed rows. In the fragment of wgmma m64nBN, lane ``4 g + q`` of warp w holds rows
``16 w + g`` and ``16 w + g + 8`` (h = 0, 1) and columns ``8 j + 2 q``, ``8 j + 2 q + 1``: a group of four columns lies in two
neighbouring lanes. With p = q & 1 and u = q >> 1: for each pair of eights (j = 2 jj, 2 jj + 1) the even lane (p = 0) gives its
columns of the second and takes its neighbour's of the first, after which each lane holds one whole group, number
``4 jj + 2 p + u`` of its row, and picks the links.

The choice is a 16-bit *selector*, the control word of ``prmt`` on (own pair, received pair) of 16-bit values: byte s takes
link s, its nibbles ``2 i, 2 i + 1`` for column i; an odd lane owns the upper pair, so all its nibbles have bit 2 flipped.
Results of 16 bits are one prmt; in float32 the same bits steer selects (bit 1 of a nibble: which of a pair; bit 2: whose).
Selectors lie in shared memory in the order the threads read them: word jj of a thread holds those of h = 0 (low) and 1.
"""

from __future__ import annotations

from ...gluon_compat import asm_scalar, asm_tied, builtin, pack_tuple, unwrap
from .sm90_ptx import splat, ties

# --- links -----------------------------------------------------------------------------------------------------------
# Thread coordinates: lane = 4 g + q of warp w of the warpgroup (w is scaled to rows); p and u as in the head of this file.
_COORDS = (
    "mov.u32 t, %tid.x; and.b32 t, t, 127; and.b32 q, t, 3; and.b32 par, q, 1; shr.u32 u, q, 1;"
    "shr.u32 w, t, 5; shl.b32 w, w, 4; shr.u32 g, t, 2; and.b32 g, g, 7;"
)
_LINK_REGS = (
    ".reg .pred podd, pu, pa, pb, ok, okb, ok0, ok1; .reg .f32 s0, s1, v0, v1, x, y, o0, o1, k0, k1, c0, c1;"
    ".reg .b32 t, q, par, u, w, g, r, col, left, i0, i1, i2, i3, ia, ib, sel<16>; .reg .b64 a, a0, a1, e; .reg .b16 z, z1;"
)


@builtin
def write_selectors(offset, ids_ptr, lut_ptr, row, col, num_rows, num_cols, MB, BN, _semantic=None):
    """Warps 1-3 of the loader's group: selectors of the tile at (row, col) to shared memory.

    num_rows = N / 4, num_cols = K / 4; blocks outside are clamped: their links are never stored. lut: 64 bits per id, the
    selector of row r (for an even lane) in the r-th 16 bits. Layout: [m64 block][jj / 4][thread 256][jj % 4] words.
    A step takes two pattern ids, eight rows apart: rows 4 b + r of both halves h make one word for each r.
    """
    mb, bn = unwrap(MB), unwrap(BN)
    groups = bn // 4
    total = mb * 16 * groups
    block_bytes = bn // 64 * 4096
    unroll = 4  # steps whose ids are fetched together: their latency is what a short problem waits for
    lines = [
        "{ .reg .pred p<4>; .reg .b32 t, i, c<4>, pr, s<4>, x<4>, y<4>, d, e, q, f, l0, h0, l1, h1, rl, cl; .reg .b64 a, b;",
        "mov.u32 t, %tid.x; and.b32 t, t, 127; sub.u32 i, t, 32; sub.u32 rl, $6, 1; sub.u32 cl, $7, 1;",
        "DW_SELECT:",
    ]
    for k in range(unroll):
        lines.append(
            f"add.u32 t, i, {96 * k}; setp.lt.u32 p{k}, t, {total}; div.u32 pr, t, {groups}; mul.lo.u32 x{k}, pr, {groups};"
            f"sub.u32 c{k}, t, x{k}; shl.b32 s{k}, pr, 1; and.b32 pr, pr, 1; and.b32 x{k}, s{k}, -4;"
            # s: 4 * slab + 2 * (upper pair of row blocks); x: its first row block
            f"shr.u32 y{k}, $4, 2; add.u32 x{k}, x{k}, y{k}; add.u32 x{k}, x{k}, pr;"
            f"shr.u32 y{k}, $5, 2; add.u32 y{k}, y{k}, c{k}; min.u32 y{k}, y{k}, cl; cvt.u64.u32 b, y{k}; add.u64 b, b, $2;"
            f"add.u32 y{k}, x{k}, 2; min.u32 x{k}, x{k}, rl; min.u32 y{k}, y{k}, rl;"
            f"mul.wide.u32 a, x{k}, $7; add.u64 a, a, b; mov.b32 x{k}, 0; @p{k} ld.global.nc.u8 x{k}, [a];"
            f"mul.wide.u32 a, y{k}, $7; add.u64 a, a, b; mov.b32 y{k}, 0; @p{k} ld.global.nc.u8 y{k}, [a];"
        )
    for k in range(unroll):
        lines.append(
            f"mul.wide.u32 a, x{k}, 8; add.u64 a, a, $3; ld.global.nc.v2.b32 {{l0, h0}}, [a];"
            f"mul.wide.u32 a, y{k}, 8; add.u64 a, a, $3; ld.global.nc.v2.b32 {{l1, h1}}, [a];"
            f"bfe.u32 f, c{k}, 1, 1; and.b32 q, c{k}, 1; shl.b32 q, q, 1; or.b32 q, q, f; mul.lo.u32 f, f, 0x44444444;"
            "xor.b32 l0, l0, f; xor.b32 h0, h0, f; xor.b32 l1, l1, f; xor.b32 h1, h1, f;"
            f"shr.u32 t, s{k}, 2; bfe.u32 d, s{k}, 1, 1; shl.b32 d, d, 4; or.b32 d, d, q;"  # t: slab; d: lane
        )
        if mb == 1:
            lines.append("shl.b32 e, t, 5; add.u32 d, d, e; shl.b32 d, d, 4;")
        else:  # slab = (warpgroup, m64 block, warp)
            lines.append(
                "shr.u32 e, t, 3; shl.b32 e, e, 2; and.b32 q, t, 3; or.b32 e, e, q; shl.b32 e, e, 5; add.u32 d, d, e; shl.b32 d, d, 4;"
                f"bfe.u32 e, t, 2, 1; mad.lo.u32 d, e, {block_bytes}, d;"
            )
        lines.append(
            f"shr.u32 e, c{k}, 4; shl.b32 e, e, 12; add.u32 d, d, e; bfe.u32 e, c{k}, 2, 2; shl.b32 e, e, 2; add.u32 d, d, e;"
            "mov.u32 e, global_smem; add.u32 d, d, e; add.u32 d, d, $1;"
            f"prmt.b32 e, l0, l1, 0x5410; @p{k} st.shared.b32 [d], e; prmt.b32 e, l0, l1, 0x7632; @p{k} st.shared.b32 [d+64], e;"
            f"prmt.b32 e, h0, h1, 0x5410; @p{k} st.shared.b32 [d+128], e; prmt.b32 e, h0, h1, 0x7632; @p{k} st.shared.b32 [d+192], e;"
        )
    lines.append(f"add.u32 i, i, {96 * unroll}; setp.lt.u32 p0, i, {total};\n@p0 bra DW_SELECT;\nbar.warp.sync -1; mov.b32 $0, 0; }}")
    args = [offset, ids_ptr, lut_ptr, row, col, num_rows, num_cols]
    return asm_scalar(_semantic, "\n".join(lines), "=r,r,l,l,r,r,r,r", args)


def _read_selectors(bn, m, offset):
    """This thread's words of m64 block m into sel0 ..."""
    lines = [
        f"mov.u32 t, %tid.x; and.b32 t, t, 255; shl.b32 t, t, 4; mov.u32 r, global_smem; add.u32 r, r, t; add.u32 r, r, {offset};"
    ]
    for k in range(bn // 64):
        names = ", ".join(f"sel{4 * k + i}" for i in range(4))
        lines.append(f"ld.shared.v4.b32 {{{names}}}, [r+{(m * (bn // 64) + k) * 4096}];")
    return "\n".join(lines)


def _pick(jj, h, n):
    """Links of unit (jj, h) in float32 into o0 (and o1 for n = 2)."""
    a = [f"${4 * j + 2 * h + c}" for j in (2 * jj, 2 * jj + 1) for c in (0, 1)]
    out = [
        f"selp.f32 s0, {a[0]}, {a[2]}, podd; selp.f32 s1, {a[1]}, {a[3]}, podd;"
        f"selp.f32 v0, {a[2]}, {a[0]}, podd; selp.f32 v1, {a[3]}, {a[1]}, podd;"
        "shfl.sync.bfly.b32 s0, s0, 1, 31, -1; shfl.sync.bfly.b32 s1, s1, 1, 31, -1;"
    ]
    for s in range(n):
        bit = 16 * h + 8 * s
        out.append(
            f"and.b32 t, sel{jj}, {2 << bit}; setp.ne.u32 pa, t, 0; and.b32 t, sel{jj}, {4 << bit}; setp.ne.u32 pb, t, 0;"
            f"selp.f32 x, v1, v0, pa; selp.f32 y, s1, s0, pa; selp.f32 o{s}, y, x, pb;"
        )
    return "\n".join(out)


def _addresses(n, size, ptr, row, col, rows, cols, lane_col):
    """a0, a1: address of the thread's rows g and g + 8 at its first column; ok0, ok1: rows that exist; left: columns left."""
    return (
        f"add.u32 r, {row}, w; add.u32 r, r, g; setp.lt.u32 ok0, r, {rows}; {lane_col} add.u32 col, t, {col}; sub.s32 left, {cols}, col;"
        f"mul.wide.u32 a, r, {cols}; cvt.u64.u32 e, col; add.u64 a, a, e; mul.lo.u64 a, a, {size}; add.u64 a0, a, {ptr};"
        f"add.u32 r, r, 8; setp.lt.u32 ok1, r, {rows}; mul.wide.u32 e, {cols}, {8 * size}; add.u64 a1, a0, e;"
    )


def _lane_col(n):
    """Compressed column of unit jj = 0: n * (2 p + u); unit jj adds 4 n jj."""
    return f"shl.b32 t, par, 1; add.u32 t, t, u; mul.lo.u32 t, t, {n};"


def _store_value(n, out, accumulate, at):
    """o0 (, o1) of one unit to memory under `ok`."""
    lines = []
    half = out != "f32"
    if accumulate and half and n == 2:
        lines.append(f"@ok ld.global.b32 t, {at}; mov.b32 {{z, z1}}, t; cvt.f32.{out} c0, z; cvt.f32.{out} c1, z1;")
    elif accumulate and half:
        lines.append(f"@ok ld.global.b16 z, {at}; cvt.f32.{out} c0, z;")
    elif accumulate:
        lines.append(f"@ok ld.global.v2.f32 {{c0, c1}}, {at};" if n == 2 else f"@ok ld.global.f32 c0, {at};")
    if accumulate:
        lines.append("add.f32 o0, o0, c0;" + ("add.f32 o1, o1, c1;" if n == 2 else ""))
    if half and n == 2:
        lines.append(f"cvt.rn.{out}x2.f32 t, o1, o0; @ok st.global.b32 {at}, t;")
    elif half:
        lines.append(f"cvt.rn.{out}.f32 z, o0; @ok st.global.b16 {at}, z;")
    else:
        lines.append(f"@ok st.global.v2.f32 {at}, {{o0, o1}};" if n == 2 else f"@ok st.global.f32 {at}, o0;")
    return "\n".join(lines)


def _store_links_asm(bn, m, n, out, accumulate, offset, ptr, row, col, rows, cols):
    """Through float32: any output type, accumulation. A quad's columns are neighbours: 32 bytes in float32."""
    size = 4 if out == "f32" else 2
    lines = ["{" + _LINK_REGS, _read_selectors(bn, m, offset), _COORDS + "setp.ne.u32 podd, par, 0;"]
    lines.append(_addresses(n, size, ptr, row, col, rows, cols, _lane_col(n)))
    for jj in range(bn // 16):
        for h in range(2):
            lines += [_pick(jj, h, n), f"setp.gt.and.s32 ok, left, {4 * n * jj}, ok{h};"]
            lines.append(_store_value(n, out, accumulate, f"[a{h}+{4 * n * jj * size}]"))
    return "\n".join(lines) + "}"


def _store_links16_asm(bn, m, n, out, wide, offset, ptr, row, col, rows, cols):
    """16-bit output: convert, exchange pairs, prmt; then lanes u = 0, 1 exchange units jj = 2 i, 2 i + 1, so that each
    holds two neighbouring groups and a quad's 16 n / 2 columns are neighbours. wide: rows are aligned to 4 n bytes."""
    lines = ["{" + _LINK_REGS, _read_selectors(bn, m, offset), _COORDS + "setp.ne.u32 podd, par, 0; setp.ne.u32 pu, u, 0;"]
    # first compressed column of the pair: n * (4 u + 2 p); pair i adds 8 n i
    lane_col = f"shl.b32 t, u, 1; add.u32 t, t, par; mul.lo.u32 t, t, {2 * n};"
    lines.append(_addresses(n, 2, ptr, row, col, rows, cols, lane_col))
    for i in range(bn // 32):
        for h in range(2):
            for unit, name in ((2 * i, "ia"), (2 * i + 1, "ib")):
                a = [f"${4 * j + 2 * h + c}" for j in (2 * unit, 2 * unit + 1) for c in (0, 1)]
                select = f"sel{unit}"
                if h:
                    lines.append(f"shr.u32 {select}, {select}, 16;")
                lines.append(
                    f"cvt.rn.{out}x2.f32 i0, {a[1]}, {a[0]}; cvt.rn.{out}x2.f32 i1, {a[3]}, {a[2]};"
                    "selp.b32 i2, i0, i1, podd; selp.b32 i3, i1, i0, podd; shfl.sync.bfly.b32 i2, i2, 1, 31, -1;"
                    f"prmt.b32 {name}, i3, i2, {select};"
                )
            lines.append(
                "selp.b32 i0, ia, ib, pu; shfl.sync.bfly.b32 i0, i0, 2, 31, -1; selp.b32 i1, i0, ia, pu; selp.b32 i2, ib, i0, pu;"
                f"setp.gt.and.s32 ok, left, {8 * n * i}, ok{h};"
            )
            at = 16 * n * i
            if n == 2 and wide:
                lines.append(f"@ok st.global.v2.b32 [a{h}+{at}], {{i1, i2}};")
            elif n == 2:
                lines.append(f"@ok st.global.b32 [a{h}+{at}], i1; setp.gt.and.s32 ok, left, {8 * n * i + 2}, ok{h};")
                lines.append(f"@ok st.global.b32 [a{h}+{at + 4}], i2;")
            elif wide:
                lines.append(f"prmt.b32 i1, i1, i2, 0x5410; @ok st.global.b32 [a{h}+{at}], i1;")
            else:
                lines.append(f"cvt.u16.u32 z, i1; @ok st.global.b16 [a{h}+{at}], z; setp.gt.and.s32 ok, left, {8 * n * i + 1}, ok{h};")
                lines.append(f"cvt.u16.u32 z, i2; @ok st.global.b16 [a{h}+{at + 2}], z;")
    return "\n".join(lines) + "}"


def _store_partial_asm(bn, m, n, offset, ptr):
    """Links in register order: float[2n] of unit jj (h = 0, then 1) at ptr + (jj * 128 + thread) * 8n."""
    lines = ["{" + _LINK_REGS, _read_selectors(bn, m, offset), _COORDS + "setp.ne.u32 podd, par, 0;"]
    lines.append(f"mul.wide.u32 a, t, {8 * n}; add.u64 a, a, {ptr};")
    for jj in range(bn // 16):
        at = f"[a+{jj * 128 * 8 * n}]"
        lines += [_pick(jj, 0, n), "mov.b32 k0, o0;" + ("mov.b32 k1, o1;" if n == 2 else ""), _pick(jj, 1, n)]
        lines.append(f"st.global.v4.f32 {at}, {{k0, k1, o0, o1}};" if n == 2 else f"st.global.v2.f32 {at}, {{k0, o0}};")
    return "\n".join(lines) + "}"


def _over_block(sem, accs, m, bn, make_asm, kinds, values):
    """Run asm over the accumulators of m64 block m; they pass through. Operand i comes `pack` times, constraint kinds[i]."""
    every = list(accs)
    count = bn // 2 // int(unwrap(every[0].shape[1]))
    part = every[m * count : (m + 1) * count]
    pack = int(unwrap(part[0].shape[1]))
    regs = pack * count
    first = [f"${2 * regs + i * pack}" for i in range(len(kinds))]
    constraints = ",".join([ties(regs)] + [k for k in kinds for _ in range(pack)])
    new = asm_tied(sem, make_asm(*first), constraints, part, [splat(sem, part[0], v) for v in values], pack)
    return pack_tuple([*every[: m * count], *new, *every[(m + 1) * count :]])


@builtin
def store_links(accs, M, offset, out_ptr, row, col, num_rows, num_cols, BN, NL, OUT, ACCUMULATE, WIDE, _semantic=None):
    """Links of m64 block M to the gradient [num_rows, num_cols]; row, col (compressed) of the block's corner."""
    m, bn, n, out, accumulate, wide = map(unwrap, (M, BN, NL, OUT, ACCUMULATE, WIDE))
    off = unwrap(offset)

    def make(*first):
        if out == "f32" or accumulate:
            return _store_links_asm(bn, m, n, out, accumulate, off, *first)
        return _store_links16_asm(bn, m, n, out, wide, off, *first)

    return _over_block(_semantic, accs, m, bn, make, "lrrrr", [out_ptr, row, col, num_rows, num_cols])


@builtin
def store_partial(accs, M, offset, ptr, BN, NL, _semantic=None):
    """Links of m64 block M, float32, in register order at ptr."""
    m, bn, n, off = map(unwrap, (M, BN, NL, offset))
    return _over_block(_semantic, accs, m, bn, lambda ptr: _store_partial_asm(bn, m, n, off, ptr), "l", [ptr])


# --- sums over the contributors of a split tile ------------------------------------------------------------------------
def _reduce_loop(label, C, P, n, slot_bytes, bn, out, accumulate):
    """Units [c, c1) in steps of C, contributors in steps of P: C * P loads in flight, sums in contributor order."""
    v = 2 * n
    vec = f"v{v}"
    lines = [f"{label}_UNIT:", "mov.u32 p, 0; mul.wide.u32 a, c, " + str(128 * 8 * n) + "; add.u64 a, a, src;"]
    lines += [f"mov.f32 s{ci}_{k}, 0f00000000;" for ci in range(C) for k in range(v)]
    lines.append(f"{label}_PART:")
    lines += [f"add.u32 t, c, {ci}; setp.lt.u32 pc{ci}, t, cend;" for ci in range(C)]
    for pi in range(P):
        lines.append(f"add.u32 t, p, {pi}; setp.lt.u32 ok, t, count;")
        for ci in range(C):
            regs = ", ".join(f"d{ci}_{pi}_{k}" for k in range(v))
            lines.append(f"and.pred l{ci}_{pi}, ok, pc{ci};")
            lines.append(f"@l{ci}_{pi} ld.global.cg.{vec}.f32 {{{regs}}}, [a+{pi * slot_bytes + ci * 128 * 8 * n}];")
    for ci in range(C):
        for pi in range(P):
            lines += [f"@l{ci}_{pi} add.f32 s{ci}_{k}, s{ci}_{k}, d{ci}_{pi}_{k};" for k in range(v)]
    lines += [f"add.u32 p, p, {P}; add.u64 a, a, {P * slot_bytes}; setp.lt.u32 ok, p, count;", f"@ok bra {label}_PART;"]
    size = 4 if out == "f32" else 2
    for ci in range(C):
        # unit c + ci: m64 block and jj
        lines.append(
            f"add.u32 t, c, {ci}; div.u32 x, t, {bn // 16}; mul.lo.u32 y, x, {bn // 16}; sub.u32 y, t, y; shl.b32 x, x, 6;"
            f"mad.lo.u32 y, y, {4 * n}, col; setp.lt.and.u32 ok, y, cols, pc{ci}; add.u32 x, x, r;"
        )
        for h in range(2):
            lines.append(
                f"add.u32 t, x, {8 * h}; setp.lt.and.u32 okh, t, rows, ok; mul.wide.u32 a, t, cols; cvt.u64.u32 e, y;"
                f"add.u64 a, a, e; mul.lo.u64 a, a, {size}; add.u64 a, a, dst;"
            )
            lines += [f"mov.f32 o{k}, s{ci}_{h * n + k};" for k in range(n)]
            lines.append(_store_value(n, out, accumulate, "[a]").replace("@ok ", "@okh "))
    lines += [f"add.u32 c, c, {C}; setp.lt.u32 ok, c, cend;", f"@ok bra {label}_UNIT;"]
    return "\n".join(lines)


@builtin
def reduce_share(ws_ptr, out_ptr, row, col, count, c0, c1, num_rows, num_cols, MB, BN, CL, NL, OUT, ACCUMULATE, _semantic=None):
    """Units [c0, c1) of this warpgroup's links: add `count` partial tiles, store. ws_ptr: the first of them, this warpgroup's
    part; row, col (compressed): corner of the warpgroup's rows of the tile."""
    mb, bn, n, out, accumulate = map(unwrap, (MB, BN, NL, OUT, ACCUMULATE))
    slot_bytes = unwrap(CL) * 2 * mb * (bn // 16) * 128 * 8 * n
    names = lambda C, P: " ".join(  # noqa: E731
        [f".reg .pred pc{ci};" for ci in range(C)]
        + [f".reg .pred l{ci}_{pi};" for ci in range(C) for pi in range(P)]
        + [f".reg .f32 s{ci}_{k};" for ci in range(C) for k in range(2 * n)]
        + [f".reg .f32 d{ci}_{pi}_{k};" for ci in range(C) for pi in range(P) for k in range(2 * n)]
    )
    asm = f"""{{ .reg .pred ok, okh; .reg .b32 t, q, par, u, w, g, r, col, c, cend, p, count, rows, cols, x, y; .reg .b16 z, z1;
    .reg .f32 o0, o1, c0, c1; .reg .b64 a, e, src, dst;
    mov.u32 c, $6; mov.u32 cend, $7; setp.ge.u32 ok, c, cend;
    @ok bra DW_DONE;
    {_COORDS} add.u32 r, $3, w; add.u32 r, r, g; mul.wide.u32 a, t, {8 * n}; add.u64 src, a, $1; mov.u64 dst, $2;
    {_lane_col(n)} add.u32 col, t, $4; mov.u32 count, $5; mov.u32 rows, $8; mov.u32 cols, $9;
    setp.gt.u32 ok, count, 6;
    @ok bra DW_MANY;
    {{ {names(4, 4)}
    {_reduce_loop("DW_FEW", 4, 4, n, slot_bytes, bn, out, accumulate)}
    bra DW_DONE; }}
    DW_MANY:
    {{ {names(1, 16)}
    {_reduce_loop("DW_MANY", 1, 16, n, slot_bytes, bn, out, accumulate)}
    }}
    DW_DONE: mov.b32 $0, 0; }}"""
    args = [ws_ptr, out_ptr, row, col, count, c0, c1, num_rows, num_cols]
    return asm_scalar(_semantic, asm, "=r,l,l,r,r,r,r,r,r,r", args)
