"""This package's opt-in weight gradient on sparse tensor cores: dY pruned 2:4 along tokens by an unbiased estimator."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.problems.linear import MVUE_DRAWS, LinearInputs, LinearProblem
from benchmarks.providers import implementation
from benchmarks.providers.cublas import no_grad
from benchmarks.timing import Variant
from chts_kernels import Mvue24, spmm
from chts_kernels.ops._library import Op
from chts_kernels.ops.weight_grad import WEIGHT_GRAD_MVUE


def build(problem: LinearProblem, impl: str) -> Variant:
    op = WEIGHT_GRAD_MVUE
    first = problem.inputs[0]

    def mean() -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=problem.device)
        for seed in range(MVUE_DRAWS):
            total = total + _draw(op, first, seed, impl)().double()
        return total / MVUE_DRAWS

    name = implementation(op, impl, first.dy, first.x, first.weight.ids, 2, first.dy.dtype, 0, 0, 0, None)
    if problem.case.op == op.name:
        calls = [no_grad(_draw(op, s, 0, impl)) for s in problem.inputs]
        return Variant(calls, lambda out: {"dw_mvue": out, "dw_mvue_mean": mean()}, impl=name)
    from benchmarks.providers.chts import layer_call

    noise = Mvue24(counter=torch.zeros((), dtype=torch.int64, device=problem.device))  # as SparseLinear passes it
    calls = [layer_call(s, lambda x, w: spmm(x, w, weight_grad=noise, impl=impl)) for s in problem.inputs]

    def canon(out: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        return {"y": out[0], "dx": out[1], "dw_mvue": out[2], "dw_mvue_mean": mean()}

    return Variant(calls, canon, impl=name, label="pack included")


def _draw(op: Op, s: LinearInputs, seed: int, impl: str) -> Callable[[], torch.Tensor]:
    return lambda: op(s.dy, s.x, s.weight.ids, 2, s.dy.dtype, seed, 0, 0, None, impl=impl)
