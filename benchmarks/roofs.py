"""The machine's own ceilings, measured in the same process as the rest: device copies and a dense product."""

from __future__ import annotations

import statistics

import torch

from benchmarks.timing import CudaTimer, Variant

COPY_BYTES = 1 << 30
GEMM_SIZE = 8192
PAUSE_S = 0.06


def measure_roofs(device: torch.device, seconds: float = 0.3) -> dict[str, float]:
    """``copy_bytes_per_s`` (read plus written), ``gemm_flop_per_s`` (dense bf16, sustained) and ``gemm_burst_flop_per_s``.

    Empty on the CPU, where there is nothing to hold against a roof.
    """
    if device.type != "cuda":
        return {}
    found = {"copy_bytes_per_s": _copy(device, seconds / 3)}
    found["gemm_flop_per_s"], found["gemm_burst_flop_per_s"] = _product(device, seconds)
    torch.cuda.empty_cache()
    return found


def _copy(device: torch.device, seconds: float) -> float:
    """The better of the runtime's copy and an elementwise kernel: which one is faster depends on the card.

    Not captured: as a node of a CUDA graph the runtime's copy of 512 MiB and more moved 2.43 TB/s on an H100, the same copy called
    eagerly 3.00, and the elementwise kernel 3.00 either way. At 64 MiB both reach 2.8, below that launches and L2 rule.
    """
    generator = torch.Generator(device).manual_seed(0)
    source = torch.randint(1 << 30, (COPY_BYTES // 4,), dtype=torch.int32, generator=generator, device=device)
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.bitwise_not(source, out=target))
    clock = CudaTimer()
    times = []
    for way in ways:
        prepared = clock.prepare(Variant([way], dict, capture=False))
        times.append(statistics.median(clock.stretch(prepared, seconds / 2)[0]))
    return 2e3 * COPY_BYTES / min(times)


def _product(device: torch.device, seconds: float) -> tuple[float, float]:
    generator = torch.Generator(device).manual_seed(0)
    shape = (2, GEMM_SIZE, GEMM_SIZE)
    a, b = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).unbind()
    clock = CudaTimer()
    prepared = clock.prepare(Variant([lambda: a @ b], dict))
    samples, _ = clock.stretch(prepared, seconds)
    sustained = statistics.median(samples[len(samples) // 3 :])
    burst = statistics.median(clock.burst(prepared, PAUSE_S) for _ in range(3))
    return 2e3 * GEMM_SIZE**3 / sustained, 2e3 * GEMM_SIZE**3 / burst
