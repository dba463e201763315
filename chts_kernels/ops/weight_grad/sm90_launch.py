"""Build, guard, cache and launch the sm_90 weight gradient. Triton is imported when a kernel is first compiled, never before."""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ... import cuda_driver
from ...patterns import pattern_table
from ..spmm.sm90_config import RESERVED
from ..spmm.sm90_launch import PTX_DTYPE
from ..spmm.sm90_launch import _map as cached_map
from .sm90_config import COUNTERS, STEP, DwConfig, Work, why_illegal

NAME = "chts_weight_grad_sm90"
TRITON_DTYPE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
PTX_OUT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
(
    PARAM_DY, PARAM_X, PARAM_IDS, PARAM_LUT, PARAM_OUT, PARAM_WORKSPACE, PARAM_COUNTER, PARAM_ROWS, PARAM_COLUMNS, PARAM_TILES_M,
    PARAM_TILES_N, PARAM_BLOCKS, PARAM_SPLIT,
) = 0, 5, *range(10, 21)  # fmt: skip


# --- build -----------------------------------------------------------------------------------------------------------
@functools.cache
def compile_config(config: DwConfig, split: bool, n: int, dtype: torch.dtype, out_dtype: torch.dtype, accumulate: bool) -> Any:
    """Triton's compiled kernel of one configuration; needs no device, raises ValueError for an illegal configuration."""
    from ...gluon_compat import compile_kernel, gl
    from .sm90_kernel import chts_weight_grad_sm90

    reason = why_illegal(config, split)
    if reason is not None:
        raise ValueError(f"config: {reason}, got {config}")
    # the type only makes Triton pass a tensor map; box and swizzle are set where the map is made
    desc = f"tensordesc<bf16[64, 64],{gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)!r}>"
    signature = {"dy_desc": desc, "x_desc": desc, "ids_ptr": "*u8", "lut_ptr": "*i32", "out_ptr": "*" + TRITON_DTYPE[out_dtype]}
    signature |= {"ws_ptr": "*fp32", "counter_ptr": "*i32"}
    signature |= dict.fromkeys(("num_rows", "num_cols", "num_m", "num_n", "blocks", "split_tiles"), "i32")
    constants = {"MB": config.bm // 128, "BN": config.bn, "STAGES": config.stages, "RING": RESERVED, "BARRIERS": config.barriers}
    constants |= {"GROUP": config.group, "CL": config.cluster, "SPLIT": split, "NL": n, "DT": PTX_DTYPE[dtype]}
    constants |= {"OUT": PTX_OUT[out_dtype], "ACCUMULATE": accumulate, "CHUNK": config.chunk, "LAG": config.lag}
    compiled = compile_kernel(chts_weight_grad_sm90, signature, constants)
    check_ptx(compiled.asm["ptx"], int(compiled.metadata.shared), config)
    return compiled


def check_ptx(ptx: str, triton_shared: int, config: DwConfig) -> None:
    """What the inline PTX takes for granted. Raises RuntimeError naming the guard that fails."""
    kinds = cuda_driver.parameters(ptx, NAME)
    maps = [i for i, kind in enumerate(kinds) if kind == "map"]
    own = [int(offset) for offset in re.findall(r"global_smem\+(\d+)", ptx)]
    guards = [
        (maps == [PARAM_DY, PARAM_X], f"tensor maps must be parameters {PARAM_DY}, {PARAM_X}, got {maps}"),
        (kinds[PARAM_IDS : PARAM_SPLIT + 1] == ["u64"] * 5 + ["u32"] * 6, f"scalar parameters changed: {kinds}"),
        (triton_shared <= RESERVED, f"Triton's own shared memory must fit {RESERVED} bytes, got {triton_shared}"),
        (all(offset < RESERVED for offset in own), f"Triton must stay below global_smem + {RESERVED}, got {own}"),
        (f"wgmma.mma_async.sync.aligned.m64n{config.bn}k16" in ptx, "wgmma must be present"),
    ]
    for holds, message in guards:
        if not holds:
            raise RuntimeError(f"chts sm_90 weight gradient, {config.name}: {message}")


def check_compiled(
    config: DwConfig,
    split: bool,
    n: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    out_dtype: torch.dtype = torch.float32,
    accumulate: bool = False,
) -> dict[str, int]:
    """Build one configuration and hold it to every guard: those of `check_ptx`, no spill, no serialised wgmma (ptxas C75xx).

    Returns registers a thread at entry and bytes of shared memory. Needs no device.

    Raises:
        RuntimeError: naming the guard that fails.
    """
    from ...gluon_compat import ptxas_log

    log = ptxas_log(compile_config(config, split, n, dtype, out_dtype, accumulate).asm["ptx"])
    warnings = re.findall(r"C7\d\d\d.*", log)
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill", log)]
    if warnings or any(spills):
        raise RuntimeError(
            f"chts sm_90 weight gradient, {config.name}: ptxas must neither warn nor spill, got {warnings}, spilled bytes {spills}"
        )
    return {"registers": int(re.search(r"Used (\d+) registers", log).group(1)), "shared": config.shared_bytes}


class _CooperativeFrame(cuda_driver._Frame):
    """A launch whose blocks must all be resident: those of a split tile wait for each other."""

    def __init__(self, kernel: cuda_driver.Kernel) -> None:
        super().__init__(kernel)
        cooperative = 2  # CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        self.attribute = cuda_driver._Attribute(cooperative, 0, (ctypes.c_uint * 16)(1))
        self.config.attributes = ctypes.pointer(self.attribute)
        self.config.num_attributes = 1


@functools.cache
def load(
    config: DwConfig, split: bool, n: int, dtype: torch.dtype, out_dtype: torch.dtype, accumulate: bool, device: int
) -> cuda_driver.Kernel:
    """The kernel on a device."""
    compiled = compile_config(config, split, n, dtype, out_dtype, accumulate)
    ptx = compiled.asm["ptx"]
    threads = int(re.search(r"\.reqntid (\d+)", ptx).group(1))
    kinds = cuda_driver.parameters(ptx, NAME)
    kernel = cuda_driver.Kernel(compiled.asm["cubin"], NAME, kinds, threads, config.shared_bytes, config.cluster, device)
    if split:
        kernel._frame = _CooperativeFrame(kernel)
    return kernel


# --- tables and counters ---------------------------------------------------------------------------------------------
def selector_codes(n: int) -> np.ndarray:
    """int32 [P]: row r's links of a pattern at bits 4r..4r+3: first column | second column << 2 (n = 1: the column)."""
    columns = pattern_table(n).columns.astype(np.int32)  # [P, 4, n]
    code = columns[..., 0] | (columns[..., 1] << 2 if n == 2 else 0)
    return (code << (4 * np.arange(4))).sum(axis=1).astype(np.int32)


@functools.cache
def _codes(n: int, device: int) -> torch.Tensor:
    return torch.from_numpy(selector_codes(n)).to(f"cuda:{device}")


class _Counters:
    """Zeroed integers for split tiles, one slice for each eager stream and one for each captured call: a kernel leaves its
    counters at zero, but two that run at the same time must not share them."""

    SLICES = 1024

    def __init__(self, device: int) -> None:
        self.arena = torch.zeros(self.SLICES * COUNTERS, dtype=torch.int32, device=f"cuda:{device}")
        torch.cuda.current_stream(device).synchronize()  # once a device: other streams use it without waiting
        self.next = itertools.count()
        self.by_stream: dict[int, int] = {}

    def take(self, stream: int, capturing: bool) -> int | None:
        """Address of a slice; None when none is left."""
        found = None if capturing else self.by_stream.get(stream)
        if found is None:
            i = next(self.next)
            if i >= self.SLICES:
                return None
            found = self.arena.data_ptr() + 4 * COUNTERS * i
            if not capturing:
                self.by_stream[stream] = found
        return found


_COUNTERS: dict[int, _Counters] = {}


def counters(device: int, stream: int) -> tuple[int, torch.Tensor | None]:
    """Address of zeroed counters for one call, and the tensor that holds them when they are its own."""
    capturing = torch.cuda.is_current_stream_capturing()
    if not capturing and device not in _COUNTERS:
        _COUNTERS[device] = _Counters(device)
    pool = _COUNTERS.get(device)
    address = pool.take(stream, capturing) if pool else None
    if address is not None:
        return address, None
    own = torch.zeros(COUNTERS, dtype=torch.int32, device=f"cuda:{device}")  # a memset, recorded when capturing
    return own.data_ptr(), own


# --- launch ----------------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=4096)
def plan(
    tokens: int, rows: int, columns: int, n: int, dtype: torch.dtype, out_dtype: torch.dtype, accumulate: bool, device: int, work: Work
) -> Callable[..., None]:
    """A function (dy, dy_row_bytes, x, x_row_bytes, ids, out, stream), addresses and integers, that launches one problem."""
    config = work.config
    split = work.split_tiles > 0
    kernel = load(config, split, n, dtype, out_dtype, accumulate, device)
    tiles_m, tiles_n = -(-rows // (config.bm * config.cluster)), -(-columns // config.bn)
    fixed = (
        (PARAM_LUT, _codes(n, device).data_ptr()), (PARAM_ROWS, rows // 4), (PARAM_COLUMNS, columns // 4), (PARAM_TILES_M, tiles_m),
        (PARAM_TILES_N, tiles_n), (PARAM_BLOCKS, -(-tokens // STEP)), (PARAM_SPLIT, work.split_tiles),
    )  # fmt: skip
    grid, launch_kernel = work.ctas * config.cluster, kernel.launch
    # a slot for every (CTA, tile) pair that can meet: their sum numbers them
    partials = (work.ctas + work.split_tiles) * config.bm * config.bn * n // 4

    def launch(dy: int, dy_bytes: int, x: int, x_bytes: int, ids: int, out: int, stream: int) -> None:
        maps = (
            (PARAM_DY, cached_map(dy, tokens, rows, dy_bytes, STEP, 64)),
            (PARAM_X, cached_map(x, tokens, columns, x_bytes, STEP, 64)),
        )
        values = (*fixed, (PARAM_IDS, ids), (PARAM_OUT, out))
        if not split:
            return launch_kernel(grid, stream, maps, values)
        workspace = torch.empty(partials, dtype=torch.float32, device=f"cuda:{device}")
        counter, _owner = counters(device, stream)
        return launch_kernel(grid, stream, maps, (*values, (PARAM_WORKSPACE, workspace.data_ptr()), (PARAM_COUNTER, counter)))

    return launch
