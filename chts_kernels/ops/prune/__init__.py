"""prune: the transposable N:M pattern of every 4x4 block that keeps the most magnitude, exactly; prune_pack_: with the values
and operands that follow from it."""

from __future__ import annotations

import torch

from ... import check
from ...patterns import BLOCK
from .. import _triton
from .._library import Op
from ..pack import empty_operands
from . import reference

PRUNE = Op(
    "prune(Tensor dense, int n, str score) -> Tensor",
    reference.prune,
    lambda dense, n, score: dense.new_empty(dense.shape[0] // BLOCK, dense.shape[1] // BLOCK, dtype=torch.uint8),
)
PRUNE_PACK_ = Op(
    "prune_pack_(Tensor dense, int n, str score, Tensor(a!) ids, Tensor(b!) values, Tensor(c!)? operand, Tensor(d!)? meta, "
    "Tensor(e!)? operand_t, Tensor(f!)? meta_t) -> ()",
    reference.prune_pack_,
    lambda *args: None,
)


def _why_not_prune_pack(dense, n, score, ids, values, operand, meta, operand_t, meta_t) -> str | None:
    outputs = {"ids": ids, "values": values, "operand": operand, "meta": meta, "operand_t": operand_t, "meta_t": meta_t}
    return _triton.why_not(dense, **outputs) or _triton.why_not_operands(dense, operand_t)


PRUNE.kernel("triton", lambda dense, n, score: _triton.why_not(dense))(
    _triton.lazy(f"{__name__}.triton_prune", "prune")
)
PRUNE_PACK_.kernel("triton", _why_not_prune_pack)(_triton.lazy(f"{__name__}.triton_prune", "prune_pack_"))


def prune(dense: torch.Tensor, n: int = 2, score: str = "abs", *, impl: str = "auto") -> torch.Tensor:
    """Pattern ids with, in every 4x4 block, the largest sum of ``|w|`` (or ``w**2``) over all 90 (24) legal patterns.

    Exact, not greedy; the lowest id wins a tie. Sums are taken in float32 (float64 for float64 input). -0.0 counts as 0;
    inf and NaN count as 2**120, the largest score there is, so that a diverged weight is kept and stays visible.
    Source: issue 2; the initial topology of dense-to-sparse re-training (eDSrT phase 1).

    Args:
        dense: [N, K], both divisible by 4; float32, bfloat16, float16 or float64.
        n: links per row of a 4x4 block, 1 or 2.
        score: "abs" or "square".

    Returns:
        uint8 [N/4, K/4].

    Raises:
        ValueError, TypeError: when an argument does not fit; the message names it.
    """
    check.links_per_row(n)
    check.dense(dense)
    check.choice(score, "score", ("abs", "square"))
    return PRUNE(dense, n, score, impl=impl)


def prune_pack(
    dense: torch.Tensor, n: int = 2, score: str = "abs", dtype: torch.dtype | None = None, *, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """:func:`prune` and :func:`chts_kernels.pack`, and for a compute dtype :func:`chts_kernels.pack_operands_`; no mask is made.

    Args:
        dense, n, score: those of :func:`prune`.
        dtype: bfloat16 or float16, the dtype of the operands; None makes none.

    Returns:
        (ids, values, operand, meta, operand_t, meta_t). For n = 2 and dtype that of ``dense``, operand is values; without dtype
        the last four are None.

    Raises:
        ValueError, TypeError: when an argument does not fit; the message names it.
    """
    check.links_per_row(n)
    check.dense(dense)
    check.choice(score, "score", ("abs", "square"))
    rows, columns = dense.shape
    ids = dense.new_empty(rows // BLOCK, columns // BLOCK, dtype=torch.uint8)
    values = dense.new_empty(rows, columns // BLOCK * n)
    operand = meta = operand_t = meta_t = None
    if dtype is not None:
        check.choice(dtype, "dtype", (torch.bfloat16, torch.float16))
        shared = n == 2 and dtype == dense.dtype
        operand, meta, operand_t, meta_t = empty_operands(rows, columns, dtype, dense.device, with_operand=not shared)
    PRUNE_PACK_(dense, n, score, ids, values, operand, meta, operand_t, meta_t, impl=impl)
    return ids, values, values if operand is None and dtype is not None else operand, meta, operand_t, meta_t
