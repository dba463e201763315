"""prune: the transposable N:M pattern of every 4x4 block that keeps the most magnitude, exactly."""

from __future__ import annotations

import torch

from ... import check
from ...patterns import BLOCK
from .._library import Op
from . import reference

PRUNE = Op(
    "prune(Tensor dense, int n, str score) -> Tensor",
    reference.prune,
    lambda dense, n, score: dense.new_empty(dense.shape[0] // BLOCK, dense.shape[1] // BLOCK, dtype=torch.uint8),
)


def prune(dense: torch.Tensor, n: int = 2, score: str = "abs", *, impl: str = "auto") -> torch.Tensor:
    """Pattern ids with, in every 4x4 block, the largest sum of ``|w|`` (or ``w**2``) over all 90 (24) legal patterns.

    Exact, not greedy; the lowest id wins a tie. Sums are taken in float32 (float64 for float64 input). -0.0 counts as 0;
    inf and NaN count as 2**120, the largest score there is, so that a diverged weight is kept and stays visible.
    Source: issue 2; the initial topology of dense-to-sparse re-training (eDSrT phase 1).

    Args:
        dense: [N, K], both divisible by 4; float32, bfloat16, float16 or float64.
        n: links per row of a 4x4 block, 1 or 2.
        score: "abs" or "square".

    Returns:
        uint8 [N/4, K/4].

    Raises:
        ValueError, TypeError: when an argument does not fit; the message names it.
    """
    check.links_per_row(n)
    check.dense(dense)
    check.choice(score, "score", ("abs", "square"))
    return PRUNE(dense, n, score, impl=impl)
