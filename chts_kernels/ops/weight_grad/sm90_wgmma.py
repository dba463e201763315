"""Exact weight gradient on Hopper (wgmma, compute capability 9.0): dW = dY^T X at the links only, never the dense matrix.

Law: dvalues[i, s] = sum over tokens t of dY[t, i] * X[t, c], c the column of slot s of row i; bf16 or fp16 operands, float32
sums, one rounding to the output. The product runs at the dense rate (tensor cores gain nothing from a sparse output); the
epilogue keeps the links, so half (n = 2) or a quarter (n = 1) of the bytes are written.

Any T >= 0, any N and K divisible by 4. Full speed asks for rows that are contiguous and start on 16-byte boundaries (N, K
divisible by 8, or a row stride that is); what does not fit is copied into padded rows first, which costs the bytes of that
operand. T % 64 tails cost nothing extra: TMA fills them with zeros.

Problems with few tiles are cut along tokens. The float32 partial sums go through a workspace of at most twice as many compressed
tiles as the device has multiprocessors, and are added in ascending token order: bit-equal from run to run on one kind of device.
"""

from __future__ import annotations

import torch

from ... import check
from ..spmm.sm90_launch import PTX_DTYPE, multiprocessors
from ..spmm.sm90_wgmma_sp import _padded_rows as padded_rows
from ..spmm.sm90_wgmma_sp import _row_bytes as row_bytes
from ..spmm.sm90_wgmma_sp import _rows_aligned as rows_aligned
from ..spmm.sm90_wgmma_sp import why_not
from . import sm90_launch
from .sm90_schedule import Work, choose

__all__ = ["weight_grad_sm90", "why_not"]


def weight_grad_sm90(
    dy: torch.Tensor,
    x: torch.Tensor,
    ids: torch.Tensor,
    n: int,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
    out_dtype: torch.dtype = torch.float32,
    work: Work | None = None,
) -> torch.Tensor:
    """dW = dY^T X at the links.

    Args:
        dy: [T, N] bfloat16 or float16 on a device of compute capability 9.0, any strides.
        x: [T, K], dtype and device of dy, any strides.
        ids: pattern ids, uint8 [N/4, K/4].
        n: links per row of a 4x4 block, 1 or 2.
        out: [N, K*n/4] contiguous, 8-byte aligned, to write into; None allocates. Its dtype replaces ``out_dtype``.
        accumulate: add to ``out`` (in float32, one rounding) instead of replacing it.
        out_dtype: float32, bfloat16 or float16.
        work: a tile configuration and token split; None chooses by the cost model.

    Returns:
        [N, K*n/4]; ``out`` when given.

    Raises:
        ValueError, TypeError: when shapes, dtypes or devices do not fit.
        RuntimeError: when the kernel cannot be built or launched.
    """
    (tokens, rows), columns = dy.shape, x.shape[1]
    dtype, device = dy.dtype, dy.get_device()
    if (
        x.shape[0] != tokens or x.dtype != dtype or dtype not in PTX_DTYPE or device < 0 or x.get_device() != device
        or ids.get_device() != device or ids.shape != (rows // 4, columns // 4) or ids.dtype != torch.uint8
        or rows % 4 or columns % 4 or n not in (1, 2) or (accumulate and out is None)
    ):  # fmt: skip
        _explain(dy, x, ids, n, out, accumulate)
    if out is not None:
        _check_out(out, dy, (rows, columns * n // 4))
        out_dtype = out.dtype
    check.require(out_dtype in sm90_launch.PTX_OUT, "out_dtype", "be float32, bfloat16 or float16", out_dtype, TypeError)
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            return weight_grad_sm90(dy, x, ids, n, out, accumulate, out_dtype, work)
    if out is None:
        out = torch.empty((rows, columns * n // 4), dtype=out_dtype, device=dy.device)
    if tokens == 0 or out.numel() == 0:
        return out if accumulate else out.zero_()
    if not rows_aligned(dy):
        dy = padded_rows(dy)
    if not rows_aligned(x):
        x = padded_rows(x)
    if not ids.is_contiguous():
        ids = ids.contiguous()
    if work is None:
        work = choose(tokens, rows, columns, multiprocessors(device))
    launch = sm90_launch.plan(tokens, rows, columns, n, dtype, out_dtype, accumulate, device, work)
    stream = torch._C._cuda_getCurrentRawStream(device)
    launch(dy.data_ptr(), row_bytes(dy), x.data_ptr(), row_bytes(x), ids.data_ptr(), out.data_ptr(), stream)
    return out


def _check_out(out: torch.Tensor, dy: torch.Tensor, shape: tuple[int, int]) -> None:
    check.require(tuple(out.shape) == shape, "out", f"have shape {shape}", tuple(out.shape))
    check.require(out.get_device() == dy.get_device(), "out", f"be on the device of dy ({dy.device})", out.device)
    fits = out.is_contiguous() and out.data_ptr() % 8 == 0
    check.require(fits, "out", "be contiguous and 8-byte aligned", (out.stride(), out.data_ptr() % 8))


def _explain(dy: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, n: int, out: torch.Tensor | None, accumulate: bool) -> None:
    """Raise for the first argument that does not fit."""
    check.links_per_row(n)
    check.require(dy.dtype in PTX_DTYPE, "dy", "have dtype bfloat16 or float16", dy.dtype, TypeError)
    check.require(dy.is_cuda, "dy", "be on a CUDA device", dy.device)
    check.require(x.dtype == dy.dtype, "x", f"have the dtype of dy ({dy.dtype})", x.dtype, TypeError)
    check.require(x.shape[0] == dy.shape[0], "x", f"have {dy.shape[0]} rows like dy", tuple(x.shape))
    check.require(dy.shape[1] % 4 == 0, "dy", "have a number of columns divisible by 4", tuple(dy.shape))
    check.require(x.shape[1] % 4 == 0, "x", "have a number of columns divisible by 4", tuple(x.shape))
    shape = (dy.shape[1] // 4, x.shape[1] // 4)
    check.require(tuple(ids.shape) == shape, "ids", f"have shape {shape}", tuple(ids.shape))
    check.require(ids.dtype == torch.uint8, "ids", "have dtype uint8", ids.dtype, TypeError)
    check.same_device(dy=dy, x=x, ids=ids)
    check.require(out is not None or not accumulate, "out", "be given to accumulate into", out)
