"""Weight gradients on Ampere-class tensor cores (mma, mma.sp; compute capability 8.0 and up): exact, and MVUE.

Law, edges and arguments are those of sm90_wgmma.py and sm90_mvue.py: dvalues[i, s] = sum over tokens t of dY[t, i] * X[t, c], c the
column of slot s of row i; float32 sums, one rounding to the output; no dense N x K buffer. Problems with few tiles are cut along tokens;
their partial sums are compressed, go through a workspace of `splits` times the result in float32, and are added in ascending order.
Deterministic.
"""

from __future__ import annotations

import functools

import torch

from ... import check
from ..spmm.mma_config import MmaConfig
from ..spmm.mma_launch import capability_of, multiprocessors
from ..spmm.mma_sp import padded_rows
from . import mma_launch
from .mma_schedule import choose
from .sm90_wgmma import aligned_rows, checked_out, row_bytes

_plan = functools.lru_cache(maxsize=4096)(mma_launch.Plan)


def weight_grad_mma(
    dy: torch.Tensor,
    x: torch.Tensor,
    ids: torch.Tensor,
    n: int,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
    out_dtype: torch.dtype = torch.float32,
    work: tuple[MmaConfig, int] | None = None,
) -> torch.Tensor:
    """dW = dY^T X at the links.

    Args:
        dy, x, ids, n, out, accumulate, out_dtype: as in :func:`chts_kernels.ops.weight_grad.sm90_wgmma.weight_grad_sm90`, on a device of
            compute capability 8.0 or higher.
        work: a tile configuration of kind "weight_grad" and the number of parts that the tokens are cut into; None chooses.

    Returns:
        [N, K*n/4]; ``out`` when given.

    Raises:
        ValueError, TypeError: when shapes, dtypes or devices do not fit.
        RuntimeError: when the kernel cannot be built or launched.
    """
    return _weight_grad(dy, x, ids, n, out, accumulate, out_dtype, work, None)


def weight_grad_mvue_mma(
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
    work: tuple[MmaConfig, int] | None = None,
) -> torch.Tensor:
    """An unbiased estimate of dW = dY^T X at the links: dY^T pruned 2:4 along tokens (mvue.py), times X on sparse tensor cores.

    Args:
        dy, x, ids, n, out, accumulate, out_dtype: as in :func:`weight_grad_mma`.
        seed, layer, step: what the noise is drawn for (63, 32, 32 bits).
        counter: int64 with one element on the device of dy, added to ``step``; None adds nothing.
        work: a tile configuration of kind "mvue" and the number of parts; None chooses.

    Returns and raises: as :func:`weight_grad_mma`.
    """
    check.unsigned(seed, "seed", 63)
    check.unsigned(layer, "layer", 32)
    check.unsigned(step, "step", 32)
    return _weight_grad(dy, x, ids, n, out, accumulate, out_dtype, work, (seed, layer, step, counter))


def _weight_grad(dy: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, n: int, out: torch.Tensor | None, accumulate: bool,
                 out_dtype: torch.dtype, work: tuple[MmaConfig, int] | None, draw: tuple | None) -> torch.Tensor:  # fmt: skip
    """Exact without ``draw``, (seed, layer, step, counter) of the noise."""
    (tokens, rows), columns = dy.shape, x.shape[1]
    dtype, device = dy.dtype, dy.get_device()
    out = checked_out(dy, x, ids, n, out, accumulate, out_dtype)
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            return _weight_grad(dy, x, ids, n, out, accumulate, out_dtype, work, draw)
    if tokens == 0 or out.numel() == 0:
        return out if accumulate else out.zero_()
    # the kernel copies whole pieces of 16 bytes
    left, x = (aligned_rows(t) if t.shape[1] % 8 == 0 else padded_rows(t) for t in (dy, x))
    ids, meta = ids.contiguous(), None
    if draw is not None:
        from .triton_mvue import prune

        left, meta = prune(left, seed=draw[0], layer=draw[1], step=draw[2], counter=draw[3])
    if work is None:
        capability, count = capability_of(device), multiprocessors(device)
        work = choose(tokens, rows, columns, count, capability, "weight_grad" if draw is None else "mvue")
    strides = (row_bytes(left), row_bytes(x))
    plan = _plan(tokens, rows, columns, n, dtype, out.dtype, accumulate, device, strides, *work)
    plan.run(left.data_ptr(), x.data_ptr(), 0 if meta is None else meta.data_ptr(), ids.data_ptr(), out,
             torch._C._cuda_getCurrentRawStream(device))  # fmt: skip
    return out
