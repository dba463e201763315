"""Plumbing of the Triton topology kernels: when they can run, and tables of pointers for many layers in one launch.

Importing this module does not import Triton.
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .. import check, cuda_driver
from ..target import compute_capability
from ._triton import READABLE

SLOTS = 16
"""Table entries written by one launch."""
ALIGNMENT = 16
"""Bytes that every tensor given to a kernel is aligned to."""
TYPES = {
    torch.uint8: "*u8", torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
    torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16",
}  # fmt: skip


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
    for device in dict.fromkeys(tensor.device for tensor in tensors if tensor is not None):
        if device.type == "cpu" and interpreted():
            continue
        capability = compute_capability(device)
        if capability is None:
            return f"it needs NVIDIA CUDA tensors (or TRITON_INTERPRET=1 on the CPU), got device {device}"
        if capability < (8, 0):
            return f"it needs compute capability 8.0, got {capability}"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    return None


def why_not_mixed(lists: Mapping[str, Sequence[torch.Tensor]]) -> str | None:
    """The reason why a kernel of one dtype per list cannot take these, or None."""
    for name, tensors in lists.items():
        dtypes = {t.dtype for t in tensors}
        if len(dtypes) > 1 or not dtypes <= set(READABLE):
            return f"it takes {name} all float32, all bfloat16 or all float16, got {sorted(map(str, dtypes))}"
    return None


def why_not_where_they_are(lists: Mapping[str, Sequence[torch.Tensor]]) -> str | None:
    """The reason why a kernel cannot use these in place, or None."""
    for name, tensors in lists.items():
        for index, t in enumerate(tensors):
            if not (t.is_contiguous() and t.data_ptr() % ALIGNMENT == 0):
                return f"{name}[{index}] must be contiguous and start on a {ALIGNMENT}-byte boundary"
    return None


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Context in which Triton launches on the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def check_noise(seed: int, layers: Sequence[int], step: int) -> None:
    """The ranges of the Philox key and counter words, as :func:`chts_kernels.rng.random_bits` checks them."""
    check.unsigned(seed, "seed", 63)
    for layer in layers:
        check.unsigned(layer, "layer", 32)
    check.unsigned(step, "step", 32)


class BatchKernel:
    """A ``triton.jit`` function launched through the driver on a one-dimensional grid.

    Compiled per pointer types, constants and compute capability, never per value of an integer: a new shape, step or layer
    compiles nothing. Under :func:`recording` calls are noted instead of launched, so that everything an operation needs
    can be compiled side by side (:func:`compile_all`).

    Args:
        function: its arguments are tensors, then integers or floats, then constants.
        wide: names of the arguments that are 64-bit integers; the others are 32-bit.
        floats: names of the arguments that are float32.
    """

    def __init__(
        self, function: Any, num_warps: int, *, wide: Sequence[str] = (), floats: Sequence[str] = (), **options: Any
    ) -> None:
        self.function, self.num_warps, self.options = function, num_warps, options
        self.scalars = dict.fromkeys(wide, "i64") | dict.fromkeys(floats, "fp32")
        self.compiled: dict[tuple, Any] = {}
        self.loaded: dict[tuple, cuda_driver.Launch] = {}

    def compile(self, types: tuple[str, ...], constants: tuple, num_warps: int, capability: tuple[int, int]) -> Any:
        """Triton's compiled kernel; needs no device. ``types``: of the arguments that are not constants, in order."""
        key = types, constants, num_warps, capability
        if key not in self.compiled:
            import triton
            from triton.backends.compiler import GPUTarget
            from triton.compiler import ASTSource

            names = self.function.arg_names
            signature = dict(zip(names, types, strict=False)) | {name: "constexpr" for name, _ in constants}
            aligned = {(i,): [["tt.divisibility", ALIGNMENT]] for i, kind in enumerate(types) if kind.startswith("*")}
            source = ASTSource(self.function, {name: signature[name] for name in names}, dict(constants), aligned)
            target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
            options = {"num_warps": num_warps, "enable_fp_fusion": False, **self.options}
            self.compiled[key] = triton.compile(source, target=target, options=options)
        return self.compiled[key]

    def __call__(self, blocks: int, *arguments: Any, num_warps: int | None = None, **constants: Any) -> None:
        """Enqueue on the current stream of the current device: tensors (aligned to 16 bytes), integers and floats in order."""
        first = next(a for a in arguments if isinstance(a, torch.Tensor))
        if first.device.type == "cpu":
            self.function[(blocks,)](*arguments, **constants)
            return
        names = self.function.arg_names
        types = tuple(
            [TYPES[a.dtype] if isinstance(a, torch.Tensor) else self.scalars.get(name, "i32")
             for name, a in zip(names, arguments, strict=False)]
        )  # fmt: skip
        device, num_warps = first.get_device(), num_warps or self.num_warps
        key = types, tuple(constants.items()), num_warps
        if _requests is not None:
            _requests.append((self, (*key, torch.cuda.get_device_capability(device))))
            return
        launch = self.loaded.get((*key, device))
        if launch is None:
            launch = self.loaded[(*key, device)] = self.load(*key, device)
        enqueue(launch, blocks, tuple(enumerate(arguments)), current_stream(device))

    def load(self, types: tuple[str, ...], constants: tuple, num_warps: int, device: int) -> cuda_driver.Launch:
        """The kernel on a device, ready to launch."""
        compiled = self.compile(types, constants, num_warps, torch.cuda.get_device_capability(device))
        name, shared = compiled.metadata.name, int(compiled.metadata.shared)
        kinds = cuda_driver.parameters(compiled.asm["ptx"], name)
        kernel = cuda_driver.Kernel(compiled.asm["cubin"], name, kinds, num_warps * 32, shared, 1, device)
        return cuda_driver.Launch(kernel, 1, ())


def enqueue(
    launch: cuda_driver.Launch, blocks: int, arguments: Sequence[tuple[int, Any]], stream: int, maps: Sequence[tuple[int, int]] = ()
) -> None:
    """Launch on ``blocks`` blocks: (parameter index, tensor, integer or float), and (parameter index, address of a tensor map)."""
    for index, argument in arguments:
        launch.values[index] = _word(argument)
    for index, address in maps:
        launch.pointers[index] = address
    launch.config.grid[0] = blocks
    launch.run(stream)


def current_stream(device: int) -> int:
    """The raw current stream of a device."""
    return torch._C._cuda_getCurrentRawStream(device)


def _word(argument: torch.Tensor | int | float) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    if isinstance(argument, float):
        return int.from_bytes(struct.pack("<f", argument), "little")
    return argument & 0xFFFFFFFFFFFFFFFF


_requests: list[tuple[Any, tuple]] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[Any, tuple]]]:
    """Kernel calls inside are noted (kernel, arguments of its ``compile``) and not launched."""
    global _requests
    before, _requests = _requests, []
    try:
        yield _requests
    finally:
        _requests = before


def is_recording() -> bool:
    return _requests is not None


def record(kernel: Any, key: tuple) -> None:
    """For kernels of other classes: note that ``kernel.compile(*key)`` is going to be needed."""
    _requests.append((kernel, key))


def compile_all(requests: Sequence[tuple[Any, tuple]]) -> None:
    """Compile what was recorded, each once, on several threads: most of the time is spent outside the interpreter lock."""
    unique = {(id(kernel), key): (kernel, key) for kernel, key in requests}
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(lambda item: item[0].compile(*item[1]), unique.values()))


def aligned(x: torch.Tensor) -> torch.Tensor:
    """``x`` contiguous from a 16-byte boundary on, copied only where it is not."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


@functools.cache
def _fill_kernel() -> BatchKernel:
    import triton
    import triton.language as tl

    @triton.jit
    def chts_fill(table_ptr, offset, v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15):
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

    return BatchKernel(chts_fill, 1, wide=[f"v{i}" for i in range(SLOTS)])


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
    for start in range(0, padded, SLOTS):
        _fill_kernel()(1, out, start, *flat[start : start + SLOTS])
    return out[: shape[0] * shape[1]].view(shape)


def triton_type(dtype: torch.dtype) -> Any:
    """Triton's element type of a torch dtype."""
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))
