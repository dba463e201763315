"""choose_moves: an update rule that spends its budget on links that really change, one legal pattern move per block.

The rule of the paper (:func:`chts_kernels.evolve`) removes links one by one, and about 85 % of them return at once, because a
block that lost one link has one legal pattern left. Here the unit of change is the *move*: a block goes from its pattern p to
another legal pattern q. With a saliency s >= 0 for every place of the matrix,

    gain(q) = sum of s over the links of q - sum of s over the links of p,    d(q) = number of links of q that p has not,

every block proposes the q with the largest gain per replaced link, gain(q) / d(q) (the lowest id wins a tie), and proposals
are accepted in the order of that number (ties by place) while the sum of d stays within k = int(zeta * links).

Saliency of a link: |w| / mean |w|, times Frechet noise exp(G / T) where a temperature is given. Saliency of a missing place:
growth / mean growth over the missing places, times ``growth_weight``. With |dL/dw| as growth this is RigL's criterion (Evci,
Gale, Menick, Castro, Elsen, "Rigging the lottery", ICML 2020: drop by magnitude, grow by gradient) under the constraint that
every block stays legal.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch

from . import check, rng
from .lasting import to_device
from .ops._batch import check_noise
from .ops.pack.reference import link_columns
from .ops.remove import check_numbers
from .patterns import BLOCK, pattern_table

CHUNK = 1 << 16
"""Blocks whose patterns are compared at once: 90 float32 each, in a few temporaries."""


@torch.no_grad()
def choose_moves(
    values: torch.Tensor,
    ids: torch.Tensor,
    n: int = 2,
    growth: torch.Tensor | None = None,
    *,
    zeta: float = 0.1,
    temperature: float = math.inf,
    growth_weight: float = 1.0,
    growth_noise: bool = False,
    seed: int = 0,
    layers: Sequence[int] = (0,),
    step: int = 0,
) -> torch.Tensor:
    """New pattern ids of L matrices of one shape; nothing is changed, and nothing waits for the device.

    A function of its arguments alone. Each matrix has its own budget and its own noise: the result does not depend on which
    matrices share a call.

    Args:
        values: [L, N, K*n/4], floating point.
        ids: uint8 [L, N/4, K/4].
        n: links per row of a block, 2 or 1.
        growth: [L, N, K], non-negative: how much a missing place promises (places with links are not read). None: uniform noise.
        zeta: fraction of the links of each matrix to replace, in [0, 1]. The number replaced is at most k = int(zeta * links) and at
            least k - (4 n - 1), unless all blocks together propose less.
        temperature: T of the noise on the links' magnitudes; infinite: none.
        growth_weight: how much the mean missing place counts against the mean link.
        growth_noise: multiply ``growth`` by Uniform(0, 1) noise.
        seed, layers, step: what noise is drawn for (:mod:`chts_kernels.rng`); a number for each matrix.

    Returns:
        uint8 [L, N/4, K/4].

    Raises:
        ValueError, TypeError: when an argument does not fit; the message names it.

    NaN counts as an infinite saliency: a diverged weight stays visible. float32 throughout; cost: 90 (24) sums of 4 numbers per block
    and a sort of the blocks.
    """
    check.links_per_row(n)
    check.tensor(ids, "ids")
    check.require(ids.dtype == torch.uint8, "ids", "have dtype uint8", ids.dtype, TypeError)
    check.require(ids.dim() == 3, "ids", "have 3 dimensions [L, N/4, K/4]", tuple(ids.shape))
    matrices, block_rows, block_columns = ids.shape
    rows, columns = block_rows * BLOCK, block_columns * BLOCK
    _check_shape(values, "values", (matrices, rows, columns * n // BLOCK), ids)
    if growth is not None:
        _check_shape(growth, "growth", (matrices, rows, columns), ids)
    check_numbers(zeta, temperature)
    check.require(growth_weight >= 0, "growth_weight", "not be negative", growth_weight)
    check.require(len(layers) == matrices, "layers", f"have {matrices} entries, one for each matrix", len(layers))
    check_noise(seed, layers, step)
    if not ids.numel():
        return ids.clone()
    noise = functools.partial(_bits, rows, columns, seed=seed, layers=tuple(layers), step=step, device=ids.device)

    # [L, N, K/4, n]: where in a row's group of four its links are
    at = link_columns(ids.reshape(-1, block_columns), n).view(matrices, rows, block_columns, n)
    kept = _relative(values.abs().float().view(matrices, rows, block_columns, n), None)
    if math.isfinite(temperature):
        bits = noise(rng.Purpose.REMOVE).view(matrices, rows, block_columns, BLOCK).gather(3, at)
        kept = (kept * torch.exp(rng.gumbel(bits) * (1.0 / temperature)).clamp_(max=LARGEST)).clamp_(max=LARGEST)
    fresh = rng.uniform(noise(rng.Purpose.REGROW)) if growth is None or growth_noise else None
    promise = fresh if growth is None else growth.float() if fresh is None else growth.float() * fresh
    promise = promise.view(matrices, rows, block_columns, BLOCK)
    missing = torch.ones_like(promise).scatter_(3, at, 0.0)
    saliency = _relative(promise, missing).mul_(growth_weight).scatter_(3, at, kept)

    # [L * blocks, 4 rows, 4 columns]
    saliency = saliency.view(matrices, block_rows, BLOCK, block_columns, BLOCK).transpose(2, 3).reshape(-1, BLOCK, BLOCK)
    parts = [_best_move(*part, n) for part in zip(saliency.split(CHUNK), ids.flatten().split(CHUNK), strict=True)]
    gain, proposed, replaced = (torch.cat(column).view(matrices, -1) for column in zip(*parts, strict=True))

    order = torch.sort(gain, dim=1, descending=True, stable=True).indices
    spent = replaced.gather(1, order).cumsum(1, dtype=torch.int64)
    accepted = torch.zeros_like(spent, dtype=torch.bool).scatter_(1, order, spent <= int(zeta * values[0].numel()))
    return torch.where(accepted, proposed, ids.view(matrices, -1)).view_as(ids)


def _best_move(saliency: torch.Tensor, ids: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of blocks [B, 4, 4] with patterns ids [B]: the largest gain per replaced link, its pattern, the links it replaces.

    Sums are taken in one order, so that every device has the same bits.
    """
    choices = list(itertools.combinations(range(BLOCK), n))
    # [B, 4, choices], then every pair of choices of the upper and of the lower two rows
    by_choice = torch.stack([functools.reduce(torch.add, [saliency[..., c] for c in choice]) for choice in choices], dim=-1)
    upper, lower = ((by_choice[:, r, :, None] + by_choice[:, r + 1, None, :]).flatten(1) for r in (0, 2))
    which, distance = _tables(n, ids.device)
    index = ids.long()[:, None]
    total = upper.index_select(1, which[0]).add_(lower.index_select(1, which[1]))  # [B, P]
    replaced = distance.index_select(0, index[:, 0])  # [B, P]
    density = total.sub_(total.gather(1, index)).div_(replaced).scatter_(1, index, -torch.inf)  # 0 / 0 at the present pattern
    gain, proposed = density.max(dim=1, keepdim=True)
    return gain[:, 0], proposed[:, 0].to(torch.uint8), replaced.gather(1, proposed)[:, 0]


@functools.cache
def _tables(n: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [2, P]: which pair of choices of columns the upper and the lower two rows of a pattern make; uint8 [P, P]: how many
    links of the second pattern the first lacks."""
    import numpy as np

    table = pattern_table(n)
    choices = {choice: place for place, choice in enumerate(itertools.combinations(range(BLOCK), n))}
    row = np.array([[choices[tuple(columns)] for columns in pattern] for pattern in table.columns.tolist()])  # [P, 4]
    which = row[:, [0, 2]] * len(choices) + row[:, [1, 3]]
    flat = table.masks.reshape(len(table), -1)
    distance = (~flat[:, None] & flat[None]).sum(-1).astype(np.uint8)
    return to_device(np.ascontiguousarray(which.T), device), to_device(distance, device)


def _relative(x: torch.Tensor, where: torch.Tensor | None) -> torch.Tensor:
    """``x`` [L, ...] over its mean in each matrix (over the places ``where``); 0 where that mean is 0. NaN and inf become huge."""
    x = torch.nan_to_num(x, nan=LARGEST, posinf=LARGEST).clamp_(max=LARGEST)
    if where is None:
        mean = x.flatten(1).mean(1, dtype=torch.float64)  # the same after rounding, whatever the order of the sum
    else:
        mean = (x * where).flatten(1).sum(1, dtype=torch.float64) / where.flatten(1).sum(1, dtype=torch.float64)
    mean = mean.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    return torch.where(mean > 0, x / mean, 0.0)


LARGEST = 2.0**60
"""Numbers are clamped to this before they are divided and summed."""


def _bits(
    rows: int, columns: int, purpose: rng.Purpose, *, seed: int, layers: tuple[int, ...], step: int, device: torch.device
) -> torch.Tensor:
    """:func:`rng.random_bits` of every layer: int64 [L, rows, columns]."""
    group = torch.arange(rows * columns // BLOCK, device=device)
    words = rng.philox((group, _numbers(layers, device), step, int(purpose)), (seed & 0xFFFFFFFF, seed >> 32))
    return torch.stack(words, dim=-1).view(len(layers), rows, columns)


@functools.cache
def _numbers(layers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    import numpy as np

    return to_device(np.array(layers, dtype=np.int64)[:, None], device)


def _check_shape(tensor: torch.Tensor, name: str, shape: tuple[int, ...], ids: torch.Tensor) -> None:
    check.tensor(tensor, name)
    check.require(tensor.is_floating_point(), name, "be floating point", tensor.dtype, TypeError)
    check.require(tuple(tensor.shape) == shape, name, f"have shape {shape}", tuple(tensor.shape))
    check.same_device(**{name: tensor, "ids": ids})
