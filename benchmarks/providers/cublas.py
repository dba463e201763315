"""Dense cuBLAS through torch, on the masked weight: what a user has without sparsity."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.problems.linear import LinearInputs, LinearProblem
from benchmarks.problems.training import ModelProblem
from benchmarks.timing import Variant


def build(problem: LinearProblem | ModelProblem, impl: str) -> list[Variant]:
    if isinstance(problem, ModelProblem):
        return [problem.variant(lambda model: model, "dense, ")]
    op = problem.case.op
    if op.startswith("layer"):
        return [Variant([layer(s) for s in problem.inputs], lambda out: dict(zip(("y", "dx", "dw_dense"), out, strict=True)))]

    def forward(s: LinearInputs):
        return lambda: F.linear(s.x, s.dense)

    def input_grad(s: LinearInputs):
        return lambda: s.dy @ s.dense

    def weight_grad(s: LinearInputs):
        return lambda: s.dy.t() @ s.x

    make, name = {
        "forward": (forward, "y"),
        "input_grad": (input_grad, "dx"),
        "weight_grad": (weight_grad, "dw_dense"),
        "weight_grad_mvue": (weight_grad, "dw_dense"),
    }[op]
    return [Variant([no_grad(make(s)) for s in problem.inputs], lambda out: {name: out})]


def no_grad(call):
    """``call`` without autograd recording: its host cost belongs to the layer, not to the product."""

    def run():
        with torch.no_grad():
            return call()

    return run


def layer(s: LinearInputs, apply=F.linear):
    """Forward, dX and dW through autograd; gradients are returned, not accumulated."""
    x, weight = s.x.detach().requires_grad_(), s.dense.detach().requires_grad_()

    def run():
        y = apply(x, weight)
        return (y.detach(), *torch.autograd.grad(y, (x, weight), s.dy))

    return run
