"""Plumbing of the Triton topology kernels: when they can run, and tables of pointers for many layers in one launch.

Importing this module does not import Triton.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence

import torch

from .. import check

SLOTS = 16
"""Table entries written by one launch."""


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 runs kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


LARGEST_MATRIX = 1 << 32
"""Elements N * K that an index of the removal's candidates can tell apart."""


def too_large(ids: torch.Tensor) -> str | None:
    elements = ids.numel() * 16
    return f"it takes up to 2**32 elements N * K, got {elements}" if elements > LARGEST_MATRIX else None


def why_not_in_place(tensors: Sequence[torch.Tensor]) -> str | None:
    """The reason why link data cannot be moved in place, or None."""
    for index, tensor in enumerate(tensors):
        if not tensor.is_contiguous():
            return f"it needs contiguous tensors, tensors[{index}] has strides {tensor.stride()}"
        if tensor.element_size() > 8:
            return f"it moves elements of up to 8 bytes, tensors[{index}] has dtype {tensor.dtype}"
    return None


def why_not(*tensors: torch.Tensor | None) -> str | None:
    """The reason why plain Triton kernels cannot take these tensors, or None."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type == "cpu" and interpreted():
            continue
        if tensor.device.type != "cuda" or torch.version.hip is not None:
            return f"it needs NVIDIA CUDA tensors (or TRITON_INTERPRET=1 on the CPU), got device {tensor.device}"
        if torch.cuda.get_device_capability(tensor.device) < (8, 0):
            return f"it needs compute capability 8.0, got {torch.cuda.get_device_capability(tensor.device)}"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    return None


def on_device(tensor: torch.Tensor):
    """Context in which Triton launches on the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def check_noise(seed: int, layers: Sequence[int], step: int) -> None:
    """The ranges of the Philox key and counter words, as :func:`chts_kernels.rng.random_bits` checks them."""
    check.unsigned(seed, "seed", 63)
    for layer in layers:
        check.unsigned(layer, "layer", 32)
    check.unsigned(step, "step", 32)


@functools.cache
def _fill_kernel():
    import triton
    import triton.language as tl

    names = [f"v{i}" for i in range(SLOTS)]

    @triton.jit(do_not_specialize=["offset", *names])
    def fill(table_ptr, offset: tl.int64,
             v0: tl.int64, v1: tl.int64, v2: tl.int64, v3: tl.int64, v4: tl.int64, v5: tl.int64, v6: tl.int64, v7: tl.int64,
             v8: tl.int64, v9: tl.int64, v10: tl.int64, v11: tl.int64, v12: tl.int64, v13: tl.int64, v14: tl.int64,
             v15: tl.int64):  # fmt: skip
        slot = table_ptr + offset
        tl.store(slot, v0)
        tl.store(slot + 1, v1)
        tl.store(slot + 2, v2)
        tl.store(slot + 3, v3)
        tl.store(slot + 4, v4)
        tl.store(slot + 5, v5)
        tl.store(slot + 6, v6)
        tl.store(slot + 7, v7)
        tl.store(slot + 8, v8)
        tl.store(slot + 9, v9)
        tl.store(slot + 10, v10)
        tl.store(slot + 11, v11)
        tl.store(slot + 12, v12)
        tl.store(slot + 13, v13)
        tl.store(slot + 14, v14)
        tl.store(slot + 15, v15)

    return fill


def table(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """int64 [rows, columns] on ``device``, written by kernels that carry the numbers as arguments.

    Not a copy from host memory: that would need pinned memory living as long as any CUDA graph that captured it, and
    without pinning it would wait for the device.
    """
    flat = [int(value) for row in rows for value in row]
    shape = len(rows), len(rows[0])
    if device.type == "cpu":
        return torch.tensor(flat, dtype=torch.int64).view(shape)
    padded = -(-len(flat) // SLOTS) * SLOTS
    flat += [0] * (padded - len(flat))
    out = torch.empty(padded, dtype=torch.int64, device=device)
    with torch.cuda.device(device):
        for start in range(0, padded, SLOTS):
            _fill_kernel()[(1,)](out, start, *flat[start : start + SLOTS], num_warps=1)
    return out[: shape[0] * shape[1]].view(shape)


def triton_type(dtype: torch.dtype):
    """Triton's element type of a torch dtype."""
    import triton.language as tl

    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}
    return getattr(tl, names[dtype])
