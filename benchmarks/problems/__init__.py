"""The data of a case: inputs on the device, the float64 answer, and the gate that compares a provider's result with it."""

from __future__ import annotations

from typing import Protocol

import torch

from benchmarks.cases import Case
from benchmarks.cost import least_bytes
from benchmarks.environment import l2_bytes
from benchmarks.problems.linear import LinearProblem
from benchmarks.problems.matrix import PackProblem, PruneProblem
from benchmarks.problems.topology import ModelUpdateProblem, TopologyProblem
from benchmarks.problems.training import ModelProblem, OptimizerProblem

MOST_SETS = 24
MOST_BYTES = 12 << 30
"""All sets of a case together; half of what the smallest supported cards have."""


class Problem(Protocol):
    case: Case
    device: torch.device
    sets: int

    def check(self, outputs: dict[str, torch.Tensor]) -> str | None:
        """Raise GateError unless the named tensors are right for set 0; may return a remark for the row's note."""


def make(case: Case, device: torch.device) -> Problem:
    """The problem of a case, its inputs drawn from a fixed seed."""
    kind = _kind(case)
    return kind(case, device, sets_for(case, device))


def sets_for(case: Case, device: torch.device) -> int:
    """How many sets of inputs to rotate so that together they exceed three times the second-level cache."""
    size = least_bytes(case, dense_weight=True)
    if device.type != "cuda" or size is None or case.suite in ("host", "model"):
        return 1
    wanted = -(-3 * l2_bytes() // max(1, int(size)))
    return max(1, min(wanted, MOST_SETS, int(MOST_BYTES // (4 * size)) or 1))


def _kind(case: Case) -> type[Problem]:
    if case.suite == "host":
        return {"pack_operands": PackProblem, "update": TopologyProblem}.get(case.op, LinearProblem)
    if case.suite == "topology" and "model" in case.dims:
        return ModelUpdateProblem
    return {
        "linear": LinearProblem,
        "prune": PruneProblem,
        "pack": PackProblem,
        "topology": TopologyProblem,
        "optimizer": OptimizerProblem,
        "model": ModelProblem,
    }[case.suite]
