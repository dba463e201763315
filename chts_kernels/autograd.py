"""The one autograd function: a linear layer with a sparse weight, differentiated through its three passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from .ops.spmm import INPUT_GRAD, SPMM, backward_input, forward, packed_in_graph
from .ops.weight_grad import WEIGHT_GRAD, WEIGHT_GRAD_MVUE, Mvue24

if TYPE_CHECKING:
    from .format import SparseWeight
    from .ops.spmm.route import Route


class SparseMatmul(torch.autograd.Function):
    """``y = x W^T + bias``. The input is saved once, in the compute dtype; nothing dense of the weight's size exists."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor | None,
        w: SparseWeight,
        impl: str,
        route: Route | None,
        noise: Mvue24 | None,
    ) -> torch.Tensor:
        if bias is not None:
            ctx.bias_dtype = bias.dtype
        # Saving values and ids costs nothing and has torch refuse a backward pass after they were changed in place.
        if route is not None:
            ctx.save_for_backward(x if values.requires_grad else None, values, w.ids)
            y = route.product(x, w, bias)
            ctx.call = w, impl, noise, w._operands.stamp
            return y
        rows, columns = w.shape
        tokens = x if x.dim() == 2 else x.reshape(-1, columns)
        packed = packed_in_graph(tokens, w, impl)
        # What a compiled graph packed serves both passes, and lives between them like an activation.
        # Eagerly x is saved as it came, as with a route: activation checkpointing compares the shapes of what a repeated pass saves.
        saved = tokens if packed else x
        ctx.save_for_backward(saved if ctx.needs_input_grad[1] else None, values, w.ids, *packed[2:])
        if packed:
            y = SPMM(tokens, values, w.ids, w.n, bias, *packed[:2], impl=impl)
        else:
            y = forward(tokens, w, bias, impl)
        ctx.call = w, impl, noise, None if torch.compiler.is_compiling() else w._operands.stamp
        return y if x.dim() == 2 else y.view(*x.shape[:-1], rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tokens, values, ids, *packed = ctx.saved_tensors
        w, impl, noise, stamp = ctx.call
        dx = dvalues = dbias = None
        rows, columns = w.shape
        for_x, for_values, for_bias, *_ = ctx.needs_input_grad
        if for_x and packed:
            dx = INPUT_GRAD(dy.reshape(-1, rows), values, ids, w.n, *packed, impl=impl).view(*dy.shape[:-1], columns)
        elif for_x:
            dx = backward_input(dy, w, impl, stamp)
        if dy.dim() != 2:
            dy = dy.reshape(-1, rows)
        if for_values:
            if tokens.dim() != 2:
                tokens = tokens.reshape(-1, columns)
            if noise is None:
                dvalues = WEIGHT_GRAD(dy, tokens, ids, w.n, values.dtype, impl=impl)
            else:
                dvalues = WEIGHT_GRAD_MVUE(
                    dy, tokens, ids, w.n, values.dtype, noise.seed, noise.layer, 0, noise.counter, impl=impl
                )
                if noise.counter is not None:
                    noise.counter.add_(1)
        if for_bias:
            wide = torch.promote_types(dy.dtype, torch.float32)
            dbias = dy.sum(dim=0, dtype=wide).to(ctx.bias_dtype)
        return dx, dvalues, dbias, None, None, None, None


# `Function.apply` without the look at functorch's transforms, which whoever has a route has excluded: 1.4 us of 3.9.
apply_eagerly = super(torch.autograd.Function, SparseMatmul).apply
