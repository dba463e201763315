"""Inline PTX of the sm_90 sparse product, as Gluon builtins.

Every shared-memory offset is in bytes from `global_smem`, the symbol of Triton's dynamic shared memory. The three tensor maps are
kernel parameters: inline PTX names them `{KERNEL}_param_{i}`. `check_compiled` reads both assumptions out of the PTX.

A descriptor (PTX ISA, "Matrix descriptor format"): start address / 16 in bits 0-13, leading offset in 16-29 (unused by swizzled
K-major tiles: 1), bytes / 16 between 8-row groups in 32-45, swizzle in 62-63 (1 = 128 B, 2 = 64 B).
"""
from __future__ import annotations

from ...gluon_compat import DESC_PARAMS, asm_scalar, asm_tied, builtin, pack_tuple, unwrap

KERNEL = "chts_spmm_sm90"
PARAM_W, PARAM_X, PARAM_Y = 0, DESC_PARAMS, 2 * DESC_PARAMS
W_DESC_HIGH = 2 << 30 | 512 >> 4        # W tile: rows of 32 kept values = 64 bytes
X_DESC_HIGH = 1 << 30 | 1024 >> 4       # X tile: rows of 64 values = 128 bytes
STORE_NAMED_BARRIER = 12                # + warpgroup; Triton hands out named barriers from 0 upwards


# --- barriers --------------------------------------------------------------------------------------------------------
@builtin
def mbar_init(offset, count, _semantic=None):
    asm = ("{ .reg .pred p; .reg .b32 a, t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; mov.u32 a, global_smem; add.u32 a, a, $1;"
           f"@p mbarrier.init.shared::cta.b64 [a], {unwrap(count)}; mov.b32 $0, 0; }}")
    return asm_scalar(_semantic, asm, "=r,r", [offset])


@builtin
def mbar_init_fence(_semantic=None):
    """The initialised barriers become visible to the copy engine, to the cluster, and to the whole warp that initialised them."""
    asm = "fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta; bar.warp.sync 0xffffffff; mov.b32 $0, 0;"
    return asm_scalar(_semantic, asm, "=r")


@builtin
def wait_for_predecessor(_semantic=None):
    """Programmatic dependent launch: blocks start before the kernel ahead has ended, and wait here until its writes are visible; the
    kernel behind may start its blocks from now on, as multiprocessors become free. Without the launch attribute: nothing."""
    return asm_scalar(_semantic, "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r")


@builtin
def mbar_wait(offset, parity, _semantic=None):
    asm = ("{ .reg .pred p; .reg .b32 a; mov.u32 a, global_smem; add.u32 a, a, $1;\n"
           "WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [a], $2;\n @!p bra.uni WAIT;\n mov.b32 $0, 0; }")
    return asm_scalar(_semantic, asm, "=r,r,r", [offset, parity])


@builtin
def mbar_arrive(offset, CLUSTER, _semantic=None):
    """One arrival a warp on this CTA's barrier; in a cluster, on every CTA's.

    Plain `arrive`: with `.release.cluster` ptxas emits MEMBAR.ALL.GPU + CCTL.IVALL (the kernel becomes 3x slower), and nothing has
    to be released: the arrival only says that wgmma, already waited for, has finished reading."""
    asm = ("{ .reg .pred p; .reg .b32 a, l; mov.u32 l, %laneid; setp.eq.u32 p, l, 0; mov.u32 a, global_smem; add.u32 a, a, $1;")
    if unwrap(CLUSTER) == 1:
        asm += "@p mbarrier.arrive.shared::cta.b64 _, [a];"
    else:
        for rank in range(unwrap(CLUSTER)):
            asm += f"mapa.shared::cluster.u32 l, a, {rank}; @p mbarrier.arrive.shared::cluster.b64 _, [l];"
    return asm_scalar(_semantic, asm + "mov.b32 $0, 0; }", "=r,r", [offset])


@builtin
def warp_in_group(_semantic=None):
    """Index of the warp in its group of four, uniform over the warp."""
    asm = "{ .reg .b32 t; mov.u32 t, %tid.x; shr.u32 t, t, 5; and.b32 t, t, 3; shfl.sync.idx.b32 $0, t, 0, 31, -1; }"
    return asm_scalar(_semantic, asm, "=r")


@builtin
def cluster_rank(_semantic=None):
    return asm_scalar(_semantic, "mov.u32 $0, %cluster_ctarank;", "=r")


@builtin
def cluster_sync(_semantic=None):
    """Every warp of every CTA must run it: it stands in each partition, and each partition has four warps (Triton pads a partition
    to four with warps that never run code and would hang it)."""
    return asm_scalar(_semantic, "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; mov.b32 $0, 0;", "=r")


# --- loads -----------------------------------------------------------------------------------------------------------
POLICY = {"f": 0x12F0000000000000, "l": 0x14F0000000000000}      # L2 cache policies evict_first and evict_last, whole access


def _hint(letter: str) -> tuple[str, str]:
    """The qualifier and the operand of an L2 policy; none for "n"."""
    return (".L2::cache_hint", f", {POLICY[letter]:#x}") if letter in POLICY else ("", "")


def _map_address(register: str, index: int) -> str:
    return f"mov.b64 {register}, {KERNEL}_param_{index}; cvta.param.u64 {register}, {register};"


@builtin
def prefetch_maps(_semantic=None):
    """One thread fetches the three tensor maps ahead of their first use."""
    asm = "{ .reg .pred p; .reg .b64 t; .reg .b32 i; mov.u32 i, %tid.x; setp.eq.u32 p, i, 0;"
    for index in (PARAM_W, PARAM_X, PARAM_Y):
        asm += f"{_map_address('t', index)} @p prefetch.tensormap [t];"
    return asm_scalar(_semantic, asm + "mov.b32 $0, 0; }", "=r")


@builtin
def load_stage(stage, full, row_w, row_x, k_w, k_x, rank, BM, BN, CLUSTER, HINTS, _semantic=None):
    """One lane announces the stage's bytes, then copies W's tile [BM, 32] and X's [BN, 64]; in a cluster each CTA copies its part of
    X's rows to all. W first: the other order costs 7 % sustained (KERNELS.md section 5)."""
    bm, bn, cluster = unwrap(BM), unwrap(BN), unwrap(CLUSTER)
    copy = "@p cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
    (hint_w, policy_w), (hint_x, policy_x) = (_hint(letter) for letter in unwrap(HINTS)[:2])
    multicast, mask = (".multicast::cluster", f", {(1 << cluster) - 1}") if cluster > 1 else ("", "")
    asm = ("{ .reg .pred p; .reg .b32 base, bar, d; .reg .b64 tw, tx; "
           "mov.u32 base, global_smem; add.u32 bar, base, $2; add.u32 base, base, $1;"
           f"{_map_address('tw', PARAM_W)} {_map_address('tx', PARAM_X)} elect.sync _|p, 0xffffffff;"
           f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {bm * 64 + bn * 128};"
           f"add.u32 d, base, {bn * 128}; {copy}{hint_w} [d], [tw, {{$5, $3}}], [bar]{policy_w};"
           f"mad.lo.u32 d, $7, {bn // cluster * 128}, base; {copy}{multicast}{hint_x} [d], [tx, {{$6, $4}}], [bar]{mask}{policy_x};"
           "mov.b32 $0, 0; }")
    return asm_scalar(_semantic, asm, "=r" + ",r" * 7, [stage, full, row_w, row_x, k_w, k_x, rank])


# --- the product -----------------------------------------------------------------------------------------------------
def _tied_constraints(count: int) -> str:
    return ",".join(["=f"] * count + [str(i) for i in range(count)])


def _product_asm(bn: int, blocks: int, pack: int, dtype: str) -> tuple[str, str]:
    """wgmma.sp over one 64-wide K step for `blocks` stacked m64 blocks, left in flight; waits for the previous step.

    Operands: blocks*bn/2 accumulators, the same tied, then per input tensor `pack` copies of: `ab` (W offset / 16 | accumulate << 15 |
    X offset / 16 << 16), and each block's metadata word."""
    regs, total = bn // 2, blocks * bn // 2
    ab = 2 * total
    lines = [
        "{ .reg .b32 base, w, x, t; .reg .b64 dw, dx; .reg .pred always, keep; setp.eq.u32 always, 1, 1;",
        f"and.b32 t, ${ab}, 0x8000; setp.ne.u32 keep, t, 0; mov.u32 base, global_smem; shr.u32 base, base, 4;",
        f"and.b32 w, ${ab}, 0x3fff; add.u32 w, w, base; and.b32 w, w, 0x3fff; or.b32 w, w, 0x10000;",
        f"shr.u32 x, ${ab}, 16; add.u32 x, x, base; and.b32 x, x, 0x3fff; or.b32 x, x, 0x10000;",
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(2):           # two k32 instructions; the sparsity selector names the lanes that supply the metadata
        lines.append(f"add.u32 t, x, {4 * step}; mov.b64 dx, {{t, {X_DESC_HIGH:#x}}};")
        for block in range(blocks):
            acc = ", ".join(f"${i}" for i in range(block * regs, (block + 1) * regs))
            lines += [
                f"add.u32 t, w, {2 * step + block * 256}; mov.b64 dw, {{t, {W_DESC_HIGH:#x}}};",
                f"wgmma.mma_async.sp.sync.aligned.m64n{bn}k32.f32.{dtype}.{dtype} {{{acc}}}, dw, dx, "
                f"${ab + pack * (1 + block)}, {step}, {'always' if step else 'keep'}, 1, 1, 0, 0;",
            ]
    lines.append("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1; }")
    return "\n".join(lines), _tied_constraints(total) + ",r" * (pack * (1 + blocks))


@builtin
def wgmma_sp(accs, ab, metas, BN, DTYPE, _semantic=None):
    """accs: tuple of float32 [128, pack], one thread a row (192 columns are no power of two: hence chunks); metas: int32 [128, 1]."""
    accs, metas = list(accs), list(metas)
    pack = int(unwrap(accs[0].shape[1]))
    asm, constraints = _product_asm(unwrap(BN), len(metas), pack, unwrap(DTYPE))
    extra = [_semantic.broadcast_impl_shape(v, accs[0].shape) for v in [ab, *metas]]
    return asm_tied(_semantic, asm, constraints, accs, extra, pack)


@builtin
def wgmma_wait_all(accs, _semantic=None):
    """Everything in flight is finished; tied, so that no use of an accumulator moves above it."""
    accs = list(accs)
    pack = int(unwrap(accs[0].shape[1]))
    return asm_tied(_semantic, "wgmma.wait_group.sync.aligned 0;", _tied_constraints(pack * len(accs)), accs, [], pack)


@builtin
def copies(x, COUNT, _semantic=None):
    return pack_tuple([x] * unwrap(COUNT))


@builtin
def shifted(words, fresh, _semantic=None):
    """The queue of metadata words without its first four, `fresh` behind them."""
    return pack_tuple([*list(words)[4:], *list(fresh)])


@builtin
def rotated(words, _semantic=None):
    """The queue with its second and third word moved up by one."""
    words = list(words)
    return pack_tuple([words[1], words[2], *words[2:]])


# --- the epilogue ----------------------------------------------------------------------------------------------------
@builtin
def store_block(accs, BLOCK, CHUNKS, Y_TOKENS, y_offset, row, token, bias, WG, DTYPE, HINTS, _semantic=None):
    """Store m64 block BLOCK (CHUNKS register tensors), transposed, in passes of Y_TOKENS tokens: wait until the previous copy has
    read this warpgroup's buffer, write [tokens, 64 rows] with stmatrix.trans, start the TMA store and leave it running.

    The buffer has rows of 128 bytes in 128-byte swizzle. Lane l of a warp feeds row l % 8 of 8x8 matrix l / 8; the four matrices are
    (tokens j, rows 0-7), (j, 8-15), (j + 1, 0-7), (j + 1, 8-15) of the warp's 16 rows, j counting groups of eight tokens.
    bias: () or two float32 [128, 1], of rows g and g + 8. The accumulators pass through, tied."""
    every, bias, block, chunks = list(accs), list(bias), unwrap(BLOCK), unwrap(CHUNKS)
    part, tokens, barrier = every[block * chunks:(block + 1) * chunks], unwrap(Y_TOKENS), STORE_NAMED_BARRIER + unwrap(WG)
    pack = int(unwrap(part[0].shape[1]))
    regs = pack * chunks
    offset, out_row, out_token, bias_low, bias_high = (f"${2 * regs + i * pack}" for i in range(5))
    convert = "cvt.rn.bf16x2.f32" if unwrap(DTYPE) == "bf16" else "cvt.rn.f16x2.f32"
    hint, policy = _hint(unwrap(HINTS)[2])
    lines = [
        "{ .reg .pred p; .reg .b32 t, w, r, h, c, a, s, x, r0, r1, r2, r3; .reg .b64 ty; .reg .f32 f0, f1;",
        f"mov.u32 t, %tid.x; and.b32 s, t, 127; setp.eq.u32 p, s, 0; mov.u32 a, global_smem; add.u32 s, a, {offset};",
        "shr.u32 w, t, 5; and.b32 w, w, 3; and.b32 r, t, 7; shr.u32 h, t, 3; and.b32 h, h, 1; shr.u32 x, t, 4; and.b32 x, x, 1;",
        "shl.b32 c, w, 1; or.b32 c, c, h; xor.b32 c, c, r; shl.b32 c, c, 4; shl.b32 r, r, 7; shl.b32 x, x, 10;",
        "add.u32 a, s, c; add.u32 a, a, r; add.u32 a, a, x;", _map_address("ty", PARAM_Y),
    ]
    for first in range(0, 2 * regs, tokens):
        lines.append(f"@p cp.async.bulk.wait_group.read 0; bar.sync {barrier}, 128;")
        for j in range(first // 8, (first + tokens) // 8, 2):
            for i, (jj, half) in enumerate([(j, 0), (j, 1), (j + 1, 0), (j + 1, 1)]):
                low, high = f"${4 * jj + 2 * half}", f"${4 * jj + 2 * half + 1}"
                if bias:
                    b = bias_high if half else bias_low
                    lines.append(f"add.f32 f0, {low}, {b}; add.f32 f1, {high}, {b};")
                    low, high = "f0", "f1"
                lines.append(f"{convert} r{i}, {high}, {low};")
            lines.append(f"stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [a+{(j - first // 8) * 1024}], {{r0, r1, r2, r3}};")
        lines.append(f"fence.proxy.async.shared::cta; bar.sync {barrier}, 128; add.u32 x, {out_token}, {first};")
        lines.append(f"@p cp.async.bulk.tensor.2d.global.shared::cta.bulk_group{hint} [ty, {{{out_row}, x}}], [s]{policy};")
        lines.append("@p cp.async.bulk.commit_group;")
    like = part[0]
    extra = [_semantic.splat(_semantic.to_tensor(v), like.shape, like.type.layout) for v in (y_offset, row, token)]
    extra += [_semantic.broadcast_impl_shape(b, like.shape) for b in bias]
    constraints = _tied_constraints(regs) + ",r" * (3 * pack) + ",f" * (pack * len(bias))
    new = asm_tied(_semantic, "\n".join([*lines, "}"]), constraints, part, extra, pack)
    return pack_tuple([*every[:block * chunks], *new, *every[(block + 1) * chunks:]])


@builtin
def store_drain(_semantic=None):
    """Shared memory outlives the copies that read it."""
    return asm_scalar(_semantic, "cp.async.bulk.wait_group.read 0; mov.b32 $0, 0;", "=r")
