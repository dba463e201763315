"""The dense twin of the Ampere-class kernels: Gluon's mma_v2 in the same tiles, ring of stages and raster, launched the same way.

What differs is the instruction (m16n8k16 instead of sparse m16n8k32), so a stage of the same bytes is half as deep, and that Gluon, not
inline PTX, places the fragments. It computes Y^T = W X^T as the sparse kernel does (left: W's rows, right: X's), or dW = dY^T X from
columns of both. Sizes must be multiples of eight; edges are masked. Importing this module imports Triton.
"""

from __future__ import annotations

import functools

import torch
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from chts_kernels import cuda_driver
from chts_kernels.gluon_compat import GluonASTSource, GPUTarget, gl, gluon, thread_barrier, triton


@gluon.jit
def place(t, num_m, num_n, GROUP: gl.constexpr):
    width = GROUP * num_n
    band = t // width
    size = gl.minimum(num_m - band * GROUP, GROUP)
    r = t % width
    return band * GROUP + r % size, r // size


@gluon.jit
def fetch(a_ptr, b_ptr, a_slot, b_slot, pm, pn, k, M, N, K, live, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
          COLUMNS: gl.constexpr, CA: gl.constexpr, CB: gl.constexpr):
    """One stage. COLUMNS: the operands are [K, M] and [K, N] instead of [M, K] and [N, K]."""
    if COLUMNS:
        ar = k * BK + gl.arange(0, BK, gl.SliceLayout(1, CA))
        ac = pm * BM + gl.arange(0, BM, gl.SliceLayout(0, CA))
        br = k * BK + gl.arange(0, BK, gl.SliceLayout(1, CB))
        bc = pn * BN + gl.arange(0, BN, gl.SliceLayout(0, CB))
        a_at, b_at = M, N
        a_yes = (gl.expand_dims(ar, 1) < K) & (gl.expand_dims(ac, 0) < M) & live
        b_yes = (gl.expand_dims(br, 1) < K) & (gl.expand_dims(bc, 0) < N) & live
    else:
        ar = pm * BM + gl.arange(0, BM, gl.SliceLayout(1, CA))
        ac = k * BK + gl.arange(0, BK, gl.SliceLayout(0, CA))
        br = pn * BN + gl.arange(0, BN, gl.SliceLayout(1, CB))
        bc = k * BK + gl.arange(0, BK, gl.SliceLayout(0, CB))
        a_at, b_at = K, K
        a_yes = (gl.expand_dims(ar, 1) < M) & (gl.expand_dims(ac, 0) < K) & live
        b_yes = (gl.expand_dims(br, 1) < N) & (gl.expand_dims(bc, 0) < K) & live
    async_copy.async_copy_global_to_shared(
        a_slot, a_ptr + gl.expand_dims(ar, 1).to(gl.int64) * a_at + gl.expand_dims(ac, 0), mask=a_yes)
    async_copy.async_copy_global_to_shared(
        b_slot, b_ptr + gl.expand_dims(br, 1).to(gl.int64) * b_at + gl.expand_dims(bc, 0), mask=b_yes)
    async_copy.commit_group()


@gluon.jit
def fragments(a_slot, b_slot, at: gl.constexpr, COLUMNS: gl.constexpr, LA: gl.constexpr, LB: gl.constexpr):
    if COLUMNS:
        a = a_slot.slice(at, 16, dim=0).permute((1, 0)).load(LA)
        b = b_slot.slice(at, 16, dim=0).load(LB)
    else:
        a = a_slot.slice(at, 16, dim=1).load(LA)
        b = b_slot.slice(at, 16, dim=1).permute((1, 0)).load(LB)
    return a, b


@gluon.jit
def chts_mma_twin(a_ptr, b_ptr, y_ptr, M, N, K, num_m, num_n, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
                  WM: gl.constexpr, WN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, COLUMNS: gl.constexpr,
                  TURN: gl.constexpr, DTYPE: gl.constexpr):
    """TURN: store the transpose [N, M] instead of [M, N]."""
    W: gl.constexpr = WM * WN
    LM: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WM, WN], [16, 8])
    LA: gl.constexpr = gl.DotOperandLayout(0, LM, 2)
    LB: gl.constexpr = gl.DotOperandLayout(1, LM, 2)
    PHASE: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0]) if COLUMNS or BK == 64 else gl.SwizzledSharedLayout(8, 2, 4, [1, 0])
    if COLUMNS:
        SA: gl.constexpr = [STAGES, BK, BM]
        SB: gl.constexpr = [STAGES, BK, BN]
        CA: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32] if BM >= 256 else [2, 16], [W, 1], [1, 0])
        CB: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32] if BN >= 256 else [2, 16], [W, 1], [1, 0])
    else:
        SA: gl.constexpr = [STAGES, BM, BK]
        SB: gl.constexpr = [STAGES, BN, BK]
        CA: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // BK, BK // 8], [W, 1], [1, 0])
        CB: gl.constexpr = CA
    a_ring = gl.allocate_shared_memory(DTYPE, SA, PHASE)
    b_ring = gl.allocate_shared_memory(DTYPE, SB, PHASE)
    steps = (K + BK - 1) // BK
    tiles = num_m * num_n
    ahead = gl.program_id(0)
    k = 0
    pm, pn = place(ahead, num_m, num_n, GROUP)
    for s in gl.static_range(STAGES - 1):
        fetch(a_ptr, b_ptr, a_ring.index(s), b_ring.index(s), pm, pn, k, M, N, K, ahead < tiles, BM, BN, BK, COLUMNS, CA, CB)
        k += 1
        if k == steps:
            k = 0
            ahead += gl.num_programs(0)
            pm, pn = place(gl.minimum(ahead, tiles - 1), num_m, num_n, GROUP)
    slot = 0
    async_copy.wait_group(STAGES - 2)
    thread_barrier()
    a, b = fragments(a_ring.index(0), b_ring.index(0), 0, COLUMNS, LA, LB)
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        acc = gl.zeros([BM, BN], gl.float32, LM)
        for _step in range(steps):
            free = gl.where(slot == 0, STAGES - 1, slot - 1)
            fetch(a_ptr, b_ptr, a_ring.index(free), b_ring.index(free), pm, pn, k, M, N, K, ahead < tiles, BM, BN, BK, COLUMNS, CA, CB)
            k += 1
            if k == steps:
                k = 0
                ahead += gl.num_programs(0)
                pm, pn = place(gl.minimum(ahead, tiles - 1), num_m, num_n, GROUP)
            for sub in gl.static_range(BK // 16 - 1):
                a_next, b_next = fragments(a_ring.index(slot), b_ring.index(slot), (sub + 1) * 16, COLUMNS, LA, LB)
                acc = mma_v2(a, b, acc)
                a, b = a_next, b_next
            slot = gl.where(slot == STAGES - 1, 0, slot + 1)
            async_copy.wait_group(STAGES - 2)
            thread_barrier()
            a_next, b_next = fragments(a_ring.index(slot), b_ring.index(slot), 0, COLUMNS, LA, LB)
            acc = mma_v2(a, b, acc)
            a, b = a_next, b_next
        tm, tn = place(t, num_m, num_n, GROUP)
        if TURN:
            LY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BM if BM < 256 else 1, BM // 8 if BM < 256 else 32], [W, 1], [1, 0])
            o = gl.convert_layout(gl.permute(acc.to(DTYPE), [1, 0]), LY)
            row = tn * BN + gl.arange(0, BN, gl.SliceLayout(1, LY))
            column = tm * BM + gl.arange(0, BM, gl.SliceLayout(0, LY))
            yes = (gl.expand_dims(row, 1) < N) & (gl.expand_dims(column, 0) < M)
            gl.store(y_ptr + gl.expand_dims(row, 1).to(gl.int64) * M + gl.expand_dims(column, 0), o, mask=yes)
        else:
            LZ: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BN if BN < 256 else 1, BN // 8 if BN < 256 else 32], [W, 1], [1, 0])
            o = gl.convert_layout(acc.to(DTYPE), LZ)
            row = tm * BM + gl.arange(0, BM, gl.SliceLayout(1, LZ))
            column = tn * BN + gl.arange(0, BN, gl.SliceLayout(0, LZ))
            yes = (gl.expand_dims(row, 1) < M) & (gl.expand_dims(column, 0) < N)
            gl.store(y_ptr + gl.expand_dims(row, 1).to(gl.int64) * N + gl.expand_dims(column, 0), o, mask=yes)


@functools.cache
def compile_twin(config: tuple[int, ...], columns: bool, turn: bool, dtype: torch.dtype, capability: int):
    """config: bm, bn, wm, wn, stages, group, depth of a stage."""
    bm, bn, wm, wn, stages, group, depth = config
    kind = {torch.bfloat16: ("*bf16", gl.bfloat16), torch.float16: ("*fp16", gl.float16)}[dtype]
    types = {"a_ptr": kind[0], "b_ptr": kind[0], "y_ptr": kind[0]} | dict.fromkeys(("M", "N", "K", "num_m", "num_n"), "i32")
    constants = {"BM": bm, "BN": bn, "BK": depth, "WM": wm, "WN": wn, "STAGES": stages, "GROUP": group, "COLUMNS": columns, "TURN": turn,
                 "DTYPE": kind[1]}  # fmt: skip
    # addresses are multiples of 16 bytes, sizes of 8: what lets Triton copy 16 bytes at once
    aligned = {(i,): [["tt.divisibility", 16 if i < 3 else 8]] for i in range(6)}
    source = GluonASTSource(chts_mma_twin, types | dict.fromkeys(constants, "constexpr"), constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": wm * wn})


@functools.lru_cache(maxsize=256)
def _launch(config: tuple[int, ...], columns: bool, turn: bool, dtype: torch.dtype, device: int, sizes: tuple[int, int, int]):
    capability = torch.cuda.get_device_capability(device)
    compiled = compile_twin(config, columns, turn, dtype, 10 * capability[0] + capability[1])
    properties = torch.cuda.get_device_properties(device)
    threads, shared = 32 * config[2] * config[3], int(compiled.metadata.shared)
    name, ptx = compiled.metadata.name, compiled.asm["ptx"]
    kernel = cuda_driver.Kernel(compiled.asm["cubin"], name, cuda_driver.parameters(ptx, name), threads, shared, 1, device)
    tiles = [-(-sizes[0] // config[0]), -(-sizes[1] // config[1])]
    resident = max(1, min(properties.shared_memory_per_multiprocessor // (shared + 1024), 256 // threads))
    grid = min(tiles[0] * tiles[1], properties.multi_processor_count * resident)
    return cuda_driver.Launch(kernel, grid, tuple(enumerate((*sizes, *tiles), start=3)))


def product(left: torch.Tensor, right: torch.Tensor, config: tuple[int, ...], *, columns: bool, turn: bool) -> torch.Tensor:
    """left [M, K] times right [N, K] transposed, or with ``columns`` left [K, M] transposed times right [K, N]: [M, N], with ``turn``
    [N, M]. Contiguous, 16-byte aligned, sizes divisible by 8."""
    depth, rows = left.shape if columns else left.shape[::-1]
    others = right.shape[1 if columns else 0]
    y = left.new_empty((others, rows) if turn else (rows, others))
    launch = _launch(config, columns, turn, left.dtype, left.get_device(), (rows, others, depth))
    launch.values[0], launch.values[1], launch.values[2] = left.data_ptr(), right.data_ptr(), y.data_ptr()
    launch.run(torch._C._cuda_getCurrentRawStream(left.get_device()))
    return y
