"""Y = X W^T on Ampere-class sparse tensor cores (mma.sp, compute capability 8.0 and up): the entry point of the forward and dX products.

Law, operands and edges are those of sm90_wgmma_sp.py: Y[t, n] = bias[n] + sum over k of X[t, k] * W[n, k], float32 accumulation and
bias, one rounding to the output; dX is the same function of the transposed operands. Any T >= 0, any N and K divisible by 4. What does not
lie in rows of 16-byte pieces is copied first (K % 16 for the values, N % 8 for the output), which costs the bytes of that operand.

inf and NaN in X reach the outputs whose kept positions touch them (a widened 1:4 operand keeps an explicit zero beside each link).
Deterministic: every output is summed by one warp in one order.
"""

from __future__ import annotations

import functools

import torch

from ... import target
from . import mma_launch
from .mma_config import MmaConfig, choose
from .sm90_wgmma_sp import _check_arguments, _row_bytes, _rows_aligned

_plan = functools.lru_cache(maxsize=1024)(mma_launch.Plan)
_PLANS: dict[tuple, mma_launch.Plan] = {}  # what the fast path found checked and aligned, by everything but addresses
_PLANS_LIMIT = 1024


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None when this kernel can run for a device and compute dtype, else the reason."""
    reason = target.why_not_kernel("mma_sp", device)
    if reason is None and dtype not in mma_launch.PTX_DTYPE:
        reason = f"it computes in bfloat16 or float16, got {dtype}"
    return reason


def spmm_mma(x: torch.Tensor, values: torch.Tensor, meta: torch.Tensor, out_features: int, bias: torch.Tensor | None = None,
             out: torch.Tensor | None = None, config: MmaConfig | None = None) -> torch.Tensor:  # fmt: skip
    """Y = X W^T + bias.

    Args:
        x: [..., K] bfloat16 or float16 on a device of compute capability 8.0 or higher, any strides.
        values: [out_features, K/2], dtype of x: the two kept values of every group of four columns, ascending.
        meta: int32 [ceil(out_features/512)*8, ceil(K/64), 128] contiguous, `chts_kernels.layout.metadata` order.
        out_features: N.
        bias: [N], float32 or dtype of x, or None.
        out: [..., N] to write into, dtype of x; None allocates.
        config: a tile configuration; None chooses by the cost model.

    Returns:
        [..., N] in x's dtype; `out` when given.

    Raises:
        ValueError, TypeError: when shapes, dtypes or devices do not fit, or the configuration is illegal.
        RuntimeError: when the kernel cannot be built or launched.
    """
    if x.dim() != 2:
        flat = spmm_mma(x.reshape(-1, x.shape[-1]), values, meta, out_features, bias, None, config)
        result = flat.view(*x.shape[:-1], out_features)
        return result if out is None else out.copy_(result)
    device, x_at, values_at = x.get_device(), x.data_ptr(), values.data_ptr()
    key = (x.shape, x.stride(), x.dtype, device, values.shape, values.stride(), values.dtype, meta.shape, meta.stride(), meta.dtype,
           out_features, None if bias is None else (bias.dtype, bias.shape, bias.stride(), bias.get_device()), config)  # fmt: skip
    plan = _PLANS.get(key)
    if (plan is None or out is not None or (x_at | values_at) % 16 or torch._C._cuda_getDevice() != device
            or values.get_device() != device or meta.get_device() != device):  # fmt: skip
        return _spmm_slow(x, values, meta, out_features, bias, out, config, key)
    y = x.new_empty((x.shape[0], out_features))
    plan.run(values_at, x_at, y.data_ptr(), meta.data_ptr(), 0 if bias is None else bias.data_ptr(),
             torch._C._cuda_getCurrentRawStream(device))  # fmt: skip
    return y


def _spmm_slow(x: torch.Tensor, values: torch.Tensor, meta: torch.Tensor, out_features: int, bias: torch.Tensor | None,
               out: torch.Tensor | None, config: MmaConfig | None, key: tuple | None) -> torch.Tensor:  # fmt: skip
    """`spmm_mma` of two dimensions for the first call of a kind, which is checked, and for everything that is copied."""
    _check_arguments(x, values, meta, out_features, bias, out)
    tokens, in_features = x.shape
    if tokens == 0:
        return x.new_empty(0, out_features) if out is None else out
    device = x.get_device()
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            return _spmm_slow(x, values, meta, out_features, bias, out, config, key)
    if (bias is not None and not bias.is_contiguous()) or not meta.is_contiguous():
        bias, meta, key = None if bias is None else bias.contiguous(), meta.contiguous(), None
    if config is None:
        capability, count = mma_launch.capability_of(device), mma_launch.multiprocessors(device)
        config = choose(tokens, out_features, in_features, count, capability)
    x_rows, w_rows = (t if _rows_aligned(t) and t.shape[1] % 8 == 0 else padded_rows(t) for t in (x, values))
    goal = out
    if out is None or not _rows_aligned(out) or out_features % 8:
        goal = x.new_empty(tokens, -(-out_features // 8) * 8)[:, :out_features]
    row_bytes = tuple(_row_bytes(t) for t in (w_rows, x_rows, goal))
    plan = _plan(tokens, out_features, in_features, x.dtype, None if bias is None else bias.dtype, device, row_bytes, config)
    plan.run(w_rows.data_ptr(), x_rows.data_ptr(), goal.data_ptr(), meta.data_ptr(), 0 if bias is None else bias.data_ptr(),
             torch._C._cuda_getCurrentRawStream(device))  # fmt: skip
    if out is None:
        if key is not None and x_rows is x and w_rows is values and out_features % 8 == 0:
            if len(_PLANS) >= _PLANS_LIMIT:
                _PLANS.clear()
            _PLANS[key] = plan
        return goal.contiguous()
    return out if goal is out else out.copy_(goal)


def padded_rows(t: torch.Tensor) -> torch.Tensor:
    """A copy whose rows are 16 bytes or a multiple apart, padded with zeros: the kernel copies whole pieces of 16 bytes."""
    rows, columns = t.shape
    padded = torch.zeros((rows, -(-columns // 8) * 8), dtype=t.dtype, device=t.device)
    return padded[:, :columns].copy_(t)
