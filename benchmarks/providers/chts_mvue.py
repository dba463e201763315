"""This package's opt-in weight gradient on sparse tensor cores: dY pruned 2:4 along tokens by an unbiased estimator."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch

from benchmarks.problems.linear import MVUE_DRAWS, LinearInputs, LinearProblem
from benchmarks.providers import Unavailable, implementation
from benchmarks.providers.cublas import no_grad
from benchmarks.timing import Variant
from chts_kernels import spmm
from chts_kernels.ops._library import REGISTRY, Op

OP, MODE = "weight_grad_mvue", "mvue24"


def build(problem: LinearProblem, impl: str) -> Variant:
    op = REGISTRY.get(OP)
    if op is None:
        raise Unavailable(f"this version of chts_kernels has no operation {OP}")
    first = problem.inputs[0]

    def mean() -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=problem.device)
        for seed in range(MVUE_DRAWS):
            total = total + _draw(op, first, seed, impl)().double()
        return total / MVUE_DRAWS

    name = implementation(op, impl, first.dy, first.x, first.weight.ids, 2, first.dy.dtype, 0, 0, 0)
    if problem.case.op == OP:
        calls = [no_grad(_draw(op, s, 0, impl)) for s in problem.inputs]
        return Variant(calls, lambda out: {"dw_mvue": out, "dw_mvue_mean": mean()}, impl=name)
    if "weight_grad" not in inspect.signature(spmm).parameters:
        raise Unavailable(f"spmm of this version of chts_kernels takes no weight_grad={MODE!r}")
    from benchmarks.providers.chts import layer_call

    calls = [layer_call(s, lambda x, w: spmm(x, w, weight_grad=MODE, impl=impl)) for s in problem.inputs]

    def canon(out: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        return {"y": out[0], "dx": out[1], "dw_mvue": out[2], "dw_mvue_mean": mean()}

    return Variant(calls, canon, impl=name, label="pack included")


def _draw(op: Op, s: LinearInputs, seed: int, impl: str) -> Callable[[], torch.Tensor]:
    return lambda: op(s.dy, s.x, s.weight.ids, 2, s.dy.dtype, seed, 0, 0, impl=impl)
