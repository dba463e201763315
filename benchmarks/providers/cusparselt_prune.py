"""``cusparseLtSpMMAPrune2`` with CUSPARSELT_PRUNE_SPMMA_TILE through ctypes: the only exact transposable 2:4 pruning that
NVIDIA ships (it keeps the largest L1 norm of every 4x4 tile). torch links the library but does not offer the function."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import torch

from benchmarks.providers import Unavailable

# library_types.h, cusparse.h, cusparseLt.h
CUDA_TYPE = {torch.bfloat16: 14, torch.float16: 2}
ORDER_ROW, OPERATION_NONE, SPARSITY_50, PRUNE_TILE = 2, 0, 0, 0
ALIGNMENT = 16
STRUCT_BYTES = 1 << 16
"""Handle and descriptor are opaque structures of 11 kB in today's header; callers own the memory."""


def load() -> ctypes.CDLL:
    """The library that torch itself loaded, or the one of NVIDIA's wheel.

    Raises:
        Unavailable: when there is none.
    """
    candidates = ["libcusparseLt.so.0", "libcusparseLt.so"]
    for package in ("nvidia.cusparselt", "nvidia.cu13", "nvidia"):
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        for folder in (spec.submodule_search_locations or []) if spec else []:
            candidates += sorted(str(p) for p in Path(folder).glob("**/libcusparseLt.so*"))
    for name in candidates:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise Unavailable("libcusparseLt was not found (torch may hold it without a name to load it by)")


class TilePruner:
    """Prunes matrices of one shape and dtype; call it with an input and an output."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        if dtype not in CUDA_TYPE:
            raise Unavailable(f"tile pruning takes bf16 and fp16, not {dtype}")
        self.library = load()
        self._handle, self._matrix = _opaque(), _opaque()
        self._call("cusparseLtInit", self._handle)
        self._call(
            "cusparseLtStructuredDescriptorInit", self._handle, self._matrix, ctypes.c_int64(rows),
            ctypes.c_int64(columns), ctypes.c_int64(columns), ctypes.c_uint32(ALIGNMENT), CUDA_TYPE[dtype], ORDER_ROW,
            SPARSITY_50,
        )  # fmt: skip

    def __call__(self, dense: torch.Tensor, out: torch.Tensor) -> None:
        """``out`` = ``dense`` with eight zeros in every 4x4 tile, on the current stream."""
        stream = torch.cuda.current_stream().cuda_stream
        self._call(
            "cusparseLtSpMMAPrune2", self._handle, self._matrix, 1, OPERATION_NONE, ctypes.c_void_p(dense.data_ptr()),
            ctypes.c_void_p(out.data_ptr()), PRUNE_TILE, ctypes.c_void_p(stream),
        )  # fmt: skip

    def _call(self, name: str, *arguments: object) -> None:
        try:
            function = getattr(self.library, name)
        except AttributeError as error:
            raise Unavailable(f"this libcusparseLt has no {name}") from error
        function.restype = ctypes.c_int
        status = function(*arguments)
        if status != 0:
            raise Unavailable(f"{name} refused with status {status}")


def _opaque() -> ctypes.Array:
    """Zeroed memory for one of the library's structures, aligned to 64 bytes."""
    raw = ctypes.create_string_buffer(STRUCT_BYTES + 64)
    return (ctypes.c_char * STRUCT_BYTES).from_buffer(raw, -ctypes.addressof(raw) % 64)
