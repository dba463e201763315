"""Build, guard, cache and launch the sm_90 sparse product. Triton is imported when a kernel is first compiled, never before.

What the kernel takes for granted is read out of the compiled artefact: `check_ptx` at every build (text only, microseconds),
`check_compiled` in the tests (it runs ptxas again for the resource report).
"""
from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

import torch

from ...cuda_driver import Kernel, TensorMap, parameters
from .sm90_config import RESERVED, SHARED_LIMIT, Sm90Config, why_illegal

if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "chts_spmm_sm90"
PTX_DTYPE = {torch.bfloat16: "bf16", torch.float16: "f16"}
BIAS_TYPE = {None: "*fp32", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
PARAM_W, PARAM_X, PARAM_Y, PARAM_META, PARAM_BIAS, PARAM_ROWS, PARAM_STEPS, PARAM_TILES_M, PARAM_TILES_N = 0, 5, 10, 15, 16, 17, 18, 19, 20
_MAPS: dict[tuple[int, ...], TensorMap] = {}
_MAPS_LIMIT = 4096


# --- build -----------------------------------------------------------------------------------------------------------
@functools.cache
def compile_config(config: Sm90Config, dtype: torch.dtype, bias: torch.dtype | None) -> Any:
    """Triton's compiled kernel of one configuration; needs no device, raises ValueError for an illegal configuration."""
    from ...gluon_compat import compile_kernel, gl
    from .sm90_kernel import chts_spmm_sm90

    reason = why_illegal(config)
    if reason is not None:
        raise ValueError(f"config: {reason}, got {config}")
    # the type only makes Triton pass a tensor map; its box and layout are this package's business (see _map)
    desc = f"tensordesc<bf16[64, 64],{gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)!r}>"
    signature = {"w_desc": desc, "x_desc": desc, "y_desc": desc, "meta_ptr": "*i32", "bias_ptr": BIAS_TYPE[bias], "n_out": "i32",
                 "steps": "i32", "num_m": "i32", "num_n": "i32"}
    constants = {"BM": config.bm, "BN": config.bn, "WARPGROUPS": config.warpgroups, "BLOCKS": config.blocks, "STAGES": config.stages,
                 "RING": RESERVED, "Y_OFFSET": config.store_offset, "Y_TOKENS": config.store_tokens,
                 "BARRIERS": config.barrier_offset, "GROUP": config.group, "CLUSTER": config.cluster, "SHIFT": config.shift,
                 "CHUNK": config.chunk, "HAS_BIAS": bias is not None, "DTYPE": PTX_DTYPE[dtype], "HINTS": config.hints, "PACE": config.pace, "DIAG": config.diag, "AHEAD": config.ahead, "MMA_REGS": config.mma_regs, "LOAD_REGS": config.load_regs}
    compiled = compile_kernel(chts_spmm_sm90, signature, constants, **({"maxnreg": 80} if config.occupancy == 2 else {}))
    check_ptx(compiled.asm["ptx"], int(compiled.metadata.shared), config)
    return compiled


def check_ptx(ptx: str, triton_shared: int, config: Sm90Config) -> None:
    """What can be read in PTX. Raises RuntimeError naming the guard that fails."""
    kinds = parameters(ptx, NAME)
    maps = [i for i, kind in enumerate(kinds) if kind == "map"]
    own = [int(offset) for offset in re.findall(r"global_smem\+(\d+)", ptx)]
    instruction = f"wgmma.mma_async.sp.sync.aligned.m64n{config.bn}k32"
    guards = [
        (maps == [PARAM_W, PARAM_X, PARAM_Y], f"tensor maps must be parameters {PARAM_W}, {PARAM_X}, {PARAM_Y}, got {maps}"),
        (kinds[PARAM_META:PARAM_TILES_N + 1] == ["u64"] * 2 + ["u32"] * 4, f"scalar parameters changed: {kinds}"),
        (triton_shared <= RESERVED, f"Triton's own shared memory must fit {RESERVED} bytes, got {triton_shared}"),
        (all(offset < RESERVED for offset in own), f"Triton must stay below global_smem + {RESERVED}, got {own}"),
        (config.shared_bytes <= SHARED_LIMIT, f"shared memory must not exceed {SHARED_LIMIT}, got {config.shared_bytes}"),
        (instruction in ptx, f"the sparse instruction {instruction} must be present"),
    ]
    for holds, message in guards:
        if not holds:
            raise RuntimeError(f"chts sm_90 spmm, {config.name}: {message}")


def check_compiled(config: Sm90Config, dtype: torch.dtype = torch.bfloat16, bias: torch.dtype | None = None) -> dict[str, int]:
    """Build one configuration and hold it to every guard: those of `check_ptx`, no spill, no serialised wgmma (ptxas C75xx).

    Returns registers a thread at entry and bytes of shared memory. Needs no device.

    Raises:
        RuntimeError: naming the guard that fails.
    """
    from ...gluon_compat import ptxas_log

    log = ptxas_log(compile_config(config, dtype, bias).asm["ptx"])
    warnings = re.findall(r"C7\d\d\d.*", log)
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    if warnings or any(spills):
        raise RuntimeError(f"chts sm_90 spmm, {config.name}: ptxas must neither warn nor spill, got {warnings}, spilled bytes {spills}")
    return {"registers": int(re.search(r"Used (\d+) registers", log).group(1)), "shared": config.shared_bytes}


@functools.cache
def load(config: Sm90Config, dtype: torch.dtype, bias: torch.dtype | None, device: int) -> Kernel:
    """The kernel on a device."""
    compiled = compile_config(config, dtype, bias)
    threads = int(re.search(r"\.reqntid (\d+)", compiled.asm["ptx"]).group(1))
    return Kernel(compiled.asm["cubin"], NAME, parameters(compiled.asm["ptx"], NAME), threads, config.shared_bytes, config.cluster, device)


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


# --- launch ----------------------------------------------------------------------------------------------------------
def _map(pointer: int, rows: int, columns: int, row_bytes: int, box_rows: int, box_columns: int, promotion: int = 128) -> int:
    """Address of a cached tensor map; a box row is as long as its swizzle. The cache starts over when full: a map costs 3 us."""
    key = (pointer, rows, columns, row_bytes, box_rows, box_columns, promotion)
    found = _MAPS.get(key)
    if found is None:
        if len(_MAPS) >= _MAPS_LIMIT:
            _MAPS.clear()
        found = _MAPS[key] = TensorMap(pointer, rows, columns, row_bytes, (box_rows, box_columns), box_columns * 2, promotion)
    return found.address


@functools.lru_cache(maxsize=4096)
def plan(tokens: int, out_features: int, in_features: int, dtype: torch.dtype, bias: torch.dtype | None, device: int,
         config: Sm90Config) -> Callable[..., None]:
    """A function (x, x_row_bytes, values, values_row_bytes, y, y_row_bytes, meta, bias, stream), all addresses and integers, that
    launches one problem; everything that does not change from call to call is worked out here."""
    kernel = load(config, dtype, bias, device)
    rows_m, bn = config.bm * config.cluster, config.bn
    tiles_m, tiles_n = -(-out_features // rows_m), -(-tokens // bn)
    grid = min(tiles_m * tiles_n, multiprocessors(device) * config.occupancy // config.cluster) * config.cluster
    fixed = ((PARAM_ROWS, out_features), (PARAM_STEPS, -(-in_features // 64)), (PARAM_TILES_M, tiles_m), (PARAM_TILES_N, tiles_n))
    promotion = config.promotion
    bm, x_box, y_box, half, launch_kernel = config.bm, bn // config.cluster, config.store_tokens // config.pace, in_features // 2, kernel.launch

    def launch(x: int, x_bytes: int, values: int, values_bytes: int, y: int, y_bytes: int, meta: int, bias_at: int, stream: int) -> None:
        maps = ((PARAM_W, _map(values, out_features, half, values_bytes, bm, 32, promotion)),
                (PARAM_X, _map(x, tokens, in_features, x_bytes, x_box, 64, promotion)),
                (PARAM_Y, _map(y, tokens, out_features, y_bytes, y_box, 64)))
        launch_kernel(grid, stream, maps, (*fixed, (PARAM_META, meta), (PARAM_BIAS, bias_at)))

    return launch
