"""Gluon kernel of the scores' int8 products on compute capability 9.0: dense wgmma m64nNk32, s8 x s8 + s32.

One CTA per multiprocessor walks over output tiles: a loader warp feeds a ring of STAGES stages of 128 columns by TMA, two
MMA warpgroups multiply, one product in flight while the next is issued, and store their accumulators straight from
registers. In int8 a tile row of 128 columns is 128 bytes, so descriptors and swizzle are those of a 64-column bf16 tile.
Barriers and conventions on shared memory are those of ../spmm/sm90_ptx.py.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import torch

from ...cuda_driver import Kernel, Launch, TensorMap, parameters
from ...gluon_compat import (
    DESC_PARAMS,
    RESERVED_SHARED,
    asm_scalar,
    asm_tied,
    builtin,
    compile_kernel,
    gl,
    gluon,
    thread_barrier,
    unwrap,
)
from .._batch import current_stream, enqueue, is_recording, record
from ..spmm.sm90_ptx import copies, mbar_arrive, mbar_init, mbar_init_fence, mbar_wait, warp_in_group

KERNEL = "chts_multiply_sm90"
PARAM_A, PARAM_B, PARAM_OUT = 0, DESC_PARAMS, 2 * DESC_PARAMS
STEP = 128  # columns of a stage
DESC_HIGH = 1 << 30 | 1024 >> 4  # 128-byte swizzle, 1024 bytes between 8-row groups


@dataclass(frozen=True)
class Config:
    """Tile rows and columns, stages in flight, tile rows of a band that stays in L2."""

    bm: int
    bn: int
    stages: int
    group: int = 8

    @property
    def barriers(self) -> int:
        return RESERVED_SHARED + self.stages * (self.bm + self.bn) * STEP

    @property
    def shared_bytes(self) -> int:
        return self.barriers + 16 * self.stages


CONFIGS = {
    "128x128": Config(128, 128, 6),
    "128x256": Config(128, 256, 4),
    "128x256g16": Config(128, 256, 4, 16),
    "256x128": Config(256, 128, 4),
    "256x128g4": Config(256, 128, 4, 4),
}
SYMMETRIC, RECTANGULAR = "128x128", "128x256"


# --- inline PTX ------------------------------------------------------------------------------------------------------
@builtin
def warpgroup_index(_semantic=None):
    """Index of the warpgroup in the CTA, uniform over the warp."""
    asm = "{ .reg .b32 t; mov.u32 t, %tid.x; shr.u32 t, t, 7; shfl.sync.idx.b32 $0, t, 0, 31, -1; }"
    return asm_scalar(_semantic, asm, "=r")


@builtin
def load_stage(stage, full, a_row, b_row, a_column, b_column, BM, BN, _semantic=None):
    """One lane: announce the stage's bytes, then copy A's tile [BM, 128] and B's [BN, 128]. Columns count pairs of bytes."""
    bm, bn = unwrap(BM), unwrap(BN)
    copy = "@p cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
    asm = (
        "{ .reg .pred p; .reg .b32 base, bar, d; .reg .b64 ta, tb; "
        "mov.u32 base, global_smem; add.u32 bar, base, $2; add.u32 base, base, $1;"
        f"mov.b64 ta, {KERNEL}_param_{PARAM_A}; cvta.param.u64 ta, ta; mov.b64 tb, {KERNEL}_param_{PARAM_B}; cvta.param.u64 tb, tb;"
        f"elect.sync _|p, 0xffffffff; @p mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {(bm + bn) * STEP};"
        f"{copy} [base], [ta, {{$5, $3}}], [bar]; add.u32 d, base, {bm * STEP}; {copy} [d], [tb, {{$6, $4}}], [bar];"
        "mov.b32 $0, 0; }"
    )
    return asm_scalar(_semantic, asm, "=r" + ",r" * 6, [stage, full, a_row, b_row, a_column, b_column])


def _ties(count):
    return ",".join(["=r"] * count + [str(i) for i in range(count)])


def _splat(semantic, like, value, kind):
    value = semantic.to_tensor(value)
    return semantic.splat(value if value.dtype == kind else semantic.cast(value, kind), like.shape, like.type.layout)


@builtin
def product(sums, ab, BLOCKS, BN, _semantic=None):
    """One stage for BLOCKS stacked m64 blocks; left in flight, after waiting for the stage before.

    sums: tuple of int32 [256, pack], one thread a row. ab: offset of the warpgroup's rows of A / 16 | accumulate << 15 | offset
    of B / 16 << 16.
    """
    sums, blocks, bn = list(sums), unwrap(BLOCKS), unwrap(BN)
    pack = int(unwrap(sums[0].shape[1]))
    count = pack * len(sums)
    lines = [
        "{ .reg .b32 base, a, b, t; .reg .b64 da, db; .reg .pred always, keep; setp.eq.u32 always, 1, 1;",
        f"and.b32 t, ${2 * count}, 0x8000; setp.ne.u32 keep, t, 0; mov.u32 base, global_smem; shr.u32 base, base, 4;",
        f"and.b32 a, ${2 * count}, 0x3fff; add.u32 a, a, base; and.b32 a, a, 0x3fff; or.b32 a, a, 0x10000;",
        f"shr.u32 b, ${2 * count}, 16; add.u32 b, b, base; and.b32 b, b, 0x3fff; or.b32 b, b, 0x10000;",
        "wgmma.fence.sync.aligned;",
    ]
    for k in range(STEP // 32):  # 32 columns = 32 bytes of every swizzled row
        lines.append(f"add.u32 t, b, {2 * k}; mov.b64 db, {{t, {DESC_HIGH:#x}}};")
        for block in range(blocks):
            registers = ", ".join(f"${i}" for i in range(block * bn // 2, (block + 1) * bn // 2))
            lines += [
                f"add.u32 t, a, {2 * k + block * 512}; mov.b64 da, {{t, {DESC_HIGH:#x}}};",
                f"wgmma.mma_async.sync.aligned.m64n{bn}k32.s32.s8.s8 {{{registers}}}, da, db, {'always' if k else 'keep'};",
            ]
    lines.append("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1; }")
    extra = [_splat(_semantic, sums[0], ab, gl.int32)]
    return asm_tied(_semantic, "\n".join(lines), _ties(count) + ",r" * pack, sums, extra, pack)


@builtin
def product_wait(sums, _semantic=None):
    """Everything in flight is finished; tied, so that no use of an accumulator moves above it."""
    sums = list(sums)
    pack = int(unwrap(sums[0].shape[1]))
    return asm_tied(_semantic, "wgmma.wait_group.sync.aligned 0;", _ties(pack * len(sums)), sums, [], pack)


@builtin
def store_block(sums, BLOCK, address, stride, valid, BN, BYTES, _semantic=None):
    """Store m64 block BLOCK to the matrix at ``address`` with ``stride`` bytes a row, as 4-byte integers or their low 2 bytes; only
    the first ``valid`` columns, a multiple of 128. Lane 4 g + q of warp w holds rows 16 w + g and + 8, columns 8 j + 2 q and + 1."""
    sums, block, bn, size = list(sums), unwrap(BLOCK), unwrap(BN), unwrap(BYTES)
    pack = int(unwrap(sums[0].shape[1]))
    count = pack * len(sums)
    at, step, limit = (f"${2 * count + i * pack}" for i in range(3))
    lines = [
        "{ .reg .b32 t, w, g, q, r; .reg .b64 x, y, s; .reg .pred p;",
        "mov.u32 t, %tid.x; and.b32 q, t, 3; shr.u32 g, t, 2; and.b32 g, g, 7; shr.u32 w, t, 5; and.b32 w, w, 3;",
        f"shl.b32 w, w, 4; add.u32 g, g, w; mul.wide.s32 x, g, {step}; add.s64 x, x, {at}; mul.wide.u32 s, q, {2 * size};",
        f"add.s64 x, x, s; mul.wide.s32 y, {step}, 8; add.s64 y, y, x;",
    ]
    for j in range(bn // 8):
        if j % 16 == 0:
            lines.append(f"setp.gt.s32 p, {limit}, {j * 8};")
        first = block * bn // 2 + 4 * j
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


# --- kernel ----------------------------------------------------------------------------------------------------------
@gluon.jit
def _tile(t, per_layer, tiles_m, tiles_n, TRIANGLE: gl.constexpr, GROUP: gl.constexpr):
    """(layer, tile row, tile column) of tile t: the order of ``triangle`` and ``rectangle`` in multiply.py."""
    layer, t = t // per_layer, t % per_layer
    if TRIANGLE:
        even = 1 - tiles_m % 2
        line, place = t // (tiles_m + even), t % (tiles_m + even)
        folded = place >= tiles_m - line
        tile_m = gl.where(folded, tiles_m - line - even, line)
        tile_n = gl.where(folded, place - even, line + place)
    else:
        band, place = t // (GROUP * tiles_n), t % (GROUP * tiles_n)
        height = gl.minimum(tiles_m - band * GROUP, GROUP)
        tile_m = band * GROUP + place % height
        tile_n = place // height
    return layer, tile_m, tile_n


@gluon.jit
def _load_partition(a_first, a_rows, a_column, b_first, b_rows, b_column, steps, tiles_m, tiles_n, per_layer, tiles,
                    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr, BARRIERS: gl.constexpr,
                    GROUP: gl.constexpr, TRIANGLE: gl.constexpr):  # fmt: skip
    STAGE: gl.constexpr = (BM + BN) * 128
    if warp_in_group() == 0:
        s = 0
        phase = 1
        for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
            layer, tile_m, tile_n = _tile(t, per_layer, tiles_m, tiles_n, TRIANGLE, GROUP)
            a_row = a_first + layer * a_rows + tile_m * BM
            b_row = b_first + layer * b_rows + tile_n * BN
            for k in range(steps):
                mbar_wait(BARRIERS + (STAGES + s) * 8, phase)
                load_stage(RING + s * STAGE, BARRIERS + s * 8, a_row, b_row, a_column + k * 64, b_column + k * 64, BM, BN)
                s += 1
                if s == STAGES:
                    s = 0
                    phase ^= 1


@gluon.jit
def _mma_partition(out_ptr, out_first, out_layer, out_stride, rows, columns, steps, tiles_m, tiles_n, per_layer, tiles,
                   BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr, BARRIERS: gl.constexpr,
                   GROUP: gl.constexpr, TRIANGLE: gl.constexpr, CHUNK: gl.constexpr, BYTES: gl.constexpr):  # fmt: skip
    STAGE: gl.constexpr = (BM + BN) * 128
    BLOCKS: gl.constexpr = BM // 128
    L: gl.constexpr = gl.BlockedLayout([1, CHUNK], [32, 1], [8, 1], [1, 0])
    wg = warpgroup_index()
    sums = copies(gl.zeros([256, CHUNK], gl.int32, L), BLOCKS * BN // 2 // CHUNK)
    base = (RING + wg * (BLOCKS * 8192)) // 16 | ((RING + BM * 128) // 16 << 16)
    s = 0
    phase = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        mbar_wait(BARRIERS + s * 8, phase)
        sums = product(sums, base + s * (STAGE // 16 * 65537), BLOCKS, BN)
        for _ in range(steps - 1):
            before = s
            s += 1
            if s == STAGES:
                s = 0
                phase ^= 1
            mbar_wait(BARRIERS + s * 8, phase)
            sums = product(sums, (base + s * (STAGE // 16 * 65537)) | 0x8000, BLOCKS, BN)
            mbar_arrive(BARRIERS + (STAGES + before) * 8, 1)
        sums = product_wait(sums)
        mbar_arrive(BARRIERS + (STAGES + s) * 8, 1)
        s += 1
        if s == STAGES:
            s = 0
            phase ^= 1
        layer, tile_m, tile_n = _tile(t, per_layer, tiles_m, tiles_n, TRIANGLE, GROUP)
        row = tile_m * BM + wg * (BLOCKS * 64)
        corner = out_first + layer.to(gl.int64) * out_layer
        if TRIANGLE:  # tiles one after the other: ``tile_number`` in multiply.py
            number = tile_m * tiles_m - tile_m * (tile_m - 1) // 2 + tile_n - tile_m
            corner += number.to(gl.int64) * (BM * BN) + wg * (BLOCKS * 64 * BN)
        else:
            corner += row.to(gl.int64) * out_stride + tile_n * BN
        valid = gl.where(row < rows, columns - tile_n * BN, 0)
        address = out_ptr.to(gl.int64) + corner * BYTES
        for block in gl.static_range(BLOCKS):
            at = address + out_stride.to(gl.int64) * (block * 64 * BYTES)
            sums = store_block(sums, block, at, out_stride * BYTES, valid, BN, BYTES)


@gluon.jit
def chts_multiply_sm90(a_desc, b_desc, out_ptr, a_first, a_rows, a_column, b_first, b_rows, b_column, steps, out_first, out_layer,
                       out_stride, rows, columns, tiles_m, tiles_n, per_layer, tiles, BM: gl.constexpr, BN: gl.constexpr,
                       STAGES: gl.constexpr, RING: gl.constexpr, BARRIERS: gl.constexpr, GROUP: gl.constexpr,
                       TRIANGLE: gl.constexpr, CHUNK: gl.constexpr, BYTES: gl.constexpr):  # fmt: skip
    """Shared memory: at RING STAGES of (A tile, B tile), at BARRIERS a full and an empty mbarrier per stage."""
    for i in gl.static_range(STAGES):
        mbar_init(BARRIERS + i * 8, 1)  # full: the loader's announcement
        mbar_init(BARRIERS + (STAGES + i) * 8, 8)  # empty: every MMA warp
    mbar_init_fence()
    thread_barrier()
    gl.warp_specialize([
        (_mma_partition, (out_ptr, out_first, out_layer, out_stride, rows, columns, steps, tiles_m, tiles_n, per_layer, tiles,
                          BM, BN, STAGES, RING, BARRIERS, GROUP, TRIANGLE, CHUNK, BYTES)),
        (_load_partition, (a_first, a_rows, a_column, b_first, b_rows, b_column, steps, tiles_m, tiles_n, per_layer, tiles,
                           BM, BN, STAGES, RING, BARRIERS, GROUP, TRIANGLE)),
    ], [4], [40])  # fmt: skip


# --- build and launch ------------------------------------------------------------------------------------------------
SCALARS = {
    "a_first": "i32", "a_rows": "i32", "a_column": "i32", "b_first": "i32", "b_rows": "i32", "b_column": "i32", "steps": "i32",
    "out_first": "i64", "out_layer": "i64", "out_stride": "i32", "rows": "i32", "columns": "i32", "tiles_m": "i32",
    "tiles_n": "i32", "per_layer": "i32", "tiles": "i32",
}  # fmt: skip


class _Compiler:
    """The kernel of one (config name, bytes of a result, symmetric); needs no device."""

    @functools.cache  # noqa: B019 - one instance for the life of the process
    def compile(self, name: str, size: int, symmetric: bool) -> Any:
        config = CONFIGS[name]
        # the type only makes Triton pass a tensor map; box and swizzle are set where the map is made
        desc = f"tensordesc<bf16[64, 64],{gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)!r}>"
        signature = {"a_desc": desc, "b_desc": desc, "out_ptr": "*i32" if size == 4 else "*i16", **SCALARS}
        registers = config.bm // 128 * config.bn // 2
        constants = {
            "BM": config.bm, "BN": config.bn, "STAGES": config.stages, "RING": RESERVED_SHARED, "BARRIERS": config.barriers,
            "GROUP": config.group, "TRIANGLE": symmetric, "CHUNK": min(128, registers & -registers), "BYTES": size,
        }  # fmt: skip
        compiled = compile_kernel(chts_multiply_sm90, signature, constants, num_warps=8)
        check_ptx(compiled.asm["ptx"], int(compiled.metadata.shared), config)
        return compiled


COMPILER = _Compiler()


def check_ptx(ptx: str, triton_shared: int, config: Config) -> None:
    """What the inline PTX takes for granted. Raises RuntimeError naming the guard that fails."""
    kinds = parameters(ptx, KERNEL)
    maps = [i for i, kind in enumerate(kinds) if kind == "map"]
    own = [int(offset) for offset in re.findall(r"global_smem\+(\d+)", ptx)]
    scalars = ["u64", *("u64" if kind == "i64" else "u32" for kind in SCALARS.values())]
    guards = [
        (maps == [PARAM_A, PARAM_B], f"tensor maps must be parameters {PARAM_A}, {PARAM_B}, got {maps}"),
        (kinds[PARAM_OUT : PARAM_OUT + len(scalars)] == scalars, f"scalar parameters changed: {kinds}"),
        (triton_shared <= RESERVED_SHARED, f"Triton's own shared memory must fit {RESERVED_SHARED} bytes, got {triton_shared}"),
        (all(offset < RESERVED_SHARED for offset in own), f"Triton must stay below global_smem + {RESERVED_SHARED}, got {own}"),
        (f"m64n{config.bn}k32.s32.s8.s8" in ptx, "wgmma must be present"),
    ]
    for holds, message in guards:
        if not holds:
            raise RuntimeError(f"chts sm_90 score products, {config}: {message}")


@functools.cache
def load(name: str, size: int, symmetric: bool, device: int) -> Launch:
    """The kernel on a device, ready to launch."""
    compiled = COMPILER.compile(name, size, symmetric)
    ptx = compiled.asm["ptx"]
    threads = int(re.search(r"\.reqntid (\d+)", ptx).group(1))
    kernel = Kernel(compiled.asm["cubin"], KERNEL, parameters(ptx, KERNEL), threads, CONFIGS[name].shared_bytes, 1, device)
    return Launch(kernel, 1, ())


@functools.lru_cache(maxsize=1024)
def _map(pointer: int, rows: int, row_bytes: int, box_rows: int) -> TensorMap:
    return TensorMap(pointer, rows, row_bytes // 2, row_bytes, (box_rows, STEP // 2), STEP)


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(
    operands: torch.Tensor,
    result: torch.Tensor,
    layers: int,
    problem: tuple[int, int, int, int, int, int],
    depth: int,
    out: tuple[int, int, int],
    tiles: tuple[int, int],
    symmetric: bool,
    name: str | None,
) -> None:
    """Arguments as in :func:`chts_kernels.ops.score.multiply.multiply`; a symmetric product keeps its 128 x 128 tiles."""
    name = SYMMETRIC if symmetric else name or RECTANGULAR
    config, size, device = CONFIGS[name], result.element_size(), operands.get_device()
    if is_recording():
        record(COMPILER, (name, size, symmetric))
        return
    kernel = load(name, size, symmetric, device)
    a_first, a_rows, a_column, b_first, b_rows, b_column = problem
    tiles_m, tiles_n = -(-tiles[0] // config.bm), -(-tiles[1] // config.bn)
    per_layer = tiles_m * (tiles_m + 1) // 2 if symmetric else tiles_m * tiles_n
    rows, row_bytes = operands.shape
    maps = [_map(operands.data_ptr(), rows, row_bytes, box) for box in (config.bm, config.bn)]
    values = (
        result.data_ptr(), a_first, a_rows, a_column // 2, b_first, b_rows, b_column // 2, depth // STEP, *out, *tiles,
        tiles_m, tiles_n, per_layer, per_layer * layers,
    )  # fmt: skip
    enqueue(
        kernel, min(per_layer * layers, multiprocessors(device)), tuple(enumerate(values, PARAM_OUT)), current_stream(device),
        ((PARAM_A, maps[0].address), (PARAM_B, maps[1].address)),
    )  # fmt: skip
