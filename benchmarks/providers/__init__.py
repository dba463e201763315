"""Who computes: one module per competitor, each with ``build(problem, impl) -> list[Variant]``.

A provider that cannot run a case raises :class:`Unavailable` with the reason, which becomes its row. Several variants of
one provider are gated one by one, and the fastest right one is kept.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from benchmarks.cases import Case
from benchmarks.problems import Problem
from benchmarks.timing import Variant


class Unavailable(Exception):
    """Why a provider has no time for a case."""


MODULES = {
    "chts": "chts",
    "cublas": "cublas",
    "cusparselt": "cusparselt",
    "torch24": "torch24",
    "eager": "eager",
    "mma_twin": "mma_twin",
    "compile": "compiled",
    "chts_compile": "chts_compiled",
}
"""Provider name in the results -> module of this package."""

_PROVIDERS: dict[str, tuple[str, ...]] = {
    "linear/forward": ("chts", "cublas", "cusparselt", "torch24", "mma_twin"),
    "linear/input_grad": ("chts", "cublas", "cusparselt", "torch24", "mma_twin"),
    "linear/weight_grad": ("chts", "cublas", "cusparselt", "mma_twin"),
    "linear/weight_grad_mvue": ("chts", "cublas"),
    "linear/layer": ("chts", "cublas", "torch24", "compile"),
    "linear/layer_mvue": ("chts", "cublas"),
    "prune/prune": ("chts", "cusparselt", "eager"),
    "prune/prune14": ("chts", "eager"),
    "prune/prune_pack": ("chts", "torch24"),
    "pack": ("chts", "cusparselt"),
    "topology": ("chts", "eager"),
    "optimizer": ("chts", "eager"),
    "model/step": ("chts", "cublas", "torch24", "chts_compile", "compile"),
    "model/step_mvue": ("chts", "cublas", "chts_compile", "compile"),
    "host/forward": ("chts", "cublas", "cusparselt", "torch24"),
    "host/input_grad": ("chts", "cublas", "cusparselt", "torch24"),
    "host/layer": ("chts", "cublas", "torch24"),
    "host/weight_grad": ("chts", "cublas"),
    "host": ("chts",),
}


def names(case: Case) -> list[str]:
    """The providers that have something to say on a case; those whose module is not part of this checkout are left out."""
    found = _PROVIDERS.get(f"{case.suite}/{case.op}") or _PROVIDERS[case.suite]
    return [name for name in found if _exists(MODULES[name])]


@functools.cache
def _exists(module: str) -> bool:
    return importlib.util.find_spec(f"{__name__}.{module}") is not None


def builder(name: str) -> Callable[[Problem, str], list[Variant]]:
    return importlib.import_module(f"{__name__}.{MODULES[name]}").build


def implementation(op: Any, impl: str, *args: Any) -> str:
    """The name of the kernel that ``impl`` selects for these arguments of a ``chts`` operation."""
    run = op.select(impl, *args)
    return next((kernel.name for kernel in op.kernels if kernel.run is run), "reference")


def cuda_only(problem: Problem, what: str) -> None:
    if problem.device.type != "cuda":
        raise Unavailable(f"{what} needs a CUDA device")
