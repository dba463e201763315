"""The epilogue of the Ampere-class sparse product: accumulators of Y^T to rows of Y.

In the fragment of m16n8, lane 4 g + q holds rows (features) g and g + 8 of columns (tokens) 2 q and 2 q + 1. Rounded to pairs of 16 bits,
an 8x8 block turns by movmatrix: the lane then has token g and features 2 q, 2 q + 1. Each warp writes its own transposed block to its
part of a free stage, so nothing but the warp has to wait, and reads it back in 16-byte pieces of Y's rows.
"""

from __future__ import annotations

from ...gluon_compat import builtin, unwrap
from .mma_config import RESERVED, MmaConfig
from .mma_ptx import Statement

CONVERT = {"bf16": "cvt.rn.bf16x2.f32", "f16": "cvt.rn.f16x2.f32"}


def _turn(c: MmaConfig, dtype: str, bias: str | None, first: int, last: int) -> list[str]:
    """Column tiles first to last - 1 of the warp into its buffer."""
    row = c.mi * 32
    lines = []
    for chunk in range(2 * c.mi):
        lines.append(f"xor.b32 a, z, {16 * chunk}; add.u32 a, a, w;")
        for ni in range(first, last):
            mi, h = divmod(chunk, 2)
            low, high = (f"<acc{mi * c.ni + ni}.{2 * h + i}>" for i in range(2))
            if bias:
                lines.append(f"add.f32 f0, {low}, bias{chunk}; add.f32 f1, {high}, bias{chunk};")
                low, high = "f0", "f1"
            lines.append(f"{CONVERT[dtype]} v, {high}, {low}; movmatrix.sync.aligned.m8n8.trans.b16 v, v;")
            lines.append(f"st.shared.b32 [a+{(ni - first) * 8 * row}], v;")
    return lines


def _flush(c: MmaConfig, first: int) -> list[str]:
    """The buffer to Y: tokens from `first` of the warp on."""
    row = c.mi * 32
    chunks = row // 16
    step = 32 // chunks
    lines = []
    for i in range(c.pass_tokens // step):
        turn = f"xor.b32 a, r, {i * step % 8 * 16}; add.u32 a, a, b;" if chunks == 8 else "add.u32 a, r, b;"
        lines += [
            f"{turn} ld.shared.v4.b32 {{v, v1, v2, v3}}, [a+{i * step * row}];",
            f"setp.gt.and.s32 p, left, {first + i * step}, inside; mad.wide.u32 at, <y_stride>, {first + i * step}, out;",
            "@p st.global.v4.b32 [at], {v, v1, v2, v3};",
        ]
    return lines


@builtin
def store_tile(accs, slot, y, y_stride, rows, columns, bias, tid, C, DTYPE, BIAS, _semantic=None):
    """slot: offset of a stage that nobody reads or fills until the next barrier, which stands at the end. y: address of the tile's first
    element; rows, columns: features and tokens left of it; bias: address of the tile's first feature's; BIAS: its type, or ""."""
    c, dtype, kind = unwrap(C), unwrap(DTYPE), unwrap(BIAS)
    accs = list(accs)
    s = Statement(_semantic, accs[0])
    for i, acc in enumerate(accs):
        s.output(f"acc{i}", acc.dtype, acc)
    for name, value, constraint in (("slot", slot, "r"), ("y", y, "l"), ("y_stride", y_stride, "r"), ("rows", rows, "r"),
                                    ("columns", columns, "r"), ("bias", bias, "l"), ("tid", tid, "r")):  # fmt: skip
        s.input(name, value, constraint)
    row = c.mi * 32
    chunks = row // 16
    swizzle = "and.b32 {0}, {1}, 7;" if chunks == 8 else "shr.u32 {0}, {1}, 1; and.b32 {0}, {0}, 3;"
    s.lines += [
        ".reg .pred p, inside; .reg .b32 l, warp, wm, wn, g, q, a, b, w, z, r, t, v, v1, v2, v3, left; .reg .f32 f0, f1;",
        ".reg .b64 at, out, e;",
        "and.b32 l, <tid>, 31; shr.u32 warp, <tid>, 5;"
        f"and.b32 wm, warp, {c.wm - 1}; shr.u32 wn, warp, {c.wm.bit_length() - 1}; mov.u32 b, global_smem; add.u32 b, b, <slot>;"
        f"mad.lo.u32 b, warp, {c.pass_tokens * row}, b; add.u32 b, b, {RESERVED};",
        f"shr.u32 g, l, 2; and.b32 q, l, 3; shl.b32 q, q, 2; mad.lo.u32 w, g, {row}, b; add.u32 w, w, q;"
        + swizzle.format("z", "g") + "shl.b32 z, z, 4;",
        # reading: 16-byte chunk l % chunks of token l / chunks
        f"and.b32 q, l, {chunks - 1}; shr.u32 t, l, {chunks.bit_length() - 1}; {swizzle.format('r', 't')} xor.b32 r, r, q; shl.b32 r, r, 4;"
        f"mad.lo.u32 r, t, {row}, r;",
        f"mad.lo.u32 t, wn, {c.ni * 8}, t; sub.s32 left, <columns>, t; mul.wide.u32 out, t, <y_stride>; add.u64 out, out, <y>;"
        f"shl.b32 q, q, 3; mad.lo.u32 q, wm, {c.mi * 16}, q; setp.gt.s32 inside, <rows>, q; mul.wide.u32 e, q, 2; add.u64 out, out, e;",
    ]  # fmt: skip
    if kind:
        size = 4 if kind == "f32" else 2
        s.lines += [
            f".reg .f32 {', '.join(f'bias{i}' for i in range(2 * c.mi))}; .reg .b16 h;",
            f"mad.lo.u32 t, wm, {c.mi * 16}, g; mul.wide.u32 e, t, {size}; add.u64 e, e, <bias>; sub.s32 t, <rows>, t;",
        ]
        for chunk in range(2 * c.mi):
            s.lines.append(f"setp.gt.s32 p, t, {8 * chunk};")
            if kind == "f32":
                s.lines.append(f"mov.f32 bias{chunk}, 0f00000000; @p ld.global.f32 bias{chunk}, [e+{32 * chunk}];")
            else:
                s.lines.append(f"mov.b16 h, 0; @p ld.global.b16 h, [e+{16 * chunk}]; cvt.f32.{kind} bias{chunk}, h;")
    tiles = c.pass_tokens // 8
    for first in range(0, c.ni, tiles):
        s.lines += [*_turn(c, dtype, kind, first, first + tiles), "bar.warp.sync -1;", *_flush(c, first * 8), "bar.warp.sync -1;"]
    s.lines.append("bar.sync 0;")
    s.run()
