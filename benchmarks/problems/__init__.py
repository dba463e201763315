"""The data of a case: inputs on the device, the float64 answer, and the gate that compares a provider's result with it."""

from __future__ import annotations

from typing import Protocol

import torch

from benchmarks.cases import Case
from benchmarks.cost import least_bytes, touched_bytes
from benchmarks.environment import l2_bytes
from benchmarks.problems.linear import LinearProblem
from benchmarks.problems.matrix import PackProblem, PruneProblem
from benchmarks.problems.topology import ModelUpdateProblem, TopologyProblem
from benchmarks.problems.training import ModelProblem, OptimizerProblem

MOST_SETS, MOST_TOPOLOGY_SETS = 160, 32
"""Sets of tiny problems: a topology set is expensive to make, since the reference takes it through the steps before."""
TIMES_L2 = 3
MOST_BYTES = 12 << 30
"""All sets of a case together; half of what the smallest supported cards have."""


class Problem(Protocol):
    case: Case
    device: torch.device
    sets: int

    def check(self, outputs: dict[str, torch.Tensor]) -> str | None:
        """Raise GateError unless the named tensors are right for set 0; may return a remark for the row's note."""


def make(case: Case, device: torch.device, sets: int | None = None) -> Problem:
    """The problem of a case, its inputs drawn from a fixed seed; ``sets`` of them, by default those that a timing needs."""
    kind = _kind(case)
    return kind(case, device, sets_for(case, device) if sets is None else sets)


def sets_for(case: Case, device: torch.device) -> int:
    """How many sets of inputs to rotate so that together they exceed three times the second-level cache.

    Counted in the bytes of the sparse provider, which touches least: for the dense ones it is more than three times.
    """
    size = touched_bytes(case)
    if device.type != "cuda" or size is None:
        return 1
    wanted = -(-TIMES_L2 * l2_bytes() // max(1, int(size)))
    most = MOST_TOPOLOGY_SETS if case.suite == "topology" else MOST_SETS
    dense = least_bytes(case, dense_weight=True) or 2 * size
    return max(1, min(wanted, most, int(MOST_BYTES // (4 * dense)) or 1))


def rotation_note(case: Case, sets: int) -> str:
    """What to say where the sets could not be made larger than the cache; empty where they are, and on the CPU."""
    size, cache = touched_bytes(case), l2_bytes()
    if not size or not cache or sets * size >= TIMES_L2 * cache:
        return ""
    return f"inputs {sets * size / cache:.1f}x L2"


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
