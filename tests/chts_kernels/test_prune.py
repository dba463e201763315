"""prune against the search over all patterns, its tie rule and its policy for numbers that are not numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chts_kernels import SparseWeight, pattern_table, prune
from chts_kernels.check import FLOATS
from chts_kernels.testing import MAGNITUDES, random_tensor, special_values

BOTH = pytest.mark.parametrize("n", (1, 2))
SETTINGS = settings(max_examples=80, deadline=None, derandomize=True)


def blocks(dense: torch.Tensor, score: str) -> np.ndarray:
    """Magnitudes [N/4, K/4, 4, 4] in the dtype that prune sums in."""
    magnitude = dense.abs().to(torch.float64 if dense.dtype == torch.float64 else torch.float32).numpy()
    magnitude = magnitude if score == "abs" else magnitude * magnitude
    rows, columns = magnitude.shape
    return magnitude.reshape(rows // 4, 4, columns // 4, 4).transpose(0, 2, 1, 3)


def brute_force(dense: torch.Tensor, n: int, score: str = "abs") -> np.ndarray:
    """Ids by summing every pattern of every block in the documented order: a row's scores left to right, then
    (row 0 + row 1) + (row 2 + row 3). argmax takes the lowest id of equals."""
    by_block, columns = blocks(dense, score), pattern_table(n).columns
    totals = []
    for pattern in columns:
        row = [by_block[:, :, r, pattern[r, 0]] for r in range(4)]
        if n == 2:
            row = [row[r] + by_block[:, :, r, pattern[r, 1]] for r in range(4)]
        totals.append((row[0] + row[1]) + (row[2] + row[3]))
    return np.stack(totals, -1).argmax(-1)


def best_kept(dense: torch.Tensor, n: int, score: str) -> np.ndarray:
    """The largest kept magnitude of every block, in float64."""
    return np.einsum("abrc,prc->abp", blocks(dense, score).astype(np.float64), pattern_table(n).masks * 1.0).max(-1)


def kept(dense: torch.Tensor, ids: torch.Tensor, n: int, score: str = "abs") -> np.ndarray:
    return (blocks(dense, score).astype(np.float64) * pattern_table(n).masks[ids.numpy()]).sum((2, 3))


def greedy(block: np.ndarray, n: int) -> float | None:
    """What the greedy transposable mask keeps, largest first while its row and its column have room; None when that ends
    in a mask with too few links."""
    rows, columns, total = [0] * 4, [0] * 4, 0.0
    for place in np.argsort(-block, axis=None, kind="stable"):
        r, c = divmod(int(place), 4)
        if rows[r] < n and columns[c] < n:
            rows[r], columns[c], total = rows[r] + 1, columns[c] + 1, total + block[r, c]
    return total if sum(rows) == 4 * n else None


@pytest.mark.parametrize("score", ("abs", "square"))
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("dtype", FLOATS)
@BOTH
def test_best_of_all_patterns(n: int, dtype: torch.dtype, magnitude: str, score: str) -> None:
    dense = random_tensor((48, 64), dtype, magnitude=magnitude, seed=n)
    ids = prune(dense, n, score)
    assert ids.dtype == torch.uint8 and ids.shape == (12, 16) and ids.is_contiguous()
    assert np.array_equal(ids.numpy(), brute_force(dense, n, score))
    assert (kept(dense, ids, n, score) >= best_kept(dense, n, score) * (1 - 2**-21)).all()


@BOTH
def test_the_order_of_summation_is_part_of_the_contract(n: int) -> None:
    """Numbers around one rounding of float32: another order of the same sum picks other patterns."""
    eps = 2.0**-23
    numbers = torch.tensor([1.0, 1 + eps, 1 + 2 * eps, 2 + 2 * eps, 4 + 4 * eps, eps / 2, eps, 1.5 * eps])
    generator = torch.Generator().manual_seed(0)
    dense = numbers[torch.randint(0, len(numbers), (128, 128), generator=generator)]
    ids = prune(dense, n).numpy()
    assert np.array_equal(ids, brute_force(dense, n))
    exact = np.einsum("abrc,prc->abp", blocks(dense, "abs").astype(np.float64), pattern_table(n).masks * 1.0).argmax(-1)
    assert (ids != exact).mean() > 0.01  # the numbers do what they are here for


@pytest.mark.parametrize("score", ("abs", "square"))
@BOTH
def test_float64_is_compared_in_float64(n: int, score: str) -> None:
    dense = random_tensor((32, 32), torch.float64, seed=7)
    assert np.array_equal(prune(dense, n, score).numpy(), brute_force(dense, n, score))
    close = torch.zeros(4, 4, dtype=torch.float64)
    close[:] = 1.0
    best = torch.from_numpy(pattern_table(n).masks[17])
    close[best] += 1e-12  # nothing in float32
    assert prune(close, n).item() == 17
    assert prune(close.float(), n).item() == 0


@SETTINGS
@given(st.lists(st.integers(-2, 2), min_size=16, max_size=16), st.sampled_from((1, 2)))
def test_ties_go_to_the_lowest_id(numbers: list[int], n: int) -> None:
    dense = torch.tensor(numbers, dtype=torch.float32).view(4, 4)
    for score in ("abs", "square"):
        assert prune(dense, n, score).item() == brute_force(dense, n, score).item()


@BOTH
def test_equal_magnitudes_take_pattern_0(n: int) -> None:
    for fill in (0.0, -0.0, 1.0, -1.0, torch.inf, torch.nan):
        assert prune(torch.full((8, 8), fill), n).eq(0).all(), fill


@pytest.mark.parametrize("dtype", FLOATS)
@BOTH
def test_signs_do_not_matter(n: int, dtype: torch.dtype) -> None:
    """What a greedy mask in the field gets wrong: signed magnitudes."""
    dense = random_tensor((32, 32), dtype, seed=5)
    assert torch.equal(prune(dense, n), prune(-dense, n))
    assert torch.equal(prune(dense, n), prune(dense.abs(), n))


@BOTH
def test_every_pattern_is_found_at_its_own_mask(n: int) -> None:
    masks = pattern_table(n).tensor("masks").float()
    dense = masks.transpose(0, 1).reshape(4, -1)  # all patterns side by side
    assert prune(dense, n).flatten().tolist() == list(range(len(masks)))
    assert prune(dense * -3, n, "square").flatten().tolist() == list(range(len(masks)))


@BOTH
def test_not_worse_than_greedy(n: int) -> None:
    dense = random_tensor((64, 64), seed=11)
    exact = kept(dense, prune(dense, n), n).flatten()
    by_greed = [greedy(block, n) for block in blocks(dense, "abs").astype(np.float64).reshape(-1, 4, 4)]
    pairs = [(e, g) for e, g in zip(exact, by_greed, strict=True) if g is not None]
    assert all(e >= g * (1 - 1e-6) for e, g in pairs)
    assert sum(e > g * (1 + 1e-3) for e, g in pairs) > len(pairs) / 20  # and often better
    assert len(pairs) > 128 * n / 2


@pytest.mark.parametrize("dtype", FLOATS)
@BOTH
def test_inf_and_nan_are_kept_before_everything(n: int, dtype: torch.dtype) -> None:
    for special in (torch.nan, torch.inf, -torch.inf):
        dense = torch.full((4, 4), torch.finfo(dtype).max / 2**9, dtype=dtype)
        dense[2, 1] = special
        assert pattern_table(n).masks[prune(dense, n).item()][2, 1], special


@BOTH
def test_special_blocks_never_fail(n: int) -> None:
    special = special_values()
    generator = torch.Generator().manual_seed(0)
    dense = special[torch.randint(0, len(special), (64, 64), generator=generator)]
    ids = prune(dense, n)
    assert (ids < len(pattern_table(n))).all()
    # equal scores for what has no order: inf, NaN and everything at or above 2**120
    clamped = torch.nan_to_num(dense.abs(), nan=torch.inf).clamp(max=2.0**120)
    assert torch.equal(ids, prune(clamped, n))


def test_square_and_abs_are_different_questions() -> None:
    """One 3 beats two 2s in squares (9 > 8) and loses in magnitude (3 < 4)."""
    dense = torch.zeros(4, 4)
    dense[0, 0], dense[0, 1], dense[1, 0] = 3, 2, 2
    by_abs, by_square = (pattern_table(1).masks[prune(dense, 1, s).item()] for s in ("abs", "square"))
    assert by_square[0, 0] and not by_abs[0, 0]
    assert by_abs[0, 1] and by_abs[1, 0]


@BOTH
def test_any_strides(n: int) -> None:
    dense = random_tensor((32, 16), seed=2)
    assert torch.equal(prune(dense.t(), n), prune(dense.t().contiguous(), n))
    wide = torch.zeros(32, 32)
    wide[:, ::2] = dense
    assert torch.equal(prune(wide[:, ::2], n), prune(dense, n))
    assert prune(dense.t(), n).is_contiguous()
    SparseWeight.from_dense(dense.t(), n).validate()


def test_does_not_change_its_input_or_keep_a_graph() -> None:
    dense = random_tensor((8, 8)).requires_grad_()
    before = dense.detach().clone()
    assert not prune(dense).requires_grad
    assert torch.equal(dense, before)
