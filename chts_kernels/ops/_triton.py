"""Plain Triton kernels behind the operations: who may run, compile once, launch cheaply. Imports Triton only to compile.

A launch goes through :class:`chts_kernels.cuda_driver.Launch` with integer arguments: a few microseconds instead of the tens that
Triton's own binder takes. Under ``TRITON_INTERPRET=1`` the same kernels run on CPU tensors, which is how their logic is tested
without a device.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch

from .. import cuda_driver

CAPABILITY = (8, 0)
ALIGNMENT = 16
"""Bytes that every pointer must be aligned to: kernels load vectors of this size."""
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
READABLE = (torch.float32, torch.bfloat16, torch.float16)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter; decided, like Triton does, by the environment."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


@functools.cache
def why_not_device(device: torch.device) -> str | None:
    """None when Triton kernels can run on tensors of this device, else the reason."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if interpreting():
            return "TRITON_INTERPRET is set, which interprets kernels on CPU tensors"
        if capability < CAPABILITY:
            return f"needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or higher, got {capability[0]}.{capability[1]}"
        if torch.version.hip is not None:
            return "needs an NVIDIA device, got an AMD one"
        return None if _has_triton() else "needs the package triton, which is not installed"
    if device.type == "cpu" and interpreting():
        return None if _has_triton() else "needs the package triton, which is not installed"
    return f"needs a CUDA device, got {device.type}"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_not(source: torch.Tensor, **outputs: torch.Tensor | None) -> str | None:
    """None when a kernel can read ``source``, a float32, bfloat16 or float16 matrix, and write to ``outputs`` in place, else the
    reason."""
    reason = why_not_device(source.device)
    if reason is None and source.dtype not in READABLE:
        reason = f"needs float32, bfloat16 or float16, got {str(source.dtype).removeprefix('torch.')}"
    for name, value in outputs.items():
        if reason is None and value is not None and not (value.is_contiguous() and value.data_ptr() % ALIGNMENT == 0):
            reason = f"{name} must be contiguous and start on a {ALIGNMENT}-byte boundary"
    return reason


def why_not_operands(source: torch.Tensor, operand: torch.Tensor | None) -> str | None:
    """None when a kernel can convert ``source`` to the dtype of ``operand``, else the reason."""
    if operand is None or operand.dtype == source.dtype != torch.float32:
        return None
    if operand.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16 operands, got {str(operand.dtype).removeprefix('torch.')}"
    if operand.dtype == torch.bfloat16 and source.device.type == "cpu" and interpreting():
        return "Triton's interpreter does not round to bfloat16 as the device does"
    return None


def readable(x: torch.Tensor) -> torch.Tensor:
    """``x``, or a copy of it where it is not contiguous or starts off a 16-byte boundary (a slice of a flat buffer)."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def lazy(module: str, function: str) -> Callable[..., Any]:
    """``function`` of ``module`` (absolute name), imported when first called: operations register before Triton is wanted."""
    found: list[Callable[..., Any]] = []

    def run(*args: Any) -> Any:
        if not found:
            found.append(getattr(importlib.import_module(module), function))
        return found[0](*args)

    return run


class TritonKernel:
    """A ``triton.jit`` function with its argument names in order; compiled per types, constants and compute capability."""

    def __init__(self, function: Any, **options: Any) -> None:
        self.function = function
        self.options = {"enable_fp_fusion": False, **options}  # a fused multiply-add would round differently from the reference

    def compile(
        self, types: tuple[str, ...], constants: tuple[tuple[str, Any], ...], num_warps: int, capability: tuple[int, int]
    ) -> Any:
        """Triton's compiled kernel; needs no device. ``types`` are those of the arguments that are not constants, in order."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = [name for name in self.function.arg_names if name not in dict(constants)]
        signature = dict(zip(names, types, strict=True)) | {name: "constexpr" for name, _ in constants}
        aligned = {
            (self.function.arg_names.index(name),): [["tt.divisibility", ALIGNMENT]]
            for name, kind in zip(names, types, strict=True)
            if kind.startswith("*")
        }
        source = ASTSource(self.function, signature, dict(constants), aligned)
        target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
        return triton.compile(source, target=target, options={"num_warps": num_warps, **self.options})

    @functools.cache  # noqa: B019 - kernels are module-level objects that live as long as the process
    def load(
        self, types: tuple[str, ...], constants: tuple[tuple[str, Any], ...], num_warps: int, device: int
    ) -> cuda_driver.Kernel:
        compiled = self.compile(types, constants, num_warps, torch.cuda.get_device_capability(device))
        name, shared = compiled.metadata.name, int(compiled.metadata.shared)
        kinds = cuda_driver.parameters(compiled.asm["ptx"], name)
        return cuda_driver.Kernel(compiled.asm["cubin"], name, kinds, num_warps * 32, shared, 1, device)

    def launch(self, blocks: int, arguments: tuple[Any, ...], constants: tuple[tuple[str, Any], ...], num_warps: int) -> None:
        """Enqueue ``blocks`` blocks on the current stream of the device of the first argument, a tensor.

        ``arguments``: tensors (their addresses are passed), None (a null pointer) and integers, in the order of the function.
        """
        device = arguments[0].get_device()
        if device < 0:
            plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
            self.function[(blocks,)](*plain, **dict(constants))
            return
        types, settings = _signature(arguments)
        launch = self._plan(blocks, types, constants, num_warps, device)
        launch.values[: len(settings)] = settings
        if torch._C._cuda_getDevice() == device:
            launch.run(torch._C._cuda_getCurrentRawStream(device))
        else:
            with torch.cuda.device(device):
                launch.run(torch._C._cuda_getCurrentRawStream(device))

    def prepare(
        self, blocks: int, arguments: tuple[Any, ...], constants: tuple[tuple[str, Any], ...], num_warps: int
    ) -> cuda_driver.Launch:
        """A launch to keep, with the arguments of :meth:`launch` set. Who runs it sets ``values[i]`` of those that changed: in a new thread
        they are the first ones again."""
        types, settings = _signature(arguments)
        kernel = self.load(types, constants, num_warps, arguments[0].get_device())
        return cuda_driver.Launch(kernel, blocks, tuple(enumerate(settings)))

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def _plan(
        self, blocks: int, types: tuple[str, ...], constants: tuple[tuple[str, Any], ...], num_warps: int, device: int
    ) -> cuda_driver.Launch:
        return cuda_driver.Launch(self.load(types, constants, num_warps, device), blocks, ())


def _signature(arguments: tuple[Any, ...]) -> tuple[tuple[str, ...], list[int]]:
    """Types and values as parameters of a kernel: integers, addresses of tensors, a null pointer for None."""
    types, settings = [], []
    for a in arguments:
        if type(a) is int:
            types.append("i32")
            settings.append(a)
        elif a is None:
            types.append("*i32")
            settings.append(0)
        else:
            types.append(TYPES[a.dtype])
            settings.append(a.data_ptr())
    return tuple(types), settings
