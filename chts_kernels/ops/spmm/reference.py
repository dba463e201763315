"""The forward and input-gradient products through the dense matrix: the specification, and the backend without kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..pack.reference import unpack


def spmm(
    x: torch.Tensor,
    values: torch.Tensor,
    ids: torch.Tensor,
    n: int,
    bias: torch.Tensor | None,
    operand: torch.Tensor | None = None,
    meta: torch.Tensor | None = None,
) -> torch.Tensor:
    # [T, K] @ [K, N]; the operands say nothing that values and ids do not
    return F.linear(x, unpack(values.to(x.dtype), ids, n), None if bias is None else bias.to(x.dtype))


def input_grad(
    dy: torch.Tensor,
    values: torch.Tensor,
    ids: torch.Tensor,
    n: int,
    operand_t: torch.Tensor | None = None,
    meta_t: torch.Tensor | None = None,
) -> torch.Tensor:
    # [T, N] @ [N, K]
    return dy @ unpack(values.to(dy.dtype), ids, n)
