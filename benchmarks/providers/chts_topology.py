"""This package's topology update and its four parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.problems.matrix import OPERANDS
from benchmarks.problems.topology import SEED, STEP, TEMPERATURE, ZETA, ModelUpdateProblem, TopologyProblem
from benchmarks.providers import implementation
from benchmarks.timing import Variant
from chts_kernels import carry_over_, evolve, regrow, remove, score
from chts_kernels.evolve import evolve_many
from chts_kernels.ops.carry_over import CARRY_OVER_
from chts_kernels.ops.regrow import REGROW
from chts_kernels.ops.remove import REMOVE
from chts_kernels.ops.score import SCORE

NOISE = {"seed": SEED, "layer": 0, "step": STEP}
COMPUTE = torch.bfloat16
"""Dtype of the operands that an update refreshes."""


def build(problem: TopologyProblem | ModelUpdateProblem, impl: str) -> Variant:
    if isinstance(problem, ModelUpdateProblem):
        return _all(problem, impl)
    return {"remove": _remove, "score": _score, "regrow": _regrow, "carry_over": _carry_over}.get(
        problem.case.op, _update
    )(problem, impl)


def _remove(p: TopologyProblem, impl: str) -> Variant:
    def call(i: int) -> Callable[[], torch.Tensor]:
        return lambda: remove(p.values[i], p.ids[i], p.n, zeta=ZETA, temperature=TEMPERATURE, impl=impl, **NOISE)

    name = implementation(REMOVE, impl, p.values[0], p.ids[0], p.n, ZETA, TEMPERATURE, "soft", SEED, 0, STEP)
    return Variant([call(i) for i in range(p.sets)], lambda out: {"survivors": out}, impl=name)


def _score(p: TopologyProblem, impl: str) -> Variant:
    def call(i: int) -> Callable[[], torch.Tensor]:
        return lambda: score(p.survivors[i], impl=impl)

    name = implementation(SCORE, impl, p.survivors[0], torch.float32)
    return Variant([call(i) for i in range(p.sets)], lambda out: {"scores": out}, impl=name)


def _regrow(p: TopologyProblem, impl: str) -> Variant:
    def call(i: int) -> Callable[[], torch.Tensor]:
        return lambda: regrow(p.scores[i], p.survivors[i], p.n, impl=impl, **NOISE)

    name = implementation(REGROW, impl, p.scores[0], p.survivors[0], p.n, "soft", SEED, 0, STEP)
    return Variant([call(i) for i in range(p.sets)], lambda out: {"ids": out}, impl=name)


def _carry_over(p: TopologyProblem, impl: str) -> Variant:
    tensors = [[p.values[i].clone(), *(m.clone() for m in p.moments[i])] for i in range(p.sets)]

    def call(i: int) -> Callable[[], list[torch.Tensor]]:
        def run() -> list[torch.Tensor]:
            carry_over_(tensors[i], p.ids[i], p.new_ids[i], p.n, impl=impl)
            return tensors[i]

        return run

    def restore() -> None:
        for mine, original in zip(tensors[0], [p.values[0], *p.moments[0]], strict=True):
            mine.copy_(original)

    name = implementation(CARRY_OVER_, impl, tensors[0], p.ids[0], p.new_ids[0], p.n)
    calls = [call(i) for i in range(p.sets)]
    return Variant(calls, lambda out: {"tensors": torch.stack(out)}, impl=name, restore=restore)


def _update(p: TopologyProblem, impl: str) -> Variant:
    """The whole update in place, ending with fresh operands for the next forward pass."""
    held = [p.weight(i) for i in range(p.sets)]

    def call(i: int) -> Callable[[], int]:
        weight, moments = held[i]

        def run() -> int:
            evolve(weight, zeta=ZETA, temperature=TEMPERATURE, moments=moments, impl=impl, **NOISE)
            weight.operands(COMPUTE)
            return i

        return run

    def canon(i: int) -> dict[str, torch.Tensor]:
        weight = held[i][0]
        fresh = weight.operands(COMPUTE)
        packed = dict(zip(OPERANDS, (fresh.values, fresh.meta, fresh.values_t, fresh.meta_t), strict=True))
        return {"update_ids": weight.ids, "update_values": weight.values, **packed}

    def restore() -> None:
        weight, moments = held[0]
        weight.ids.copy_(p.ids[0])
        weight.values.copy_(p.values[0])
        for mine, original in zip(moments, p.moments[0], strict=True):
            mine.copy_(original)

    name = implementation(REMOVE, impl, p.values[0], p.ids[0], p.n, ZETA, TEMPERATURE, "soft", SEED, 0, STEP)
    return Variant([call(i) for i in range(p.sets)], canon, impl=name, restore=restore, label="operands included")


def _all(p: ModelUpdateProblem, impl: str) -> Variant:
    """Every matrix of a model in one call, operands included."""
    weights, moments = p.weights()

    def run() -> int:
        evolve_many(
            weights, zeta=ZETA, temperature=TEMPERATURE, seed=SEED, step=STEP, moments=moments, impl=impl
        )  # fmt: skip
        for weight in weights:
            weight.operands(COMPUTE)
        return 0

    def canon(_: Any) -> dict[str, torch.Tensor]:
        return {
            "update_ids": torch.cat([w.ids.flatten() for w in weights]),
            "update_values": torch.cat([w.values.flatten() for w in weights]),
        }

    def restore() -> None:
        fresh, fresh_moments = p.weights()
        for w, f, ms, fs in zip(weights, fresh, moments, fresh_moments, strict=True):
            w.ids.copy_(f.ids)
            w.values.copy_(f.values)
            for mine, original in zip(ms, fs, strict=True):
                mine.copy_(original)

    w = weights[0]
    name = implementation(REMOVE, impl, w.values, w.ids, 2, ZETA, TEMPERATURE, "soft", SEED, 0, STEP)
    return Variant([run], canon, impl=name, restore=restore, label="operands included")
