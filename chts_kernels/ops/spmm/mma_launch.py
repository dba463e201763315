"""Build, guard, cache and launch the Ampere-class sparse product. Triton is imported when a kernel is first compiled, never before."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import Any

import torch

from ...cuda_driver import Kernel, Launch, parameters
from .mma_config import RESERVED, MmaConfig, resident, why_illegal

NAME = "chts_spmm_mma"
PTX_DTYPE = {torch.bfloat16: "bf16", torch.float16: "f16"}
PTX_BIAS = {None: "", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
ARCH = {90: "sm_90a", 100: "sm_100a", 103: "sm_103a", 120: "sm_120a"}
(
    PARAM_W, PARAM_X, PARAM_META, PARAM_BIAS, PARAM_Y, PARAM_W_STRIDE, PARAM_X_STRIDE, PARAM_Y_STRIDE, PARAM_ROWS, PARAM_TOKENS,
    PARAM_COLUMNS, PARAM_TILES_M, PARAM_TILES_N,
) = range(13)  # fmt: skip


# --- build -----------------------------------------------------------------------------------------------------------
@functools.cache
def source() -> str:
    """A digest of the inline PTX's source, part of Triton's cache key through a constant: the key does not see builtins' code."""
    here = Path(__file__).parents[1]
    files = [*sorted(here.glob("*/mma_*.py")), here.parent / "gluon_compat.py"]
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:16]


@functools.cache
def compile_config(config: MmaConfig, dtype: torch.dtype, bias: torch.dtype | None, capability: int) -> Any:
    """Triton's compiled kernel of one configuration for compute capability ``capability`` (10 * major + minor); needs no device, raises
    ValueError for an illegal configuration."""
    from ...gluon_compat import compile_kernel
    from .mma_kernel import chts_spmm_mma
    from .mma_ptx import fragment_count

    reason = why_illegal(config, capability) if config.kind == "spmm" else "kind must be spmm"
    if reason is not None:
        raise ValueError(f"config: {reason}, got {config}")
    names = ("w_ptr", "x_ptr", "meta_ptr", "bias_ptr", "y_ptr")
    numbers = ("w_stride", "x_stride", "y_stride", "n_out", "tokens", "in_features", "num_m", "num_n")
    constants = {
        "C": config, "BM": config.bm, "BN": config.bn, "MI": config.mi, "NI": config.ni, "WM": config.wm, "THREADS": config.threads,
        "STAGES": config.stages, "SLOT": config.slot_bytes, "GROUP": config.group, "ACCS": config.mi * config.ni,
        "FRAGMENTS": fragment_count(config), "BIAS": PTX_BIAS[bias], "BIAS_SIZE": 4 if bias == torch.float32 else 2,
        "DTYPE": PTX_DTYPE[dtype], "SOURCE": source(),
    }  # fmt: skip
    compiled = compile_kernel(chts_spmm_mma, dict.fromkeys(names, "*u8") | dict.fromkeys(numbers, "i32"), constants,
                              capability=capability, num_warps=config.threads // 32)  # fmt: skip
    check_ptx(compiled.asm["ptx"], NAME, int(compiled.metadata.shared), ["u64"] * 5 + ["u32"] * 8, "mma.sp::ordered_metadata")
    return compiled


def check_ptx(ptx: str, name: str, triton_shared: int, kinds: list[str], instruction: str) -> None:
    """What can be read in PTX: the parameters that the launcher fills, the shared memory that inline PTX lays out by hand, and the
    instruction. Raises RuntimeError naming the guard that fails."""
    found = parameters(ptx, name)
    own = [int(offset) for offset in re.findall(r"global_smem\+(\d+)", ptx)]
    guards = [
        (found[: len(kinds)] == kinds, f"parameters must begin with {kinds}, got {found}"),
        (triton_shared <= RESERVED, f"Triton's own shared memory must fit {RESERVED} bytes, got {triton_shared}"),
        (all(offset < RESERVED for offset in own), f"Triton must stay below global_smem + {RESERVED}, got {own}"),
        (instruction in ptx, f"the instruction {instruction} must be present"),
    ]
    for holds, message in guards:
        if not holds:
            raise RuntimeError(f"chts {name}: {message}")


def resources(ptx: str, capability: int, what: object) -> dict[str, int]:
    """Registers a thread, from `ptxas -v`. Raises RuntimeError when it spills."""
    from ...gluon_compat import ptxas_log

    log = ptxas_log(ptx, ARCH.get(capability, f"sm_{capability}"))
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    if any(spills):
        raise RuntimeError(f"{what} on {capability}: ptxas must not spill, got {spills} bytes")
    return {"registers": int(re.search(r"Used (\d+) registers", log).group(1))}


def check_compiled(config: MmaConfig, dtype: torch.dtype = torch.bfloat16, bias: torch.dtype | None = None, capability: int = 80) -> dict:
    """Build one configuration and hold it to every guard: those of `check_ptx`, and no spill.

    Returns registers a thread and bytes of shared memory. Needs no device.

    Raises:
        RuntimeError: naming the guard that fails.
    """
    found = resources(compile_config(config, dtype, bias, capability).asm["ptx"], capability, config)
    return found | {"shared": config.shared_bytes}


def load_binary(compiled: Any, name: str, config: MmaConfig, device: int) -> Kernel:
    """A compiled kernel on a device."""
    ptx = compiled.asm["ptx"]
    return Kernel(compiled.asm["cubin"], name, parameters(ptx, name), config.threads, config.shared_bytes, 1, device)


@functools.cache
def capability_of(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def load(config: MmaConfig, dtype: torch.dtype, bias: torch.dtype | None, device: int) -> Kernel:
    """The kernel on a device."""
    return load_binary(compile_config(config, dtype, bias, capability_of(device)), NAME, config, device)


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def grid(items: int, config: MmaConfig, device: int) -> int:
    """CTAs of a persistent launch over `items` tiles: as many as are resident at once, at most one a tile."""
    properties = torch.cuda.get_device_properties(device)
    return min(items, properties.multi_processor_count * resident(config, properties.shared_memory_per_multiprocessor))


# --- launch ----------------------------------------------------------------------------------------------------------
class Plan:
    """One problem on one device with everything that does not change from call to call worked out: the kernel, its grid, the sizes.

    Args:
        tokens, out_features, in_features: T, N, K.
        dtype: of x, values and y.
        bias: dtype of the bias, or None.
        device: CUDA device index.
        row_bytes: bytes from row to row of values, x and y, multiples of 16.
        config: the tile configuration.
    """

    def __init__(self, tokens: int, out_features: int, in_features: int, dtype: torch.dtype, bias: torch.dtype | None, device: int,
                 row_bytes: tuple[int, int, int], config: MmaConfig) -> None:  # fmt: skip
        tiles_m, tiles_n = -(-out_features // config.bm), -(-tokens // config.bn)
        fixed = ((PARAM_ROWS, out_features), (PARAM_TOKENS, tokens), (PARAM_COLUMNS, in_features), (PARAM_TILES_M, tiles_m),
                 (PARAM_TILES_N, tiles_n), *zip((PARAM_W_STRIDE, PARAM_X_STRIDE, PARAM_Y_STRIDE), row_bytes, strict=True))  # fmt: skip
        self.call = Launch(load(config, dtype, bias, device), grid(tiles_m * tiles_n, config, device), fixed)

    def run(self, values: int, x: int, y: int, meta: int, bias: int, stream: int) -> None:
        """Launch: device addresses (values, x and y 16-byte aligned; bias 0 for none) and the raw stream."""
        scalars = self.call.values
        scalars[PARAM_W], scalars[PARAM_X], scalars[PARAM_Y] = values, x, y
        scalars[PARAM_META], scalars[PARAM_BIAS] = meta, bias
        self.call.run(stream)
