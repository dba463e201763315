"""A made-up result file with every suite in it, to try tables, targets, plots and comparisons on."""

from __future__ import annotations

from pathlib import Path

from benchmarks.cases import Case, select
from benchmarks.cost import flops, is_large, least_bytes
from benchmarks.providers import names
from benchmarks.results import Results, Row, spread_note

SPEED = {"chts": 1000e12, "cublas": 650e12, "cusparselt": 880e12, "torch24": 700e12, "compile": 640e12, "mma_twin": 480e12}


def made_up(path: Path | None = None, factor: float = 1.0) -> Results:
    """Plausible figures by formula; ``factor`` slows ours down."""
    session = {
        "started": "2026-01-02T03:04:05+00:00",
        "copy_bytes_per_s": 3e12,
        "gemm_flop_per_s": 650e12,
        "gemm_burst_flop_per_s": 750e12,
    }
    environment = {"gpu": "Imaginary GPU", "torch": "2.0", "kernel_hash": "0123", "driver": "1", "sessions": [session]}
    rows = []
    for case in select(shapes=["S", "L", "4096x4096", "llama-60m", "vit-b"]):
        for provider in names(case):
            rows.append(_row(case, provider, factor))
    return Results(environment, rows, path)


def _row(case: Case, provider: str, factor: float) -> Row:
    if provider == "cusparselt" and case.op == "weight_grad":
        return Row.of(case, provider, error="dW has no sparse operand")
    if flops(case) and case.suite == "linear":
        ms = 1e3 * (flops(case) / SPEED[provider] + 5e-6)
    elif least_bytes(case):
        ms = 1e3 * least_bytes(case) / (2.5e12 if provider == "chts" else 0.4e12)
    else:
        ms = {"chts": 1.0, "eager": 90.0}.get(provider, 1.4)
    ms *= factor if provider == "chts" else 1.0
    burst = 0.9 * ms if is_large(case) else None
    note = f"{spread_note(0.99 * ms, 1.02 * ms)}; made up"
    if case.suite == "host":
        return Row.of(case, provider, eager_ms=0.015 if provider == "chts" else 0.4, note=note)
    return Row.of(case, provider, gpu_ms=ms, burst_ms=burst, eager_ms=ms + 0.01, peak_bytes=1 << 20, note=note)
