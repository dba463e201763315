"""AdamW on links in plain torch: the order of operations of torch.optim.AdamW, and the operands of the new values."""

from __future__ import annotations

import torch

from ... import rng
from ...patterns import pattern_table
from ..pack.reference import transpose_values, widen


def adamw_(
    values: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    steps: list[torch.Tensor],
    ids: list[torch.Tensor],
    n: int,
    operands: list[torch.Tensor],
    operands_t: list[torch.Tensor],
    layers: list[int],
    lr_tensor: torch.Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    seed: int | None,
) -> None:
    for i, p in enumerate(values):
        wide = torch.promote_types(p.dtype, torch.float32)
        step = steps[i].to(p.device, torch.float64)
        rate = lr if lr_tensor is None else lr_tensor.to(p.device, torch.float64)
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        g = grads[i].to(wide)
        if grad_scale is not None:
            g = g / grad_scale
            grads[i].copy_(g)
        g = -g if maximize else g
        x = p.to(wide)
        x = x * (1 - rate * weight_decay)
        m = torch.lerp(exp_avgs[i].to(wide), g, 1 - beta1)
        v = exp_avg_sqs[i].to(wide) * beta2 + g * g * (1 - beta2)
        x = x - (rate / correction1) * m / (v.sqrt() / correction2.sqrt() + eps)
        if seed is None:
            new = x, m, v
        else:
            bits = _rounding_bits(p, seed, layers[i], int(step))
            new = x, round_stochastically(m, bits & 0xFFFF), round_stochastically(v, bits >> 16)
        for old, now in zip((p, exp_avgs[i], exp_avg_sqs[i]), new, strict=True):
            old.copy_(now if found_inf is None else torch.where(found_inf != 0, old, now))
        if operands:
            low = p.to(operands[i].dtype)
            operands[i].copy_(low if n == 2 else widen(low, ids[i]))
        if operands_t:
            low_t = transpose_values(p.to(operands_t[i].dtype), ids[i], n)
            ids_t = pattern_table(n).tensor("transpose_id", ids[i].device)[ids[i].long()].t().contiguous()
            operands_t[i].copy_(low_t if n == 2 else widen(low_t, ids_t))


def _rounding_bits(p: torch.Tensor, seed: int, layer: int, step: int) -> torch.Tensor:
    """32 bits for every link: number ``index`` in memory order belongs to group index // 4, word index % 4."""
    count = -(-p.numel() // 4) * 4
    bits = rng.random_bits(1, count, seed=seed, layer=layer, step=step, purpose=rng.Purpose.ROUND, device=p.device)
    return bits[0, : p.numel()].view(p.shape)


def round_stochastically(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """float32 ``x`` to one of its two neighbours in bfloat16, unbiased for ``noise`` uniform on 0, ..., 65535."""
    bits = x.float().view(torch.int32)
    rounded = (bits + noise.to(torch.int32)) & -65536
    return torch.where(x.isfinite(), rounded.view(torch.float32), x).to(torch.bfloat16)
