"""The few CUDA driver calls that launching a compiled kernel takes, through ctypes: no Triton, no torch, no device call at import.

Why not Triton's own launcher: its binder and tensor descriptors cost tens of microseconds a call, its C launcher is private and
changes between versions, and it encodes tensor maps with power-of-two boxes only. Here a launch costs a few microseconds and depends
on the driver's documented interface: cuModuleLoadData, cuTensorMapEncodeTiled, cuLaunchKernelEx.
"""
from __future__ import annotations

import ctypes
import functools
import re
import threading
from ctypes import POINTER, addressof, byref, c_char_p, c_int, c_uint, c_uint32, c_uint64, c_void_p

_MAX_DYNAMIC_SHARED = 8             # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CLUSTER_DIMENSION = 4              # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_PROGRAMMATIC_SERIALIZATION = 6     # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_INVALID_CONTEXT = 201              # CUDA_ERROR_INVALID_CONTEXT: a thread that has not used the device yet
_CAPTURE_ACTIVE = 1                 # CU_STREAM_CAPTURE_STATUS_ACTIVE
_UINT16 = 1                         # CU_TENSOR_MAP_DATA_TYPE_UINT16: TMA moves 16-bit values unchanged, whatever they mean
_PROMOTION = {0: 0, 64: 1, 128: 2, 256: 3}
_SWIZZLE = {0: 0, 32: 1, 64: 2, 128: 3}


class _Attribute(ctypes.Structure):
    _fields_ = [("id", c_int), ("pad", c_int), ("value", c_uint * 16)]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [("grid", c_uint * 3), ("block", c_uint * 3), ("shared", c_uint), ("stream", c_void_p),
                ("attributes", POINTER(_Attribute)), ("num_attributes", c_uint)]


@functools.cache
def _driver() -> ctypes.CDLL:
    """libcuda, with the signatures of the calls used here. Raises OSError where there is no driver."""
    lib = ctypes.CDLL("libcuda.so.1")
    lib.cuLaunchKernelEx.argtypes = [c_void_p, c_void_p, c_void_p, c_void_p]
    lib.cuGetErrorString.argtypes = [c_int, POINTER(c_char_p)]
    lib.cuModuleLoadData.argtypes = [POINTER(c_void_p), c_char_p]
    lib.cuModuleGetFunction.argtypes = [POINTER(c_void_p), c_void_p, c_char_p]
    lib.cuFuncSetAttribute.argtypes = [c_void_p, c_int, c_int]
    lib.cuDeviceGet.argtypes = [POINTER(c_int), c_int]
    lib.cuDevicePrimaryCtxRetain.argtypes = [POINTER(c_void_p), c_int]
    lib.cuCtxGetCurrent.argtypes = [POINTER(c_void_p)]
    lib.cuCtxSetCurrent.argtypes = [c_void_p]
    lib.cuStreamGetCaptureInfo_v2.argtypes = [c_void_p, POINTER(c_int), POINTER(c_uint64), c_void_p, c_void_p, c_void_p]
    lib.cuTensorMapEncodeTiled.argtypes = [c_void_p, c_int, c_uint32, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p,
                                           c_int, c_int, c_int, c_int]
    return lib


def _check(code: int, what: str) -> None:
    if code:
        text = c_char_p()
        _driver().cuGetErrorString(code, byref(text))
        raise RuntimeError(f"{what}: CUDA driver error {code} ({(text.value or b'unknown').decode()})")


@functools.cache
def _primary_context(device: int) -> int:
    lib, handle, context = _driver(), c_int(), c_void_p()
    _check(lib.cuDeviceGet(byref(handle), device), f"cuDeviceGet({device})")
    _check(lib.cuDevicePrimaryCtxRetain(byref(context), handle), "cuDevicePrimaryCtxRetain")
    return context.value


def capture_id(stream: int) -> int | None:
    """What tells the CUDA-graph capture under way on a raw stream from every other one of the process; None when there is none.

    Raises:
        RuntimeError: when the driver refuses the question (the capture was invalidated).
    """
    status, identifier = c_int(), c_uint64()
    code = _driver().cuStreamGetCaptureInfo_v2(stream, byref(status), byref(identifier), None, None, None)
    _check(code, "cuStreamGetCaptureInfo")
    return identifier.value if status.value == _CAPTURE_ACTIVE else None


class TensorMap:
    """A TMA descriptor of a 2-D array of 16-bit values; `address` is that of its 128 bytes.

    Args:
        pointer: device address, 16-byte aligned.
        rows, columns: the array's size; what a box reaches beyond it reads as zeros and is not written.
        row_bytes: bytes between rows, a multiple of 16.
        box: (rows, columns) of one copy, each at most 256.
        swizzle: 0, 32, 64 or 128 bytes.
        promotion: 0, 64, 128 or 256: bytes that L2 fetches at least.

    Raises:
        RuntimeError: when the driver refuses the description.
    """

    __slots__ = ("_buffer", "address")

    def __init__(self, pointer: int, rows: int, columns: int, row_bytes: int, box: tuple[int, int], swizzle: int,
                 promotion: int = 128) -> None:
        self._buffer = (ctypes.c_char * 192)()
        self.address = (addressof(self._buffer) + 63) & ~63
        sizes, strides = (c_uint64 * 2)(columns, rows), (c_uint64 * 1)(row_bytes)
        boxes, steps = (c_uint32 * 2)(box[1], box[0]), (c_uint32 * 2)(1, 1)
        code = _driver().cuTensorMapEncodeTiled(self.address, _UINT16, 2, pointer, sizes, strides, boxes, steps,
                                                0, _SWIZZLE[swizzle], _PROMOTION[promotion], 0)
        _check(code, f"cuTensorMapEncodeTiled(rows={rows}, columns={columns}, row_bytes={row_bytes}, box={box})")


class TensorMaps(dict):
    """``maps[address]``: the :class:`TensorMap` of arrays of one shape, encoded once per address and kept; at `limit` of them the cache
    starts over, so hold a map by name until its launch.

    Args: those of :class:`TensorMap` but the pointer.
    """

    limit = 256

    def __init__(self, *shape: object) -> None:
        super().__init__()
        self.shape = shape

    def __missing__(self, address: int) -> TensorMap:
        if len(self) >= self.limit:
            self.clear()
        found = self[address] = TensorMap(address, *self.shape)
        return found


def parameters(ptx: str, name: str) -> list[str]:
    """The kernel's parameters as PTX declares them, in order: "map" for a tensor map, else the PTX type ("u32", "u64", ...)."""
    body = re.search(rf"\.entry {re.escape(name)}\((.*?)\)", ptx, re.S)
    if body is None:
        raise ValueError(f"ptx: must declare the entry {name}, got {len(ptx)} characters without it")
    found = []
    for line in body.group(1).split(",\n"):
        found.append("map" if re.search(r"\.b8 .*\[128\]", line) else re.search(r"\.param \.(\w+)", line).group(1))
    return found


class Kernel:
    """A cubin loaded on one device.

    Args:
        cubin: the binary.
        name: the entry's name.
        kinds: `parameters` of the entry.
        threads: threads of a block.
        shared: dynamic shared memory of a block in bytes.
        cluster: blocks of a cluster.
        device: CUDA device index.

    Raises:
        RuntimeError: when the driver refuses the binary or the shared memory.
    """

    def __init__(self, cubin: bytes, name: str, kinds: list[str], threads: int, shared: int, cluster: int, device: int) -> None:
        self.kinds, self.threads, self.shared, self.cluster, self.device = kinds, threads, shared, cluster, device
        self.context = _primary_context(device)
        lib, before, module, function = _driver(), c_void_p(), c_void_p(), c_void_p()
        _check(lib.cuCtxGetCurrent(byref(before)), "cuCtxGetCurrent")
        _check(lib.cuCtxSetCurrent(self.context), "cuCtxSetCurrent")
        try:
            _check(lib.cuModuleLoadData(byref(module), cubin), "cuModuleLoadData")
            _check(lib.cuModuleGetFunction(byref(function), module, name.encode()), f"cuModuleGetFunction({name})")
            _check(lib.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared), f"cuFuncSetAttribute(shared memory {shared})")
        finally:
            lib.cuCtxSetCurrent(before)
        self.function = function.value


class Launch(threading.local):
    """A kernel with its grid and the parameters that stay: what one problem launches again and again. Every thread that uses it gets
    its own copy of the block of arguments, so that threads do not overwrite each other's.

    Set what changes in `pointers[i]` (parameter i is a tensor map: `TensorMap.address`) and `values[i]` (an integer or a device
    address), then `run(stream)`.

    Args:
        kernel: what to launch.
        grid: its number of blocks.
        fixed: (index, value) of parameters that stay.
        overlap: blocks may start while the kernel ahead on the stream is still running; the kernel waits for it itself
            (PTX `griddepcontrol.wait`) before it touches memory.
    """

    def __init__(self, kernel: Kernel, grid: int, fixed: tuple[tuple[int, int], ...], overlap: bool = False) -> None:
        count = len(kernel.kinds)
        self.kernel, self._run = kernel, _driver().cuLaunchKernelEx
        self.values = (c_uint64 * count)()                      # scalars and pointers live here; unset ones are zero
        base = addressof(self.values)
        self.pointers = (c_void_p * count)(*[base + 8 * i for i in range(count)])
        for index, value in fixed:
            self.values[index] = value
        attributes = [_Attribute(_CLUSTER_DIMENSION, 0, (c_uint * 16)(kernel.cluster, 1, 1))] if kernel.cluster > 1 else []
        if overlap:
            attributes.append(_Attribute(_PROGRAMMATIC_SERIALIZATION, 0, (c_uint * 16)(1)))
        self._attributes = (_Attribute * len(attributes))(*attributes)
        self.config = _LaunchConfig((c_uint * 3)(grid, 1, 1), (c_uint * 3)(kernel.threads, 1, 1), kernel.shared, None,
                                    ctypes.cast(self._attributes, POINTER(_Attribute)), len(attributes))
        self._arguments = (addressof(self.config), kernel.function, addressof(self.pointers), None)

    def run(self, stream: int) -> None:
        """Enqueue on a raw stream of the kernel's device, whose context must be current (a thread that has none gets it).

        Raises:
            RuntimeError: when the driver refuses the launch.
        """
        self.config.stream = stream
        code = self._run(*self._arguments)
        if code == _INVALID_CONTEXT:
            _check(_driver().cuCtxSetCurrent(self.kernel.context), "cuCtxSetCurrent")
            code = self._run(*self._arguments)
        if code:
            _check(code, f"cuLaunchKernelEx({self.config.grid[0]} blocks of {self.kernel.threads} threads)")
