"""Baselines that keep dense weights: transposable STE and SR-STE (ALGORITHM section 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from chts_kernels import Operands, SparseWeight, spmm, unpack
from chts_kernels.freshness import Freshness
from chts_kernels.ops.prune import prune_pack
from chts_kernels.ops.spmm import compute_dtype


class _StraightThrough(torch.autograd.Function):
    """Forward: ``y``, which a masked weight made from ``x``. Backward: the gradient of that weight, dense, passed to all weights."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.dtype = weight.dtype
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        (x,) = ctx.saved_tensors
        grad = dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        return dy, None, grad.to(ctx.dtype)


class STELinear(nn.Linear):
    """A dense linear layer whose weight is masked to the best transposable N:M pattern in every forward pass.

    Best by the sum of ``|w|`` over each 4x4 block, exactly. The forward pass and the gradient with respect to the input run on sparse
    tensor cores where there are kernels for them (:func:`chts_kernels.spmm`); the gradient of the masked weight is dense and goes to all
    weights (straight-through). SR-STE's term is added to the gradients by :func:`attach_srste_decay`.

    Args:
        in_features, out_features: positive multiples of 4.
        bias, device, dtype: those of ``nn.Linear``.
        n: links per group of four, 2 or 1.
        srste_lambda: SR-STE's decay of masked-out weights; 0 is plain STE.

    The attribute ``impl`` chooses the implementation of the products as :func:`chts_kernels.spmm` has it; "auto" at first.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        n: int = 2,
        *,
        srste_lambda: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **factory)
        self._configure(n, srste_lambda)

    def _configure(self, n: int, srste_lambda: float) -> None:
        self.n, self.srste_lambda, self.impl = n, srste_lambda, "auto"
        self._forget()

    @classmethod
    def from_linear(cls, linear: nn.Linear, n: int = 2, *, srste_lambda: float = 0.0) -> STELinear:
        """The same layer, masked; shares no storage with ``linear``.

        Raises:
            ValueError: when a size is not divisible by 4 or ``n`` is neither 1 nor 2.
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.detach().clone(), linear.weight.requires_grad)
        self.bias = (
            None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), linear.bias.requires_grad)
        )
        self._configure(n, srste_lambda)
        self.mask()  # refuse illegal sizes here rather than in the first forward pass
        return self.train(linear.training)

    @property
    def sparse_weight(self) -> SparseWeight:
        """Today's masked weight, compressed; a copy that no gradient reaches.

        Kept until the weight changes, so that micro-batches of one optimizer step search once. A compiled graph or a CUDA graph searches
        in every pass: it cannot tell whether the weight has changed.
        """
        if torch.compiler.is_compiling() or (self.weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            return self._search()
        if self._masked is None or not self._freshness.holds((self.weight,), self.weight.dtype):
            with torch.inference_mode(False):  # a validation may be first to ask, and training next
                self._masked, self._mask = self._search(), None
            self._freshness.mark((self.weight,), self.weight.dtype)
        return self._masked

    @torch.no_grad()
    def _search(self) -> SparseWeight:
        ids, values, *_ = prune_pack(self.weight.detach(), self.n)
        return SparseWeight.view(ids, values, self.n, self._operands)

    @torch.no_grad()
    def mask(self) -> torch.Tensor:
        """[out_features, in_features] of zeros and ones in the weight's dtype: today's best pattern, kept as long as it is."""
        masked = self.sparse_weight
        if masked is self._masked and self._mask is not None:
            return self._mask
        with torch.inference_mode(False):
            mask = unpack(torch.ones_like(masked.values), masked.ids, self.n)
        if masked is self._masked:
            self._mask = mask
        return mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features], in the dtype of ``x`` or autocast's."""
        x = x.to(compute_dtype(x))
        y = spmm(x, self.sparse_weight, self.bias, impl=self.impl)
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return _StraightThrough.apply(y, x, self.weight)
        return y

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear`` with zeros where the mask is zero."""
        with torch.no_grad():
            return dense_linear(self, self.weight * self.mask(), self.weight.requires_grad)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, n={self.n}, srste_lambda={self.srste_lambda:g}"

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_masked", "_mask", "_operands", "_freshness")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"impl": "auto", **state})
        self._forget()

    def _forget(self) -> None:
        self._masked: SparseWeight | None = None
        self._mask: torch.Tensor | None = None
        self._operands, self._freshness = Operands(), Freshness()


def dense_linear(layer: nn.Module, weight: torch.Tensor, requires_grad: bool) -> nn.Linear:
    """An ``nn.Linear`` with this weight and the bias, sizes and mode of ``layer``."""
    linear = nn.utils.skip_init(nn.Linear, layer.in_features, layer.out_features, bias=layer.bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=requires_grad)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=layer.bias.requires_grad)
    return linear.train(layer.training)


def attach_srste_decay(model: nn.Module, optimizer: torch.optim.Optimizer) -> RemovableHandle:
    """Add ``lambda * (1 - mask) * w`` to the gradient of every SR-STE weight before each optimizer step.

    So the term passes through Adam, enters once per step whatever the number of micro-batches, and is not touched by loss
    scaling. (1 - mask): the masked-OUT weights; the paper's formula lost the bar. ALGORITHM section 5.

    Returns:
        A handle whose ``remove()`` detaches it.
    """
    layers = [m for m in model.modules() if isinstance(m, STELinear) and m.srste_lambda > 0]

    @torch.no_grad()
    def add_decay(*_: Any) -> None:
        by_decay: dict[float, list[STELinear]] = {}
        for layer in layers:
            if layer.weight.grad is not None:
                by_decay.setdefault(layer.srste_lambda, []).append(layer)
        for decay, same in by_decay.items():  # a launch or two for all layers
            weights = [layer.weight for layer in same]
            masked_out = torch._foreach_sub(weights, [layer.sparse_weight.to_dense() for layer in same])
            torch._foreach_add_([w.grad for w in weights], masked_out, alpha=decay)

    return optimizer.register_step_pre_hook(add_decay)
