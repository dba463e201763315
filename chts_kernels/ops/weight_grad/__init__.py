"""weight_grad: dW = dY^T X at the links only, in the shape of the values; and an unbiased estimate of it, weight_grad_mvue."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ... import check, target
from ...patterns import BLOCK
from .._library import Op, Route
from . import mvue, reference
from .estimator import Mvue24, check_counter

__all__ = ["WEIGHT_GRAD", "WEIGHT_GRAD_MVUE", "Mvue24", "weight_grad", "weight_grad_mvue"]

_Tensor = torch.Tensor


def _kind(dy: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, n: int, out_dtype: torch.dtype) -> tuple[Any, ...] | None:
    """What a route depends on; None for what is not on a CUDA device, or would be copied."""
    if type(dy) is not _Tensor or type(x) is not _Tensor or type(ids) is not _Tensor or type(n) is not int:
        return None
    device = dy.get_device()
    if (
        device < 0 or not (dy.is_contiguous() and x.is_contiguous() and ids.is_contiguous())
        or (dy.data_ptr() | x.data_ptr()) % 16
    ):  # fmt: skip
        return None
    return dy.shape, dy.dtype, device, x.shape, x.dtype, x.get_device(), ids.shape, ids.dtype, ids.get_device(), n, out_dtype


def _kind_mvue(
    dy: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, n: int, out_dtype: torch.dtype, seed: int, layer: int, step: int,
    counter: torch.Tensor | None,
) -> tuple[Any, ...] | None:  # fmt: skip
    for word, bits in ((seed, 63), (layer, 32), (step, 32)):
        if type(word) is not int or word < 0 or word >> bits:
            return None
    kind = _kind(dy, x, ids, n, out_dtype)
    if kind is None or counter is None:
        return kind
    if type(counter) is not _Tensor:
        return None
    return *kind, counter.dtype, counter.numel(), counter.get_device()


WEIGHT_GRAD = Op(
    "weight_grad(Tensor dy, Tensor x, Tensor ids, int n, ScalarType out_dtype) -> Tensor",
    reference.weight_grad,
    lambda dy, x, ids, n, out_dtype: dy.new_empty(ids.shape[0] * BLOCK, ids.shape[1] * n, dtype=out_dtype),
    selects_by=lambda dy, x, ids, n, out_dtype: (dy.get_device(), dy.dtype, out_dtype),
    kind=_kind,
    any_rows=True,
)

# The noise is drawn for (seed, layer, step + counter); counter lives on the device, where a captured graph reads it anew.
WEIGHT_GRAD_MVUE = Op(
    "weight_grad_mvue(Tensor dy, Tensor x, Tensor ids, int n, ScalarType out_dtype, int seed, int layer, int step, Tensor? counter)"
    " -> Tensor",
    mvue.weight_grad_mvue,
    lambda dy, x, ids, n, out_dtype, *_: dy.new_empty(ids.shape[0] * BLOCK, ids.shape[1] * n, dtype=out_dtype),
    selects_by=lambda dy, x, ids, n, out_dtype, *_: (dy.get_device(), dy.dtype, out_dtype),
    kind=_kind_mvue,
    any_rows=True,
)


def _why_not(
    family: str, dy: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, n: int, out_dtype: torch.dtype, *_: object
) -> str | None:
    reason = target.why_not_kernel(family, dy.device)
    if reason is None and dy.dtype not in (torch.bfloat16, torch.float16):
        reason = f"it computes in bfloat16 or float16, got {dy.dtype} (cast dy and x, or use autocast)"
    if reason is None and out_dtype not in (torch.float32, dy.dtype):
        reason = f"it writes float32 or the dtype of dy, got {out_dtype}"
    return reason


def _prepare(*args: Any) -> Route | None:
    from .sm90_wgmma import Gradient

    return Gradient.prepare(*args)


def _prepare_mvue(*args: Any) -> Route | None:
    from .sm90_mvue import Estimate

    return Estimate.prepare(*args)


# One name for a family's kernels of all three passes, although this one multiplies densely.
@WEIGHT_GRAD.kernel("wgmma_sp", functools.partial(_why_not, "wgmma_sp"), _prepare)
def _weight_grad_wgmma(
    dy: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, n: int, out_dtype: torch.dtype
) -> torch.Tensor:
    from .sm90_wgmma import weight_grad_sm90

    return weight_grad_sm90(dy, x, ids, n, out_dtype=out_dtype)


@WEIGHT_GRAD_MVUE.kernel("wgmma_sp", functools.partial(_why_not, "wgmma_sp"), _prepare_mvue)
def _weight_grad_mvue_wgmma_sp(
    dy: torch.Tensor,
    x: torch.Tensor,
    ids: torch.Tensor,
    n: int,
    out_dtype: torch.dtype,
    seed: int,
    layer: int,
    step: int,
    counter: torch.Tensor | None,
) -> torch.Tensor:
    from .sm90_mvue import weight_grad_mvue_sm90

    return weight_grad_mvue_sm90(
        dy, x, ids, n, out_dtype=out_dtype, seed=seed, layer=layer, step=step, counter=counter
    )


@WEIGHT_GRAD.kernel("mma_sp", functools.partial(_why_not, "mma_sp"))
def _weight_grad_mma(
    dy: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, n: int, out_dtype: torch.dtype
) -> torch.Tensor:
    from .mma_weight_grad import weight_grad_mma

    return weight_grad_mma(dy, x, ids, n, out_dtype=out_dtype)


@WEIGHT_GRAD_MVUE.kernel("mma_sp", functools.partial(_why_not, "mma_sp"))
def _weight_grad_mvue_mma_sp(
    dy: torch.Tensor,
    x: torch.Tensor,
    ids: torch.Tensor,
    n: int,
    out_dtype: torch.dtype,
    seed: int,
    layer: int,
    step: int,
    counter: torch.Tensor | None,
) -> torch.Tensor:
    from .mma_weight_grad import weight_grad_mvue_mma

    return weight_grad_mvue_mma(dy, x, ids, n, out_dtype=out_dtype, seed=seed, layer=layer, step=step, counter=counter)


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
    arguments = dy, x, ids, n, getattr(dy, "dtype", None) if out_dtype is None else out_dtype
    found = WEIGHT_GRAD.route(*arguments, impl=impl)
    if found is not None:
        return found(*arguments)
    sizes = _checked(dy, x, ids, n, out_dtype)
    return WEIGHT_GRAD(dy.reshape(-1, sizes[0]), x.reshape(-1, sizes[1]), ids, n, out_dtype or dy.dtype, impl=impl)


def weight_grad_mvue(
    dy: torch.Tensor,
    x: torch.Tensor,
    ids: torch.Tensor,
    n: int = 2,
    *,
    seed: int,
    layer: int = 0,
    step: int = 0,
    counter: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """An unbiased random estimate of :func:`weight_grad` that runs on sparse tensor cores.

    Two of every four consecutive tokens of each column of ``dy`` are kept, at random, with the probabilities and scales of the
    minimum-variance unbiased estimator (Hu et al., "Accelerating Transformer Pre-training with 2:4 Sparsity", ICML 2024; the law
    is in ``ops/weight_grad/mvue.py``): the mean over the noise is the exact gradient, the variance is the price.

    Args:
        dy, x, ids, n, out_dtype: as in :func:`weight_grad`; a kernel wants bfloat16 or float16.
        seed, layer, step: what the noise is drawn for (63, 32, 32 bits): the same words, the same bits.
        counter: int64 with one element on the device of ``dy``, added to ``step`` on the device, so that replays of a CUDA graph draw
            anew when something on the device advances it. Read, not changed.

    Returns:
        [N, K*n/4].

    Raises:
        ValueError, TypeError: when an argument does not fit; the message names it.
    """
    arguments = dy, x, ids, n, getattr(dy, "dtype", None) if out_dtype is None else out_dtype, seed, layer, step, counter
    found = WEIGHT_GRAD_MVUE.route(*arguments, impl=impl)
    if found is not None:
        return found(*arguments)
    sizes = _checked(dy, x, ids, n, out_dtype)
    check.floating(dy, "dy", tuple(mvue.DTYPES))
    check.unsigned(seed, "seed", 63)
    check.unsigned(layer, "layer", 32)
    check.unsigned(step, "step", 32)
    check_counter(counter)
    check.same_device(dy=dy, counter=counter)
    dy, x = dy.reshape(-1, sizes[0]), x.reshape(-1, sizes[1])
    return WEIGHT_GRAD_MVUE(dy, x, ids, n, out_dtype or dy.dtype, seed, layer, step, counter, impl=impl)


def _checked(
    dy: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, n: int, out_dtype: torch.dtype | None
) -> tuple[int, int]:
    """(N, K) of arguments that fit."""
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
    return sizes
