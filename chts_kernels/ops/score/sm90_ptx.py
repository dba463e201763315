"""Inline PTX of the scores' int8 products on compute capability 9.0, as Gluon builtins.

Two instructions share one accumulator: wgmma.sp m64nNk64, whose left operand is a 2:4 survivor matrix, and dense wgmma m64nNk32,
s8 x s8 + s32. A stage holds 128 columns: tile rows of 128 bytes (128-byte swizzle) or, compressed, of 64 bytes (64-byte swizzle).

Metadata of wgmma.sp for 8-bit operands (PTX ISA, "Sparse WGMMA .m64nNk64"; checked numerically): lane 4 g + 2 c + h of warp w holds
row 16 w + 8 h + g, columns 32 c to 32 c + 31, a nibble ``idx0 | idx1 << 2`` per group of four, lowest column lowest; the sparsity
selector is 0. (The 16-bit order, :mod:`chts_kernels.layout.metadata`, is another one.)

Barriers and conventions on shared memory are those of ../spmm/sm90_ptx.py.
"""

from __future__ import annotations

from ...gluon_compat import DESC_PARAMS, asm_scalar, asm_tied, builtin, gl, unwrap

KERNEL = "chts_score_sm90"
MAPS = 3
PARAM_OUT = MAPS * DESC_PARAMS
STEP = 128  # columns of a stage
DENSE_HIGH = 1 << 30 | 1024 >> 4  # descriptor, high word: 128-byte swizzle, 1024 bytes between 8-row groups
SPARSE_HIGH = 2 << 30 | 512 >> 4  # 64-byte swizzle, 512 bytes between 8-row groups


@builtin
def warpgroup_index(_semantic=None):
    """Index of the warpgroup in the CTA, uniform over the warp."""
    asm = "{ .reg .b32 t; mov.u32 t, %tid.x; shr.u32 t, t, 7; shfl.sync.idx.b32 $0, t, 0, 31, -1; }"
    return asm_scalar(_semantic, asm, "=r")


@builtin
def mbar_wait(offset, parity, _semantic=None):
    """Wait for the barrier's phase; a barrier that does not come in four million attempts (seconds, where it takes microseconds)
    traps: an error that the host sees instead of a device that hangs."""
    asm = (
        "{ .reg .pred p, late; .reg .b32 a, n; mov.u32 a, global_smem; add.u32 a, a, $1; mov.u32 n, 0;\n"
        "WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [a], $2;\n @p bra.uni DONE;\n"
        "add.u32 n, n, 1; setp.gt.u32 late, n, 4000000; @late trap; bra.uni WAIT;\n DONE: mov.b32 $0, 0; }"
    )
    return asm_scalar(_semantic, asm, "=r,r,r", [offset, parity])


@builtin
def load_stage(stage, full, a_row, b_row, a_column, b_column, MAP, A_BYTES, BM, BN, B_OFFSET, _semantic=None):
    """One lane: announce the stage's bytes, then copy A's tile [BM, A_BYTES] by tensor map MAP and B's [BN, 128] by the last map.
    Columns count pairs of bytes; B lies B_OFFSET bytes into the stage."""
    bm, bn, width, number = unwrap(BM), unwrap(BN), unwrap(A_BYTES), unwrap(MAP)
    copy = "@p cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
    last = (MAPS - 1) * DESC_PARAMS
    asm = (
        "{ .reg .pred p; .reg .b32 base, bar, d; .reg .b64 ta, tb; "
        "mov.u32 base, global_smem; add.u32 bar, base, $2; add.u32 base, base, $1;"
        f"mov.b64 ta, {KERNEL}_param_{number * DESC_PARAMS}; cvta.param.u64 ta, ta; "
        f"mov.b64 tb, {KERNEL}_param_{last}; cvta.param.u64 tb, tb;"
        f"elect.sync _|p, 0xffffffff; @p mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {bm * width + bn * STEP};"
        f"{copy} [base], [ta, {{$5, $3}}], [bar]; add.u32 d, base, {unwrap(B_OFFSET)}; {copy} [d], [tb, {{$6, $4}}], [bar];"
        "mov.b32 $0, 0; }"
    )
    return asm_scalar(_semantic, asm, "=r" + ",r" * 6, [stage, full, a_row, b_row, a_column, b_column])


def _ties(count):
    return ",".join(["=r"] * count + [str(i) for i in range(count)])


def _splat(semantic, like, value, kind):
    value = semantic.to_tensor(value)
    return semantic.splat(value if value.dtype == kind else semantic.cast(value, kind), like.shape, like.type.layout)


def _opening(ab):
    """Descriptor words of both operands from operand ``ab``: offset of the warpgroup's rows of A / 16 | accumulate << 15 | offset of
    B / 16 << 16."""
    return [
        "{ .reg .b32 base, a, b, t; .reg .b64 da, db; .reg .pred always, keep; setp.eq.u32 always, 1, 1;",
        f"and.b32 t, ${ab}, 0x8000; setp.ne.u32 keep, t, 0; mov.u32 base, global_smem; shr.u32 base, base, 4;",
        f"and.b32 a, ${ab}, 0x3fff; add.u32 a, a, base; and.b32 a, a, 0x3fff; or.b32 a, a, 0x10000;",
        f"shr.u32 b, ${ab}, 16; add.u32 b, b, base; and.b32 b, b, 0x3fff; or.b32 b, b, 0x10000;",
        "wgmma.fence.sync.aligned;",
    ]


CLOSING = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1; }"


@builtin
def sparse_product(sums, ab, words, BLOCKS, BN, _semantic=None):
    """One stage for BLOCKS stacked m64 blocks with a compressed A; left in flight, after waiting for the stage before.

    sums: tuple of int32 [256, pack], one thread a row. words: int32 [256, 1], metadata of block 0's two k64 steps, then block 1's."""
    sums, words, blocks, bn = list(sums), list(words), unwrap(BLOCKS), unwrap(BN)
    pack = int(unwrap(sums[0].shape[1]))
    at = 2 * pack * len(sums)
    lines = _opening(at)
    for k in range(2):  # 64 columns: 32 bytes of A's swizzled rows, 64 of B's
        lines.append(f"add.u32 t, b, {4 * k}; mov.b64 db, {{t, {DENSE_HIGH:#x}}};")
        for block in range(blocks):
            registers = ", ".join(f"${i}" for i in range(block * bn // 2, (block + 1) * bn // 2))
            lines += [
                f"add.u32 t, a, {2 * k + block * 256}; mov.b64 da, {{t, {SPARSE_HIGH:#x}}};",
                f"wgmma.mma_async.sp.sync.aligned.m64n{bn}k64.s32.s8.s8 {{{registers}}}, da, db, ${at + pack * (1 + 2 * block + k)}, 0, "
                f"{'always' if k else 'keep'};",
            ]
    extra = [_splat(_semantic, sums[0], ab, gl.int32)]
    extra += [_semantic.broadcast_impl_shape(word, sums[0].shape) for word in words]
    return asm_tied(_semantic, "\n".join([*lines, CLOSING]), _ties(at // 2) + ",r" * (pack * (1 + len(words))), sums, extra, pack)


@builtin
def dense_product(sums, ab, BLOCKS, BN, _semantic=None):
    """:func:`sparse_product` with a dense A of 128 bytes a row."""
    sums, blocks, bn = list(sums), unwrap(BLOCKS), unwrap(BN)
    pack = int(unwrap(sums[0].shape[1]))
    at = 2 * pack * len(sums)
    lines = _opening(at)
    for k in range(STEP // 32):  # 32 columns = 32 bytes of every swizzled row
        lines.append(f"add.u32 t, b, {2 * k}; mov.b64 db, {{t, {DENSE_HIGH:#x}}};")
        for block in range(blocks):
            registers = ", ".join(f"${i}" for i in range(block * bn // 2, (block + 1) * bn // 2))
            lines += [
                f"add.u32 t, a, {2 * k + block * 512}; mov.b64 da, {{t, {DENSE_HIGH:#x}}};",
                f"wgmma.mma_async.sync.aligned.m64n{bn}k32.s32.s8.s8 {{{registers}}}, da, db, {'always' if k else 'keep'};",
            ]
    extra = [_splat(_semantic, sums[0], ab, gl.int32)]
    return asm_tied(_semantic, "\n".join([*lines, CLOSING]), _ties(at // 2) + ",r" * pack, sums, extra, pack)


@builtin
def wait_all(sums, SHIFT, _semantic=None):
    """Everything in flight is finished and, then, every sum shifted left by SHIFT bits; tied, so that no use of an accumulator
    moves above it."""
    sums, shift = list(sums), unwrap(SHIFT)
    pack = int(unwrap(sums[0].shape[1]))
    count = pack * len(sums)
    lines = ["wgmma.wait_group.sync.aligned 0;"]
    if shift:
        lines += [f"shl.b32 ${i}, ${i}, {shift};" for i in range(count)]
    return asm_tied(_semantic, "\n".join(lines), _ties(count), sums, [], pack)


@builtin
def store_block(sums, BLOCK, address, stride, valid, BN, BYTES, TRANSPOSED, _semantic=None):
    """Store m64 block BLOCK to the matrix at ``address`` with ``stride`` bytes a row, as 4-byte integers or their low 2 bytes; only
    the first ``valid`` columns, a multiple of 128. TRANSPOSED: columns of the block are rows of the matrix.

    Lane 4 g + q of warp w holds rows 16 w + g and + 8, columns 8 j + 2 q and + 1: a store instruction fills sectors of 32 bytes
    either way."""
    sums, block, bn, size = list(sums), unwrap(BLOCK), unwrap(BN), unwrap(BYTES)
    pack = int(unwrap(sums[0].shape[1]))
    count = pack * len(sums)
    at, step, limit = (f"${2 * count + i * pack}" for i in range(3))
    lines = [
        "{ .reg .b32 t, w, g, q, r; .reg .b64 x, y, s; .reg .pred p;",
        "mov.u32 t, %tid.x; and.b32 q, t, 3; shr.u32 g, t, 2; and.b32 g, g, 7; shr.u32 w, t, 5; and.b32 w, w, 3;",
        "shl.b32 w, w, 4; add.u32 g, g, w;",
    ]
    if unwrap(TRANSPOSED):
        lines += [
            f"shl.b32 q, q, 1; mul.wide.s32 x, q, {step}; add.s64 x, x, {at}; mul.wide.u32 s, g, 4; add.s64 x, x, s;",
            f"cvt.s64.s32 s, {step}; add.s64 y, x, s; shl.b64 s, s, 3;",
        ]
    else:
        lines += [
            f"mul.wide.s32 x, g, {step}; add.s64 x, x, {at}; mul.wide.u32 s, q, {2 * size};",
            f"add.s64 x, x, s; mul.wide.s32 y, {step}, 8; add.s64 y, y, x;",
        ]
    for j in range(bn // 8):
        if j % 16 == 0:
            lines.append(f"setp.gt.s32 p, {limit}, {j * 8};")
        first = block * bn // 2 + 4 * j
        if unwrap(TRANSPOSED):
            lines.append(f"@p st.global.b32 [x], ${first}; @p st.global.b32 [x+32], ${first + 2};")
            lines.append(f"@p st.global.b32 [y], ${first + 1}; @p st.global.b32 [y+32], ${first + 3}; add.s64 x, x, s; add.s64 y, y, s;")
            continue
        for row, low in (("x", first), ("y", first + 2)):
            if size == 4:
                lines.append(f"@p st.global.v2.b32 [{row}+{j * 32}], {{${low}, ${low + 1}}};")
            else:
                lines.append(f"prmt.b32 r, ${low}, ${low + 1}, 0x5410; @p st.global.b32 [{row}+{j * 16}], r;")
    extra = [
        _splat(_semantic, sums[0], address, gl.int64),
        _splat(_semantic, sums[0], stride, gl.int32),
        _splat(_semantic, sums[0], valid, gl.int32),
    ]
    constraints = _ties(count) + ",l" * pack + ",r" * (2 * pack)
    return asm_tied(_semantic, "\n".join([*lines, "}"]), constraints, sums, extra, pack)
