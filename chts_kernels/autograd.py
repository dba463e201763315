"""The one autograd function: a linear layer with a sparse weight, differentiated through its three passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from .ops.spmm import backward_input, forward
from .ops.weight_grad import WEIGHT_GRAD

if TYPE_CHECKING:
    from .format import SparseWeight


class SparseMatmul(torch.autograd.Function):
    """``y = x W^T + bias``. The input is saved once, in the compute dtype; nothing dense of the weight's size exists."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, w: SparseWeight, impl: str
    ) -> torch.Tensor:
        rows, columns = w.shape
        tokens = x if x.dim() == 2 else x.reshape(-1, columns)
        y = forward(tokens, w, bias, impl)
        # Saving values and ids costs nothing and has torch refuse a backward pass after they were changed in place.
        ctx.save_for_backward(tokens if ctx.needs_input_grad[1] else None, values, w.ids)
        ctx.w, ctx.impl, ctx.leading = w, impl, x.shape[:-1]
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y if x.dim() == 2 else y.view(*x.shape[:-1], rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tokens, values, ids = ctx.saved_tensors
        w, impl = ctx.w, ctx.impl
        rows, columns = w.shape
        dy = dy.reshape(-1, rows)
        dx = dvalues = dbias = None
        if ctx.needs_input_grad[0]:
            dx = backward_input(dy, w, impl).view(*ctx.leading, columns)
        if ctx.needs_input_grad[1]:
            dvalues = WEIGHT_GRAD(dy, tokens, ids, w.n, values.dtype, impl=impl)
        if ctx.needs_input_grad[2]:
            wide = torch.promote_types(dy.dtype, torch.float32)
            dbias = dy.sum(dim=0, dtype=wide).to(ctx.bias_dtype)
        return dx, dvalues, dbias, None, None
