"""score: CH2-L3n, the Cannistraci-Hebb likelihood of every possible link given the surviving ones."""

from __future__ import annotations

import torch

from ... import check
from ...patterns import BLOCK
from .._batch import too_large, why_not
from .._library import Op
from . import reference

SCORE = Op(
    "score(Tensor survivors, ScalarType dtype) -> Tensor",
    reference.score,
    lambda survivors, dtype: survivors.new_empty(survivors.shape[0] * BLOCK, survivors.shape[1] * BLOCK, dtype=dtype),
)


def check_survivors(survivors: torch.Tensor) -> None:
    check.tensor(survivors, "survivors")
    check.require(survivors.dtype == torch.int32, "survivors", "have dtype int32", survivors.dtype, TypeError)
    check.require(survivors.dim() == 2, "survivors", "have 2 dimensions [N/4, K/4]", tuple(survivors.shape))


def score(survivors: torch.Tensor, *, dtype: torch.dtype = torch.float32, impl: str = "auto") -> torch.Tensor:
    """CH2-L3n scores of all N x K links of a bipartite layer.

    With M the 0/1 matrix of the survivors: ``P = M M^T``, ``B = (P != 0)``, ``d`` the row sums,
    ``E[u, z] = (d[z] - P[u, z]) B[u, z]``, ``W = (P + B) / (E + 1)`` for rows, and the same of M^T for columns;
    ``S = W_row M + (W_col M^T)^T``. ALGORITHM section 2, step 2.

    Args:
        survivors: int32 [N/4, K/4] from :func:`chts_kernels.remove`.
        dtype: of the result: float32 or float64. The reference computes in float64 either way.

    Returns:
        [N, K].

    Raises:
        ValueError, TypeError: when an argument does not fit; the message names it.
    """
    check_survivors(survivors)
    check.choice(dtype, "dtype", (torch.float32, torch.float64))
    return SCORE(survivors, dtype, impl=impl)


def _why_not(survivors: torch.Tensor, dtype: torch.dtype) -> str | None:
    if dtype != torch.float32:
        return f"it computes float32 scores, got dtype {dtype}"
    return too_large(survivors) or why_not(survivors)


@SCORE.kernel("triton", _why_not)
def _triton(*args) -> torch.Tensor:
    from . import triton_score

    return triton_score.score(*args)
