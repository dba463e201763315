"""Helpers for tests of sparse operations, this package's own and those of whoever adds a kernel.

Inputs from a seed (:func:`random_tensor`, :func:`random_weight`, :func:`special_values`), memory that shows when it was
not written (:func:`poison`), and two comparisons: bit for bit (:func:`assert_bitwise_equal`) and "not worse than plain
torch at this precision" (:func:`assert_no_worse_than`), whose tolerance comes from the data instead of from a guess.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import torch

from . import check
from .format import SparseWeight, random_ids

MAGNITUDES = ("normal", "integer", "wide", "cancelling")
"""Kinds of numbers of :func:`random_tensor`."""


def random_tensor(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    magnitude: str = "normal",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """A floating tensor that depends on (shape, magnitude, seed) alone, rounded to ``dtype``.

    Args:
        magnitude: "normal": N(0, 1). "integer": -3 to 3: products and their sums (below 2**24 / 9 terms) are exact in
            float32, so every summation order gives the same bits and a kernel can be compared bit for bit. "wide":
            N(0, 1) times a power of two from 2**-5 to 2**5 for each element: large and tiny terms meet in one sum, and
            float16 holds the sums of some thousand products. "cancelling": each element of an even column has its
            negative, one part in 64 off, in the next column, so that sums lose six bits to cancellation.

    Raises:
        ValueError, TypeError: when ``magnitude`` or ``dtype`` is unknown.
    """
    check.choice(magnitude, "magnitude", MAGNITUDES)
    check.choice(dtype, "dtype", check.FLOATS)
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    if magnitude == "integer":
        normal = torch.randint(-3, 4, tuple(shape), generator=generator).double()
    elif magnitude == "wide":
        normal = torch.ldexp(normal, torch.randint(-5, 6, tuple(shape), generator=generator))
    elif magnitude == "cancelling":
        pairs = normal.shape[-1] // 2 * 2
        normal[..., 1:pairs:2] = -normal[..., 0:pairs:2] * (1 + 1 / 64)
    return normal.to(device, dtype)


def random_weight(
    rows: int,
    columns: int,
    n: int = 2,
    dtype: torch.dtype = torch.float32,
    *,
    magnitude: str = "normal",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> SparseWeight:
    """A SparseWeight [rows, columns] with uniform pattern ids and values from :func:`random_tensor`.

    Raises:
        ValueError, TypeError: when an argument does not fit; the message names it.
    """
    ids = random_ids(rows, columns, n, seed=seed, device=device)
    values = random_tensor((rows, columns // 4 * n), dtype, magnitude=magnitude, seed=seed + 1, device=device)
    return SparseWeight(ids, values, n)


def special_values(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> torch.Tensor:
    """The numbers that careless code loses: +0, -0, the smallest subnormal and normal, the largest, inf, NaN; 1-d."""
    info = torch.finfo(dtype)
    positive = [0.0, info.smallest_normal * info.eps, info.smallest_normal, 1.0, info.max, float("inf")]
    return torch.tensor([*positive, *(-x for x in positive), float("nan")], dtype=torch.float64).to(device, dtype)


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Within it, fresh memory (``torch.empty``, ``new_empty``, ``empty_like``, ...) holds NaN, or the largest integer.

    An element that an operation forgot to write then fails its comparison, on the CPU and on CUDA. Uses torch's own
    deterministic fill, so the process is in deterministic mode (warnings only) until the end of the block.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Dd]eterministic")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = before[2]


def assert_bitwise_equal(actual: torch.Tensor, expected: torch.Tensor, *, limit: int = 8) -> None:
    """Same shape, same dtype, same bits: -0.0 is not 0.0, and NaNs are equal when their payloads are.

    Raises:
        AssertionError: with the number of differing elements, and coordinates, values and bits of the first ``limit``.
    """
    _assert_alike(actual, expected)
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    bits, expected_bits = actual.contiguous().view(signed), expected.contiguous().view(signed)
    wrong = (bits != expected_bits).nonzero()
    if not len(wrong):
        return
    digits = 2 * actual.element_size()
    lines = [f"{len(wrong)} of {actual.numel()} elements differ in their bits ({actual.dtype}):"]
    for row in wrong[:limit].tolist():
        place = tuple(row)
        hexed = [f"{t[place].item() & ((1 << 4 * digits) - 1):0{digits}x}" for t in (bits, expected_bits)]
        lines.append(
            f"  {place}: got {actual[place].item()!r} (0x{hexed[0]}), "
            f"expected {expected[place].item()!r} (0x{hexed[1]})"
        )
    if len(wrong) > limit:
        lines.append(f"  ... and {len(wrong) - limit} more")
    raise AssertionError("\n".join(lines))


def assert_no_worse_than(
    actual: torch.Tensor, exact: torch.Tensor, baseline: torch.Tensor, factor: float = 2.0
) -> None:
    """The error of ``actual`` is at most ``factor`` times that of ``baseline``, plain torch on the very same inputs.

    Both the largest and the root-mean-square absolute error count, each with one rounding (of the largest, of the
    root-mean-square result) to the dtype of ``actual`` on top, for a baseline that happens to be exact. Elements that
    are finite in ``exact`` and ``baseline`` must be finite; where ``exact`` is inf or NaN, ``actual`` must hold the same.

    Args:
        actual: the result under test, any floating dtype.
        exact: float64: the same computation on the inputs converted to float64.
        baseline: the same computation by plain torch in the working precision.

    Raises:
        AssertionError: with both errors, their ratio and the worst coordinate.
        TypeError: when ``exact`` is not float64.
    """
    check.floating(exact, "exact", (torch.float64,))
    assert actual.shape == exact.shape == baseline.shape, (
        f"shapes differ: actual {tuple(actual.shape)}, exact {tuple(exact.shape)}, baseline {tuple(baseline.shape)}"
    )
    eps = torch.finfo(actual.dtype).eps
    actual, exact, baseline = (t.detach().cpu().double() for t in (actual, exact, baseline))
    finite = exact.isfinite()
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    lost = ~finite & ~same | finite & baseline.isfinite() & ~actual.isfinite()
    if lost.any():
        place = tuple(lost.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(lost.sum())} elements are inf or NaN where they must not be, or the reverse; first at {place}: "
            f"got {actual[place].item()}, exact {exact[place].item()}, baseline {baseline[place].item()}"
        )
    compared = finite & baseline.isfinite() & actual.isfinite()
    if not compared.any():
        return
    error = torch.where(compared, (actual - exact).abs(), 0.0)
    error_of_baseline = torch.where(compared, (baseline - exact).abs(), 0.0)
    size = torch.where(compared, exact.abs(), 0.0)
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    for name, got, allowed, rounding in (
        ("largest", error.max(), error_of_baseline.max(), eps * size.max()),
        ("root-mean-square", _rms(error), _rms(error_of_baseline), eps * _rms(size)),
    ):
        if got > factor * allowed + rounding:
            ratio = float(got / allowed) if allowed else float("inf")
            raise AssertionError(
                f"the {name} error is {got:.3e}, {ratio:.2f} times the {allowed:.3e} of plain torch (allowed: {factor}); "
                f"worst at {worst}: got {actual[worst].item()!r}, exact {exact[worst].item()!r}, "
                f"baseline {baseline[worst].item()!r}"
            )


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean().sqrt()


def _assert_alike(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape, f"shapes differ: got {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"dtypes differ: got {actual.dtype}, expected {expected.dtype}"
