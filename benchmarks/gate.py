"""The correctness gate: no time is reported for a result that is not right on the very tensors that were timed."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

CHUNK = 1 << 25  # elements compared at a time: float64 copies stay below 1 GB


class GateError(Exception):
    """A provider computed something else; the message says how far off it is."""


@dataclass
class Reference:
    """A result in float64, plain torch's on the same inputs, and (computed once) how far apart they are."""

    exact: torch.Tensor
    baseline: torch.Tensor

    @functools.cached_property
    def errors_and_sizes(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """((error of the baseline, size of the result) by the largest element, the same by root mean square)."""
        tops, means = _distances(self.baseline, self.exact, sizes=True)
        return (tops[0], tops[1]), (means[0], means[1])


def no_worse_than(actual: torch.Tensor, reference: Reference, what: str, factor: float = 2.0) -> None:
    """The error against float64 is at most ``factor`` times that of plain torch on the same inputs.

    The rule of ``chts_kernels.testing.assert_no_worse_than`` (largest and root-mean-square error, each plus one
    rounding of the result), computed where the tensors are.

    Args:
        actual: the result under test, any floating dtype.
        what: name of the result for the message.

    Raises:
        GateError: when shape, finiteness or either error is off.
    """
    if actual.shape != reference.exact.shape:
        raise GateError(f"{what} has shape {tuple(actual.shape)} instead of {tuple(reference.exact.shape)}")
    eps = torch.finfo(actual.dtype).eps
    tops, means = _distances(actual, reference.exact)
    names = ("largest", "root-mean-square")
    for name, error, (allowed, size) in zip(names, (tops[0], means[0]), reference.errors_and_sizes, strict=True):
        if not error <= factor * allowed + eps * size:  # "not <=": NaN fails
            raise GateError(
                f"{what}: the {name} error is {error:.3g}, plain torch's is {allowed:.3g} "
                f"({factor:g} times that is allowed; the result's size is {size:.3g})"
            )


def _distances(
    actual: torch.Tensor, exact: torch.Tensor, *, sizes: bool = False
) -> tuple[list[float], list[float]]:
    """Largest and root-mean-square values of ``actual - exact``, and with ``sizes`` of ``exact`` too."""
    kinds = 2 if sizes else 1
    sums = torch.zeros(kinds, dtype=torch.float64, device=exact.device)
    tops = torch.zeros(kinds, dtype=torch.float64, device=exact.device)
    rows = max(1, CHUNK // max(1, exact[0].numel())) if exact.numel() else 1
    for start in range(0, len(exact), rows):
        true = exact[start : start + rows]
        values = [actual[start : start + rows].double() - true, true][:kinds]
        for i, value in enumerate(values):
            sums[i] += value.square().sum()
            tops[i] = torch.maximum(tops[i], value.abs().max())  # a NaN stays
    return tops.tolist(), (sums / max(1, exact.numel())).sqrt().tolist()


def equal(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Raise GateError unless both are equal bit for bit (as numbers: -0.0 equals 0.0)."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise GateError(
            f"{what} is {actual.dtype} {tuple(actual.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
        )
    if not torch.equal(actual, expected):
        count = int((actual != expected).sum())
        raise GateError(f"{what}: {count} of {actual.numel()} elements differ from the reference")


def at_least(value: float, bound: float, what: str) -> None:
    if not value >= bound:
        raise GateError(f"{what} is {value:.6g}, at least {bound:.6g} is required")


def at_most(value: float, bound: float, what: str) -> None:
    if not value <= bound:
        raise GateError(f"{what} is {value:.6g}, at most {bound:.6g} is allowed")


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Frobenius norm of the error over that of ``exact``."""
    difference = actual.double() - exact
    return float(difference.norm() / exact.norm())
