"""The weight gradient through the dense product: the specification, and the backend of devices without kernels."""

from __future__ import annotations

import torch

from ..pack.reference import pack


def weight_grad(dy: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, n: int, out_dtype: torch.dtype) -> torch.Tensor:
    # [N, T] @ [T, K]; 16-bit inputs accumulate in float32 and round once, to out_dtype
    if dy.dtype in (torch.bfloat16, torch.float16) and out_dtype == torch.float32:
        if dy.is_cuda:
            return pack(torch.mm(dy.t(), x, out_dtype=torch.float32), ids, n)
        return pack(dy.float().t() @ x.float(), ids, n)
    return pack(dy.t() @ x, ids, n).to(out_dtype)
