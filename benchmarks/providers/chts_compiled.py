"""This package inside torch.compile: a model's blocks with sparse layers, each block one graph."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.problems.training import ModelProblem
from benchmarks.providers import cuda_only
from benchmarks.timing import Variant
from chts_train import SparsityConfig, sparse_layers, sparsify_
from chts_train.step_graphs import compile_blocks


def build(problem: ModelProblem, impl: str) -> list[Variant]:
    cuda_only(problem, "torch.compile with Inductor's GPU code")
    torch._dynamo.reset()
    label = "2:4, compiled, operands resident, "
    return [problem.variant(lambda model: compile_blocks(sparse(problem, model, impl)), label, resident=True)]


def sparse(problem: ModelProblem, model: nn.Module, impl: str) -> nn.Module:
    """``model`` with sparse layers, and the gradient of the weights that the operation names."""
    mvue = problem.case.op.endswith("_mvue")
    sparsify_(model, SparsityConfig(impl=impl, weight_grad="mvue24" if mvue else "exact"))
    if mvue:
        # The number of a layer is a constant of its compiled graph. One number for all lets blocks share a graph, draws the same noise
        # in all of them and takes the same time.
        for layer in sparse_layers(model).values():
            layer._origin = (0, 0)
    return model
