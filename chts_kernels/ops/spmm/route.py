"""The short way of an eager product: :mod:`chts_kernels.ops._library`'s routes, for calls that bring a weight instead of operands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...patterns import BLOCK
from .._library import ROUTES_LIMIT, TENSORS, empty, unwatched

if TYPE_CHECKING:
    from ...format import SparseWeight
    from .sm90_launch import Plan

_ROUTES: dict[tuple[Any, ...], Route] = {}
_Tensor = torch.Tensor
_is_autocast_enabled = torch.is_autocast_enabled


class Route:
    """The launch of one kind of product and the output it writes to."""

    __slots__ = ("device", "dtype", "plan", "shape", "strides", "transposed")

    def __init__(self, plan: Plan, shape: tuple[int, ...], dtype: torch.dtype, device: int, transposed: bool) -> None:
        self.plan, self.shape, self.dtype, self.device, self.transposed = plan, shape, dtype, device, transposed
        strides, step = [], 1
        for size in reversed(shape):
            strides.append(step)
            step *= size
        self.strides = tuple(reversed(strides))

    def product(self, x: torch.Tensor, w: SparseWeight, bias: torch.Tensor | None, stamp: object | None = None) -> torch.Tensor:
        """``x W^T + bias``, or ``x W`` of a transposed route, of tensors that :func:`find` found it for; ``stamp``: as in
        :meth:`SparseWeight.operands`."""
        operands = w.operands(self.dtype, stamp)
        operand, meta = (operands.values_t, operands.meta_t) if self.transposed else (operands.values, operands.meta)
        operand_at = operand.data_ptr()
        if operand_at & 15:  # values that are their own operand and begin anywhere: a slice of a flat buffer
            operand = operand.clone()
            operand_at = operand.data_ptr()
        y = empty(self.shape, self.strides, self.dtype)
        self.plan.run(operand_at, x.data_ptr(), y.data_ptr(), meta.data_ptr(), 0 if bias is None else bias.data_ptr(),
                      torch._C._cuda_getCurrentRawStream(self.device))
        return y


def _key(x: torch.Tensor, w: SparseWeight, bias: torch.Tensor | None, impl: str, transposed: bool) -> tuple[Any, ...]:
    if bias is None:
        return x.shape, x.dtype, x.get_device(), w.ids.shape, impl, transposed
    return (x.shape, x.dtype, x.get_device(), w.ids.shape, impl, transposed,
            type(bias), bias.shape, bias.dtype, bias.get_device(), bias.is_contiguous())


def find(x: torch.Tensor, w: SparseWeight, bias: torch.Tensor | None, impl: str, transposed: bool) -> Route | None:
    """The route of an earlier call of this kind when nothing about this one forbids it; None sends it the long way.

    Args: any; only ``w`` must be a SparseWeight.
    """
    if not unwatched() or type(x) is not _Tensor or not (bias is None or isinstance(bias, _Tensor)):
        return None
    route = _ROUTES.get(_key(x, w, bias, impl, transposed))
    if route is None:
        return None
    values, device = w.values, route.device
    if (
        not x.is_contiguous() or x.data_ptr() & 15 or type(values) not in TENSORS or values.get_device() != device
        or torch._C._cuda_getDevice() != device
        or (_is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") != route.dtype)
    ):  # fmt: skip
        return None
    return route


def add(x: torch.Tensor, w: SparseWeight, bias: torch.Tensor | None, impl: str, transposed: bool) -> None:
    """Leave a route for calls like this one, which the Hopper kernel is going to run and whose arguments were checked.

    Only for calls that need no copy of anything: rows of x, of the operand and of the output that TMA can address.
    """
    from .sm90_wgmma_sp import plan

    rows, columns = (w.ids.shape[d] * BLOCK for d in ((1, 0) if transposed else (0, 1)))
    if columns % 16 or rows % 8 or x.numel() == 0:
        return
    if bias is not None and not (type(bias) in TENSORS and bias.dtype in (x.dtype, torch.float32) and bias.is_contiguous()):
        return
    tokens, device = x.numel() // columns, x.get_device()
    bias_dtype = None if bias is None else bias.dtype
    ready = plan(tokens, rows, columns, x.dtype, bias_dtype, device, (columns, 2 * columns, 2 * rows), None)
    if len(_ROUTES) >= ROUTES_LIMIT:
        _ROUTES.clear()
    _ROUTES[_key(x, w, bias, impl, transposed)] = Route(ready, (*x.shape[:-1], rows), x.dtype, device, transposed)
