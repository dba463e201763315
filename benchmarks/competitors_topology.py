"""Algorithm 1 of the paper in eager torch, as a user writes it today: the rival of the fused topology update.

Dense masks and weights [N, K] in float32, dense [N, N] and [K, K] intermediates, noise from torch's generator, and every
block scored against all 90 (24) patterns at once by a broadcast product. Matrix products run in float32, or in tf32 where
``torch.backends.cuda.matmul.allow_tf32`` is set. No host synchronisation is added and no step is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chts_kernels import pattern_table

GAMMA = 1e6
"""Survivor bonus: beyond any score, exact in float32 sums of a block to 2**-3."""
CHUNK_BYTES = 7 << 30
"""The broadcast over patterns takes 4 * 16 * patterns bytes a block; larger matrices go in chunks of block rows."""


def blocks(matrix: torch.Tensor) -> torch.Tensor:
    """[N, K] to [N/4 * K/4, 16]."""
    rows, columns = matrix.shape
    return matrix.view(rows // 4, 4, columns // 4, 4).transpose(1, 2).reshape(-1, 16)


def unblocks(flat: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The inverse of :func:`blocks`."""
    return flat.view(rows // 4, columns // 4, 4, 4).transpose(1, 2).reshape(rows, columns)


def remove(weight: torch.Tensor, mask: torch.Tensor, zeta: float, temperature: float, n: int) -> torch.Tensor:
    """float32 survivor mask [N, K]: the links with the int(zeta * links) smallest ``|w| (-ln U)**(-1/T)`` go."""
    rank = weight.abs() * (-torch.log(torch.rand_like(weight))).pow(-1.0 / temperature)
    rank = torch.where(mask.bool(), rank, torch.inf).flatten()
    k = int(zeta * (mask.numel() * n // 4))
    survivors = mask.clone().flatten()
    survivors[torch.topk(rank, k, largest=False, sorted=False).indices] = 0.0
    return survivors.view_as(mask)


def side(mask: torch.Tensor) -> torch.Tensor:
    """(P + B) / (E + 1) of the rows of a mask."""
    common = mask @ mask.t()
    linked = (common != 0).float()
    external = (mask.sum(1)[None, :] - common) * linked
    return (common + linked) / (external + 1)


def score(mask: torch.Tensor) -> torch.Tensor:
    """CH2-L3n scores [N, K] of a survivor mask."""
    return side(mask) @ mask + (side(mask.t()) @ mask.t()).t()


def regrow(scores: torch.Tensor, survivors: torch.Tensor, patterns: torch.Tensor, soft: bool = True) -> torch.Tensor:
    """Mask [N, K] of the patterns [P, 16] with the largest noisy score in every block."""
    rows, columns = scores.shape
    noisy = scores * torch.rand_like(scores) if soft else scores
    of_block = blocks(noisy + GAMMA * survivors)
    step = max(1, CHUNK_BYTES // (patterns.numel() * 4))
    best = [(part[:, None, :] * patterns).sum(-1).argmax(1) for part in of_block.split(step)]
    return unblocks(patterns[torch.cat(best)], rows, columns)


def score_and_select(survivors: torch.Tensor, patterns: torch.Tensor, soft: bool = True) -> torch.Tensor:
    """The part of an update that the paper's Algorithm 1 spells out."""
    return regrow(score(survivors), survivors, patterns, soft)


def update(
    weight: torch.Tensor,
    mask: torch.Tensor,
    moments: Sequence[torch.Tensor],
    patterns: torch.Tensor,
    *,
    zeta: float,
    temperature: float,
    n: int = 2,
) -> None:
    """A whole update of a dense weight, its mask and moments, in place."""
    survivors = remove(weight, mask, zeta, temperature, n)
    new = score_and_select(survivors, patterns)
    stays = mask * new  # links that stay, or went and came back, keep their numbers
    for tensor in (weight, *moments):
        tensor.mul_(stays)
    mask.copy_(new)


def pattern_matrix(n: int, device: torch.device | str) -> torch.Tensor:
    """float32 [P, 16]."""
    table = pattern_table(n)
    return torch.from_numpy(table.masks.reshape(len(table), 16)).float().to(device)
