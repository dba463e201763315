"""Plain torch: Algorithm 1 of the paper, the search over 90 patterns as a product, an optimizer on dense weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.problems import Problem
from benchmarks.problems.matrix import PruneProblem, blocks
from benchmarks.problems.training import OptimizerProblem
from benchmarks.timing import Variant
from chts_kernels import pattern_table


def build(problem: Problem, impl: str) -> list[Variant]:
    if isinstance(problem, PruneProblem):
        return [_prune(problem)]
    if isinstance(problem, OptimizerProblem):
        return [problem.dense("torch's fused AdamW on the dense weight")]
    from benchmarks.providers import eager_topology

    return eager_topology.build(problem)


def _prune(problem: PruneProblem) -> Variant:
    """Score every pattern of every block by one product: [blocks, 16] @ [16, patterns], then argmax."""
    table = pattern_table(problem.case.n)
    masks = torch.from_numpy(table.masks.reshape(len(table), 16).astype("float32")).to(problem.device).t().contiguous()

    def call(dense: torch.Tensor) -> Callable[[], Any]:
        def run() -> torch.Tensor:
            scores = blocks(dense.float().abs()).reshape(-1, 16)
            return (scores @ masks).argmax(dim=1).to(torch.uint8).view(dense.shape[0] // 4, dense.shape[1] // 4)

        return run

    def canon(ids: torch.Tensor) -> dict[str, torch.Tensor]:
        # Sums in another order may choose the other of two nearly equal patterns: gated as a pruned matrix.
        mask = table.tensor("masks", problem.device)[ids.long()]
        dense = problem.dense[0]
        kept = mask.transpose(1, 2).reshape(dense.shape)
        return {"pruned": torch.where(kept.bool(), dense, torch.zeros_like(dense))}

    return Variant([call(dense) for dense in problem.dense], canon)
