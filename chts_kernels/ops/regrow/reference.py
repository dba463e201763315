"""Regrowth in plain torch (ALGORITHM section 2, step 3)."""

from __future__ import annotations

import torch

from ... import rng
from ...patterns import BLOCK
from ..prune.reference import best_pattern


def regrow(
    scores: torch.Tensor | None, survivors: torch.Tensor, n: int, mode: str, seed: int, layer: int, step: int
) -> torch.Tensor:
    if mode != "greedy":
        bits = rng.random_bits(
            survivors.shape[0] * BLOCK, survivors.shape[1] * BLOCK, seed=seed, layer=layer, step=step,
            purpose=rng.Purpose.REGROW, device=survivors.device,
        )  # fmt: skip
        noise = rng.uniform(bits)
        scores = noise if mode == "random" else scores * noise
    return best_pattern(scores, n, required=survivors)
