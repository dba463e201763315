"""Masked dense weights of many layers, in plain torch."""

from __future__ import annotations

import torch

from ..pack.reference import pack, pack_operands_, unpack
from ..prune.reference import prune


def mask_operands_(
    weights: list[torch.Tensor],
    n: int,
    ids: list[torch.Tensor],
    values: list[torch.Tensor],
    operands: list[torch.Tensor],
    metas: list[torch.Tensor],
    operands_t: list[torch.Tensor],
    metas_t: list[torch.Tensor],
) -> None:
    for i, weight in enumerate(weights):
        ids[i].copy_(prune(weight, n, "abs"))
        values[i].copy_(pack(weight, ids[i], n))
        pack_operands_(values[i], ids[i], n, operands[i] if operands else None, metas[i], operands_t[i], metas_t[i])


def masked_out_decay_(grads: list[torch.Tensor], weights: list[torch.Tensor], ids: list[torch.Tensor], n: int, decay: float) -> None:
    for grad, weight, of_layer in zip(grads, weights, ids, strict=True):
        links = unpack(weight.new_ones(weight.shape[0], weight.shape[1] // 4 * n), of_layer, n).bool()
        wide = torch.promote_types(torch.promote_types(grad.dtype, weight.dtype), torch.float32)
        grad.copy_(torch.where(links, grad, (grad.to(wide) + decay * weight.to(wide)).to(grad.dtype)))
