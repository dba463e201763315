"""Dense weights that are masked to their best patterns: what the sparse tensor cores read of many layers, and SR-STE's decay."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ... import check
from ...layout import metadata_shape
from ...patterns import BLOCK
from .._batch import too_large, why_not, why_not_mixed, why_not_where_they_are
from .._library import Op
from .._triton import interpreting, lazy
from . import reference

MASK_OPERANDS_ = Op(
    "mask_operands_(Tensor[] weights, int n, Tensor(a!)[] ids, Tensor(b!)[] values, Tensor(c!)[] operands, Tensor(d!)[] metas, "
    "Tensor(e!)[] operands_t, Tensor(f!)[] metas_t) -> ()",
    reference.mask_operands_,
    lambda *args: None,
)
MASKED_OUT_DECAY_ = Op(
    "masked_out_decay_(Tensor(a!)[] grads, Tensor[] weights, Tensor[] ids, int n, float decay) -> ()",
    reference.masked_out_decay_,
    lambda *args: None,
)


NO_BF16 = "Triton's interpreter does not round to bfloat16 as the device does"


def _why_not_operands(weights, n, ids, values, operands, metas, operands_t, metas_t) -> str | None:
    if not ids:
        return "there is nothing to do"
    if interpreting() and torch.bfloat16 == values[0].dtype != weights[0].dtype:
        return NO_BF16
    written = {"ids": ids, "values": values, "operands": operands, "metas": metas, "operands_t": operands_t, "metas_t": metas_t}
    return _why_not(ids) or why_not_mixed({"weights": weights, "values": values}) or why_not_where_they_are(written)


def _why_not_decay(grads, weights, ids, n, decay) -> str | None:
    if not ids:
        return "there is nothing to do"
    if interpreting() and grads[0].dtype == torch.bfloat16:
        return NO_BF16
    return _why_not(ids) or why_not_mixed({"grads": grads, "weights": weights}) or why_not_where_they_are({"ids": ids})


def _why_not(ids: Sequence[torch.Tensor]) -> str | None:
    return why_not(ids[0]) or too_large(max(ids, key=torch.Tensor.numel))


MASK_OPERANDS_.kernel("triton", _why_not_operands)(lazy(f"{__name__}.triton_masked", "mask_operands_"))
MASKED_OUT_DECAY_.kernel("triton", _why_not_decay)(lazy(f"{__name__}.triton_masked", "masked_out_decay_"))


def mask_operands_(
    weights: Sequence[torch.Tensor],
    n: int,
    ids: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    operands: Sequence[torch.Tensor],
    metas: Sequence[torch.Tensor],
    operands_t: Sequence[torch.Tensor],
    metas_t: Sequence[torch.Tensor],
    *,
    impl: str = "auto",
) -> None:
    """Of many dense weights, the best patterns and the operands of the weights masked to them, in place.

    Two launches, and one for every further kind of size: sizes are multiples of 16 or not, each way. Patterns are those of
    :func:`chts_kernels.prune` (score "abs"), operands those of :func:`chts_kernels.pack_operands_`.

    Args:
        weights: [N, K] each, float32, bfloat16, float16 or float64.
        n: links per row of a 4x4 block.
        ids: uint8 [N/4, K/4], written.
        values: [N, K*n/4] in the compute dtype, bfloat16 or float16; written. For n = 2 they are the operand of W, too.
        operands: for n = 1 the operands [N, K/2] of :func:`chts_kernels.ops.pack.empty_operands` in the compute dtype; for n = 2 none.
        metas, operands_t, metas_t: the rest of those operands.

    Raises:
        ValueError, TypeError: when an argument does not fit; the message names it; then nothing was written.
        RuntimeError: when the named implementation cannot run here; the message says why.
    """
    check.links_per_row(n)
    lists = {"ids": ids, "values": values, "metas": metas, "operands_t": operands_t, "metas_t": metas_t}
    lists |= {"operands": operands} if n == 1 or operands else {}
    check.require(n == 1 or not operands, "operands", "be empty for n = 2, whose values are the operands", len(operands))
    for name, entries in lists.items():
        check.require(len(entries) == len(weights), name, f"have one entry per layer, {len(weights)}", len(entries))
    for i, weight in enumerate(weights):
        check.dense(weight, f"weights[{i}]")
        rows, columns = weight.shape
        shapes = {
            "ids": (rows // BLOCK, columns // BLOCK), "values": (rows, columns // BLOCK * n), "operands": (rows, columns // 2),
            "metas": metadata_shape(rows, columns), "operands_t": (columns, rows // 2), "metas_t": metadata_shape(columns, rows),
        }  # fmt: skip
        kinds = {"ids": (torch.uint8,), "metas": (torch.int32,), "metas_t": (torch.int32,)}
        for name, entries in lists.items():
            found = entries[i]
            if name in ("operands", "operands_t"):
                kinds[name] = (values[i].dtype,)
            check.floating(found, f"{name}[{i}]", kinds.get(name, (torch.bfloat16, torch.float16)))
            check.require(tuple(found.shape) == shapes[name], f"{name}[{i}]", f"have shape {shapes[name]}", tuple(found.shape))
            check.same_device(**{f"weights[{i}]": weight, f"{name}[{i}]": found})
    if weights:
        MASK_OPERANDS_(
            list(weights), n, list(ids), list(values), list(operands), list(metas), list(operands_t), list(metas_t), impl=impl
        )  # fmt: skip


def masked_out_decay_(
    grads: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], ids: Sequence[torch.Tensor], n: int, decay: float, *, impl: str = "auto"
) -> None:
    """``grad += decay * (1 - mask) * weight`` for many layers, in place, in one launch: SR-STE's term; A. Zhou et al., "Learning N:M
    fine-grained structured sparse neural networks from scratch", ICLR 2021; ALGORITHM section 5. Gradients of links stay bit for bit.

    Args:
        grads, weights: [N, K] each; float32, bfloat16, float16 or float64; summed in float32 (float64 where there is any).
        ids: uint8 [N/4, K/4]: the masks.
        n: links per row of a 4x4 block.
        decay: not negative.

    Raises:
        ValueError, TypeError: when an argument does not fit; the message names it; then nothing was written.
        RuntimeError: when the named implementation cannot run here; the message says why.
    """
    check.links_per_row(n)
    check.require(0 <= decay < math.inf, "decay", "be in [0, inf)", decay)
    for name, entries in (("weights", weights), ("ids", ids)):
        check.require(len(entries) == len(grads), name, f"have one entry per layer, {len(grads)}", len(entries))
    for i, grad in enumerate(grads):
        check.dense(weights[i], f"weights[{i}]")
        check.dense(grad, f"grads[{i}]")
        check.ids(ids[i], f"ids[{i}]")
        shape = tuple(weights[i].shape)
        check.require(tuple(grad.shape) == shape, f"grads[{i}]", f"have shape {shape}", tuple(grad.shape))
        expected = shape[0] // BLOCK, shape[1] // BLOCK
        check.require(tuple(ids[i].shape) == expected, f"ids[{i}]", f"have shape {expected}", tuple(ids[i].shape))
        check.same_device(**{f"weights[{i}]": weights[i], f"grads[{i}]": grad, f"ids[{i}]": ids[i]})
    if grads:
        MASKED_OUT_DECAY_(list(grads), list(weights), list(ids), n, float(decay), impl=impl)
