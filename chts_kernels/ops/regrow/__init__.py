"""regrow: the legal pattern of every block that keeps its survivors and has the largest (noisy) score."""

from __future__ import annotations

import torch

from ... import check
from ...patterns import BLOCK
from .._batch import too_large, why_not
from .._library import Op
from ..score import check_survivors
from . import reference

REGROW = Op(
    "regrow(Tensor? scores, Tensor survivors, int n, str mode, int seed, int layer, int step) -> Tensor",
    reference.regrow,
    lambda scores, survivors, *_: survivors.new_empty(survivors.shape, dtype=torch.uint8),
)


def regrow(
    scores: torch.Tensor | None,
    survivors: torch.Tensor,
    n: int = 2,
    *,
    mode: str = "soft",
    seed: int = 0,
    layer: int = 0,
    step: int = 0,
    impl: str = "auto",
) -> torch.Tensor:
    """New pattern ids: per block the largest sum of scores among the patterns that contain all survivors.

    "soft" multiplies every score by its own xi ~ Uniform[0, 1); "greedy" takes scores as they are; "random" puts 1 for
    every score (then multiplies by xi): the control that shows what the scores contribute. Patterns that miss a survivor
    are excluded exactly, which is the limit of an infinite survivor bonus Gamma. The lowest id wins a tie. The order of
    summation is fixed (:func:`chts_kernels.ops.prune.reference.best_pattern`). ALGORITHM section 2, step 3.

    Args:
        scores: float32 or float64 [N, K], no NaN; None in mode "random".
        survivors: int32 [N/4, K/4], each contained in at least one pattern of ``n``.
        n: links per row of a 4x4 block.
        mode: "soft", "greedy" or "random".
        seed, layer, step: what the noise is drawn for (:mod:`chts_kernels.rng`).

    Returns:
        uint8 [N/4, K/4].

    Raises:
        ValueError, TypeError: when an argument does not fit; the message names it.
    """
    check.links_per_row(n)
    check_survivors(survivors)
    check.choice(mode, "mode", ("soft", "greedy", "random"))
    if mode != "random":
        check.require(scores is not None, "scores", f"be given in mode {mode!r}", None)
        check.floating(scores, "scores", (torch.float32, torch.float64))
        expected = (survivors.shape[0] * BLOCK, survivors.shape[1] * BLOCK)
        check.require(tuple(scores.shape) == expected, "scores", f"have shape {expected}", tuple(scores.shape))
        check.same_device(survivors=survivors, scores=scores)
    return REGROW(None if mode == "random" else scores, survivors, n, mode, seed, layer, step, impl=impl)


def _why_not(scores: torch.Tensor | None, survivors: torch.Tensor, *_: object) -> str | None:
    return too_large(survivors) or why_not(scores, survivors)


@REGROW.kernel("triton", _why_not)
def _triton(*args) -> torch.Tensor:
    from . import triton_regrow

    return triton_regrow.regrow(*args)
