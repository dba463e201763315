"""Sparsity metadata in the register order of ``wgmma.sp`` (m64nNk32) and ``mma.sp`` (m16n8k32), 16-bit operands.

Logically a 2:4 row has one nibble ``idx0 | idx1 << 2`` per group of four columns. In registers one int32 per thread
covers 64 rows x 64 columns of a warpgroup: in the warp that owns rows 16 w to 16 w + 15, lane ``4 g + q`` holds, for the
k32 step ``q // 2`` and its 16-column half ``q % 2``, row g in the low and row g + 8 in the high 16 bits (four nibbles
each, lowest column lowest). The instruction's sparsity selector then alternates 0, 1 over the two k32 steps. The order
is that of PTX ISA, "Sparse matrix storage", and was checked numerically (issue 3).

Rows are padded to :data:`ROW_PADDING` and columns to 64 with the legal nibble (0, 1); padded values are zeros.
"""

from __future__ import annotations

import torch

from ..patterns import BLOCK, pattern_table

ROW_PADDING = 512
"""The tallest row tile of any kernel (two 256-row tiles of a cluster)."""
PADDING_NIBBLE = 0b0100


def metadata_shape(rows: int, columns: int) -> tuple[int, int, int]:
    """[64-row slabs, 64-column slabs, 128 threads] of the int32 metadata of a [rows, columns] operand."""
    return -(-rows // ROW_PADDING) * (ROW_PADDING // 64), -(-columns // 64), 128


def metadata_from_ids(ids: torch.Tensor, n: int) -> torch.Tensor:
    """Metadata of the [N, K] operand with pattern ids uint8 [N/4, K/4]: int32 of :func:`metadata_shape`."""
    block_rows, block_columns = ids.shape
    slabs, steps, threads = metadata_shape(block_rows * BLOCK, block_columns * BLOCK)
    meta16 = pattern_table(n).tensor("meta16", ids.device)[ids.long()]
    shifts = torch.arange(0, 16, 4, device=ids.device)
    nibbles = torch.full((slabs * 64, steps * 16), PADDING_NIBBLE, dtype=torch.int64, device=ids.device)
    nibbles[: block_rows * BLOCK, :block_columns] = (meta16[:, None, :] >> shifts[None, :, None] & 0xF).flatten(0, 1)
    halves = (nibbles.view(slabs * 64, steps * 4, 4) << shifts).sum(-1)
    #                  slab  warp row-half g  step k32 k16
    x = halves.view(slabs, 4, 2, 8, steps, 2, 2)
    words = (x[:, :, 0] | x[:, :, 1] << 16).permute(0, 3, 1, 2, 4, 5)
    return _to_int32(words.reshape(slabs, steps, threads)).contiguous()


def ids_from_metadata(metadata: torch.Tensor, rows: int, columns: int, n: int) -> torch.Tensor:
    """The inverse of :func:`metadata_from_ids`: uint8 ids [rows/4, columns/4], 255 where a block is no pattern.

    For n = 1 the place of the link inside a widened pair is a fact of the values, not of the metadata, so only n = 2 can
    be inverted.

    Raises:
        ValueError: when ``n`` is not 2.
    """
    if n != 2:
        raise ValueError(f"n: must be 2 (the metadata of a widened 1:4 row does not say which slot is the link), got {n}")
    slabs, steps, _ = metadata.shape
    words = metadata.long().view(slabs, steps, 4, 8, 2, 2).permute(0, 2, 3, 1, 4, 5)
    halves = torch.stack([words & 0xFFFF, words >> 16 & 0xFFFF], dim=2).reshape(slabs * 64, steps * 4)
    shifts = torch.arange(0, 16, 4, device=metadata.device)
    nibbles = (halves[..., None] >> shifts & 0xF).reshape(slabs * 64, steps * 16)[:rows, : columns // BLOCK]
    row_mask = 1 << (nibbles & 3) | 1 << (nibbles >> 2)
    mask16 = (row_mask.view(rows // BLOCK, BLOCK, -1) << shifts[None, :, None]).sum(1)
    return pattern_table(n).tensor("id_from_mask", metadata.device)[mask16]


def _to_int32(words: torch.Tensor) -> torch.Tensor:
    """uint32 held in int64 to the int32 of the same bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
