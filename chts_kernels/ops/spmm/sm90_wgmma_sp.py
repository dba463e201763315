"""Y = X W^T on Hopper's sparse tensor cores (wgmma.sp, compute capability 9.0): the entry point of the forward and dX products.

Law: Y[t, n] = bias[n] + sum over k of X[t, k] * W[n, k], W 2:4 along k, bf16 or fp16 operands, float32 accumulation and bias, one
rounding to the output. dX is the same function of the transposed operands: X = dY [T, N], values_t [K, N/2], meta_t.

Any T >= 0, any N and K divisible by 4. Full speed asks for 16-byte aligned rows: K % 16 == 0 for `values`, N % 8 == 0 for the output, and
an x whose rows are contiguous and start on 16-byte boundaries. What does not fit is copied into padded rows first (or copied out of
them), which costs the bytes of that operand and is correct. K % 64 tails cost nothing extra: TMA fills them with zeros.

inf and NaN in X reach the outputs whose kept positions touch them (a widened 1:4 operand keeps an explicit zero beside each link).
Deterministic: every output is summed by one warpgroup in one order.
"""
from __future__ import annotations

import torch

from ... import check
from . import sm90_launch
from .sm90_config import Sm90Config, choose


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None when this kernel can run for a device and compute dtype, else the reason."""
    if device.type != "cuda":
        return f"needs a CUDA device, got {device.type}"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return f"needs compute capability 9.0, got {torch.cuda.get_device_capability(device)}"
    if dtype not in sm90_launch.PTX_DTYPE:
        return f"needs bfloat16 or float16, got {dtype}"
    return None


def spmm_sm90(x: torch.Tensor, values: torch.Tensor, meta: torch.Tensor, out_features: int, bias: torch.Tensor | None = None,
              out: torch.Tensor | None = None, config: Sm90Config | None = None) -> torch.Tensor:
    """Y = X W^T + bias.

    Args:
        x: [..., K] bfloat16 or float16 on a device of compute capability 9.0, any strides.
        values: [out_features, K/2], dtype of x: the two kept values of every group of four columns, ascending.
        meta: int32 [ceil(out_features/512)*8, ceil(K/64), 128] contiguous, `chts_kernels.layout.metadata` order.
        out_features: N.
        bias: [N], float32 or dtype of x, or None.
        out: [..., N] to write into, dtype of x; None allocates.
        config: a tile configuration; None chooses by the measured table.

    Returns:
        [..., N] in x's dtype; `out` when given.

    Raises:
        ValueError, TypeError: when shapes, dtypes or devices do not fit, or the configuration is illegal.
        RuntimeError: when the kernel cannot be built or launched.
    """
    if x.dim() != 2:
        flat = spmm_sm90(x.reshape(-1, x.shape[-1]), values, meta, out_features, bias, None, config)
        result = flat.view(*x.shape[:-1], out_features)
        return result if out is None else out.copy_(result)
    tokens, in_features = x.shape
    dtype, device = x.dtype, x.get_device()
    if (values.shape != (out_features, in_features // 2) or values.dtype != dtype or meta.dtype != torch.int32 or device < 0
            or meta.numel() != -(-out_features // 512) * 8 * -(-in_features // 64) * 128 or not meta.is_contiguous()
            or values.get_device() != device or meta.get_device() != device or dtype not in sm90_launch.PTX_DTYPE):
        _explain(x, values, meta, out_features)
    bias_dtype, bias_at = None, 0
    if bias is not None:
        bias = _checked_bias(bias, x, out_features)
        bias_dtype, bias_at = bias.dtype, bias.data_ptr()
    if out is not None:
        check.require(out.shape == (tokens, out_features) and out.dtype == dtype and out.get_device() == device, "out",
                      f"be {dtype} of shape {(tokens, out_features)} on {x.device}", (tuple(out.shape), out.dtype, out.device))
    if tokens == 0:
        return x.new_empty(0, out_features) if out is None else out
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            return spmm_sm90(x, values, meta, out_features, bias, out, config)
    if not _rows_aligned(x):
        x = _padded_rows(x)
    if not _rows_aligned(values):
        values = _padded_rows(values)
    target = out
    if out is None and out_features % 8 == 0:
        out = target = torch.empty((tokens, out_features), dtype=dtype, device=x.device)
    elif out is None or not _rows_aligned(out):
        target = torch.empty((tokens, -(-out_features // 8) * 8), dtype=dtype, device=x.device)[:, :out_features]
    if config is None:
        config = choose(tokens, out_features, in_features, sm90_launch.multiprocessors(device))
    launch = sm90_launch.plan(tokens, out_features, in_features, dtype, bias_dtype, device, config)
    launch(x.data_ptr(), _row_bytes(x), values.data_ptr(), _row_bytes(values), target.data_ptr(), _row_bytes(target), meta.data_ptr(),
           bias_at, torch._C._cuda_getCurrentRawStream(device))
    if target is out:
        return out
    return target.contiguous() if out is None else out.copy_(target)


def _row_bytes(t: torch.Tensor) -> int:
    """Bytes from row to row; a single row may have any stride, so it gets a legal one."""
    return 2 * t.stride(0) if t.shape[0] > 1 else -(-t.shape[1] // 8) * 16


def _rows_aligned(t: torch.Tensor) -> bool:
    """Whether TMA can address the matrix: contiguous rows that start on 16-byte boundaries and do not overlap."""
    rows, columns = t.shape
    row_stride, column_stride = t.stride()
    return (t.data_ptr() % 16 == 0 and (column_stride == 1 or columns == 1)
            and (rows == 1 or (row_stride % 8 == 0 and row_stride >= columns)))


def _padded_rows(t: torch.Tensor) -> torch.Tensor:
    """A copy whose rows are 16 bytes or a multiple apart."""
    rows, columns = t.shape
    return torch.empty((rows, -(-columns // 8) * 8), dtype=t.dtype, device=t.device)[:, :columns].copy_(t)


def _checked_bias(bias: torch.Tensor, x: torch.Tensor, out_features: int) -> torch.Tensor:
    if bias.shape != (out_features,) or bias.get_device() != x.get_device():
        check.require(bias.shape == (out_features,), "bias", f"have shape ({out_features},)", tuple(bias.shape))
        check.same_device(x=x, bias=bias)
    if bias.dtype != x.dtype and bias.dtype != torch.float32:
        check.require(False, "bias", f"have dtype torch.float32 or {x.dtype}", bias.dtype, TypeError)
    return bias if bias.is_contiguous() else bias.contiguous()


def _explain(x: torch.Tensor, values: torch.Tensor, meta: torch.Tensor, out_features: int) -> None:
    """Raise for the first argument that does not fit."""
    tokens, in_features = x.shape
    check.require(x.dtype in sm90_launch.PTX_DTYPE, "x", "have dtype bfloat16 or float16", x.dtype, TypeError)
    check.require(x.is_cuda, "x", "be on a CUDA device", x.device)
    check.require(in_features > 0 and in_features % 4 == 0, "x", "have a number of columns divisible by 4", tuple(x.shape))
    check.require(values.shape == (out_features, in_features // 2), "values", f"have shape {(out_features, in_features // 2)}",
                  tuple(values.shape))
    check.require(values.dtype == x.dtype, "values", f"have dtype {x.dtype}", values.dtype, TypeError)
    check.require(meta.dtype == torch.int32, "meta", "have dtype int32", meta.dtype, TypeError)
    check.same_device(x=x, values=values, meta=meta)
    shape = (-(-out_features // 512) * 8, -(-in_features // 64), 128)
    check.require(False, "meta", f"be contiguous with shape {shape}", tuple(meta.shape))
