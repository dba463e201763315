"""spmm and input_grad: the two products with a sparse weight, Y = X W^T and dX = dY W."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.autograd import forward_ad

from ... import check, target
from ...patterns import BLOCK
from .._library import Op
from ..pack import PACK_OPERANDS_, empty_operands
from ..weight_grad.estimator import Mvue24, estimator
from . import reference, route

if TYPE_CHECKING:
    from ...format import SparseWeight

# operand and meta are what a kernel reads instead of values and ids (Operands); absent, a kernel packs them itself.
SPMM = Op(
    "spmm(Tensor x, Tensor values, Tensor ids, int n, Tensor? bias, Tensor? operand, Tensor? meta) -> Tensor",
    reference.spmm,
    lambda x, values, ids, n, bias, operand, meta: x.new_empty(x.shape[0], ids.shape[0] * BLOCK),
    selects_by=lambda x, *_: (x.get_device(), x.dtype),
    any_rows=True,
)
INPUT_GRAD = Op(
    "input_grad(Tensor dy, Tensor values, Tensor ids, int n, Tensor? operand_t, Tensor? meta_t) -> Tensor",
    reference.input_grad,
    lambda dy, values, ids, n, operand_t, meta_t: dy.new_empty(dy.shape[0], ids.shape[1] * BLOCK),
    selects_by=lambda dy, *_: (dy.get_device(), dy.dtype),
    any_rows=True,
)


TENSOR_CORE_DTYPES = (torch.bfloat16, torch.float16)


def _why_not(family: str, x: torch.Tensor, *_: object) -> str | None:
    reason = target.why_not_kernel(family, x.device)
    if reason is None and x.dtype not in TENSOR_CORE_DTYPES:
        reason = f"it computes in bfloat16 or float16, got {x.dtype} (cast x, or use autocast)"
    return reason


@functools.cache
def _product(family: str) -> Callable[..., torch.Tensor]:
    """``X W^T`` from operands by a family's kernels, imported when first needed."""
    if family == "wgmma_sp":
        from .sm90_wgmma_sp import spmm_sm90 as product
    else:
        from .mma_sp import spmm_mma as product
    return product


def _register(family: str) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """A family's forward pass and input gradient: one product, of the operands of W and of W^T."""

    @SPMM.kernel(family, functools.partial(_why_not, family))
    def run(
        x: torch.Tensor,
        values: torch.Tensor,
        ids: torch.Tensor,
        n: int,
        bias: torch.Tensor | None,
        operand: torch.Tensor | None,
        meta: torch.Tensor | None,
    ) -> torch.Tensor:
        if operand is None or meta is None:
            operand, meta, _, _ = _packed(values, ids, n, x.dtype)
        if bias is not None and bias.dtype not in (x.dtype, torch.float32):
            bias = bias.float()
        return _product(family)(x, operand, meta, ids.shape[0] * BLOCK, bias)

    @INPUT_GRAD.kernel(family, functools.partial(_why_not, family))
    def run_transposed(
        dy: torch.Tensor,
        values: torch.Tensor,
        ids: torch.Tensor,
        n: int,
        operand_t: torch.Tensor | None,
        meta_t: torch.Tensor | None,
    ) -> torch.Tensor:
        if operand_t is None or meta_t is None:
            _, _, operand_t, meta_t = _packed(values, ids, n, dy.dtype)
        return _product(family)(dy, operand_t, meta_t, ids.shape[1] * BLOCK)

    return run, run_transposed


_spmm_wgmma_sp, _input_grad_wgmma_sp = _register("wgmma_sp")
_register("mma_sp")


def _packed(values: torch.Tensor, ids: torch.Tensor, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    operands = empty_operands(ids.shape[0] * BLOCK, ids.shape[1] * BLOCK, dtype, values.device)
    PACK_OPERANDS_(values, ids, n, *operands)
    return operands


def forward(x: torch.Tensor, w: SparseWeight, bias: torch.Tensor | None, impl: str) -> torch.Tensor:
    """[T, K] to [T, N], not differentiable: what the autograd function runs."""
    operand, meta, _, _ = _operands(x, w, impl)
    return SPMM(x, w.values, w.ids, w.n, bias, operand, meta, impl=impl)


def backward_input(dy: torch.Tensor, w: SparseWeight, impl: str, stamp: object | None = None) -> torch.Tensor:
    """[..., N] to [..., K], not differentiable; ``stamp``: of the operands in the forward pass (:meth:`SparseWeight.operands`)."""
    found = route.find(dy, w, None, impl, True)
    if found is not None:
        return found.product(dy, w, None, stamp)
    rows, columns = w.shape
    tokens = dy if dy.dim() == 2 else dy.reshape(-1, rows)
    _, _, operand_t, meta_t = _operands(tokens, w, impl, stamp)
    dx = INPUT_GRAD(tokens, w.values, w.ids, w.n, operand_t, meta_t, impl=impl)
    if operand_t is not None and INPUT_GRAD.select(impl, tokens) is _input_grad_wgmma_sp:
        route.add(dy, w, None, impl, True)
    return dx if dy.dim() == 2 else dx.view(*dy.shape[:-1], columns)


def _operands(x: torch.Tensor, w: SparseWeight, impl: str, stamp: object | None = None) -> tuple[torch.Tensor | None, ...]:
    """The weight's operands in x's dtype when a kernel is going to read them.

    A compiled graph cannot look at version counters: there it packs every time (:func:`packed_in_graph`), but for resident ones.
    """
    if not _reads_operands(x, impl):
        return None, None, None, None
    if torch.compiler.is_compiling():
        return _resident(x, w) or (None, None, None, None)
    if not target.has_sparse_tensor_core_kernel(x.get_device()):
        return None, None, None, None
    fresh = w.operands(x.dtype) if stamp is None else w.operands(x.dtype, stamp)
    return fresh.values, fresh.meta, fresh.values_t, fresh.meta_t


def packed_in_graph(x: torch.Tensor, w: SparseWeight, impl: str) -> tuple[torch.Tensor, ...]:
    """In a compiled graph: the weight's operands, resident or packed by the graph, for both passes; outside, and where no kernel reads
    them or none may be kept until the backward pass: nothing."""
    if not torch.compiler.is_compiling() or not _reads_operands(x, impl) or type(w) is not _late_imports()[2]:
        return ()
    return _resident(x, w) or _packed(w.values, w.ids, w.n, x.dtype)


def _resident(x: torch.Tensor, w: SparseWeight) -> tuple[torch.Tensor, ...]:
    """In a compiled graph: the operands that the writers of the weight keep up to date, inputs of the graph; an exported program is of
    values that nobody here writes, and packs."""
    kept = w._operands
    # The flag itself: traced by torch 2.11, is_exporting() is True under torch.compile, too.
    exporting = getattr(torch.compiler, "_is_exporting_flag", False)
    if not kept.resident or kept.owner is not w.values or kept.values_t.dtype != x.dtype or exporting:
        return ()
    return kept.values, kept.meta, kept.values_t, kept.meta_t


def _reads_operands(x: torch.Tensor, impl: str) -> bool:
    return x.is_cuda and impl != "reference" and x.dtype in TENSOR_CORE_DTYPES


def _late_imports() -> tuple[type, Callable[..., torch.Tensor], type]:
    from ...autograd import SparseMatmul, apply_eagerly  # both import this module
    from ...format import SparseWeight

    return SparseMatmul, apply_eagerly, SparseWeight


_cached_late_imports = functools.cache(_late_imports)  # not for torch.compile, which warns of caches and needs none


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """x's dtype, or autocast's where that is enabled for x's device."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def spmm(
    x: torch.Tensor,
    w: SparseWeight,
    bias: torch.Tensor | None = None,
    *,
    weight_grad: str | Mvue24 = "exact",
    impl: str = "auto",
) -> torch.Tensor:
    """``y = x W^T + bias``, differentiable with respect to x, the values of w, and the bias.

    Computes in the dtype of ``x`` (of autocast, where enabled): values and bias are converted to it, products accumulate in
    float32 or wider, gradients come back in the dtypes of x, values and bias.

    inf and NaN in x: a sparse kernel lets them reach exactly the outputs whose links touch them; the reference multiplies a
    dense matrix and so spreads NaN through ``0 * inf`` along the whole row.

    Args:
        x: [..., K], floating point, any strides, any number of leading dimensions and tokens, 0 included.
        w: a SparseWeight of shape (N, K).
        bias: [N] or None.
        weight_grad: "exact"; "mvue24", the unbiased estimate of :func:`chts_kernels.weight_grad_mvue`, with a seed from torch's CPU
            generator; or :class:`chts_kernels.Mvue24`, which says what its noise is drawn for.
        impl: "auto", "reference" or a kernel's name (:func:`chts_kernels.capability_report` lists them).

    Returns:
        [..., N].

    Raises:
        ValueError, TypeError: when an argument does not fit; the message names it.
        RuntimeError: when the named implementation cannot run here; the message says why.
    """
    late = _late_imports() if torch.compiler.is_compiling() else _cached_late_imports()
    SparseMatmul, apply_eagerly, SparseWeight = late
    noise = None if weight_grad == "exact" else estimator(weight_grad)
    if noise is not None and noise.counter is not None and isinstance(x, torch.Tensor) and noise.counter.device != x.device:
        check.same_device(**{"x": x, "weight_grad.counter": noise.counter})
    found = route.find(x, w, bias, impl, False) if type(w) is SparseWeight else None
    if found is not None:
        values = w.values
        if torch.is_grad_enabled() and (
            values.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return apply_eagerly(x, values, bias, w, impl, found, noise)
        return found.product(x, w, bias)
    check.require(isinstance(w, SparseWeight), "w", "be a SparseWeight", type(w).__name__, TypeError)
    check.floating(x, "x")
    if bias is not None:
        check.floating(bias, "bias")
    values = w.values
    rows, columns = w.shape
    if x.dim() < 1 or x.shape[-1] != columns:
        check.require(False, "x", f"have {columns} = in_features columns", tuple(x.shape))
    if bias is not None and bias.shape != (rows,):
        check.require(False, "bias", f"have shape ({rows},) = (out_features,)", tuple(bias.shape))
    if x.device != values.device or (bias is not None and bias.device != x.device):
        check.same_device(x=x, values=values, bias=bias)
    dtype = compute_dtype(x)
    if x.dtype != dtype:
        x = x.to(dtype)
    if x.is_cuda and not torch.compiler.is_compiling() and SPMM.select(impl, x) is _spmm_wgmma_sp:
        route.add(x, w, bias, impl, False)
    # Spares inference the bookkeeping of autograd, which refuses forward-mode differentiation.
    if not torch.is_grad_enabled() and (torch.compiler.is_compiling() or forward_ad._current_level < 0):
        y = forward(x if x.dim() == 2 else x.reshape(-1, columns), w, bias, impl)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], rows)
    return SparseMatmul.apply(x, values, bias, w, impl, None, noise)


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
    _, _, SparseWeight = _late_imports()
    found = route.find(dy, w, None, impl, True) if type(w) is SparseWeight else None
    if found is not None:
        return found.product(dy, w, None)
    check.require(isinstance(w, SparseWeight), "w", "be a SparseWeight", type(w).__name__, TypeError)
    check.floating(dy, "dy")
    rows, columns = w.shape
    check.require(dy.dim() >= 1 and dy.shape[-1] == rows, "dy", f"have {rows} = out_features columns", tuple(dy.shape))
    check.same_device(dy=dy, values=w.values)
    return backward_input(dy, w, impl)
