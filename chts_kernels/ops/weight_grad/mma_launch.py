"""Build, guard, cache and launch the Ampere-class weight gradients. Triton is imported when a kernel is first compiled, never before."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from ...cuda_driver import Kernel, Launch
from ...lasting import to_device
from ..spmm.mma_config import MmaConfig, why_illegal
from ..spmm.mma_launch import PTX_DTYPE, capability_of, check_ptx, grid, load_binary, resources, source
from .sm90_launch import PTX_OUT, selector_table

NAME = "chts_weight_grad_mma"
(
    PARAM_LEFT, PARAM_RIGHT, PARAM_META, PARAM_IDS, PARAM_TABLE, PARAM_OUT, PARAM_LEFT_STRIDE, PARAM_RIGHT_STRIDE, PARAM_ROWS,
    PARAM_COLUMNS, PARAM_TOKENS, PARAM_TILES_M, PARAM_TILES_N, PARAM_SPLITS, PARAM_PART,
) = range(15)  # fmt: skip


# --- build -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for."""

    config: MmaConfig
    n: int = 2
    dtype: torch.dtype = torch.bfloat16
    out_dtype: torch.dtype = torch.float32
    accumulate: bool = False


@functools.cache
def compile_variant(variant: Variant, capability: int) -> Any:
    """Triton's compiled kernel for compute capability ``capability`` (10 * major + minor); needs no device, raises ValueError for an
    illegal configuration."""
    from ...gluon_compat import compile_kernel
    from ..spmm.mma_ptx import fragment_count
    from .mma_kernel import chts_weight_grad_mma

    config = variant.config
    reason = why_illegal(config, capability) if config.kind != "spmm" else "kind must be weight_grad or mvue"
    if reason is not None:
        raise ValueError(f"config: {reason}, got {config}")
    if variant.accumulate and config.kind == "mvue":
        raise ValueError(f"accumulate: must be False for MVUE, whose registers it exceeds, got {variant}")
    names = ("left_ptr", "right_ptr", "meta_ptr", "ids_ptr", "table_ptr", "out_ptr")
    numbers = ("left_stride", "right_stride", "n_rows", "n_columns", "tokens", "num_m", "num_n", "splits", "part")
    constants = {
        "C": config, "BM": config.bm, "BN": config.bn, "MI": config.mi, "NI": config.ni, "WM": config.wm, "THREADS": config.threads,
        "STAGES": config.stages, "SLOT": config.slot_bytes, "STEP": config.step, "SPARSE": config.sparse, "GROUP": config.group,
        "ACCS": config.mi * config.ni, "FRAGMENTS": fragment_count(config), "NL": variant.n, "OUT": PTX_OUT[variant.out_dtype],
        "OUT_SIZE": 4 if variant.out_dtype == torch.float32 else 2, "ACCUMULATE": variant.accumulate, "DTYPE": PTX_DTYPE[variant.dtype],
        "SOURCE": source(),
    }  # fmt: skip
    compiled = compile_kernel(chts_weight_grad_mma, dict.fromkeys(names, "*u8") | dict.fromkeys(numbers, "i32"), constants,
                              capability=capability, num_warps=config.threads // 32)  # fmt: skip
    instruction = "mma.sp::ordered_metadata" if config.sparse else "mma.sync.aligned.m16n8k16"
    check_ptx(compiled.asm["ptx"], NAME, int(compiled.metadata.shared), ["u64"] * 6 + ["u32"] * 9, instruction)
    return compiled


def check_compiled(variant: Variant, capability: int = 80) -> dict[str, int]:
    """Build one variant and hold it to every guard: those of `check_ptx`, and no spill.

    Returns registers a thread and bytes of shared memory. Needs no device.

    Raises:
        RuntimeError: naming the guard that fails.
    """
    found = resources(compile_variant(variant, capability).asm["ptx"], capability, variant)
    return found | {"shared": variant.config.shared_bytes}


@functools.cache
def load(variant: Variant, device: int) -> Kernel:
    """The kernel on a device."""
    return load_binary(compile_variant(variant, capability_of(device)), NAME, variant.config, device)


@functools.cache
def table(n: int, device: int) -> torch.Tensor:
    """The selectors (see mma_links.py) on a device."""
    return to_device(selector_table(n), device)


# --- launch ----------------------------------------------------------------------------------------------------------
class Plan:
    """One problem on one device with everything that does not change from call to call worked out.

    Args:
        tokens, rows, columns: T, N, K.
        n: links per row of a 4x4 block.
        dtype, out_dtype: of dy and x; of the result.
        accumulate: add to the result.
        device: CUDA device index.
        row_bytes: bytes from row to row of the left operand and of x, multiples of 16.
        config: the tile configuration.
        splits: parts that the tokens are cut into. The sums of more than one go through a float32 workspace; so does MVUE accumulating.
    """

    def __init__(self, tokens: int, rows: int, columns: int, n: int, dtype: torch.dtype, out_dtype: torch.dtype, accumulate: bool,
                 device: int, row_bytes: tuple[int, int], config: MmaConfig, splits: int) -> None:  # fmt: skip
        steps = -(-tokens // config.step)
        part = -(-steps // splits)
        self.splits = -(-steps // part)
        self.device, self.size = device, (rows, columns * n // 4)
        cut = self.cut = self.splits > 1 or (accumulate and config.kind == "mvue")  # whose accumulating kernel spills on 10.0
        variant = Variant(config, n, dtype, torch.float32 if cut else out_dtype, accumulate and not cut)
        tiles_m, tiles_n = -(-rows // config.bm), -(-columns // config.bn)
        self.accumulate = accumulate
        fixed = (
            (PARAM_TABLE, table(n, device).data_ptr()), (PARAM_LEFT_STRIDE, row_bytes[0]), (PARAM_RIGHT_STRIDE, row_bytes[1]),
            (PARAM_ROWS, rows), (PARAM_COLUMNS, columns), (PARAM_TOKENS, tokens), (PARAM_TILES_M, tiles_m), (PARAM_TILES_N, tiles_n),
            (PARAM_SPLITS, self.splits), (PARAM_PART, part),
        )  # fmt: skip
        self.call = Launch(load(variant, device), grid(tiles_m * tiles_n * self.splits, config, device), fixed)

    def run(self, left: int, x: int, meta: int, ids: int, out: torch.Tensor, stream: int) -> None:
        """Launch: device addresses (left and x 16-byte aligned; meta 0 for the exact product), the result, and the raw stream."""
        scalars = self.call.values
        scalars[PARAM_LEFT], scalars[PARAM_RIGHT], scalars[PARAM_META], scalars[PARAM_IDS] = left, x, meta, ids
        if not self.cut:
            scalars[PARAM_OUT] = out.data_ptr()
            self.call.run(stream)
            return
        from .mma_reduce import add_layers

        layers = torch.empty((self.splits, *self.size), dtype=torch.float32, device=out.device)
        scalars[PARAM_OUT] = layers.data_ptr()
        self.call.run(stream)
        total = out if out.data_ptr() % 16 == 0 else out.clone()  # Triton's vectors
        add_layers(layers, total, self.accumulate)
        if total is not out:
            out.copy_(total)
