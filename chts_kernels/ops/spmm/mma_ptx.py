"""Inline PTX of the Ampere-class products, as Gluon builtins: fragments by ldmatrix, copies by cp.async, mma and mma.sp.

Every register tensor is [threads, 4], one thread a row: the four registers of an accumulator tile m16n8, of an A fragment, of one
(sparse) or two (dense) B fragments, or the metadata words of a warp's four m16 tiles. Shared-memory offsets are in bytes from
`global_smem` + RESERVED, the ring of stages.

Swizzles (16-byte chunk c of row r): rows of 64 bytes keep it at c ^ (r / 2 % 4), rows of 128 bytes and more at c ^ (r % 8). So the
eight rows of an 8x8 matrix lie in different banks, for ldmatrix with and without .trans and for the copies.
"""

from __future__ import annotations

import re

from ...gluon_compat import builtin, gl, glcore, pack_tuple, unwrap
from .mma_config import RESERVED, MmaConfig

MMA = {
    True: "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{0}.{0}.f32",
    False: "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32",
}


class Statement:
    """One inline PTX statement whose operands are tensors [threads, 4], by name: `<acc3.1>` is register 1 of operand acc3, `<k>` the
    value of a scalar or of a [threads, 1] operand. Operands of 64 bits have constraint "l"."""

    def __init__(self, semantic, like) -> None:
        self.semantic, self.like = semantic, like
        self.outputs: list[tuple[str, object, str]] = []
        self.inputs: list[tuple[str, object, str]] = []
        self.lines: list[str] = []

    def output(self, name: str, dtype, before=None) -> None:
        """`before`: the value that the register holds when the statement begins; none: written before anything is read."""
        self.outputs.append((name, dtype, "f" if dtype is gl.float32 else "r"))
        if before is not None:
            self.inputs.append((f"{name}:", before, name))

    def input(self, name: str, value, constraint: str = "r") -> None:
        self.inputs.append((name, value, constraint))

    def run(self) -> list:
        sem, shape, layout = self.semantic, self.like.shape, self.like.type.layout
        tied = {name[:-1] for name, _, _ in self.inputs if name.endswith(":")}
        index = {name: 4 * i for i, (name, _, _) in enumerate(self.outputs + self.inputs)}
        constraints = [("=" if name in tied else "=&") + c for name, _, c in self.outputs for _ in range(4)]
        handles = []
        for name, value, constraint in self.inputs:
            constraints += [str(index[constraint] + i) if name.endswith(":") else constraint for i in range(4)]
            value = sem.to_tensor(value)
            value = sem.broadcast_impl_shape(value, shape) if len(value.shape) == 2 else sem.splat(value, shape, layout)
            handles.append(value.handle)
        kinds = [glcore.distributed_type(dtype, shape, layout) for _, dtype, _ in self.outputs]

        def operand(found: re.Match) -> str:
            name, _, element = found.group(1).partition(".")
            return f"${index[name] + int(element or 0)}"

        text = re.sub(r"<([\w.]+)>", operand, "{\n" + "\n".join(self.lines) + "\n}")
        call = sem.builder.create_inline_asm(text, ",".join(constraints), handles, [k.to_ir(sem.builder) for k in kinds], False, 4)
        return [glcore.tensor(call.get_result(i), kind) for i, kind in enumerate(kinds)]


# --- fragments -------------------------------------------------------------------------------------------------------
def fragment_count(c: MmaConfig) -> int:
    """Tensors of one substep's fragments: A, B, and the metadata where the product is sparse."""
    return c.mi + (c.ni if c.sparse else c.ni // 2)


def _fragment_names(c: MmaConfig, prefix: str) -> list[str]:
    return [f"{prefix}a{i}" for i in range(c.mi)] + [f"{prefix}b{i}" for i in range(fragment_count(c) - c.mi)]


def _registers(name: str) -> str:
    return "{" + ", ".join(f"<{name}.{i}>" for i in range(4)) + "}"


def _fragment_loads(c: MmaConfig, prefix: str, sub: int) -> tuple[list[str], list[str], list[str]]:
    """PTX that computes addresses, and the loads of A and B, of substep `sub` of the stage that register `from` names.

    la, lb: the thread's offsets in the stage for its first matrices of A and of B."""
    load = "ldmatrix.sync.aligned.m8n8.x4{}.shared.b16 {}, [{}];"
    setup, a, b = [], [], []
    if c.sparse:  # compressed rows of 64 bytes: the other k32 half is two chunks on
        setup.append(f"xor.b32 fa, <la>, {32 * sub}; add.u32 fa, fa, from;")
        a = [load.format("", _registers(f"{prefix}a{i}"), f"fa+{1024 * i}") for i in range(c.mi)]
    else:  # [tokens, bm]: 16 tokens on; tile i is 2 i chunks to the right
        for i in range(c.mi):
            address = f"xor.b32 fa, <la>, {32 * i}; add.u32 fa, fa, from; "
            a.append(address + load.format(".trans", _registers(f"{prefix}a{i}"), f"fa+{16 * sub * c.bm * 2}"))
    if c.kind == "spmm":  # rows of 128 bytes: the other k32 half is four chunks on
        setup.append(f"xor.b32 fb, <lb>, {64 * sub}; add.u32 fb, fb, from;")
        b = [load.format("", _registers(f"{prefix}b{i}"), f"fb+{1024 * i}") for i in range(c.ni)]
    else:  # [tokens, bn]: an x4 is 32 tokens of one n8 (sparse) or 16 tokens of two
        deep, wide = (32, 1) if c.sparse else (16, 2)
        for i in range(c.ni // wide):
            address = f"xor.b32 fb, <lb>, {16 * wide * i}; add.u32 fb, fb, from; "
            b.append(address + load.format(".trans", _registers(f"{prefix}b{i}"), f"fb+{deep * sub * c.bn * 2}"))
    return setup, a, b


def _words(c: MmaConfig, prefix: str) -> list[str]:
    """The metadata words of a warp's m16 tiles, which serve both substeps."""
    if not c.sparse:
        return []
    return ["add.u32 fm, <lm>, from;", *(f"ld.shared.b32 <{prefix}e.{i}>, [fm+{128 * i}];" for i in range(c.mi))]


_FRAGMENT_REGISTERS = ".reg .b32 from, fa, fb, fm, base; mov.u32 base, global_smem;"


def _outputs(s: Statement, c: MmaConfig, words: bool) -> None:
    for name in _fragment_names(c, "n"):
        s.output(name, gl.int32)
    if words and c.sparse:
        s.output("ne", gl.int32)


def _inputs(s: Statement, at, **scalars) -> None:
    for name, value in zip(("la", "lb", "lm"), at, strict=False):
        s.input(name, value)
    for name, value in scalars.items():
        s.input(name, value)


@builtin
def first_fragments(like, at, slot, C, _semantic=None):
    """Wait for the first stage; its fragments of substep 0 and metadata."""
    c = unwrap(C)
    s = Statement(_semantic, like)
    _outputs(s, c, True)
    _inputs(s, list(at), slot=slot, zeros=like)  # `like` is named so that the compiler does not remove what it comes from
    setup, a, b = _fragment_loads(c, "n", 0)
    s.lines += [_FRAGMENT_REGISTERS, _wait(c), f"add.u32 from, base, <slot>; add.u32 from, from, {RESERVED};"]
    s.lines += [*setup, *a, *b, *_words(c, "n")]
    if c.sparse and c.mi < 4:
        s.lines += [f"mov.b32 <ne.{i}>, 0;" for i in range(c.mi, 4)]
    return pack_tuple(s.run())


def _wait(c: MmaConfig) -> str:
    """All copies but those of the youngest stages have landed, for every thread, and the oldest stage has no reader left."""
    return f"cp.async.wait_group {c.stages - 2}; bar.sync 0;"


# --- products --------------------------------------------------------------------------------------------------------
def _products(c: MmaConfig, dtype: str, sub: int, ni: int, tail: bool) -> list[str]:
    """The mi products with column tile `ni`. `tail`: of an even or odd order, so that neighbours share an operand."""
    lines = []
    for mi in range(c.mi) if not tail else reversed(range(c.mi)):
        acc = _registers(f"acc{mi * c.ni + ni}")
        b = _registers(f"b{ni}") if c.sparse else f"{{<b{ni // 2}.{ni % 2 * 2}>, <b{ni // 2}.{ni % 2 * 2 + 1}>}}"
        word = f", <e.{mi}>, {sub}" if c.sparse else ""
        lines.append(f"{MMA[c.sparse].format(dtype)} {acc}, {_registers(f'a{mi}')}, {b}, {acc}{word};")
    return lines


def _interleave(products: list[list[str]], others: list[str]) -> list[str]:
    """`others` spread evenly between the groups of products, in order."""
    lines, done = [], 0
    for i, group in enumerate(products):
        lines += group
        upto = len(others) * (i + 1) // len(products)
        lines += others[done:upto]
        done = upto
    return lines


@builtin
def multiply(accs, fragments, words, at, slot, SUB, C, DTYPE, copies=None, _semantic=None):
    """Substep SUB of a stage's products, with what comes next loaded in between.

    SUB 0: `slot` is this stage: loads its substep 1; copies: the operands of :func:`copy_lines` and the stage after the last one in
    flight is fetched. SUB 1: waits for the next stage, `slot`, and loads its substep 0 and metadata.
    Returns accumulators, then the next fragments, then (SUB 1) the next words."""
    c, sub, dtype = unwrap(C), unwrap(SUB), unwrap(DTYPE)
    accs, fragments = list(accs), list(fragments)
    s = Statement(_semantic, accs[0])
    for i, acc in enumerate(accs):
        s.output(f"acc{i}", gl.float32, acc)
    _outputs(s, c, sub == 1)
    for name, value in zip(_fragment_names(c, ""), fragments, strict=True):
        s.input(name, value)
    if c.sparse:
        s.input("e", words)
    _inputs(s, list(at), slot=slot)
    setup, a, b = _fragment_loads(c, "n", 1 - sub)
    s.lines.append(_FRAGMENT_REGISTERS)
    late = []
    if sub == 0:
        for (name, constraint), value in zip(COPY_OPERANDS[c.sparse], list(copies), strict=True):
            s.input(name, value, constraint)
        declare, late = copy_lines(c)
        late[0] = "\n".join([*declare, late[0]])
    products = [_products(c, dtype, sub, ni, ni % 2 == 1) for ni in range(c.ni)]
    if sub == 1:
        s.lines.append(_wait(c))
    s.lines += [f"add.u32 from, base, <slot>; add.u32 from, from, {RESERVED};", *setup]
    extra = (_words(c, "n") if sub == 1 else []) + a + b
    # Copies all together: before each that follows an ldmatrix ptxas puts three idle loads. Last is 9 % faster than first in the
    # forward product's 8 warps; with 4 it spills, and the weight gradients were measured with copies first.
    s.lines += _interleave(products, extra + late if c.kind == "spmm" and c.threads == 256 else late + extra)
    if sub == 1 and c.sparse and c.mi < 4:
        s.lines += [f"mov.b32 <ne.{i}>, 0;" for i in range(c.mi, 4)]
    if sub == 0:
        s.lines.append("cp.async.commit_group;")
    return pack_tuple(s.run())


# --- copies ----------------------------------------------------------------------------------------------------------
COPY_OPERANDS = {
    True: [("left", "l"), ("right", "l"), ("meta", "l"), ("left_stride", "r"), ("right_stride", "r"), ("meta_stride", "r"),
           ("rows", "r"), ("columns", "r"), ("depth", "r"), ("to", "r"), ("tid", "r")],
    False: [("left", "l"), ("right", "l"), ("left_stride", "r"), ("right_stride", "r"), ("rows", "r"), ("columns", "r"),
            ("depth", "r"), ("to", "r"), ("tid", "r")],
}  # fmt: skip


def _row_copies(c: MmaConfig, side: str) -> tuple[list[str], list[str]]:
    """A tile whose rows run along the reduction: 64 (compressed) or 128 bytes. Rows past the end are skipped: what they leave is only
    read for results that are not stored. Pieces past the end of a row are filled with zeros; MVUE's rows are padded to whole stages.

    <left>, <right>: address of the tile at this stage; <rows>, <columns>: rows left of it; <depth>: reduction columns left."""
    tile, offset, limit = (c.bm, c.right_bytes, "rows") if side == "left" else (c.bn, 0, "columns")
    width = 64 if side == "left" else 128
    chunks = width // 16
    step, p = c.threads // chunks, side[0]
    turn = f"shr.u32 {p}t, {p}r, 1; and.b32 {p}t, {p}t, 3;" if width == 64 else f"and.b32 {p}t, {p}r, 7;"
    bytes_left = "<depth>" if side == "left" else f"{p}n"
    whole = c.kind == "mvue"
    setup = [
        f".reg .b32 {p}r, {p}c, {p}t, {p}d, {p}n; .reg .b64 {p}g, {p}x; .reg .pred {p}p, {p}z;",
        f"shr.u32 {p}r, <tid>, {chunks.bit_length() - 1}; and.b32 {p}c, <tid>, {chunks - 1};",
        f"{turn} xor.b32 {p}t, {p}t, {p}c; shl.b32 {p}t, {p}t, 4; mad.lo.u32 {p}d, {p}r, {width}, {p}t; add.u32 {p}d, {p}d, base;"
        f"add.u32 {p}d, {p}d, <to>; add.u32 {p}d, {p}d, {RESERVED + offset}; shl.b32 {p}c, {p}c, 4;",
        "" if whole else f"shl.b32 {p}n, <depth>, 1; setp.le.s32 {p}z, {bytes_left}, {p}c;",
        f"mul.wide.u32 {p}x, {p}r, <{side}_stride>; cvt.u64.u32 {p}g, {p}c; add.u64 {p}g, {p}g, {p}x; add.u64 {p}g, {p}g, <{side}>;"
        f"sub.s32 {p}r, <{limit}>, {p}r;",
    ]
    copies = []
    for i in range(tile // step):
        source = f"{p}g" if i == 0 else f"{p}x"
        move = "" if i == 0 else f"mad.wide.u32 {p}x, <{side}_stride>, {i * step}, {p}g; "
        copies.append(
            f"{move}setp.gt.s32 {p}p, {p}r, {i * step}; "
            f"@{p}p cp.async.cg.shared.global [{p}d+{i * step * width}], [{source}], 16{'' if whole else f', {p}z'};"
        )
    return setup, copies


def _column_copies(c: MmaConfig, side: str) -> tuple[list[str], list[str]]:
    """A tile [step tokens, bm or bn] whose rows run across the reduction: tokens past the end are filled with zeros, columns past the
    end are skipped."""
    tile, offset, limit = (c.bm, c.right_bytes, "rows") if side == "left" else (c.bn, 0, "columns")
    chunks = tile // 8
    step, p = c.threads // chunks, side[0]
    setup = [
        f".reg .b32 {p}r, {p}c, {p}t, {p}d; .reg .b64 {p}g, {p}x; .reg .pred {p}p, {p}z;",
        f"shr.u32 {p}r, <tid>, {chunks.bit_length() - 1}; and.b32 {p}c, <tid>, {chunks - 1};",
        f"shl.b32 {p}t, {p}c, 3; setp.lt.s32 {p}p, {p}t, <{limit}>;",
        f"and.b32 {p}t, {p}r, 7; xor.b32 {p}t, {p}t, {p}c; shl.b32 {p}t, {p}t, 4; mad.lo.u32 {p}d, {p}r, {tile * 2}, {p}t;",
        f"add.u32 {p}t, base, <to>; add.u32 {p}t, {p}t, {RESERVED + offset};",
        f"shl.b32 {p}c, {p}c, 4; mul.wide.u32 {p}x, {p}r, <{side}_stride>; cvt.u64.u32 {p}g, {p}c; add.u64 {p}g, {p}g, {p}x;"
        f"add.u64 {p}g, {p}g, <{side}>; sub.s32 {p}r, <depth>, {p}r;",
    ]
    if step % 8 == 0:
        setup.append(f"add.u32 {p}d, {p}d, {p}t;")
    copies = []
    for i in range(c.step // step):
        source = f"{p}g" if i == 0 else f"{p}x"
        move = "" if i == 0 else f"mad.wide.u32 {p}x, <{side}_stride>, {i * step}, {p}g; "
        goal = f"{p}d+{i * step * tile * 2}"
        if step % 8:  # fewer than eight rows at once: the swizzle, which sees row % 8, changes from copy to copy
            move += f"xor.b32 {p}c, {p}d, {i * step % 8 * 16}; add.u32 {p}c, {p}c, {p}t; "
            goal = f"{p}c+{i * step * tile * 2}"
        copies.append(f"{move}setp.le.s32 {p}z, {p}r, {i * step}; @{p}p cp.async.cg.shared.global [{goal}], [{source}], 16, {p}z;")
    return setup, copies


def _word_copies(c: MmaConfig) -> tuple[list[str], list[str]]:
    """A stage's metadata: 512 bytes of every 64 rows; <meta_stride>: bytes from one such slab to the next."""
    if not c.sparse:
        return [], []
    setup = [
        ".reg .b32 mr, mc, md; .reg .b64 mg, mx; .reg .pred mp;",
        "shr.u32 mr, <tid>, 5; and.b32 mc, <tid>, 31; shl.b32 mc, mc, 4; mul.wide.u32 mx, mr, <meta_stride>; cvt.u64.u32 mg, mc;",
        "add.u64 mg, mg, mx; add.u64 mg, mg, <meta>; shl.b32 md, <tid>, 4; add.u32 md, md, base; add.u32 md, md, <to>;"
        f"setp.lt.u32 mp, <tid>, {c.meta_bytes // 16}; setp.gt.and.s32 mp, <rows>, 0, mp;",
    ]
    return setup, [f"@mp cp.async.cg.shared.global [md+{RESERVED + c.right_bytes + c.left_bytes}], [mg], 16;"]


def copy_lines(c: MmaConfig) -> tuple[list[str], list[str]]:
    """PTX that fetches a stage: set-up, and one string a copy."""
    sides = [
        (_row_copies if c.sparse else _column_copies)(c, "left"),
        (_row_copies if c.kind == "spmm" else _column_copies)(c, "right"),
        _word_copies(c),
    ]
    return [line for setup, _ in sides for line in setup], [line for _, copies in sides for line in copies]


@builtin
def fetch(like, copies, C, _semantic=None):
    """Begin a stage's copies and commit them as a group. Returns a tensor nobody needs."""
    c = unwrap(C)
    s = Statement(_semantic, like)
    s.output("nothing", gl.int32)
    for (name, constraint), value in zip(COPY_OPERANDS[c.sparse], list(copies), strict=True):
        s.input(name, value, constraint)
    declare, lines = copy_lines(c)
    s.lines += [".reg .b32 base; mov.u32 base, global_smem;", *declare, *lines, "cp.async.commit_group;"]
    s.lines += [f"mov.b32 <nothing.{i}>, 0;" for i in range(4)]
    return s.run()[0]


@builtin
def split(tensors, FIRST, COUNT, _semantic=None):
    """Elements FIRST to FIRST + COUNT - 1 of a tuple."""
    first, count = unwrap(FIRST), unwrap(COUNT)
    return pack_tuple(list(tensors)[first : first + count])


@builtin
def copies_of(x, COUNT, _semantic=None):
    return pack_tuple([x] * unwrap(COUNT))
