"""Algorithm 1 of the paper in eager torch (:mod:`benchmarks.competitors_topology`): dense weights, masks and moments.

Everything with a matrix product in it is tried in float32 and in tf32; the faster one is kept and both are noted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import competitors_topology as algorithm
from benchmarks.problems.topology import TEMPERATURE, ZETA, ModelUpdateProblem, TopologyProblem
from benchmarks.timing import Variant
from chts_kernels import pack, unpack
from chts_kernels.ops.score.reference import link_mask


def build(problem: TopologyProblem | ModelUpdateProblem) -> list[Variant]:
    if isinstance(problem, ModelUpdateProblem):
        return _precisions(_all(problem), problem.device)
    op = problem.case.op
    if op in ("remove", "regrow", "carry_over"):
        return [{"remove": _remove, "regrow": _regrow, "carry_over": _carry_over}[op](problem)]
    return _precisions(_score(problem) if op == "score" else _update(problem), problem.device)


def _precisions(variant: Variant, device: torch.device) -> list[Variant]:
    if device.type != "cuda":
        return [variant]

    def with_tf32(call: Callable[[], Any], allow: bool) -> Callable[[], Any]:
        def run() -> Any:
            before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = allow
            try:
                return call()
            finally:
                torch.backends.cuda.matmul.allow_tf32 = before

        return run

    return [
        Variant([with_tf32(call, allow) for call in variant.calls], variant.canon, label=label, restore=variant.restore)
        for label, allow in (("fp32", False), ("tf32", True))
    ]


def _dense(p: TopologyProblem, i: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Weight, mask and moments of a set as [N, K] matrices of the caller's own."""
    mask = unpack(torch.ones_like(p.values[i]), p.ids[i], p.n)
    return unpack(p.values[i], p.ids[i], p.n), mask, [unpack(m, p.ids[i], p.n) for m in p.moments[i]]


def _remove(p: TopologyProblem) -> Variant:
    def call(i: int) -> Callable[[], torch.Tensor]:
        weight, mask, _ = _dense(p, i)
        return lambda: algorithm.remove(weight, mask, ZETA, TEMPERATURE, p.n)

    return Variant([call(i) for i in range(p.sets)], lambda out: {"free_survivors": out})


def _score(p: TopologyProblem) -> Variant:
    def call(i: int) -> Callable[[], torch.Tensor]:
        mask = link_mask(p.survivors[i], torch.float32)
        return lambda: algorithm.score(mask)

    return Variant([call(i) for i in range(p.sets)], lambda out: {"scores": out})


def _regrow(p: TopologyProblem) -> Variant:
    patterns = algorithm.pattern_matrix(p.n, p.device)

    def call(i: int) -> Callable[[], torch.Tensor]:
        survivors = link_mask(p.survivors[i], torch.float32)
        return lambda: algorithm.regrow(p.scores[i], survivors, patterns)

    return Variant([call(i) for i in range(p.sets)], lambda out: {"free_mask": out})


def _carry_over(p: TopologyProblem) -> Variant:
    held = [_dense(p, i) for i in range(p.sets)]
    new = [unpack(torch.ones_like(v), ids, p.n) for v, ids in zip(p.values, p.new_ids, strict=True)]

    def call(i: int) -> Callable[[], Sequence[torch.Tensor]]:
        weight, mask, moments = held[i]

        def run() -> Sequence[torch.Tensor]:
            stays = mask * new[i]
            for tensor in (weight, *moments):
                tensor.mul_(stays)
            return weight, *moments

        return run

    def canon(out: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"tensors": torch.stack([pack(t, p.new_ids[0], p.n) for t in out])}

    return Variant([call(i) for i in range(p.sets)], canon, restore=lambda: _restore(held[0], _dense(p, 0)))


def _update(p: TopologyProblem) -> Variant:
    patterns = algorithm.pattern_matrix(p.n, p.device)
    held = [_dense(p, i) for i in range(p.sets)]

    def call(i: int) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        weight, mask, moments = held[i]

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            algorithm.update(weight, mask, moments, patterns, zeta=ZETA, temperature=TEMPERATURE, n=p.n)
            return weight, mask

        return run

    return Variant(
        [call(i) for i in range(p.sets)],
        lambda out: {"free_weight": out[0], "free_mask": out[1]},
        restore=lambda: _restore(held[0], _dense(p, 0)),
    )


def _restore(mine: tuple[Any, ...], original: tuple[Any, ...]) -> None:
    for a, b in zip((*mine[:2], *mine[2]), (*original[:2], *original[2]), strict=True):
        a.copy_(b)


def _all(p: ModelUpdateProblem) -> Variant:
    patterns = algorithm.pattern_matrix(2, p.device)
    held = []
    for ids, tensors in zip(p.ids, p.tensors, strict=True):
        weight, *moments = (unpack(t, ids, 2) for t in tensors)
        held.append((weight, unpack(torch.ones_like(tensors[0]), ids, 2), moments))

    def run() -> int:
        for weight, mask, moments in held:
            algorithm.update(weight, mask, moments, patterns, zeta=ZETA, temperature=TEMPERATURE)
        return 0

    def canon(_: int) -> dict[str, torch.Tensor]:
        first = held[0]
        return {"free_weight": first[0], "free_mask": first[1]}

    def restore() -> None:
        values, ids = p.tensors[0], p.ids[0]
        weight, *moments = (unpack(t, ids, 2) for t in values)
        _restore(held[0], (weight, unpack(torch.ones_like(values[0]), ids, 2), moments))

    return Variant([run], canon, restore=restore)
