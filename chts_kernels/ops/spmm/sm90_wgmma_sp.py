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

import functools

import torch

from ... import check
from ...layout.metadata import metadata_shape
from . import sm90_launch
from .sm90_config import Sm90Config, choose

_PLANS: dict[tuple, sm90_launch.Plan] = {}      # what the fast path found checked and aligned, by everything but addresses
_PLANS_LIMIT = 1024


@functools.lru_cache(maxsize=1024)
def plan(tokens: int, out_features: int, in_features: int, dtype: torch.dtype, bias: torch.dtype | None, device: int,
         row_bytes: tuple[int, int, int], config: Sm90Config | None = None) -> sm90_launch.Plan:
    """The plan of a problem, made once; without a configuration, with the one of the measured table."""
    if config is None:
        config = choose(tokens, out_features, in_features, sm90_launch.multiprocessors(device))
    return sm90_launch.Plan(tokens, out_features, in_features, dtype, bias, device, row_bytes, config)


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
    device, x_at, values_at = x.get_device(), x.data_ptr(), values.data_ptr()
    key = (x.shape, x.stride(), x.dtype, device, values.shape, values.stride(), values.dtype, meta.shape, meta.stride(), meta.dtype,
           out_features, None if bias is None else (bias.dtype, bias.shape, bias.stride(), bias.get_device()), config)
    launch = _PLANS.get(key)
    if (launch is None or out is not None or (x_at | values_at) % 16 or torch._C._cuda_getDevice() != device
            or values.get_device() != device or meta.get_device() != device):
        return _spmm_slow(x, values, meta, out_features, bias, out, config, key)
    y = x.new_empty((x.shape[0], out_features))
    launch.run(values_at, x_at, y.data_ptr(), meta.data_ptr(), 0 if bias is None else bias.data_ptr(),
             torch._C._cuda_getCurrentRawStream(device))
    return y


def _spmm_slow(x: torch.Tensor, values: torch.Tensor, meta: torch.Tensor, out_features: int, bias: torch.Tensor | None,
               out: torch.Tensor | None, config: Sm90Config | None, key: tuple) -> torch.Tensor:
    """`spmm_sm90` of two dimensions for the first call of a kind, which is checked, and for everything that is copied."""
    _check_arguments(x, values, meta, out_features, bias, out)
    tokens, in_features = x.shape
    if tokens == 0:
        return x.new_empty(0, out_features) if out is None else out
    device = x.get_device()
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            return _spmm_slow(x, values, meta, out_features, bias, out, config, key)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
        key = None
    if not meta.is_contiguous():
        meta = meta.contiguous()
        key = None
    x_rows, w_rows = (t if _rows_aligned(t) else _padded_rows(t) for t in (x, values))
    target = out
    if out is None or not _rows_aligned(out):
        target = x.new_empty(tokens, -(-out_features // 8) * 8)[:, :out_features]
    row_bytes = tuple(_row_bytes(t) for t in (w_rows, x_rows, target))
    launch = plan(tokens, out_features, in_features, x.dtype, None if bias is None else bias.dtype, device, row_bytes, config)
    launch.run(w_rows.data_ptr(), x_rows.data_ptr(), target.data_ptr(), meta.data_ptr(), 0 if bias is None else bias.data_ptr(),
             torch._C._cuda_getCurrentRawStream(device))
    if out is None:
        if key is not None and x_rows is x and w_rows is values and out_features % 8 == 0:
            if len(_PLANS) >= _PLANS_LIMIT:
                _PLANS.clear()
            _PLANS[key] = launch
        return target.contiguous()
    return out if target is out else out.copy_(target)


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


def _check_arguments(x: torch.Tensor, values: torch.Tensor, meta: torch.Tensor, out_features: int, bias: torch.Tensor | None,
                     out: torch.Tensor | None) -> None:
    """Raise for the first argument that does not fit; the kernel trusts the shapes."""
    tokens, in_features = x.shape
    check.floating(x, "x", tuple(sm90_launch.PTX_DTYPE))
    check.require(x.is_cuda, "x", "be on a CUDA device", x.device)
    check.require(in_features > 0 and in_features % 4 == 0, "x", "have a positive number of columns divisible by 4", tuple(x.shape))
    check.require(out_features > 0 and out_features % 4 == 0, "out_features", "be positive and divisible by 4", out_features)
    shape = (out_features, in_features // 2)
    check.require(values.shape == shape, "values", f"have shape {shape}", tuple(values.shape))
    check.require(values.dtype == x.dtype, "values", f"have dtype {x.dtype}", values.dtype, TypeError)
    shape = metadata_shape(out_features, in_features)
    check.require(meta.dtype == torch.int32, "meta", "have dtype int32", meta.dtype, TypeError)
    check.require(meta.shape == shape, "meta", f"have shape {shape}", tuple(meta.shape))
    if bias is not None:
        check.require(bias.shape == (out_features,), "bias", f"have shape ({out_features},)", tuple(bias.shape))
        check.require(bias.dtype in (x.dtype, torch.float32), "bias", f"have dtype torch.float32 or {x.dtype}", bias.dtype, TypeError)
    if out is not None:
        check.require(out.shape == (tokens, out_features), "out", f"have shape {(tokens, out_features)}", tuple(out.shape))
        check.require(out.dtype == x.dtype, "out", f"have dtype {x.dtype}", out.dtype, TypeError)
    check.same_device(x=x, values=values, meta=meta, bias=bias, out=out)
