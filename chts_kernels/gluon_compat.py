"""What Gluon and Triton call differently in 3.6 ... 3.9, in one place. Importing this module imports Triton: do it inside launchers.

| need | 3.6 | 3.7 | 3.8 | 3.9 |
| --- | --- | --- | --- | --- |
| barrier over the threads of a partition | `gl.thread_barrier` | `gl.barrier` | `gl.barrier` | `gl.barrier` |
| aggregates | `triton.language.core._aggregate` | same | `gluon.aggregate` | `gluon.aggregate` |
| TMA store | `tma.async_copy_shared_to_global` | same | same | `tma.async_store` |
| shared allocations | first dimension free | free | free | powers of two only |

Because of the last row, and because no version before 3.9 turns a shared-memory descriptor into an address, kernels written in
inline PTX reserve their shared memory by hand: Triton's own use (captures of `warp_specialize`) starts at `global_smem` and must end
below `RESERVED_SHARED`, which `triton_shared_bytes` lets the caller check; the kernel's region follows, and the launcher asks for both.
"""
from __future__ import annotations

import os
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import _core as glcore
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language import core as tlcore

VERSION = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2])
RESERVED_SHARED = 1024      # bytes from `global_smem` left to Triton by kernels that lay out shared memory by hand
DESC_PARAMS = 5             # a host 2-D tensor descriptor becomes 5 kernel parameters: the map, 2 sizes, 2 strides

builtin = glcore.builtin
unwrap = glcore._unwrap_if_constexpr
aggregate = getattr(gluon, "aggregate", None) or tlcore._aggregate
thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

__all__ = ["DESC_PARAMS", "RESERVED_SHARED", "VERSION", "aggregate", "asm_scalar", "asm_tied", "builtin", "compile_kernel", "gl",
           "gluon", "pack_tuple", "ptxas_log", "thread_barrier", "tma_store", "triton_shared_bytes", "unwrap"]


def asm_scalar(semantic, asm: str, constraints: str, args=()):
    """Inline PTX run by every thread of the partition: int32 scalars in, one int32 scalar `$0` out. Never removed or merged."""
    handles = [semantic.to_tensor(a).handle for a in args]
    call = semantic.builder.create_inline_asm(asm, constraints, handles, [gl.int32.to_ir(semantic.builder)], False, 1)
    return glcore.tensor(call.get_result(0), gl.int32)


def asm_tied(semantic, asm: str, constraints: str, tensors, extra, pack: int):
    """Inline PTX over register tensors of one shape: `tensors` pass through (outputs tied to inputs), `extra` are inputs only.

    `pack` elements of every operand go to one asm statement; with pack = elements a thread, one statement sees them all.
    Returns a Gluon tuple of the new values of `tensors`."""
    kind = tensors[0].type
    call = semantic.builder.create_inline_asm(asm, constraints, [t.handle for t in tensors] + [e.handle for e in extra],
                                              [kind.to_ir(semantic.builder)] * len(tensors), False, pack)
    return pack_tuple(glcore.tensor(call.get_result(i), kind) for i in range(len(tensors)))


def pack_tuple(items):
    """A Gluon tuple of values, for builtins that return several."""
    return glcore.tuple(list(items))


def compile_kernel(fn, signature: dict, constants: dict, *, capability: int = 90, num_warps: int = 4, **options):
    """Compile a Gluon kernel to PTX and cubin without a device. signature: argument -> Triton type; constants: constexpr -> value."""
    full = dict(signature) | dict.fromkeys(constants, "constexpr")
    return triton.compile(GluonASTSource(fn, full, constants), target=GPUTarget("cuda", capability, 32),
                          options={"num_warps": num_warps, **options})


def triton_shared_bytes(compiled) -> int:
    """Shared memory that Triton itself placed at the start of `global_smem`, in bytes."""
    return int(compiled.metadata.shared)


def ptxas_log(ptx: str, arch: str = "sm_90a") -> str:
    """`ptxas -v` on PTX text: the resource report and the performance warnings (C75xx). Raises RuntimeError when it does not assemble."""
    ptxas = get_ptxas(int("".join(filter(str.isdigit, arch)))).path      # the one that Triton assembles with: 3.9 has another for sm_90
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "kernel.ptx")
        with open(source, "w") as file:
            file.write(ptx)
        done = subprocess.run([ptxas, "-v", f"--gpu-name={arch}", source, "-o", os.path.join(folder, "kernel.cubin")],
                              capture_output=True, text=True)
    log = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"ptxas failed for {arch}:\n{log}")
    return log
