"""What this machine can do, and with which kernels."""

from __future__ import annotations

import functools
import logging
import platform
from importlib import metadata

import torch

logger = logging.getLogger("chts_kernels")

# Kernel family: lowest and highest compute capability, and what it computes in. One name for all passes of a family.
KERNELS: dict[str, tuple[tuple[int, int], tuple[int, int] | None, str]] = {
    "wgmma_sp": ((9, 0), (9, 0), "Hopper tensor cores, sparse and dense: bfloat16, float16"),
    "mma_sp": ((8, 0), None, "Ampere and later tensor cores, sparse and dense: bfloat16, float16"),
    "triton": ((8, 0), None, "packing, pruning and topology: bfloat16, float16, float32"),
}


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """(major, minor) of a CUDA device, None of any other device."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def why_not_cuda(
    device: torch.device, minimum: tuple[int, int] = (8, 0), maximum: tuple[int, int] | None = None
) -> str | None:
    """None when ``device`` is a CUDA device of compute capability ``minimum`` to ``maximum``, else the reason."""
    capability = compute_capability(device)
    if capability is None:
        return f"it needs a CUDA device, got {device.type}"
    if capability < minimum or (maximum is not None and capability > maximum):
        upper = " or higher" if maximum is None else "" if maximum == minimum else f" to {maximum[0]}.{maximum[1]}"
        wanted = f"{minimum[0]}.{minimum[1]}{upper}"
        return f"it needs compute capability {wanted}, {device} has {capability[0]}.{capability[1]}"
    return None


def why_not_kernel(name: str, device: torch.device) -> str | None:
    """None when the kernel family ``name`` (a key of :data:`KERNELS`) can run on ``device``, else the reason."""
    minimum, maximum, _ = KERNELS[name]
    reason = why_not_cuda(device, minimum, maximum)
    if reason is None and _package_version("triton") == "not installed":
        reason = "it needs the package triton, which is not installed"
    return reason


@functools.cache
def has_sparse_tensor_core_kernel(index: int) -> bool:
    """Whether a kernel of this package drives the sparse tensor cores of CUDA device ``index``. Where none does, one line of the log
    says so: products then run on the reference."""
    device = torch.device("cuda", index)
    reasons = {name: why_not_kernel(name, device) for name in ("wgmma_sp", "mma_sp")}
    if None in reasons.values():
        return True
    logger.warning("%s: sparse products run densely, on the reference, because of mma_sp: %s", device, reasons["mma_sp"])
    return False


@functools.cache  # 0.2 ms of looking through folders, otherwise at every choice of a kernel
def _package_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def capability_report() -> str:
    """One screen of text: versions, devices, and for every operation the implementations and why one cannot run.

    ``python -m chts_kernels`` prints it.
    """
    from .ops._library import REGISTRY

    lines = [
        f"chts {_package_version('chts')}  python {platform.python_version()}  torch {torch.__version__}  "
        f"triton {_package_version('triton')}",
        "",
        "devices",
        f"  cpu      {platform.machine()}, {torch.get_num_threads()} threads: reference implementations",
    ]
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "this torch is built without CUDA" if built is None else f"no device answers (torch built for CUDA {built})"
        lines.append(f"  cuda     none: {why}")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        lines.append(
            f"  cuda:{index}   {properties.name}, compute capability {capability}, "
            f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB"
        )
    lines += ["", "kernels"]
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    for name, (_, _, what) in KERNELS.items():
        reason = why_not_kernel(name, device)
        state = f"runs on {device}" if reason is None else f"no, {reason}"
        lines.append(f"  {name:10} {what}: {state}")
    lines += ["", "operations (auto takes the first that can run)"]
    width = max(map(len, REGISTRY))
    for op in REGISTRY.values():
        choices = [*(k.name for k in op.kernels), "reference"]
        lines.append(f"  {op.name:{width}} {', '.join(choices)}")
    return "\n".join(lines)
