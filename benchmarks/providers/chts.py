"""This package, through its public functions and ``torch.ops.chts``, with the implementation that ``--impl`` names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.problems import Problem
from benchmarks.problems.linear import LinearInputs, LinearProblem
from benchmarks.problems.matrix import OPERANDS, PackProblem, PruneProblem
from benchmarks.problems.topology import ModelUpdateProblem, TopologyProblem
from benchmarks.problems.training import ModelProblem, OptimizerProblem
from benchmarks.providers import chts_compiled, chts_mvue, chts_topology, implementation
from benchmarks.providers.cublas import no_grad
from benchmarks.timing import Variant
from chts_kernels import input_grad, pack, pack_operands_, prune, spmm, weight_grad
from chts_kernels.ops._library import Op
from chts_kernels.ops.pack import PACK, PACK_OPERANDS_, empty_operands
from chts_kernels.ops.prune import PRUNE
from chts_kernels.ops.spmm import INPUT_GRAD, SPMM
from chts_kernels.ops.weight_grad import WEIGHT_GRAD


def build(problem: Problem, impl: str) -> list[Variant]:
    if isinstance(problem, LinearProblem):
        op = problem.case.op
        if op.endswith("_mvue"):
            return [chts_mvue.build(problem, impl)]
        return [_layer(problem, impl) if op == "layer" else _product(problem, impl)]
    if isinstance(problem, TopologyProblem | ModelUpdateProblem):
        return [chts_topology.build(problem, impl)]
    if isinstance(problem, PruneProblem):
        return [_prune(problem, impl)]
    if isinstance(problem, PackProblem):
        return [_pack(problem, impl)]
    if isinstance(problem, OptimizerProblem):
        return [problem.links("operands included", impl)]
    assert isinstance(problem, ModelProblem)
    label = "2:4, operands resident, "
    return [problem.variant(lambda model: chts_compiled.sparse(problem, model, impl), label, resident=True)]


def _product(problem: LinearProblem, impl: str) -> Variant:
    """One product. The timed call takes operands packed before, as they are for all but the first micro-batch of a step;
    the eager call is the public function."""
    op = problem.case.op
    if op == "weight_grad":
        calls = [no_grad(_weight_grad(s, impl)) for s in problem.inputs]
        s = problem.inputs[0]
        name = implementation(WEIGHT_GRAD, impl, s.dy, s.x, s.weight.ids, 2, s.dy.dtype)
        return Variant(calls, lambda out: {"dw": out}, impl=name)
    forward = op == "forward"
    calls, eager = [], []
    for s in problem.inputs:
        arguments = _arguments(s, forward, impl)
        calls.append(_call(SPMM if forward else INPUT_GRAD, arguments, impl))
        eager.append(no_grad(_public(s, forward, impl)))
    name = implementation(SPMM if forward else INPUT_GRAD, impl, *_arguments(problem.inputs[0], forward, impl))
    return Variant(calls, lambda out: {"y" if forward else "dx": out}, impl=name, eager=eager)


def _arguments(s: LinearInputs, forward: bool, impl: str) -> tuple[Any, ...]:
    w, op = s.weight, SPMM if forward else INPUT_GRAD
    packed = s.x.is_cuda and impl != "reference" and bool(op.kernels)
    fresh = w.operands(s.x.dtype) if packed else None
    if forward:
        return s.x, w.values, w.ids, w.n, None, *((fresh.values, fresh.meta) if packed else (None, None))
    return s.dy, w.values, w.ids, w.n, *((fresh.values_t, fresh.meta_t) if packed else (None, None))


def _call(op: Op, arguments: tuple[Any, ...], impl: str) -> Callable[[], torch.Tensor]:
    return lambda: op(*arguments, impl=impl)


def _public(s: LinearInputs, forward: bool, impl: str) -> Callable[[], torch.Tensor]:
    if forward:
        return lambda: spmm(s.x, s.weight, impl=impl)
    return lambda: input_grad(s.dy, s.weight, impl=impl)


def _weight_grad(s: LinearInputs, impl: str) -> Callable[[], torch.Tensor]:
    return lambda: weight_grad(s.dy, s.x, s.weight.ids, 2, impl=impl)


def layer_call(s: LinearInputs, apply: Callable[[torch.Tensor, Any], torch.Tensor]) -> Callable[[], Any]:
    """Pack, forward, dX and dW through autograd; gradients are returned, not accumulated."""
    x = s.x.detach().requires_grad_()
    weight = s.weight
    weight.values.requires_grad_()
    packed = weight.operands(s.x.dtype) if s.x.is_cuda else None

    def run() -> tuple[torch.Tensor, ...]:
        if packed is not None:
            packed.invalidate()  # as after an optimizer step
        y = apply(x, weight)
        return (y.detach(), *torch.autograd.grad(y, (x, weight.values), s.dy))

    return run


def _layer(problem: LinearProblem, impl: str) -> Variant:
    calls = [layer_call(s, lambda x, w: spmm(x, w, impl=impl)) for s in problem.inputs]
    name = implementation(SPMM, impl, *_arguments(problem.inputs[0], True, impl))
    return Variant(calls, lambda out: dict(zip(("y", "dx", "dw"), out, strict=True)), impl=name, label="pack included")


def _prune(problem: PruneProblem, impl: str) -> Variant:
    n = problem.case.n
    name = implementation(PRUNE, impl, problem.dense[0], n, "abs")
    if problem.case.op != "prune_pack":

        def choose(dense: torch.Tensor) -> Callable[[], torch.Tensor]:
            return lambda: prune(dense, n, impl=impl)

        return Variant([choose(d) for d in problem.dense], lambda out: {"ids": out}, impl=name)

    def whole(dense: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
        operands = empty_operands(*dense.shape, problem.dtype, problem.device)

        def run() -> tuple[torch.Tensor, ...]:
            ids = prune(dense, n, impl=impl)
            values = pack(dense, ids, n, impl=impl)
            # The values are already the operand of the forward pass.
            pack_operands_(values, ids, n, None, *operands[1:], impl=impl)
            return ids, values, *operands[1:]

        return run

    names = ("ids", "values", "meta", "operand_t", "meta_t")
    return Variant([whole(d) for d in problem.dense], lambda out: dict(zip(names, out, strict=True)), impl=name)


def _pack(problem: PackProblem, impl: str) -> Variant:
    if problem.case.op == "pack":

        def gather(index: int) -> Callable[[], torch.Tensor]:
            dense, weight = problem.dense[index], problem.weights[index]
            return lambda: pack(dense, weight.ids, weight.n, impl=impl)

        name = implementation(PACK, impl, problem.dense[0], problem.weights[0].ids, problem.weights[0].n)
        return Variant([gather(i) for i in range(problem.sets)], lambda out: {"values": out}, impl=name)
    shared = problem.case.op == "pack_operands_shared"

    def arguments(index: int) -> tuple[Any, ...]:
        weight, buffers = problem.weights[index], problem.buffers[index]
        return weight.values, weight.ids, weight.n, None if shared else buffers[0], *buffers[1:]

    def derive(index: int) -> Callable[[], tuple[torch.Tensor, ...]]:
        args = arguments(index)

        def run() -> tuple[torch.Tensor, ...]:
            pack_operands_(*args, impl=impl)
            return args[3:]

        return run

    def canon(out: tuple[torch.Tensor | None, ...]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in zip(OPERANDS, out, strict=True) if tensor is not None}

    name = implementation(PACK_OPERANDS_, impl, *arguments(0))
    return Variant([derive(i) for i in range(problem.sets)], canon, impl=name)
