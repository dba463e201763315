"""Build, guard, cache and launch the sm_90 weight gradient. Triton is imported when a kernel is first compiled, never before."""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ... import cuda_driver
from ...lasting import lasting, to_device
from ...patterns import pattern_table
from .._library import empty
from ..spmm.sm90_config import RESERVED
from .sm90_config import STEP, DwConfig, why_illegal
from .sm90_schedule import COUNTERS, Work, table

NAME = "chts_weight_grad_sm90"
PTX_DTYPE = {torch.bfloat16: "bf16", torch.float16: "f16"}
TRITON_DTYPE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
PTX_OUT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
(
    PARAM_DY, PARAM_X, PARAM_IDS, PARAM_LUT, PARAM_OUT, PARAM_WORKSPACE, PARAM_COUNTER, PARAM_STARTS, PARAM_PIECES, PARAM_EXTRA,
    PARAM_ROWS, PARAM_COLUMNS, PARAM_STEPS,
) = 0, 5, *range(10, 21)  # fmt: skip


# --- build -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for. wide: K % 8 == 0, so that compressed rows take stores of 8 (n = 1: 4) bytes."""

    config: DwConfig
    split: bool = False
    n: int = 2
    dtype: torch.dtype = torch.bfloat16
    out_dtype: torch.dtype = torch.float32
    accumulate: bool = False
    wide: bool = True


@functools.cache
def compile_variant(variant: Variant) -> Any:
    """Triton's compiled kernel; needs no device, raises ValueError for an illegal configuration."""
    from ...gluon_compat import compile_kernel, gl

    config = variant.config
    reason = why_illegal(config)
    if reason is not None:
        raise ValueError(f"config: {reason}, got {config}")
    if config.sparse:
        from .sm90_mvue_kernel import chts_weight_grad_sm90 as kernel
    else:
        from .sm90_kernel import chts_weight_grad_sm90 as kernel
    # the type only makes Triton pass a tensor map; box and swizzle are set where the map is made
    desc = f"tensordesc<bf16[64, 64],{gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)!r}>"
    types = [desc, desc, "*u8", "*i64", "*" + TRITON_DTYPE[variant.out_dtype], "*fp32", "*i32", "*i32", "*i32"]
    types += ["*i32" if config.sparse else "*i64", "i32", "i32", *["i32"] * config.sparse]
    constants = {"RING": RESERVED, "SELECTORS": config.selectors, "BARRIERS": config.barriers, "BN": config.bn, "STAGES": config.stages}
    constants |= {"CL": config.cluster, "SPLIT": variant.split, "NL": variant.n, "DT": PTX_DTYPE[variant.dtype]}
    constants |= {"OUT": PTX_OUT[variant.out_dtype], "ACCUMULATE": variant.accumulate, "WIDE": variant.wide, "CHUNK": config.chunk}
    if not config.sparse:
        constants |= {"MB": config.bm // 128, "SHARE": config.share, "LAG": config.lag, "STAMP": config.stamp}
    names = [name for name in kernel.arg_names if name not in constants]
    compiled = compile_kernel(kernel, dict(zip(names, types, strict=True)), constants, num_warps=8)
    check_ptx(compiled.asm["ptx"], int(compiled.metadata.shared), config)
    return compiled


def check_ptx(ptx: str, triton_shared: int, config: DwConfig) -> None:
    """What the inline PTX takes for granted. Raises RuntimeError naming the guard that fails."""
    kinds = cuda_driver.parameters(ptx, NAME)
    maps = [i for i, kind in enumerate(kinds) if kind == "map"]
    own = [int(offset) for offset in re.findall(r"global_smem\+(\d+)", ptx)]
    guards = [
        (maps == [PARAM_DY, PARAM_X], f"tensor maps must be parameters {PARAM_DY}, {PARAM_X}, got {maps}"),
        (kinds[PARAM_IDS : PARAM_COLUMNS + 1] == ["u64"] * 8 + ["u32"] * 2, f"scalar parameters changed: {kinds}"),
        (triton_shared <= RESERVED, f"Triton's own shared memory must fit {RESERVED} bytes, got {triton_shared}"),
        (all(offset < RESERVED for offset in own), f"Triton must stay below global_smem + {RESERVED}, got {own}"),
        (f"wgmma.mma_async{'.sp' * config.sparse}.sync.aligned.m64n{config.bn}k" in ptx, "wgmma must be present"),
    ]
    for holds, message in guards:
        if not holds:
            raise RuntimeError(f"chts sm_90 weight gradient, {config.name}: {message}")


def check_compiled(variant: Variant) -> dict[str, int]:
    """Build one variant and hold it to every guard: those of `check_ptx`, no spill, no serialised wgmma (ptxas C75xx).

    Returns registers a thread at entry and bytes of shared memory. Needs no device.

    Raises:
        RuntimeError: naming the guard that fails.
    """
    from ...gluon_compat import ptxas_log

    log = ptxas_log(compile_variant(variant).asm["ptx"])
    warnings = re.findall(r"C7\d\d\d.*", log)
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill", log)]
    if warnings or any(spills):
        raise RuntimeError(f"chts sm_90 weight gradient, {variant}: ptxas must neither warn nor spill, got {warnings}, {spills} bytes")
    return {"registers": int(re.search(r"Used (\d+) registers", log).group(1)), "shared": variant.config.shared_bytes}


class CooperativeLaunch(cuda_driver.Launch):
    """A launch whose blocks must all be resident: those of a split tile wait for each other."""

    def __init__(self, kernel: cuda_driver.Kernel, grid: int, fixed: tuple[tuple[int, int], ...]) -> None:
        super().__init__(kernel, grid, fixed)
        cooperative, cluster_dimension = 2, 4  # CU_LAUNCH_ATTRIBUTE_...
        attributes = [cuda_driver._Attribute(cooperative, 0, (ctypes.c_uint * 16)(1))]
        if kernel.cluster > 1:
            attributes.append(cuda_driver._Attribute(cluster_dimension, 0, (ctypes.c_uint * 16)(kernel.cluster, 1, 1)))
        self.attributes = (cuda_driver._Attribute * len(attributes))(*attributes)
        self.config.attributes = ctypes.cast(self.attributes, ctypes.POINTER(cuda_driver._Attribute))
        self.config.num_attributes = len(attributes)


@functools.cache
def load(variant: Variant, device: int) -> cuda_driver.Kernel:
    """The kernel on a device."""
    compiled = compile_variant(variant)
    ptx, config = compiled.asm["ptx"], variant.config
    threads = int(re.search(r"\.reqntid (\d+)", ptx).group(1))
    kinds = cuda_driver.parameters(ptx, NAME)
    return cuda_driver.Kernel(compiled.asm["cubin"], NAME, kinds, threads, config.shared_bytes, config.cluster, device)


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


# --- tables and counters ---------------------------------------------------------------------------------------------
def selector_table(n: int) -> np.ndarray:
    """int64 [P]: the selectors of an even lane (see sm90_links.py), row r's in the r-th 16 bits.

    Byte s of a selector is 0x22 times the column of link s, plus 0x10."""
    columns = pattern_table(n).columns.astype(np.int64)  # [P, 4, n]
    bytes_ = columns * 0x22 + 0x10
    rows = bytes_[..., 0] | (bytes_[..., 1] << 8 if n == 2 else 0)
    return (rows << (16 * np.arange(4))).sum(axis=1)


@functools.cache
def _selectors(n: int, device: int) -> torch.Tensor:
    return to_device(selector_table(n), device)


class _Counters:
    """Zeroed integers for split tiles, one slice for each eager stream and one for each captured call: a kernel leaves its
    counters at zero, but two that run at the same time must not share them."""

    SLICES = 1024

    def __init__(self, device: int) -> None:
        size = self.SLICES * COUNTERS
        self.arena = lasting(lambda: torch.zeros(size, dtype=torch.int32, device=f"cuda:{device}"), device)
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
_CAPTURED: set[torch.Tensor] = set()  # lists of pieces that captured graphs read (tensors hash by identity)


def counters(device: int, stream: int, capturing: bool) -> tuple[int, torch.Tensor | None]:
    """Address of zeroed counters for one call, and the tensor that holds them when they are its own."""
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
def _lists(tiles_m: int, tiles_n: int, blocks: int, work: Work, device: int) -> tuple[torch.Tensor, int, int]:
    """The lists of pieces on a device, the offset of the second in bytes, the number of slots."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("weight_grad: the first call with new sizes copies its schedule to the device; make it before capturing a graph")
    starts, pieces, slots = table(tiles_m, tiles_n, blocks, work)
    lists = to_device(np.concatenate([starts.reshape(-1), pieces.reshape(-1)]), device)
    torch.cuda.current_stream(device).synchronize()  # other streams use it without waiting
    return lists, 4 * starts.size, slots


class Plan:
    """One problem on one device, everything that does not change from call to call worked out: lists, kernel, grid, tensor maps.

    Args:
        tokens, rows, columns: T, N, K.
        n, dtype, out_dtype, accumulate: as in :class:`Variant`.
        device: CUDA device index, the current one.
        work: the division of the problem.
        row_bytes: bytes from row to row of dy (of a sparse configuration: of nothing, its compressed dy is contiguous) and of x.

    Raises:
        RuntimeError: in a capture, when the lists are not on the device yet.
    """

    def __init__(
        self, tokens: int, rows: int, columns: int, n: int, dtype: torch.dtype, out_dtype: torch.dtype, accumulate: bool, device: int,
        work: Work, row_bytes: tuple[int, int],
    ) -> None:  # fmt: skip
        config = work.config
        blocks = -(-tokens // STEP)
        self.lists, pieces_offset, slots = _lists(-(-rows // config.rows), -(-columns // config.columns), blocks, work, device)
        split = slots > 0
        kernel = load(Variant(config, split, n, dtype, out_dtype, accumulate, columns % 8 == 0), device)
        lists_at = self.lists.data_ptr()
        fixed = (
            (PARAM_LUT, _selectors(n, device).data_ptr()), (PARAM_ROWS, rows // 4), (PARAM_COLUMNS, columns // 4),
            (PARAM_STARTS, lists_at), (PARAM_PIECES, lists_at + pieces_offset), *([(PARAM_STEPS, blocks)] if config.sparse else []),
        )  # fmt: skip
        self.launch = (CooperativeLaunch if split else cuda_driver.Launch)(kernel, work.ctas * config.cluster, fixed)
        self.device, self.partials = device, slots * config.rows * config.columns * n // 4
        # a row of the box is as long as its swizzle
        left = (rows, 32 * blocks, 64 * blocks, (128, 32), 64) if config.sparse else (tokens, rows, row_bytes[0], (STEP, 64), 128)
        self.maps = cuda_driver.TensorMaps(*left), cuda_driver.TensorMaps(tokens, columns, row_bytes[1], (STEP, 64), 128)

    def run(self, left: int, x: int, ids: int, out: int, extra: int = 0) -> None:
        """Launch on the current stream: device addresses (left, dy or its compressed transpose, and x 16-byte aligned); extra: of the
        metadata (sparse) or of the stamps."""
        launch, (left_maps, x_maps) = self.launch, self.maps
        pointers, values = launch.pointers, launch.values
        left_map, x_map = left_maps[left], x_maps[x]  # held by name until the launch
        pointers[PARAM_DY], pointers[PARAM_X] = left_map.address, x_map.address
        values[PARAM_IDS], values[PARAM_OUT], values[PARAM_EXTRA] = ids, out, extra
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        capturing = torch._C._cuda_isCurrentStreamCapturing()
        if capturing:
            _CAPTURED.add(self.lists)  # a graph keeps addresses, not tensors
        if self.partials:
            workspace = empty((self.partials,), (1,), torch.float32)
            values[PARAM_COUNTER], _owner = counters(self.device, stream, capturing)
            values[PARAM_WORKSPACE] = workspace.data_ptr()
        launch.run(stream)


plan = functools.lru_cache(maxsize=4096)(Plan)
