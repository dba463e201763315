"""remove: drop the k lowest-ranked links of a matrix, softly (Frechet noise) or hard (magnitude)."""

from __future__ import annotations

import torch

from ... import check
from .._batch import too_large, why_not
from .._library import Op
from . import reference

MIN_TEMPERATURE = 1e-30
"""Below about 1e-37, G / T overflows float32 and the rank of a zero (-inf + inf) is lost."""

REMOVE = Op(
    "remove(Tensor values, Tensor ids, int n, float zeta, float temperature, str mode, int seed, int layer, int step) -> Tensor",
    reference.remove,
    lambda values, ids, *_: ids.new_empty(ids.shape, dtype=torch.int32),
)


def remove(
    values: torch.Tensor,
    ids: torch.Tensor,
    n: int = 2,
    *,
    zeta: float = 0.1,
    temperature: float = 1.0,
    mode: str = "soft",
    seed: int = 0,
    layer: int = 0,
    step: int = 0,
    impl: str = "auto",
) -> torch.Tensor:
    """The links that survive the removal of ``k = int(zeta * links)`` links of this matrix.

    Soft removal scores a link ``|w| * (-ln U)**(-1/T)``, U ~ Uniform(0, 1), and drops the k smallest scores: the kept set
    is sampled without replacement with probability proportional to ``|w|**T``. Ranking is done on
    ``ln|w| + G / T``, G = -ln(-ln U), in float32: the same order without overflow. Hard removal ranks by ``|w|``. Zeros
    rank last (are removed first), ties go by index, inf and NaN always rank first. ALGORITHM section 2, step 1.

    Args:
        values: [N, K*n/4].
        ids: uint8 [N/4, K/4].
        n: links per row of a 4x4 block.
        zeta: fraction of the active links to remove, in [0, 1].
        temperature: T of the soft removal, at least 1e-30.
        mode: "soft" or "hard".
        seed, layer, step: what the noise is drawn for (:mod:`chts_kernels.rng`).

    Returns:
        int32 [N/4, K/4]: bit ``4 r + c`` is set when link (r, c) of the block survives.

    Raises:
        ValueError, TypeError: when an argument does not fit; the message names it.
    """
    check.links_per_row(n)
    check.ids(ids)
    check.values_for_ids(values, ids, n)
    check_numbers(zeta, temperature)
    check.choice(mode, "mode", ("soft", "hard"))
    return REMOVE(values, ids, n, float(zeta), float(temperature), mode, seed, layer, step, impl=impl)


def check_numbers(zeta: float, temperature: float) -> None:
    check.require(0.0 <= zeta <= 1.0, "zeta", "be in [0, 1] (a fraction of the active links)", zeta)
    check.require(temperature >= MIN_TEMPERATURE, "temperature", f"be at least {MIN_TEMPERATURE}", temperature)


def _why_not(values: torch.Tensor, ids: torch.Tensor, *_: object) -> str | None:
    return too_large(ids) or why_not(values, ids)


@REMOVE.kernel("triton", _why_not)
def _triton(*args) -> torch.Tensor:
    from . import triton_remove

    return triton_remove.remove(*args)
