"""Values and moments follow their links, in plain torch (ALGORITHM section 2, step 4)."""

from __future__ import annotations

import torch

from ..pack.reference import pack, unpack


def carry_over_(tensors: list[torch.Tensor], old_ids: torch.Tensor, new_ids: torch.Tensor, n: int) -> None:
    for tensor in tensors:
        tensor.copy_(pack(unpack(tensor, old_ids, n), new_ids, n))
