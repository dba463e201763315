"""carry_over_: values and optimizer moments follow their links to new pattern ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import check
from .._batch import why_not, why_not_in_place
from .._library import Op
from . import reference

CARRY_OVER_ = Op(
    "carry_over_(Tensor(a!)[] tensors, Tensor old_ids, Tensor new_ids, int n) -> ()",
    reference.carry_over_,
    lambda *args: None,
)


def carry_over_(
    tensors: Sequence[torch.Tensor], old_ids: torch.Tensor, new_ids: torch.Tensor, n: int = 2, *, impl: str = "auto"
) -> None:
    """Move every tensor of link data from ``old_ids`` to ``new_ids``, in place.

    A link in both keeps its number (bit for bit); a new link starts at 0; a link that left is forgotten. ALGORITHM
    section 2, step 4.

    Args:
        tensors: each [N, K*n/4] in the order of the values, any dtype: values, Adam moments, link ages.
        old_ids, new_ids: uint8 [N/4, K/4].
        n: links per row of a 4x4 block.

    Raises:
        ValueError, TypeError: when an argument does not fit; the message names it; then no tensor was touched.
    """
    check.links_per_row(n)
    check.ids(old_ids, "old_ids")
    check.ids(new_ids, "new_ids")
    check.require(new_ids.shape == old_ids.shape, "new_ids", f"have the shape of old_ids {tuple(old_ids.shape)}", tuple(new_ids.shape))
    check.same_device(old_ids=old_ids, new_ids=new_ids)
    for index, tensor in enumerate(tensors):
        check.link_data(tensor, old_ids, n, f"tensors[{index}]")
    if tensors:
        CARRY_OVER_(list(tensors), old_ids, new_ids, n, impl=impl)


def _why_not(tensors: list[torch.Tensor], old_ids: torch.Tensor, new_ids: torch.Tensor, n: int) -> str | None:
    return why_not_in_place(tensors) or why_not(*tensors, old_ids, new_ids)


@CARRY_OVER_.kernel("triton", _why_not)
def _triton(*args) -> None:
    from . import triton_carry_over

    triton_carry_over.carry_over_(*args)
