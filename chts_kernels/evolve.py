"""evolve: one topology update of one weight matrix, remove -> score -> regrow -> carry over (ALGORITHM section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import check
from .format import SparseWeight
from .ops.carry_over import carry_over_
from .ops.regrow import regrow
from .ops.remove import remove
from .ops.score import score
from .ops.score.reference import link_mask
from .patterns import pattern_table


@dataclass(frozen=True)
class Evolution:
    """What one update did. Nothing here was read back from the device."""

    old_ids: torch.Tensor
    """uint8 [N/4, K/4]: the ids before the update (the weight now holds the new ones)."""
    survivors: torch.Tensor
    """int32 [N/4, K/4]: bit masks of the links that outlived the removal."""
    removed: int
    """The number of removed links, k = int(zeta * links)."""
    stats: dict[str, torch.Tensor] | None
    """0-dim float64 device tensors (see :func:`evolution_stats`), or None when they were not asked for."""


@torch.no_grad()
def evolve(
    w: SparseWeight,
    *,
    zeta: float = 0.1,
    temperature: float = 1.0,
    removal: str = "soft",
    regrowth: str = "soft",
    seed: int = 0,
    layer: int = 0,
    step: int = 0,
    moments: Sequence[torch.Tensor] = (),
    stats: bool = False,
    impl: str = "auto",
) -> Evolution:
    """Update the topology of ``w`` in place and let values and moments follow their links.

    A function of (ids, values, seed, layer, step) alone: the same on every rank, and again when replayed.

    Args:
        w: changed in place: ``w.ids`` and ``w.values``.
        zeta: fraction of the active links to remove, in [0, 1].
        temperature: T > 0 of the soft removal.
        removal: "soft" or "hard"; regrowth: "soft", "greedy" or "random".
        seed, layer, step: what the noise is drawn for (:mod:`chts_kernels.rng`).
        moments: further tensors of link data [N, K*n/4], any dtype, carried over in place (new links get 0).
        stats: also compute :func:`evolution_stats` on the device.
        impl: implementation of every op.

    Returns:
        :class:`Evolution`.

    Raises:
        ValueError, TypeError: when an argument does not fit; the message names it; then nothing was changed.
    """
    check.require(isinstance(w, SparseWeight), "w", "be a SparseWeight", type(w).__name__, TypeError)
    check.choice(regrowth, "regrowth", ("soft", "greedy", "random"))
    check.choice(removal, "removal", ("soft", "hard"))
    for index, moment in enumerate(moments):
        check.link_data(moment, w.ids, w.n, f"moments[{index}]")
    survivors = remove(
        w.values, w.ids, w.n, zeta=zeta, temperature=temperature, mode=removal,
        seed=seed, layer=layer, step=step, impl=impl,
    )  # fmt: skip
    scores = score(survivors, impl=impl) if regrowth != "random" or stats else None
    new_ids = regrow(scores, survivors, w.n, mode=regrowth, seed=seed, layer=layer, step=step, impl=impl)
    old_ids = w.ids.clone()
    figures = None
    if stats:
        greedy = new_ids if regrowth == "greedy" else regrow(scores, survivors, w.n, mode="greedy", impl=impl)
        figures = evolution_stats(old_ids, new_ids, survivors, scores, greedy, w.n)
    carry_over_([w.values, *moments], old_ids, new_ids, w.n, impl=impl)
    w.ids.copy_(new_ids)
    return Evolution(old_ids, survivors, int(zeta * w.links), figures)


def evolution_stats(
    old_ids: torch.Tensor,
    new_ids: torch.Tensor,
    survivors: torch.Tensor,
    scores: torch.Tensor,
    greedy_ids: torch.Tensor,
    n: int,
) -> dict[str, torch.Tensor]:
    """Figures of one update as 0-dim float64 tensors on the device.

    ``can_change_blocks``: blocks in which more than one pattern contains the survivors; ``replaced``: links that are new;
    ``turnover``: replaced / links; ``noise_changed_blocks``: share of blocks whose pattern differs from the greedy choice;
    ``score_mean``, ``score_var``: of the scores over the links before the update; ``score_mean_survivors``,
    ``score_var_survivors``: over the survivors (population variances).
    """
    table = pattern_table(n)
    mask16 = table.tensor("mask16", old_ids.device)
    old, new = mask16[old_ids.long()], mask16[new_ids.long()]
    replaced = link_mask(new & ~old, torch.float64).sum()
    links = old_ids.numel() * 4 * n
    before = _moments(scores, link_mask(old, torch.float64))
    after = _moments(scores, link_mask(survivors, torch.float64))
    return {
        "can_change_blocks": (table.tensor("completions", old_ids.device)[survivors.long()] > 1).sum().double(),
        "replaced": replaced,
        "turnover": replaced / links,
        "noise_changed_blocks": (new_ids != greedy_ids).double().mean(),
        "score_mean": before[0],
        "score_var": before[1],
        "score_mean_survivors": after[0],
        "score_var_survivors": after[1],
    }


def _moments(scores: torch.Tensor, where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    count = where.sum()
    mean = (scores * where).sum() / count
    return mean, ((scores - mean) ** 2 * where).sum() / count
