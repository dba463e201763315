"""spmm and input_grad: the two products with a sparse weight, Y = X W^T and dX = dY W."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ... import check
from ...patterns import BLOCK
from .._library import Op
from . import reference

if TYPE_CHECKING:
    from ...format import SparseWeight

# operand and meta are what a kernel reads instead of values and ids (Operands); absent, a kernel packs them itself.
SPMM = Op(
    "spmm(Tensor x, Tensor values, Tensor ids, int n, Tensor? bias, Tensor? operand, Tensor? meta) -> Tensor",
    reference.spmm,
    lambda x, values, ids, n, bias, operand, meta: x.new_empty(x.shape[0], ids.shape[0] * BLOCK),
)
INPUT_GRAD = Op(
    "input_grad(Tensor dy, Tensor values, Tensor ids, int n, Tensor? operand_t, Tensor? meta_t) -> Tensor",
    reference.input_grad,
    lambda dy, values, ids, n, operand_t, meta_t: dy.new_empty(dy.shape[0], ids.shape[1] * BLOCK),
)


def forward(x: torch.Tensor, w: SparseWeight, bias: torch.Tensor | None, impl: str) -> torch.Tensor:
    """[T, K] to [T, N], not differentiable: what the autograd function runs."""
    operand, meta, _, _ = operands(SPMM, x, w, impl)
    return SPMM(x, w.values, w.ids, w.n, bias, operand, meta, impl=impl)


def backward_input(dy: torch.Tensor, w: SparseWeight, impl: str) -> torch.Tensor:
    """[T, N] to [T, K], not differentiable."""
    _, _, operand_t, meta_t = operands(INPUT_GRAD, dy, w, impl)
    return INPUT_GRAD(dy, w.values, w.ids, w.n, operand_t, meta_t, impl=impl)


def operands(op: Op, x: torch.Tensor, w: SparseWeight, impl: str) -> tuple[torch.Tensor | None, ...]:
    """The weight's operands in x's dtype when a kernel of ``op`` is going to read them."""
    if impl == "reference" or not x.is_cuda or not op.kernels:
        return None, None, None, None
    fresh = w.operands(x.dtype)
    return fresh.values, fresh.meta, fresh.values_t, fresh.meta_t


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """x's dtype, or autocast's where that is enabled for x's device."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def spmm(x: torch.Tensor, w: SparseWeight, bias: torch.Tensor | None = None, *, impl: str = "auto") -> torch.Tensor:
    """``y = x W^T + bias``, differentiable with respect to x, the values of w, and the bias.

    Computes in the dtype of ``x`` (of autocast, where enabled): values and bias are converted to it, products accumulate in
    float32 or wider, gradients come back in the dtypes of x, values and bias.

    inf and NaN in x: a sparse kernel lets them reach exactly the outputs whose links touch them; the reference multiplies a
    dense matrix and so spreads NaN through ``0 * inf`` along the whole row.

    Args:
        x: [..., K], floating point, any strides, any number of leading dimensions and tokens, 0 included.
        w: a SparseWeight of shape (N, K).
        bias: [N] or None.
        impl: "auto", "reference" or a kernel's name (:func:`chts_kernels.capability_report` lists them).

    Returns:
        [..., N].

    Raises:
        ValueError, TypeError: when an argument does not fit; the message names it.
        RuntimeError: when the named implementation cannot run here; the message says why.
    """
    from ...autograd import SparseMatmul
    from ...format import SparseWeight

    check.require(isinstance(w, SparseWeight), "w", "be a SparseWeight", type(w).__name__, TypeError)
    check.floating(x, "x")
    rows, columns = w.shape
    check.require(x.dim() >= 1 and x.shape[-1] == columns, "x", f"have {columns} = in_features columns", tuple(x.shape))
    if bias is not None:
        check.floating(bias, "bias")
        check.require(tuple(bias.shape) == (rows,), "bias", f"have shape ({rows},) = (out_features,)", tuple(bias.shape))
    check.same_device(x=x, values=w.values, bias=bias)
    return SparseMatmul.apply(x.to(compute_dtype(x)), w.values, bias, w, impl)


def input_grad(dy: torch.Tensor, w: SparseWeight, *, impl: str = "auto") -> torch.Tensor:
    """``dX = dY W``: gradient with respect to the input of :func:`spmm`. Not differentiable.

    Args:
        dy: [..., N], floating point.
        w: a SparseWeight of shape (N, K).

    Returns:
        [..., K] in the dtype of ``dy``.

    Raises:
        ValueError, TypeError: when an argument does not fit; the message names it.
    """
    check.floating(dy, "dy")
    rows, columns = w.shape
    check.require(dy.dim() >= 1 and dy.shape[-1] == rows, "dy", f"have {rows} = out_features columns", tuple(dy.shape))
    check.same_device(dy=dy, values=w.values)
    return backward_input(dy.reshape(-1, rows), w, impl).view(*dy.shape[:-1], columns)
