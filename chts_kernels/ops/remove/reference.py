"""Link removal in plain torch (ALGORITHM section 2, step 1)."""

from __future__ import annotations

import torch

from ... import rng
from ...patterns import BLOCK
from ..pack.reference import pack, unpack
from ..prune.reference import blocks


def rank_keys(
    values: torch.Tensor, ids: torch.Tensor, n: int, mode: str, temperature: float, seed: int, layer: int, step: int
) -> torch.Tensor:
    """float32 [N, K*n/4]; the links with the smallest keys are removed."""
    magnitude = values.abs().float()
    if mode == "hard":
        return torch.nan_to_num(magnitude, nan=torch.inf, posinf=torch.inf)
    bits = rng.random_bits(
        values.shape[0], ids.shape[1] * BLOCK, seed=seed, layer=layer, step=step,
        purpose=rng.Purpose.REMOVE, device=values.device,
    )  # fmt: skip
    noise = rng.gumbel(pack(bits, ids, n))
    # One float32 product, one float32 sum: what a kernel without fused multiply-add computes.
    return rng.log_float32(magnitude) + noise * (1.0 / temperature)


def remove(
    values: torch.Tensor,
    ids: torch.Tensor,
    n: int,
    zeta: float,
    temperature: float,
    mode: str,
    seed: int,
    layer: int,
    step: int,
) -> torch.Tensor:
    keys = rank_keys(values, ids, n, mode, temperature, seed, layer, step).flatten()
    order = torch.sort(keys, stable=True).indices  # stable: equal keys go by index
    kept = torch.ones_like(keys, dtype=torch.bool)
    kept.index_fill_(0, order[: int(zeta * keys.numel())], False)
    links = blocks(unpack(kept.view(values.shape), ids, n)).flatten(2)
    return (links.int() << torch.arange(16, dtype=torch.int32, device=ids.device)).sum(-1, dtype=torch.int32)
