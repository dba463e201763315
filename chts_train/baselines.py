"""Baselines that keep dense weights: transposable STE and SR-STE (ALGORITHM section 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from chts_kernels import Operands, SparseWeight, spmm, unpack
from chts_kernels.freshness import Freshness
from chts_kernels.ops.masked import MASK_OPERANDS_, MASKED_OUT_DECAY_
from chts_kernels.ops.prune import prune_pack
from chts_kernels.ops.spmm import compute_dtype
from chts_kernels.resident import FollowedParameter, ResidentOperands


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

    The attribute ``impl`` chooses the implementation of the products as :func:`chts_kernels.spmm` has it; "auto" at first. Masks of a
    whole model can be found in one go after every optimizer step (:func:`chts_train.make_masks_resident_`).
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
        if self._is_recorded():
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

    def _is_recorded(self) -> bool:
        """Whether what runs now runs again later without Python."""
        return torch.compiler.is_compiling() or (self.weight.is_cuda and torch.cuda.is_current_stream_capturing())

    @property
    def resident_mask(self) -> torch.dtype | None:
        """The dtype that this layer's resident mask is for (:func:`chts_train.make_masks_resident_`), or None."""
        return None if self._resident is None else self._resident.dtype

    @resident_mask.setter
    def resident_mask(self, dtype: torch.dtype | None) -> None:
        self._resident, self._resident_of, self._resident_peers = None, None, []
        if dtype is not None:
            with torch.inference_mode(False), torch.no_grad():
                ids, values, *_ = prune_pack(self.weight.detach(), self.n)
                values = values.to(dtype)
                for tensor in (ids, values):  # the operands are so, too
                    torch._dynamo.mark_static_address(tensor)
                self._resident = SparseWeight.view(ids, values, self.n, ResidentOperands(values, ids, self.n, dtype))
                self._resident_of, self._resident_peers = FollowedParameter(self.weight), [self]
                self._resident_of.mark((self.weight,))

    def _masked_in(self, dtype: torch.dtype | None) -> SparseWeight:
        """Today's masked weight for products in ``dtype``; None: for its ids alone."""
        if self._resident is None or dtype not in (None, self._resident.dtype):
            return self.sparse_weight
        if not self._is_recorded() and not self._resident_holds():
            refresh_resident([layer for layer in self._resident_peers if not layer._resident_holds()])
        return self._resident

    def _resident_holds(self) -> bool:
        return self._resident is None or self._resident_of.holds((self.weight,))

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
        y = spmm(x, self._masked_in(x.dtype), self.bias, impl=self.impl)
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return _StraightThrough.apply(y, x, self.weight)
        return y

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear`` with zeros where the mask is zero."""
        with torch.no_grad():
            return dense_linear(self, self.weight * self.mask(), self.weight.requires_grad)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, n={self.n}, srste_lambda={self.srste_lambda:g}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> STELinear:
        before = self.weight.device, self.weight.dtype
        super()._apply(fn, recurse)
        if self._resident is not None:
            if (self.weight.device, self.weight.dtype) == before:
                refresh_resident([self])
            else:
                self.resident_mask = None if self.weight.is_meta else self.resident_mask
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self._resident is not None:
            refresh_resident([self])

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _DERIVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"impl": "auto", **state})
        self._forget()

    def _forget(self) -> None:
        self._masked: SparseWeight | None = None
        self._mask: torch.Tensor | None = None
        self._operands, self._freshness = Operands(), Freshness()
        self._resident: SparseWeight | None = None
        self._resident_of: FollowedParameter | None = None
        self._resident_peers: list[STELinear] = []  # with it: who finds one mask out of date finds the others so, too


_DERIVED = ("_masked", "_mask", "_operands", "_freshness", "_resident", "_resident_of", "_resident_peers")


def refresh_resident(layers: Iterable[STELinear]) -> None:
    """Find the resident masks of these layers anew, in place and together; layers without one are passed over."""
    kinds: dict[tuple[Any, ...], list[STELinear]] = {}
    for layer in layers:
        if layer._resident is not None:
            kind = layer.n, layer.weight.device, layer.weight.dtype, layer._resident.dtype, layer.impl == "reference"
            kinds.setdefault(kind, []).append(layer)
    with torch.inference_mode(False), torch.no_grad():
        for (n, *_, plain), some in kinds.items():
            masked = [layer._resident for layer in some]
            operands = [weight._operands for weight in masked]
            MASK_OPERANDS_(
                [layer.weight.detach() for layer in some], n, [w.ids for w in masked], [w.values for w in masked],
                [o.values for o in operands] if n == 1 else [], [o.meta for o in operands], [o.values_t for o in operands],
                [o.meta_t for o in operands], impl="reference" if plain else "auto",
            )  # fmt: skip
            for layer in some:
                layer._resident._operands.mark(layer._resident.values, layer._resident.ids)
                layer._resident_of.mark((layer.weight,))


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
        kinds: dict[tuple[Any, ...], list[STELinear]] = {}
        for layer in layers:
            if layer.weight.grad is not None:
                kind = layer.n, layer.srste_lambda, layer.weight.device, layer.weight.dtype, layer.weight.grad.dtype
                kinds.setdefault(kind, []).append(layer)
        for (n, decay, *_), same in kinds.items():  # one launch
            weights = [layer.weight for layer in same]
            MASKED_OUT_DECAY_([w.grad for w in weights], weights, [layer._masked_in(None).ids for layer in same], n, decay)

    return optimizer.register_step_pre_hook(add_decay)
