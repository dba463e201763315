"""MVUE weight gradient on Hopper: dY^T pruned 2:4 along tokens (mvue.py), times X on sparse tensor cores, the links kept.

Two launches: triton_mvue.py prunes and compresses dY^T in one pass, sm90_mvue_kernel.py multiplies. The estimate is unbiased; its
variance is the price for a product at up to twice the dense rate. The compressed dY^T takes 1.25 bytes an element of dY
while the call runs.

Deterministic in (dy, x, ids, seed, layer, step + counter); shapes, alignment and the token split are those of sm90_wgmma.py.
"""

from __future__ import annotations

import torch

from ... import check
from .._library import empty
from . import sm90_launch
from .sm90_schedule import Work, choose
from .sm90_wgmma import Gradient, aligned_rows, checked_out, row_bytes


def weight_grad_mvue_sm90(
    dy: torch.Tensor,
    x: torch.Tensor,
    ids: torch.Tensor,
    n: int,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
    out_dtype: torch.dtype = torch.float32,
    *,
    seed: int,
    layer: int,
    step: int,
    counter: torch.Tensor | None = None,
    work: Work | None = None,
) -> torch.Tensor:
    """An unbiased estimate of dW = dY^T X at the links.

    Args:
        dy, x, ids, n, out, accumulate, out_dtype: as in :func:`chts_kernels.ops.weight_grad.sm90_wgmma.weight_grad_sm90`.
        seed, layer, step: what the noise is drawn for (63, 32, 32 bits).
        counter: int64 with one element on the device of dy, added to ``step``.
        work: a (sparse) tile configuration and token split; None chooses by the cost model.

    Returns:
        [N, K*n/4]; ``out`` when given.

    Raises:
        ValueError, TypeError: when an argument does not fit.
        RuntimeError: when a kernel cannot be built or launched.
    """
    from .triton_mvue import prune

    check.unsigned(seed, "seed", 63)
    check.unsigned(layer, "layer", 32)
    check.unsigned(step, "step", 32)
    (tokens, rows), columns = dy.shape, x.shape[1]
    dtype, device = dy.dtype, dy.get_device()
    out = checked_out(dy, x, ids, n, out, accumulate, out_dtype)
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            draw = {"seed": seed, "layer": layer, "step": step, "counter": counter}
            return weight_grad_mvue_sm90(dy, x, ids, n, out, accumulate, **draw, work=work)
    if tokens == 0 or out.numel() == 0:
        return out if accumulate else out.zero_()
    x, ids = aligned_rows(x), ids.contiguous()
    values, meta = prune(aligned_rows(dy), seed=seed, layer=layer, step=step, counter=counter)
    if work is None:
        work = choose(tokens, rows, columns, sm90_launch.multiprocessors(device), True)
    plan = sm90_launch.plan(tokens, rows, columns, n, dtype, out.dtype, accumulate, device, work, (0, row_bytes(x)))
    plan.run(values.data_ptr(), x.data_ptr(), ids.data_ptr(), out.data_ptr(), meta.data_ptr())
    return out


class Estimate(Gradient):
    """The route of an estimate, like that of an exact gradient."""

    __slots__ = ("prune",)
    sparse = True

    def __init__(
        self, dy: torch.Tensor, x: torch.Tensor, n: int, out_dtype: torch.dtype, seed: int, layer: int, step: int,
        counter: torch.Tensor | None,
    ) -> None:  # fmt: skip
        from .triton_mvue import Pruning

        super().__init__(dy, x, n, out_dtype)
        self.prune = Pruning(dy, counter)

    def __call__(
        self, dy: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, n: int, out_dtype: torch.dtype, seed: int, layer: int, step: int,
        counter: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        values, meta = self.prune(dy, seed, layer, step, counter)
        out = empty(*self.out)
        self.plan.run(values.data_ptr(), x.data_ptr(), ids.data_ptr(), out.data_ptr(), meta.data_ptr())
        return out
