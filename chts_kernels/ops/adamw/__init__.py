"""adamw_: one step of AdamW on the links of many layers, writing the sparse tensor cores' operands in the same pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ... import check
from ...patterns import BLOCK
from .._batch import too_large, why_not, why_not_mixed, why_not_where_they_are
from .._library import Op
from .._triton import interpreting, lazy
from . import reference

ADAMW_ = Op(
    "adamw_(Tensor(a!)[] values, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor[] steps, "
    "Tensor[] ids, int n, Tensor(e!)[] operands, Tensor(f!)[] operands_t, int[] layers, Tensor? lr_tensor, float lr, "
    "float beta1, float beta2, float eps, float weight_decay, bool maximize, Tensor? grad_scale, Tensor? found_inf, "
    "int? seed) -> ()",
    reference.adamw_,
    lambda *args: None,
)


def _why_not(values, grads, exp_avgs, exp_avg_sqs, steps, ids, n, operands, operands_t, layers, lr_tensor, lr, *rest) -> str | None:
    *_, grad_scale, found_inf, _ = rest
    if not values:
        return "there is nothing to do"
    written = {"values": values, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "operands": operands, "operands_t": operands_t}
    reason = why_not(values[0], *ids[:1], *steps[:1], lr_tensor, grad_scale, found_inf) or too_large(max(ids, key=torch.Tensor.numel))
    reason = reason or why_not_mixed(written) or why_not_where_they_are(written)
    if reason is None and exp_avgs[0].dtype != exp_avg_sqs[0].dtype:
        reason = f"it takes moments of one dtype, got {exp_avgs[0].dtype} and {exp_avg_sqs[0].dtype}"
    if reason is None and any(s.dtype != torch.float32 or s.device != values[0].device for s in steps):
        reason = "it takes float32 step counters on the device of the values"
    if reason is None and seed_without_bf16(rest[-1], exp_avgs[0].dtype):
        reason = f"it rounds stochastically to bfloat16 only, got moments of {exp_avgs[0].dtype}"
    if reason is None and interpreting() and torch.bfloat16 in {t.dtype for t in (*values, *operands, *operands_t)}:
        reason = "Triton's interpreter does not round to bfloat16 as the device does"
    return reason


def seed_without_bf16(seed: int | None, dtype: torch.dtype) -> bool:
    return seed is not None and dtype != torch.bfloat16


ADAMW_.kernel("triton", _why_not)(lazy(f"{__name__}.triton_adamw", "adamw_"))


def adamw_(
    values: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    ids: Sequence[torch.Tensor],
    n: int = 2,
    *,
    operands: Sequence[torch.Tensor] = (),
    operands_t: Sequence[torch.Tensor] = (),
    lr: float | torch.Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    seed: int | None = None,
    layers: Sequence[int] | None = None,
    impl: str = "auto",
) -> None:
    """AdamW on the links of several layers, in place; I. Loshchilov and F. Hutter, "Decoupled weight decay regularization",
    ICLR 2019, in the order of operations of ``torch.optim.AdamW``, computed in float32 (float64 for float64 values)::

        p -= lr * weight_decay * p
        m += (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g * g
        p -= lr / (1 - beta1**t) * m / (sqrt(v) / sqrt(1 - beta2**t) + eps)

    A kernel does all layers in one launch, moves 32 bytes per link with float32 masters and moments and both operands, and
    nothing waits for the device.

    Args:
        values, grads: [N, K*n/4] each, float32, bfloat16, float16 or float64, in the order of the ids.
        exp_avgs, exp_avg_sqs: the moments m and v in that shape, of any floating dtype.
        steps: t of every layer, of one element each, already counted: 1 in the first step.
        ids: uint8 [N/4, K/4] of every layer.
        n: links per row of a 4x4 block.
        operands, operands_t: one per layer or none at all: receive the new values as 2:4 rows of W [N, K/2] and of W^T
            [K, N/2] in their own dtype (:func:`chts_kernels.pack_operands_`; metadata depends on the ids alone).
        lr: a float, or a tensor of one element, read on the device.
        grad_scale: gradients are divided by it, in place, as in torch's fused optimizers.
        found_inf: nothing changes when it is not 0.
        seed: for moments of dtype bfloat16: round them stochastically, each of the two nearest numbers with the probability that
            makes the mean exact. Noise depends on (seed, layer, t, place) alone (:mod:`chts_kernels.rng`). None: to the nearest.
        layers: numbers of the layers in the noise; default 0, 1, ...

    Raises:
        ValueError, TypeError: when an argument does not fit; the message names it; then nothing was touched.
        RuntimeError: when the named implementation cannot run here; the message says why.
    """
    check.links_per_row(n)
    layers = list(range(len(values))) if layers is None else list(layers)
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps, "ids": ids, "layers": layers}
    optional = {"operands": operands, "operands_t": operands_t}
    for name, entries in (lists | {k: v for k, v in optional.items() if v}).items():
        check.require(len(entries) == len(values), name, f"have one entry per layer, {len(values)}", len(entries))
    rates = {"beta1": (beta1, 1.0), "beta2": (beta2, 1.0), "eps": (eps, math.inf), "weight_decay": (weight_decay, math.inf)}
    for name, (rate, high) in rates.items():
        check.require(0 <= rate < high, name, f"be in [0, {high})", rate)
    for i, p in enumerate(values):
        check.ids(ids[i], f"ids[{i}]")
        check.values_for_ids(p, ids[i], n)
        rows, columns = ids[i].shape[0] * BLOCK, ids[i].shape[1] * BLOCK
        shapes = dict.fromkeys(("grads", "exp_avgs", "exp_avg_sqs"), p.shape)
        shapes |= {"operands": (rows, columns // 2), "operands_t": (columns, rows // 2)}
        for name, shape in shapes.items():
            entries = (lists | optional)[name]
            if entries:
                check.floating(entries[i], f"{name}[{i}]")
                check.require(entries[i].shape == shape, f"{name}[{i}]", f"have shape {tuple(shape)}", tuple(entries[i].shape))
                check.same_device(**{"values": p, f"{name}[{i}]": entries[i]})
        check.require(steps[i].numel() == 1, f"steps[{i}]", "have one element", tuple(steps[i].shape))
    if seed is not None:
        check.unsigned(seed, "seed", 63)
        for layer in layers:
            check.unsigned(layer, "layers", 32)
    tensor = lr if isinstance(lr, torch.Tensor) else None
    ADAMW_(
        list(values), list(grads), list(exp_avgs), list(exp_avg_sqs), list(steps), list(ids), n, list(operands), list(operands_t), layers,
        tensor, 0.0 if tensor is not None else float(lr), beta1, beta2, eps, weight_decay, maximize, grad_scale, found_inf, seed, impl=impl,
    )  # fmt: skip
