"""Second moments for links that have just been made, by a topology update or all at once: an estimate from the links around them.

Adam divides by sqrt(v). A new link whose v starts at 0, while the bias correction of its tensor's step counter is long over, makes
steps of up to (1 - beta1^t) / sqrt(1 - beta2^t) learning rates, 6.5 at its tenth step with the usual betas, whatever its gradient.
The estimate is the rank-one factorisation of Adafactor (Shazeer and Stern, "Adafactor", ICML 2018), over the links that were there
before: v[i, j] = r[i] * c[j] / m, with r the mean of v over row i, c over column j, and m over the matrix. It is exact where v is an outer
product, as the squared gradients of a linear layer nearly are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chts_kernels import unpack
from chts_kernels.ops.pack.reference import link_columns
from chts_kernels.patterns import BLOCK

from .distributed import first_row, is_dtensor, mesh_group
from .linear import SparseLinear

NEW_MOMENTS = ("zero", "estimated")
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")
"""Keys of torch's optimizers for running means of squared gradients."""


def link_states(optimizer: torch.optim.Optimizer, name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """The entries of a parameter's optimizer state that have a number for every element and so can follow it; scalars stay behind.

    Args:
        name: of the parameter, for errors.
        values: the parameter.

    Raises:
        TypeError: when the optimizer keeps anything else for it.
    """
    found = {}
    for key, entry in optimizer.state.get(values, {}).items():
        if isinstance(entry, torch.Tensor) and entry.shape == values.shape:
            found[key] = entry
        elif not (entry is None or isinstance(entry, int | float) or (isinstance(entry, torch.Tensor) and entry.numel() == 1)):
            what = f"a tensor of shape {tuple(entry.shape)}" if isinstance(entry, torch.Tensor) else type(entry).__name__
            raise TypeError(
                f"optimizer: must keep per-parameter state in the parameter's shape for links to carry it along, got "
                f"{type(optimizer).__name__} with state[{key!r}] = {what} for {name} {tuple(values.shape)}"
            )
    return found


@torch.no_grad()
def estimate_(layer: SparseLinear, ages: torch.Tensor, moments: Sequence[torch.Tensor], name: str) -> None:
    """Fill in the second moments of a layer's new links, in place; nothing waits for the device.

    Deterministic on one kind of device, so that the ranks of a data-parallel job go on in step: no atomic additions, at the price of a
    dense [rows, K] for a moment.

    Args:
        layer: with its ids of today.
        ages: uint8 [N, K*n/4] like the values (a DTensor where they are one): 0 marks a new link.
        moments: each [N, K*n/4] likewise.
        name: of the layer, for errors.

    Raises:
        NotImplementedError: values sharded otherwise than along dim 0.
    """
    start, group = 0, None
    if is_dtensor(layer.values):
        start, group = first_row(layer.values, f"{name}.values"), mesh_group(layer.values)
        ages, moments = ages.to_local(), [moment.to_local() for moment in moments]
    new = ages == 0
    rows, columns = len(new), BLOCK * layer.ids.shape[1]
    # [rows, K*n/4]: the column of every link of these rows
    blocks = slice(start // BLOCK, -(-(start + rows) // BLOCK))
    inside = link_columns(layer.ids[blocks], layer.n)[start % BLOCK : start % BLOCK + rows]
    at = (inside + BLOCK * torch.arange(layer.ids.shape[1], device=new.device)[:, None]).reshape(new.shape)
    for moment in moments:
        wide = torch.promote_types(moment.dtype, torch.float32)
        kept = (~new).to(wide)
        old = moment.to(wide) * kept
        # [2, K]: sums and counts of columns
        totals = torch.stack([_column_sums(old, at, columns), _column_sums(kept, at, columns)])
        if group is not None:
            torch.distributed.all_reduce(totals, group=group)
        whole, links = totals.sum(1).unbind()
        mean = whole / links.clamp(min=1)
        by_column = torch.where(totals[1] > 0, totals[0] / totals[1].clamp(min=1), mean)
        count = kept.sum(1)
        by_row = torch.where(count > 0, old.sum(1) / count.clamp(min=1), mean)
        guess = by_row[:, None] * (by_column / mean.clamp(min=torch.finfo(wide).tiny))[at]
        moment.copy_(torch.where(new, guess.to(moment.dtype), moment))


@torch.no_grad()
def spread(moment: torch.Tensor, ids: torch.Tensor, n: int) -> torch.Tensor:
    """The second moment of a whole dense weight, from that of its links: theirs at their places, the estimate everywhere else.

    Args:
        moment: float [N, K*n/4].
        ids: uint8 [N/4, K/4].
        n: links per group of four, 2 or 1.

    Returns:
        [N, K], of the moment's dtype.
    """
    wide = unpack(moment.to(torch.promote_types(moment.dtype, torch.float32)), ids, n)
    links = unpack(torch.ones_like(moment, dtype=wide.dtype), ids, n)
    # Every row and every column of a legal topology has links.
    by_row, by_column, mean = wide.sum(1) / links.sum(1), wide.sum(0) / links.sum(0), wide.sum() / links.sum()
    guess = by_row[:, None] * (by_column / mean.clamp(min=torch.finfo(wide.dtype).tiny))
    return torch.where(links > 0, wide, guess).to(moment.dtype)


def _column_sums(links: torch.Tensor, at: torch.Tensor, columns: int) -> torch.Tensor:
    return links.new_zeros(len(links), columns).scatter_(1, at, links).sum(0)
