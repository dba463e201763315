"""evolve: one topology update of one weight matrix, remove -> score -> regrow -> carry over (ALGORITHM section 2).

evolve_many: of many matrices. ``impl="triton"`` runs the fused kernels of :mod:`chts_kernels.evolve_triton`, matrices of one
shape together; anything else the four operations one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import check
from .format import SparseWeight
from .ops._batch import check_noise, too_large, why_not, why_not_in_place
from .ops.carry_over import carry_over_
from .ops.regrow import regrow
from .ops.remove import check_numbers, remove
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
    removed: int | None
    """The number of removed links, k = int(zeta * links); None when a kernel read zeta on the device."""
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
    Operands of ``w`` that are up to date (:meth:`SparseWeight.operands`) stay so where the fused kernels run; else the next use packs.

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
    return evolve_many(
        [w], zeta=zeta, temperature=temperature, removal=removal, regrowth=regrowth, seed=seed, layers=[layer], step=step,
        moments=[moments], stats=stats, impl=impl,
    )[0]  # fmt: skip


@torch.no_grad()
def evolve_many(
    weights: Sequence[SparseWeight],
    *,
    zeta: float = 0.1,
    temperature: float = 1.0,
    removal: str = "soft",
    regrowth: str = "soft",
    seed: int = 0,
    layers: Sequence[int] | None = None,
    step: int = 0,
    moments: Sequence[Sequence[torch.Tensor]] | None = None,
    stats: bool = False,
    schedule: torch.Tensor | None = None,
    impl: str = "auto",
) -> list[Evolution]:
    """:func:`evolve` of many weights; the result does not depend on which of them share a launch.

    Args:
        weights: distinct SparseWeights, changed in place.
        layers: the layer number of every weight, by default its place in ``weights``.
        moments: the moments of every weight, by default none.
        schedule: float64 tensor [3] = (zeta, temperature, step) on the weights' device, used instead of the three numbers: a
            captured CUDA graph follows it. Its range cannot be checked without waiting for the device.
        impl: "auto", "triton" or "reference".
        zeta, temperature, removal, regrowth, seed, step, stats: those of :func:`evolve`.

    Returns:
        One :class:`Evolution` for every weight.

    Raises:
        ValueError, TypeError: when an argument does not fit; the message names it; then nothing was changed.
        RuntimeError: when the named implementation cannot run here; the message says why.
    """
    for index, w in enumerate(weights):
        check.require(isinstance(w, SparseWeight), f"weights[{index}]", "be a SparseWeight", type(w).__name__, TypeError)
    check.require(
        len({w.values.data_ptr() for w in weights}) == len(weights), "weights", "be distinct", f"{len(weights)} with shared values"
    )
    layers = list(range(len(weights))) if layers is None else list(layers)
    moments = [() for _ in weights] if moments is None else [tuple(m) for m in moments]
    check.require(len(layers) == len(weights), "layers", f"have {len(weights)} entries = len(weights)", len(layers))
    check.require(len(moments) == len(weights), "moments", f"have {len(weights)} entries = len(weights)", len(moments))
    check.choice(removal, "removal", ("soft", "hard"))
    check.choice(regrowth, "regrowth", ("soft", "greedy", "random"))
    check_numbers(zeta, temperature)
    check_noise(seed, layers, step)
    for w, of_weight in zip(weights, moments, strict=True):
        check.ids(w.ids, "w.ids")
        check.values_for_ids(w.values, w.ids, w.n, "w.values")
        for index, moment in enumerate(of_weight):
            check.link_data(moment, w.ids, w.n, f"moments[{index}]")
    if schedule is not None:
        check.tensor(schedule, "schedule")
        check.require(schedule.dtype == torch.float64, "schedule", "have dtype float64", schedule.dtype, TypeError)
        check.require(tuple(schedule.shape) == (3,), "schedule", "have shape (3,)", tuple(schedule.shape))
        if weights:
            check.same_device(schedule=schedule, values=weights[0].values)
    check.choice(impl, "impl", ("auto", "triton", "reference"))

    reason: str | None = None
    if impl == "reference":
        reason = "impl = 'reference' takes the operations one by one"
    else:
        reasons = (_why_not_fused(w, m) for w, m in zip(weights, moments, strict=True))
        reason = next((r for r in reasons if r is not None), None)
    if impl == "triton" and reason is not None:
        raise RuntimeError(f"impl: 'triton' cannot run evolve here: {reason}")
    results: list[Evolution] = []
    if reason is None and weights:
        from .evolve_triton import batches, evolve_batch

        by_index: dict[int, Evolution] = {}
        for members in batches(weights, moments):
            old_ids, survivors, figures = evolve_batch(
                [weights[m] for m in members], [layers[m] for m in members], [moments[m] for m in members],
                zeta=zeta, temperature=temperature, removal=removal, regrowth=regrowth, seed=seed, step=step,
                stats=stats, schedule=schedule,
            )  # fmt: skip
            for place, m in enumerate(members):
                own = None if figures is None else {name: figure[place] for name, figure in figures.items()}
                removed = None if schedule is not None else int(zeta * weights[m].links)
                by_index[m] = Evolution(old_ids[place], survivors[place], removed, own)
        _follow(weights)
        return [by_index[m] for m in range(len(weights))]
    if schedule is not None:
        zeta, temperature, step = schedule.tolist()
        step = int(step)
    for w, layer, of_weight in zip(weights, layers, moments, strict=True):
        results.append(
            _evolve_one(
                w, of_weight, layer, zeta=zeta, temperature=temperature, removal=removal, regrowth=regrowth, seed=seed,
                step=step, stats=stats, impl=impl,
            )  # fmt: skip
        )
    _follow(weights)
    return results


def _follow(weights: Sequence[SparseWeight]) -> None:
    """Resident operands that the update has not brought up to date on its way."""
    for w in weights:
        if w._operands.resident:
            w._operands.follow(w.values, w.ids, w.n)


def _why_not_fused(w: SparseWeight, moments: Sequence[torch.Tensor]) -> str | None:
    """The reason why the fused kernels cannot take this weight, or None."""
    return too_large(w.ids) or why_not_in_place([w.values, w.ids, *moments]) or why_not(w.values, w.ids, *moments)


def _evolve_one(
    w: SparseWeight,
    moments: Sequence[torch.Tensor],
    layer: int,
    *,
    zeta: float,
    temperature: float,
    removal: str,
    regrowth: str,
    seed: int,
    step: int,
    stats: bool,
    impl: str,
) -> Evolution:
    """One update, operation by operation."""
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
