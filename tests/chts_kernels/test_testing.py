"""The test helpers: they must fail when they should."""

from __future__ import annotations

import pytest
import torch

from chts_kernels.check import FLOATS
from chts_kernels.testing import (
    MAGNITUDES,
    assert_bitwise_equal,
    assert_no_worse_than,
    poison,
    random_tensor,
    random_weight,
    special_values,
)


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_random_tensor(magnitude: str, dtype: torch.dtype) -> None:
    x = random_tensor((16, 33), dtype, magnitude=magnitude, seed=4)
    assert x.dtype == dtype and x.shape == (16, 33) and x.isfinite().all()
    assert_bitwise_equal(x, random_tensor((16, 33), torch.float64, magnitude=magnitude, seed=4).to(dtype))
    assert not torch.equal(x, random_tensor((16, 33), dtype, magnitude=magnitude, seed=5))
    assert (x @ x.t()).isfinite().all()


def test_magnitudes_are_what_they_say() -> None:
    integer = random_tensor((64, 64), torch.bfloat16, magnitude="integer")
    assert set(integer.unique().tolist()) == set(range(-3, 4))
    wide = random_tensor((64, 64), magnitude="wide").abs()
    assert wide.max() > 64 and wide.median() < 2
    cancelling = random_tensor((64, 64), torch.float64, magnitude="cancelling")
    assert (cancelling.sum() / cancelling.abs().sum()).abs() < 1 / 64
    with pytest.raises(ValueError, match=r"magnitude: must be one of \('normal'|magnitude: must be one of \['normal'"):
        random_tensor((4,), magnitude="huge")
    with pytest.raises(ValueError, match="dtype: must be one of"):
        random_tensor((4,), torch.int32)


@pytest.mark.parametrize("n", (1, 2))
def test_random_weight(n: int) -> None:
    w = random_weight(8, 12, n, torch.float16, magnitude="integer", seed=3)
    w.validate()
    assert w.n == n and w.shape == (8, 12) and w.dtype == torch.float16
    assert_bitwise_equal(w.values, random_weight(8, 12, n, torch.float16, magnitude="integer", seed=3).values)


@pytest.mark.parametrize("dtype", FLOATS)
def test_special_values(dtype: torch.dtype) -> None:
    x = special_values(dtype)
    assert x.dtype == dtype and x.isnan().sum() == 1 and x.isinf().sum() == 2
    assert ((x != 0) & (x.abs() < torch.finfo(dtype).smallest_normal)).sum() == 2
    assert (torch.signbit(x) & (x == 0)).sum() == 1


@pytest.mark.parametrize("dtype", (*FLOATS, torch.uint8, torch.int32, torch.int64))
def test_poison_fills_every_kind_of_fresh_memory(dtype: torch.dtype) -> None:
    x = torch.ones(3, 5, dtype=dtype)
    with poison():
        fresh = [
            torch.empty(3, 5, dtype=dtype), torch.empty_like(x), x.new_empty(3, 5), torch.empty_strided((3,), (1,), dtype=dtype),
            x.new_empty_strided((2,), (1,)),
        ]  # fmt: skip
    for tensor in fresh:
        assert tensor.isnan().all() if dtype.is_floating_point else tensor.eq(torch.iinfo(dtype).max).all()


def test_poison_restores_what_it_found() -> None:
    def state() -> tuple:
        return (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
                torch.utils.deterministic.fill_uninitialized_memory)  # fmt: skip

    before = state()
    with pytest.raises(KeyError), poison():
        assert torch.are_deterministic_algorithms_enabled()
        raise KeyError
    assert state() == before


@pytest.mark.parametrize("dtype", (*FLOATS, torch.uint8, torch.int32, torch.bool))
def test_bitwise_equal_accepts_equal_bits(dtype: torch.dtype) -> None:
    x = special_values(dtype) if dtype.is_floating_point else torch.tensor([0, 1, 1, 0], dtype=dtype)
    assert_bitwise_equal(x, x.clone())
    assert_bitwise_equal(x.expand(3, -1).t(), x.expand(3, -1).t().contiguous())
    assert_bitwise_equal(x[0], x[0].clone())
    assert_bitwise_equal(x[:0], x[:0])


def test_bitwise_equal_tells_zeros_and_nan_payloads_apart() -> None:
    with pytest.raises(AssertionError, match=r"1 of 4 .*\n  \(1, 0\): got -0.0 \(0x80000000\), expected 0.0 \(0x00000000\)"):
        assert_bitwise_equal(torch.tensor([[1.0, 2.0], [-0.0, 3.0]]), torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    quiet = torch.tensor([torch.nan])
    other = (quiet.view(torch.int32) + 1).view(torch.float32)
    with pytest.raises(AssertionError, match=r"got nan \(0x7fc00001\), expected nan \(0x7fc00000\)"):
        assert_bitwise_equal(other, quiet)


def test_bitwise_equal_shortens_long_lists_and_checks_shape_and_dtype() -> None:
    with pytest.raises(AssertionError, match=r"\(0, 2\): .*\n  \.\.\. and 97 more"):
        assert_bitwise_equal(torch.ones(10, 10), torch.zeros(10, 10), limit=3)
    with pytest.raises(AssertionError, match=r"shapes differ: got \(2,\), expected \(1,\)"):
        assert_bitwise_equal(torch.ones(2), torch.ones(1))
    with pytest.raises(AssertionError, match="dtypes differ: got torch.float32, expected torch.float64"):
        assert_bitwise_equal(torch.ones(1), torch.ones(1).double())


def products() -> tuple[torch.Tensor, torch.Tensor]:
    a, b = random_tensor((32, 64), torch.bfloat16, seed=1), random_tensor((64, 32), torch.bfloat16, seed=2)
    return a.double() @ b.double(), a @ b


def test_no_worse_than_accepts_the_baseline_and_better() -> None:
    exact, baseline = products()
    assert_no_worse_than(baseline, exact, baseline)
    assert_no_worse_than(exact.float(), exact, baseline)
    assert_no_worse_than(exact.bfloat16(), exact, exact)  # one rounding is allowed to a perfect baseline
    assert_no_worse_than(exact[:0].float(), exact[:0], baseline[:0])


def test_no_worse_than_sees_a_wrong_element_and_a_lower_precision() -> None:
    exact, baseline = products()
    wrong = baseline.clone()
    wrong[3, 4] += 1
    with pytest.raises(AssertionError, match=r"the largest error is .* worst at \(3, 4\): got"):
        assert_no_worse_than(wrong, exact, baseline)
    coarse = exact.float() * (1 + 2**-6 * torch.sign(random_tensor((32, 32), seed=9)))
    with pytest.raises(AssertionError, match="error is .* times the .* of plain torch"):
        assert_no_worse_than(coarse, exact, baseline)
    assert_no_worse_than(coarse, exact, baseline, factor=1000)
    everywhere = exact.float() + 0.9 * (baseline.double() - exact).abs().max().float()  # small, but biased
    with pytest.raises(AssertionError, match="root-mean-square"):
        assert_no_worse_than(everywhere, exact, baseline)


def test_no_worse_than_wants_the_same_specials() -> None:
    exact, baseline = products()
    poisoned = baseline.clone()
    poisoned[1, 2] = torch.nan
    with pytest.raises(AssertionError, match=r"1 elements are inf or NaN .* first at \(1, 2\): got nan"):
        assert_no_worse_than(poisoned, exact, baseline)
    infinite = exact.clone()
    infinite[1, 2] = torch.inf
    with pytest.raises(AssertionError, match="exact inf"):
        assert_no_worse_than(baseline, infinite, baseline)
    assert_no_worse_than(infinite.float(), infinite, baseline)
    overflowing = baseline.clone()
    overflowing[0, 0] = torch.inf  # plain torch overflows here: nothing is asked of this element
    assert_no_worse_than(baseline, exact, overflowing)
    with pytest.raises(TypeError, match="exact: must have dtype float64"):
        assert_no_worse_than(baseline, exact.float(), baseline)
