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

from typing import Any

import torch

from ... import check
from .._library import empty
from . import sm90_launch
from .sm90_launch import PTX_DTYPE, PTX_OUT
from .sm90_schedule import Work, choose


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None when this kernel can run for a device and the dtype of dy and x, else the reason."""
    if device.type != "cuda":
        return f"needs a CUDA device, got {device.type}"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return f"needs compute capability 9.0, got {torch.cuda.get_device_capability(device)}"
    if dtype not in PTX_DTYPE:
        return f"needs bfloat16 or float16, got {dtype}"
    return None


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
    out = checked_out(dy, x, ids, n, out, accumulate, out_dtype)
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            return weight_grad_sm90(dy, x, ids, n, out, accumulate, work=work)
    if tokens == 0 or out.numel() == 0:
        return out if accumulate else out.zero_()
    dy, x, ids = aligned_rows(dy), aligned_rows(x), ids.contiguous()
    if work is None:
        work = choose(tokens, rows, columns, sm90_launch.multiprocessors(device))
    strides = row_bytes(dy), row_bytes(x)
    plan = sm90_launch.plan(tokens, rows, columns, n, dtype, out.dtype, accumulate, device, work, strides)
    plan.run(dy.data_ptr(), x.data_ptr(), ids.data_ptr(), out.data_ptr())
    return out


class Gradient:
    """The route of an exact gradient: contiguous arguments on 16-byte boundaries, with rows of a multiple of 16 bytes."""

    __slots__ = ("device", "out", "plan")
    sparse = False

    def __init__(self, dy: torch.Tensor, x: torch.Tensor, n: int, out_dtype: torch.dtype) -> None:
        (tokens, rows), columns = dy.shape, x.shape[1]
        self.device = dy.get_device()
        work = choose(tokens, rows, columns, sm90_launch.multiprocessors(self.device), self.sparse)
        strides = 0 if self.sparse else 2 * rows, 2 * columns
        self.plan = sm90_launch.plan(tokens, rows, columns, n, dy.dtype, out_dtype, False, self.device, work, strides)
        links = columns * n // 4
        self.out = (rows, links), (links, 1), out_dtype

    @classmethod
    def prepare(
        cls, dy: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, n: int, out_dtype: torch.dtype, *draw: Any
    ) -> Gradient | None:
        """The route of calls with arguments like these, or None where some have to be copied."""
        fits = dy.shape[1] % 8 == 0 and x.shape[1] % 8 == 0 and dy.numel() > 0 and torch._C._cuda_getDevice() == dy.get_device()
        return cls(dy, x, n, out_dtype, *draw) if fits else None

    def __call__(self, dy: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, n: int, out_dtype: torch.dtype) -> torch.Tensor:
        out = empty(*self.out)
        self.plan.run(dy.data_ptr(), x.data_ptr(), ids.data_ptr(), out.data_ptr())
        return out


def row_bytes(t: torch.Tensor) -> int:
    """Bytes from row to row; a single row may have any stride, so it gets a legal one."""
    return 2 * t.stride(0) if t.shape[0] > 1 else -(-t.shape[1] // 8) * 16


def aligned_rows(t: torch.Tensor) -> torch.Tensor:
    """``t``, or where TMA cannot address it a copy whose rows are contiguous and 16 bytes or a multiple apart."""
    rows, columns = t.shape
    row_stride, column_stride = t.stride()
    if column_stride == 1 and t.data_ptr() % 16 == 0 and (rows == 1 or (row_stride % 8 == 0 and row_stride >= columns)):
        return t
    return torch.empty((rows, -(-columns // 8) * 8), dtype=t.dtype, device=t.device)[:, :columns].copy_(t)


def checked_out(
    dy: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, n: int, out: torch.Tensor | None, accumulate: bool, out_dtype: torch.dtype
) -> torch.Tensor:
    """``out``, or a new tensor for the result; raises for the first argument that does not fit."""
    (tokens, rows), (x_tokens, columns) = dy.shape, x.shape
    device = dy.get_device()
    if (
        x_tokens != tokens or x.dtype != dy.dtype or dy.dtype not in PTX_DTYPE or device < 0 or x.get_device() != device
        or ids.get_device() != device or ids.shape != (rows // 4, columns // 4) or ids.dtype != torch.uint8
        or rows % 4 or columns % 4 or n not in (1, 2) or (accumulate and out is None)
    ):  # fmt: skip
        _explain(dy, x, ids, n, out, accumulate)
    if out is not None:
        _check_out(out, dy, (rows, columns * n // 4))
        return out
    check.require(out_dtype in PTX_OUT, "out_dtype", "be float32, bfloat16 or float16", out_dtype, TypeError)
    return torch.empty((rows, columns * n // 4), dtype=out_dtype, device=dy.device)


def _check_out(out: torch.Tensor, dy: torch.Tensor, shape: tuple[int, int]) -> None:
    check.require(tuple(out.shape) == shape, "out", f"have shape {shape}", tuple(out.shape))
    check.require(out.get_device() == dy.get_device(), "out", f"be on the device of dy ({dy.device})", out.device)
    check.require(out.dtype in PTX_OUT, "out", "have dtype float32, bfloat16 or float16", out.dtype, TypeError)
    fits = out.is_contiguous() and out.data_ptr() % 8 == 0
    check.require(fits, "out", "be contiguous and 8-byte aligned", (out.stride(), out.data_ptr() % 8))


def _explain(dy: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, n: int, out: torch.Tensor | None, accumulate: bool) -> None:
    """Raise for the first argument that does not fit."""
    check.links_per_row(n)
    check.require(dy.dtype in PTX_DTYPE, "dy", "have dtype bfloat16 or float16", dy.dtype, TypeError)
    check.require(x.dtype == dy.dtype, "x", f"have the dtype of dy ({dy.dtype})", x.dtype, TypeError)
    check.require(x.shape[0] == dy.shape[0], "x", f"have {dy.shape[0]} rows like dy", tuple(x.shape))
    check.require(dy.shape[1] % 4 == 0, "dy", "have a number of columns divisible by 4", tuple(dy.shape))
    check.require(x.shape[1] % 4 == 0, "x", "have a number of columns divisible by 4", tuple(x.shape))
    shape = (dy.shape[1] // 4, x.shape[1] // 4)
    check.require(tuple(ids.shape) == shape, "ids", f"have shape {shape}", tuple(ids.shape))
    check.require(ids.dtype == torch.uint8, "ids", "have dtype uint8", ids.dtype, TypeError)
    check.require(dy.is_cuda, "dy", "be on a CUDA device", dy.device)
    check.same_device(dy=dy, x=x, ids=ids)
    check.require(out is not None or not accumulate, "out", "be given to accumulate into", out)
