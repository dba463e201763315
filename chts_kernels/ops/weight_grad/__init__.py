"""weight_grad: dW = dY^T X at the links only, in the shape of the values."""

from __future__ import annotations

import torch

from ... import check, target
from ...patterns import BLOCK
from .._library import Op
from . import reference

WEIGHT_GRAD = Op(
    "weight_grad(Tensor dy, Tensor x, Tensor ids, int n, ScalarType out_dtype) -> Tensor",
    reference.weight_grad,
    lambda dy, x, ids, n, out_dtype: dy.new_empty(ids.shape[0] * BLOCK, ids.shape[1] * n, dtype=out_dtype),
    selects_by=lambda dy, x, ids, n, out_dtype: (dy.get_device(), dy.dtype, out_dtype),
)


def _why_not_wgmma(dy: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, n: int, out_dtype: torch.dtype) -> str | None:
    reason = target.why_not_kernel("wgmma_sp", dy.device)
    if reason is None and dy.dtype not in (torch.bfloat16, torch.float16):
        reason = f"it computes in bfloat16 or float16, got {dy.dtype} (cast dy and x, or use autocast)"
    if reason is None and out_dtype not in (torch.float32, dy.dtype):
        reason = f"it writes float32 or the dtype of dy, got {out_dtype}"
    return reason


# One name for the Hopper kernels of all three passes, although this one multiplies densely.
@WEIGHT_GRAD.kernel("wgmma_sp", _why_not_wgmma)
def _weight_grad_wgmma(
    dy: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, n: int, out_dtype: torch.dtype
) -> torch.Tensor:
    from .sm90_wgmma import weight_grad_sm90

    return weight_grad_sm90(dy, x, ids, n, out_dtype=out_dtype)


def weight_grad(
    dy: torch.Tensor,
    x: torch.Tensor,
    ids: torch.Tensor,
    n: int = 2,
    *,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Gradient of a loss with respect to the values: ``(dY^T X)`` gathered at the links.

    Args:
        dy: output gradient, [..., N].
        x: input, [..., K], dtype and leading dimensions of ``dy``. No tokens give zeros.
        ids: pattern ids, uint8 [N/4, K/4].
        n: links per row of a 4x4 block.
        out_dtype: dtype of the result; default that of ``dy``. Sums are in float32 or wider.

    Returns:
        [N, K*n/4].

    Raises:
        ValueError, TypeError: when an argument does not fit; the message names it.
    """
    check.links_per_row(n)
    check.ids(ids)
    check.floating(dy, "dy")
    check.floating(x, "x", (dy.dtype,))
    sizes = ids.shape[0] * BLOCK, ids.shape[1] * BLOCK
    check.require(dy.dim() >= 1 and dy.shape[-1] == sizes[0], "dy", f"have {sizes[0]} = 4 * ids.shape[0] columns", tuple(dy.shape))
    expected = (*dy.shape[:-1], sizes[1])
    check.require(tuple(x.shape) == expected, "x", f"have shape {expected} to match dy and ids", tuple(x.shape))
    check.same_device(dy=dy, x=x, ids=ids)
    if out_dtype is not None:
        check.choice(out_dtype, "out_dtype", check.FLOATS)
    return WEIGHT_GRAD(dy.reshape(-1, sizes[0]), x.reshape(-1, sizes[1]), ids, n, out_dtype or dy.dtype, impl=impl)
