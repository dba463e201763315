"""Dense to pattern ids, in plain torch: the exact best of all patterns, and the block search that regrowth shares."""

from __future__ import annotations

import itertools

import torch

from ...patterns import BLOCK, pattern_table
from ..pack.reference import pack, pack_operands_

LARGEST_SCORE = 2.0**120
"""Element scores are clamped to this, so that inf and NaN neither poison nor overflow a block's sum in float32."""


def blocks(matrix: torch.Tensor) -> torch.Tensor:
    """[N, K] to [N/4, K/4, 4, 4]."""
    rows, columns = matrix.shape
    return matrix.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK).transpose(1, 2)


def best_pattern(scores: torch.Tensor, n: int, required: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 [N/4, K/4]: per block the pattern with the largest sum of ``scores``; the lowest id wins a tie.

    The sum has one order on every device: each row's n scores left to right, then (row 0 + row 1) + (row 2 + row 3), in
    the dtype of ``scores``.

    Args:
        scores: [N, K], no NaN.
        n: links per row of a block.
        required: int32 [N/4, K/4] bit masks (bit 4 r + c); patterns that miss one of these links are out of the question.
    """
    table = pattern_table(n)
    by_block = blocks(scores)
    # Score of every choice of n columns in every row: choices[a][r] is [N/4, K/4].
    choices = list(itertools.combinations(range(BLOCK), n))
    row_scores = [[sum_in_order([by_block[..., r, c] for c in choice]) for r in range(BLOCK)] for choice in choices]
    choice_of = {choice: index for index, choice in enumerate(choices)}

    best = scores.new_full(by_block.shape[:2], -torch.inf)
    best_id = torch.zeros(by_block.shape[:2], dtype=torch.uint8, device=scores.device)
    for pattern, columns in enumerate(table.columns.tolist()):
        rows = [row_scores[choice_of[tuple(row)]][r] for r, row in enumerate(columns)]
        total = (rows[0] + rows[1]) + (rows[2] + rows[3])
        better = total > best
        if required is not None:
            better &= (required & ~int(table.mask16[pattern])) == 0
        best = torch.where(better, total, best)
        best_id = torch.where(better, pattern, best_id)
    return best_id.to(torch.uint8).contiguous()  # the strides of torch.where follow those of the scores


def sum_in_order(terms: list[torch.Tensor]) -> torch.Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def prune(dense: torch.Tensor, n: int, score: str) -> torch.Tensor:
    magnitude = dense.abs() if dense.dtype == torch.float64 else dense.float().abs()
    magnitude = magnitude if score == "abs" else magnitude * magnitude
    return best_pattern(torch.nan_to_num(magnitude, nan=LARGEST_SCORE).clamp(max=LARGEST_SCORE), n)


def prune_pack_(
    dense: torch.Tensor,
    n: int,
    score: str,
    ids: torch.Tensor,
    values: torch.Tensor,
    operand: torch.Tensor | None,
    meta: torch.Tensor | None,
    operand_t: torch.Tensor | None,
    meta_t: torch.Tensor | None,
) -> None:
    ids.copy_(prune(dense, n, score))
    values.copy_(pack(dense, ids, n))
    if operand_t is not None:
        pack_operands_(values, ids, n, operand, meta, operand_t, meta_t)
