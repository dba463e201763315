"""The epilogue of the Ampere-class weight gradients: accumulators of m16n8 tiles to compressed rows of dW.

In the fragment of m16n8, lane 4 g + q holds columns 2 q and 2 q + 1 of rows g and g + 8 (h = 0, 1), so a group of four columns lies in two
neighbouring lanes. With p = q & 1 and u = q >> 1: of each pair of tiles (j = 2 jj, 2 jj + 1) the even lane gives its columns of the second
and takes its neighbour's of the first, after which each lane holds one whole group, number 4 jj + 2 p + u of its row, and picks the links.

The links of a group are named by a *selector* of 16 bits (sm90_launch.selector_table): for link s, bits 8 s to 8 s + 2 are the link's
column as an even lane sees it (bit 1: ... of a pair; bit 2: whose pair); an odd lane owns the upper pair and flips bit 2.
"""

from __future__ import annotations

from ...gluon_compat import builtin, unwrap
from ..spmm.mma_config import MmaConfig
from ..spmm.mma_ptx import Statement


def _selectors(c: MmaConfig, mi: int) -> list[str]:
    """Selectors of row tile `mi`: sel{h}_{jj}; what is outside of the matrix gets none and is never stored."""
    lines = []
    for h in range(2):
        lines.append(
            f"add.u32 t, row, {16 * mi + 8 * h}; setp.lt.s32 ok{h}, t, <rows>; shr.u32 t, t, 2; mul.wide.u32 a, t, quarters;"
            "add.u64 a, a, ids;"
        )
        for jj in range(c.ni // 2):
            lines.append(f"setp.gt.and.s32 ok, left, {16 * jj}, ok{h}; mov.b32 sel{h}_{jj}, 0; @ok ld.global.u8 sel{h}_{jj}, [a+{4 * jj}];")
    for h in range(2):
        for jj in range(c.ni // 2):
            name = f"sel{h}_{jj}"
            lines.append(f"mul.wide.u32 a, {name}, 8; add.u64 a, a, table; ld.global.u16 {name}, [a]; xor.b32 {name}, {name}, flip;")
    return lines


def _pick(c: MmaConfig, mi: int, h: int, jj: int, n: int) -> list[str]:
    """Links of one unit in float32: o0 (and o1 for n = 2)."""
    first, second = (f"<acc{mi * c.ni + 2 * jj + i}." for i in range(2))
    a = [f"{first}{2 * h}>", f"{first}{2 * h + 1}>", f"{second}{2 * h}>", f"{second}{2 * h + 1}>"]
    lines = [
        f"selp.b32 s0, {a[0]}, {a[2]}, odd; selp.b32 s1, {a[1]}, {a[3]}, odd;",
        f"selp.b32 v0, {a[2]}, {a[0]}, odd; selp.b32 v1, {a[3]}, {a[1]}, odd;",
        "shfl.sync.bfly.b32 s0, s0, 1, 31, -1; shfl.sync.bfly.b32 s1, s1, 1, 31, -1;",
    ]
    for s in range(n):
        lines.append(
            f"and.b32 t, sel{h}_{jj}, {2 << 8 * s}; setp.ne.u32 pa, t, 0; and.b32 t, sel{h}_{jj}, {4 << 8 * s}; setp.ne.u32 pb, t, 0;"
            f"selp.b32 x, v1, v0, pa; selp.b32 y, s1, s0, pa; selp.b32 o{s}, y, x, pb;"
        )
    return lines


def _store(n: int, out: str, accumulate: bool, at: str) -> list[str]:
    """o0 (, o1) to memory under `ok`."""
    lines = []
    half = out != "f32"
    if accumulate and half and n == 2:
        lines.append(f"@ok ld.global.b32 t, {at}; cvt.u16.u32 z, t; shr.u32 t, t, 16; cvt.u16.u32 z1, t;")
        lines.append(f"cvt.f32.{out} c0, z; cvt.f32.{out} c1, z1;")
    elif accumulate and half:
        lines.append(f"@ok ld.global.b16 z, {at}; cvt.f32.{out} c0, z;")
    elif accumulate:
        lines.append(f"@ok ld.global.v2.b32 {{c0, c1}}, {at};" if n == 2 else f"@ok ld.global.b32 c0, {at};")
    if accumulate:
        lines += ["add.f32 o0, o0, c0;", *["add.f32 o1, o1, c1;"] * (n - 1)]
    if half and n == 2:
        lines.append(f"cvt.rn.{out}x2.f32 t, o1, o0; @ok st.global.b32 {at}, t;")
    elif half:
        lines.append(f"cvt.rn.{out}.f32 z, o0; @ok st.global.b16 {at}, z;")
    else:
        lines.append(f"@ok st.global.v2.b32 {at}, {{o0, o1}};" if n == 2 else f"@ok st.global.b32 {at}, o0;")
    return lines


@builtin
def store_links(accs, out, ids, table, rows, columns, tile_row, tile_column, tid, C, NL, OUT, ACCUMULATE, _semantic=None):
    """Links of the tile at (tile_row, tile_column) of dW [rows, columns] to out [rows, columns * NL / 4]. table: 64 bits per id, the
    selector of row r in the r-th 16. OUT: f32, bf16 or f16; ACCUMULATE: add to what is there."""
    c, n, kind, accumulate = unwrap(C), unwrap(NL), unwrap(OUT), unwrap(ACCUMULATE)
    accs = list(accs)
    s = Statement(_semantic, accs[0])
    for i, acc in enumerate(accs):
        s.output(f"acc{i}", acc.dtype, acc)
    for name, value, constraint in (("out", out, "l"), ("ids", ids, "l"), ("table", table, "l"), ("rows", rows, "r"),
                                    ("columns", columns, "r"), ("tile_row", tile_row, "r"), ("tile_column", tile_column, "r"),
                                    ("tid", tid, "r")):  # fmt: skip
        s.input(name, value, constraint)
    size = 4 if kind == "f32" else 2
    selectors = ", ".join(f"sel{h}_{jj}" for h in range(2) for jj in range(c.ni // 2))
    s.lines += [
        ".reg .pred odd, pa, pb, ok, ok0, ok1; .reg .f32 s0, s1, v0, v1, x, y, o0, o1, c0, c1; .reg .b16 z, z1;",
        ".reg .b64 a, ids, table, to0, to1, e;",
        f".reg .b32 t, p, u, g, row, column, left, quarters, width, flip, {selectors};",
        "and.b32 p, <tid>, 1; setp.ne.u32 odd, p, 0; bfe.u32 u, <tid>, 1, 1; bfe.u32 g, <tid>, 2, 3; shr.u32 t, <tid>, 5;"
        f"and.b32 row, t, {c.wm - 1}; mul.lo.u32 row, row, {c.mi * 16}; add.u32 row, row, g; add.u32 row, row, <tile_row>;"
        f"shr.u32 t, t, {c.wm.bit_length() - 1}; mul.lo.u32 column, t, {c.ni * 8}; add.u32 column, column, <tile_column>;"
        # this lane's groups: number 2 p + u of every four
        "shl.b32 t, p, 1; add.u32 t, t, u; shl.b32 t, t, 2; add.u32 column, column, t; sub.s32 left, <columns>, column;",
        "shr.u32 quarters, <columns>, 2; shr.u32 t, column, 2; cvt.u64.u32 ids, t; add.u64 ids, ids, <ids>;"
        "and.b32 t, g, 3; mul.wide.u32 table, t, 2; add.u64 table, table, <table>; mul.lo.u32 flip, p, 17476;",
        f"mul.lo.u32 width, quarters, {n * size}; mul.wide.u32 to0, row, width; shr.u32 t, column, 2; mul.wide.u32 e, t, {n * size};"
        "add.u64 to0, to0, e; add.u64 to0, to0, <out>;",
    ]  # fmt: skip
    for mi in range(c.mi):
        s.lines += _selectors(c, mi)
        for h in range(2):
            s.lines.append(f"mul.wide.u32 to1, width, {16 * mi + 8 * h}; add.u64 to1, to1, to0;")
            for jj in range(c.ni // 2):
                s.lines += _pick(c, mi, h, jj, n)
                s.lines.append(f"setp.gt.and.s32 ok, left, {16 * jj}, ok{h};")
                s.lines += _store(n, kind, accumulate, f"[to1+{4 * jj * n * size}]")
    s.run()
