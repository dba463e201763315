"""CH2-L3n scores in plain torch (ALGORITHM section 2, step 2)."""

from __future__ import annotations

import torch

from ...patterns import BLOCK


def link_mask(links: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bit masks int32 [N/4, K/4] to a 0/1 matrix [N, K]."""
    bits = links[:, None, :, None] >> torch.arange(16, device=links.device).view(BLOCK, 1, BLOCK)
    return (bits & 1).reshape(links.shape[0] * BLOCK, links.shape[1] * BLOCK).to(dtype)


def side_weights(mask: torch.Tensor) -> torch.Tensor:
    """W_row [N, N] of the mask [N, K]; of the transposed mask it is W_col."""
    common = mask @ mask.t()  # P: the number of common neighbours
    linked = (common != 0).to(mask.dtype)  # B
    degree = mask.sum(dim=1)
    # The degree of the INTERMEDIATE node z, so along the last axis.
    external = (degree[None, :] - common) * linked  # E
    return (common + linked) / (external + 1)


def score(survivors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    mask = link_mask(survivors, torch.float64)  # counts and their products are exact; TF32 settings cannot touch it
    return (side_weights(mask) @ mask + (side_weights(mask.t()) @ mask.t()).t()).to(dtype)
