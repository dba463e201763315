"""torch.compile of the dense layer, and of a model block by block (blocks of one kind share their code), default mode."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.problems.linear import LinearProblem
from benchmarks.problems.training import ModelProblem
from benchmarks.providers import cuda_only
from benchmarks.providers.cublas import layer
from benchmarks.timing import Variant
from chts_train.step_graphs import compile_blocks


def build(problem: LinearProblem | ModelProblem, impl: str) -> list[Variant]:
    cuda_only(problem, "torch.compile with Inductor's GPU code")
    torch._dynamo.reset()  # every case is a new program; without it the recompilation limit falls back to eager
    if isinstance(problem, ModelProblem):
        return [problem.variant(compile_blocks, "dense, compiled, ")]
    apply = torch.compile(lambda x, weight: F.linear(x, weight), dynamic=False)
    calls = [layer(s, apply) for s in problem.inputs]
    return [Variant(calls, lambda out: dict(zip(("y", "dx", "dw_dense"), out, strict=True)))]
