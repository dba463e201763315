"""Build, guard, cache and launch the sm_90 sparse product. Triton is imported when a kernel is first compiled, never before.

What the kernel takes for granted is read out of the compiled artefact: `check_ptx` at every build (text only, microseconds),
`check_compiled` in the tests (it runs ptxas again for the resource report).
"""
from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import Any

import torch

from ...cuda_driver import Kernel, Launch, TensorMaps, parameters
from .sm90_config import RESERVED, SHARED_LIMIT, Sm90Config, why_illegal

NAME = "chts_spmm_sm90"
PTX_DTYPE = {torch.bfloat16: "bf16", torch.float16: "f16"}
BIAS_TYPE = {None: "*fp32", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
PARAM_W, PARAM_X, PARAM_Y, PARAM_META, PARAM_BIAS, PARAM_ROWS, PARAM_STEPS, PARAM_TILES_M, PARAM_TILES_N = 0, 5, 10, 15, 16, 17, 18, 19, 20


# --- build -----------------------------------------------------------------------------------------------------------
@functools.cache
def compile_config(config: Sm90Config, dtype: torch.dtype, bias: torch.dtype | None) -> Any:
    """Triton's compiled kernel of one configuration; needs no device, raises ValueError for an illegal configuration."""
    from ...gluon_compat import compile_kernel, gl
    from .sm90_kernel import chts_spmm_sm90

    reason = why_illegal(config)
    if reason is not None:
        raise ValueError(f"config: {reason}, got {config}")
    # the type only makes Triton pass a tensor map; its box and layout are this package's business (see Plan)
    desc = f"tensordesc<bf16[64, 64],{gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)!r}>"
    signature = {"w_desc": desc, "x_desc": desc, "y_desc": desc, "meta_ptr": "*i32", "bias_ptr": BIAS_TYPE[bias], "n_out": "i32",
                 "steps": "i32", "num_m": "i32", "num_n": "i32"}
    constants = {"BM": config.bm, "BN": config.bn, "WARPGROUPS": config.warpgroups, "BLOCKS": config.blocks, "STAGES": config.stages,
                 "RING": RESERVED, "Y_OFFSET": config.store_offset, "Y_TOKENS": config.store_tokens,
                 "BARRIERS": config.barrier_offset, "GROUP": config.group, "CLUSTER": config.cluster, "AHEAD": config.ahead,
                 "CHUNK": config.chunk, "HAS_BIAS": bias is not None, "DTYPE": PTX_DTYPE[dtype],
                 "HINTS": config.hints, "SOURCE": _source()}
    compiled = compile_kernel(chts_spmm_sm90, signature, constants)
    check_ptx(compiled.asm["ptx"], int(compiled.metadata.shared), config)
    return compiled


@functools.cache
def _source() -> str:
    """A digest of the inline PTX's source, part of Triton's cache key through a constant: the key does not see builtins' code."""
    here = Path(__file__).parent
    return hashlib.sha256(b"".join(p.read_bytes() for p in (here / "sm90_ptx.py", here.parents[1] / "gluon_compat.py"))).hexdigest()[:16]


def check_ptx(ptx: str, triton_shared: int, config: Sm90Config) -> None:
    """What can be read in PTX. Raises RuntimeError naming the guard that fails."""
    kinds = parameters(ptx, NAME)
    maps = [i for i, kind in enumerate(kinds) if kind == "map"]
    own = [int(offset) for offset in re.findall(r"global_smem\+(\d+)", ptx)]
    instruction = f"wgmma.mma_async.sp.sync.aligned.m64n{config.bn}k32.f32"
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
    # One register: Triton 3.8's dispatch of warp partitions keeps it in memory across setmaxnreg, once a launch and in no loop.
    if warnings or any(n > 4 for n in spills):
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
class Plan:
    """One problem on one device, everything that does not change from call to call worked out: the kernel, its grid, the tensor maps.

    Args:
        tokens, out_features, in_features: T, N, K.
        dtype: of x, values and y.
        bias: dtype of the bias, or None.
        device: CUDA device index.
        row_bytes: bytes from row to row of values, x and y.
        config: the tile configuration.
    """

    def __init__(self, tokens: int, out_features: int, in_features: int, dtype: torch.dtype, bias: torch.dtype | None, device: int,
                 row_bytes: tuple[int, int, int], config: Sm90Config) -> None:
        tiles_m, tiles_n = -(-out_features // (config.bm * config.cluster)), -(-tokens // config.bn)
        grid = min(tiles_m * tiles_n, multiprocessors(device) // config.cluster) * config.cluster
        fixed = ((PARAM_ROWS, out_features), (PARAM_STEPS, -(-in_features // 64)), (PARAM_TILES_M, tiles_m), (PARAM_TILES_N, tiles_n))
        # Starting before the kernel ahead ends takes about a microsecond off a single wave; with several it moves the blocks to other
        # multiprocessors than their neighbours', which cost up to 10 % (benchmarks/LOG.md).
        overlap = tiles_m * tiles_n * config.cluster <= multiprocessors(device)
        self.call = Launch(load(config, dtype, bias, device), grid, fixed, overlap)
        w_bytes, x_bytes, y_bytes = row_bytes
        # a box is as wide as its swizzle: 64 bytes of W, 128 of X and Y
        self.maps = (TensorMaps(out_features, in_features // 2, w_bytes, (config.bm, 32), 64),
                     TensorMaps(tokens, in_features, x_bytes, (config.bn // config.cluster, 64), 128),
                     TensorMaps(tokens, out_features, y_bytes, (config.store_tokens, 64), 128))

    def run(self, values: int, x: int, y: int, meta: int, bias: int, stream: int) -> None:
        """Launch: device addresses (values, x and y 16-byte aligned; bias 0 for none) and the raw stream."""
        w_maps, x_maps, y_maps = self.maps
        call = self.call
        pointers, scalars = call.pointers, call.values
        # Held by name until the launch: another thread may empty a cache meanwhile.
        w_map, x_map, y_map = w_maps[values], x_maps[x], y_maps[y]
        pointers[PARAM_W], pointers[PARAM_X], pointers[PARAM_Y] = w_map.address, x_map.address, y_map.address
        scalars[PARAM_META] = meta
        scalars[PARAM_BIAS] = bias
        call.run(stream)
