"""Between a dense matrix, its compressed values and the operands of the sparse tensor cores, in plain torch."""

from __future__ import annotations

import torch

from ...layout import metadata_from_ids
from ...patterns import BLOCK, pattern_table


def link_columns(ids: torch.Tensor, n: int) -> torch.Tensor:
    """int64 [N, K/4, n]: the in-block columns of the links of every row, ascending."""
    columns = pattern_table(n).tensor("columns", ids.device)[ids.long()]  # [N/4, K/4, 4, n]
    return columns.transpose(1, 2).reshape(ids.shape[0] * BLOCK, ids.shape[1], n).long()


def as_bits(x: torch.Tensor) -> torch.Tensor:
    """16-bit floats as int16, the rest as it is: torch's CPU gather and scatter rewrite the payloads of their NaNs."""
    return x.view(torch.int16) if x.dtype in (torch.bfloat16, torch.float16) else x


def pack(dense: torch.Tensor, ids: torch.Tensor, n: int) -> torch.Tensor:
    rows, columns = dense.shape
    groups = as_bits(dense).reshape(rows, columns // BLOCK, BLOCK)
    return groups.gather(2, link_columns(ids, n)).view(rows, -1).view(dense.dtype)


def unpack(values: torch.Tensor, ids: torch.Tensor, n: int) -> torch.Tensor:
    rows, groups = values.shape[0], ids.shape[1]
    bits = as_bits(values).reshape(rows, groups, n)
    dense = bits.new_zeros(rows, groups, BLOCK)
    return dense.scatter_(2, link_columns(ids, n), bits).view(rows, groups * BLOCK).view(values.dtype)


def transpose_values(values: torch.Tensor, ids: torch.Tensor, n: int) -> torch.Tensor:
    """Values [N, K*n/4] of W to the values [K, N*n/4] of W^T: a permutation of the 4n slots of each block."""
    block_rows, block_columns = ids.shape
    slots = as_bits(values).reshape(block_rows, BLOCK, block_columns, n).transpose(1, 2)
    slots = slots.reshape(block_rows, block_columns, BLOCK * n)
    order = pattern_table(n).tensor("from_transposed_slot", ids.device)[ids.long()].long()
    slots = slots.gather(2, order).view(block_rows, block_columns, BLOCK, n)  # [.., column, link of the column]
    return slots.permute(1, 2, 0, 3).reshape(block_columns * BLOCK, block_rows * n).contiguous().view(values.dtype)


def widen(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """1:4 values [N, K/4] to the 2:4 operand [N, K/2]: the link in slot ``column & 1``, an explicit zero beside it."""
    slot = link_columns(ids, 1) & 1  # [N, K/4, 1]
    bits = as_bits(values)
    pair = bits.new_zeros(*values.shape, 2)
    return pair.scatter_(2, slot, bits[..., None]).view(values.shape[0], -1).view(values.dtype)


def pack_operands_(
    values: torch.Tensor,
    ids: torch.Tensor,
    n: int,
    operand: torch.Tensor | None,
    meta: torch.Tensor,
    operand_t: torch.Tensor,
    meta_t: torch.Tensor,
) -> None:
    ids_t = pattern_table(n).tensor("transpose_id", ids.device)[ids.long()].t().contiguous()
    low = values.to(operand_t.dtype)
    low_t = transpose_values(low, ids, n)
    if operand is not None:
        operand.copy_(low if n == 2 else widen(low, ids))
    operand_t.copy_(low_t if n == 2 else widen(low_t, ids_t))
    meta.copy_(metadata_from_ids(ids, n))
    meta_t.copy_(metadata_from_ids(ids_t, n))
