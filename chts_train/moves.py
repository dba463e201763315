"""Topology updates by moves of whole patterns (:func:`chts_kernels.choose_moves`) for the layers of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from chts_kernels import Evolution, carry_over_, choose_moves, score
from chts_kernels.evolve import evolution_stats
from chts_kernels.patterns import pattern_table

from .dense_gradient import DenseGradients
from .distributed import carry_over_rows_, first_row, gathered, is_dtensor
from .linear import SparseLinear

MANY = 1 << 24
"""Elements of dense matrices whose moves are chosen in one call."""

Member = tuple[int, str, SparseLinear, list[torch.Tensor]]
"""Layer number, name, layer, and the tensors besides its values that follow its links (DTensors where the values are)."""


@torch.no_grad()
def move_many(
    members: Sequence[Member],
    gradients: DenseGradients | None,
    *,
    zeta: float,
    temperature: float,
    removal: str,
    regrowth: str,
    seed: int,
    step: int,
    stats: bool,
) -> Iterator[tuple[str, Evolution]]:
    """Update layers in place, those of one shape together; yields each one's name and what happened to it.

    Args:
        members: the layers.
        gradients: of the dense weights at this step, for regrowth "gradient": the layers' are taken.
        removal: "moves" or "soft-moves"; regrowth: "gradient", "soft" or "random"; the rest: see
            :class:`chts_train.TopologyEvolver`.
        stats: compute :func:`chts_kernels.evolve.evolution_stats`; its greedy choice is that of the rule itself, so that no block counts
            as changed by noise.
    """
    groups: dict[tuple, list[Member]] = {}
    for member in members:
        layer = member[2]
        kind = layer.ids.device, layer.ids.shape, layer.n, layer.values.dtype
        groups.setdefault(kind, []).append(member)
    for group in groups.values():
        layer = group[0][2]
        count = max(1, MANY // (16 * layer.ids.numel()))
        for some in (group[start : start + count] for start in range(0, len(group), count)):
            ids = torch.stack([layer.ids for _, _, layer, _ in some])
            values = torch.stack([gathered(layer.values.detach(), layer.ids.device) for _, _, layer, _ in some])
            new_ids = choose_moves(
                values, ids, layer.n, _growth(some, gradients, regrowth), zeta=zeta,
                temperature=temperature if removal == "soft-moves" else math.inf, growth_noise=regrowth == "soft",
                seed=seed, layers=[number for number, *_ in some], step=step,
            )  # fmt: skip
            for (_, name, layer, tensors), old, new in zip(some, ids, new_ids, strict=True):
                _carry_over(name, layer, tensors, old, new)
                yield name, _evolution(layer, old, new, int(zeta * values[0].numel()), stats)


def _growth(some: Sequence[Member], gradients: DenseGradients | None, regrowth: str) -> torch.Tensor | None:
    """What missing places promise, [L, N, K]; None: chance decides."""
    if regrowth == "gradient":
        return torch.stack([gradients.take(name) for _, name, _, _ in some]).abs_()
    if regrowth == "random":
        return None
    return torch.stack([score(_bits(layer.ids, layer.n)) for _, _, layer, _ in some])


def _carry_over(
    name: str, layer: SparseLinear, tensors: list[torch.Tensor], old: torch.Tensor, new: torch.Tensor
) -> None:
    # A kernel's name names the products; moving links knows only one reference and one kernel.
    impl = "reference" if layer.impl == "reference" else "auto"
    if is_dtensor(layer.values):
        rows = [t.to_local() for t in (layer.values, *tensors)]
        carry_over_rows_([rows], [old], [new], layer.n, first_row(layer.values, f"{name}.values"), impl=impl)
    else:
        carry_over_([layer.values, *tensors], old, new, layer.n, impl=impl)
    layer.ids.copy_(new)


def _evolution(layer: SparseLinear, old: torch.Tensor, new: torch.Tensor, removed: int, stats: bool) -> Evolution:
    survivors = _bits(old, layer.n) & _bits(new, layer.n)
    figures = evolution_stats(old, new, survivors, score(survivors), new, layer.n) if stats else None
    return Evolution(old, survivors, removed, figures)


def _bits(ids: torch.Tensor, n: int) -> torch.Tensor:
    """int32: every block's links as a bit mask."""
    return pattern_table(n).tensor("mask16", ids.device)[ids.long()]
