"""The MVUE weight gradient as an operation and as an option of spmm: what its noise is drawn for, and when it is drawn."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from chts_kernels import Mvue24, SparseWeight, spmm, weight_grad, weight_grad_mvue
from chts_kernels.testing import assert_bitwise_equal, random_tensor, random_weight

BF16 = torch.bfloat16


def problem(tokens=33, rows=16, columns=24, dtype=BF16, n=2):
    w = random_weight(rows, columns, n)
    return random_tensor((tokens, rows), dtype, seed=1), random_tensor((tokens, columns), dtype, seed=2), w


@pytest.mark.parametrize("n", (1, 2))
@pytest.mark.parametrize("dtype", (BF16, torch.float16, torch.float32), ids=str)
def test_mean_is_the_exact_gradient(n: int, dtype: torch.dtype) -> None:
    dy, x, w = problem(64, dtype=dtype, n=n)
    exact = weight_grad(dy.double(), x.double(), w.ids, n)
    draws = torch.stack([
        weight_grad_mvue(dy, x, w.ids, n, seed=3, step=step, out_dtype=torch.float32).double() for step in range(400)
    ])  # fmt: skip
    deviation = (draws.mean(0) - exact) / (draws.std(0) / 400**0.5)
    assert deviation.abs().max() < 5 and deviation.square().mean().sqrt() < 1.2


@pytest.mark.parametrize("tokens", (0, 1, 17, 129))
def test_any_number_of_tokens_and_leading_dimensions(tokens: int) -> None:
    dy, x, w = problem(tokens)
    flat = weight_grad_mvue(dy, x, w.ids, seed=1)
    assert flat.shape == w.values.shape and flat.dtype == BF16
    assert_bitwise_equal(flat, weight_grad_mvue(dy[None], x[None], w.ids, seed=1))
    if tokens < 3:  # of fewer than three tokens none has to go
        assert_bitwise_equal(flat, weight_grad(dy, x, w.ids))


def test_the_counter_is_added_to_the_step() -> None:
    dy, x, w = problem()
    at = lambda step, counter: weight_grad_mvue(  # noqa: E731
        dy, x, w.ids, seed=1, layer=2, step=step, counter=None if counter is None else torch.tensor([counter])
    )
    assert_bitwise_equal(at(7, None), at(3, 4))
    assert_bitwise_equal(at(5, None), at(6, (1 << 32) - 1))  # 32 bits
    assert not torch.equal(at(7, None), at(8, None))


def backward(x, w, dy, **options) -> tuple[torch.Tensor, ...]:
    x, values = x.clone().requires_grad_(), w.values.clone().requires_grad_()
    y = spmm(x, SparseWeight(w.ids, values, w.n), **options)
    return y.detach(), *torch.autograd.grad(y, (x, values), dy)


def test_only_the_gradient_of_the_values_is_random() -> None:
    dy, x, w = problem()
    counter = torch.tensor(5)
    exact, random = backward(x, w, dy), backward(x, w, dy, weight_grad=Mvue24(1, 2, counter))
    assert_bitwise_equal(exact[0], random[0])
    assert_bitwise_equal(exact[1], random[1])
    expected = weight_grad_mvue(dy, x, w.ids, w.n, seed=1, layer=2, step=5, out_dtype=w.values.dtype)
    assert_bitwise_equal(random[2], expected)
    assert counter == 6  # one backward pass
    again = backward(x, w, dy, weight_grad=Mvue24(1, 2, counter))
    assert not torch.equal(again[2], random[2])


def test_without_a_counter_the_seed_is_torchs() -> None:
    dy, x, w = problem()
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(backward(x, w, dy, weight_grad="mvue24")[2])
    assert_bitwise_equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert_bitwise_equal(*(backward(x, w, dy, weight_grad=Mvue24(4))[2] for _ in range(2)))


@pytest.mark.parametrize("reentrant", (False, True))
def test_activation_checkpointing_draws_once(reentrant: bool) -> None:
    dy, x, w = problem()
    expected = backward(x, w, dy, weight_grad=Mvue24(1, 2, torch.tensor(0)))
    counter = torch.tensor(0)
    x, values = x.clone().requires_grad_(), w.values.clone().requires_grad_()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return spmm(x, SparseWeight(w.ids, values, w.n), weight_grad=Mvue24(1, 2, counter))

    y = checkpoint(layer, x, use_reentrant=reentrant)
    y.backward(dy)
    assert counter == 1
    assert_bitwise_equal(values.grad, expected[2])


def test_autocast_and_float32_masters() -> None:
    dy, x, w = problem(dtype=torch.float32)
    with torch.autocast("cpu", BF16):
        _, _, dvalues = backward(x, w, dy.to(BF16), weight_grad=Mvue24(1))
    assert dvalues.dtype == torch.float32
    assert_bitwise_equal(dvalues, weight_grad_mvue(dy.to(BF16), x.to(BF16), w.ids, seed=1, out_dtype=torch.float32))


def test_compiled() -> None:
    dy, x, w = problem(dtype=torch.float32)

    def run(function, counter):
        leaf, values = x.clone().requires_grad_(), w.values.clone().requires_grad_()
        y = function(leaf, w.ids, values, counter)
        return torch.autograd.grad(y, (leaf, values), dy)

    def layer(x, ids, values, counter):
        return spmm(torch.relu(x), SparseWeight(ids, values), weight_grad=Mvue24(1, 2, counter)) * 2

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    counters = torch.tensor(0), torch.tensor(0)
    for _ in range(2):
        for a, b in zip(run(compiled, counters[0]), run(layer, counters[1]), strict=True):
            assert_bitwise_equal(a, b)
    assert counters[0] == counters[1] == 2
    with pytest.raises(Exception, match="Mvue24 with a counter"):
        torch.compile(lambda x: spmm(x, w, weight_grad="mvue24"), fullgraph=True, backend="aot_eager")(x)


def test_errors_name_the_argument() -> None:
    dy, x, w = problem()
    bad = [
        ({"seed": -1}, "seed"), ({"seed": 0, "layer": 1 << 32}, "layer"), ({"seed": 0, "step": 0.5}, "step"),
        ({"seed": 0, "counter": torch.zeros(1)}, "counter"), ({"seed": 0, "counter": torch.zeros(2, dtype=torch.int64)}, "counter"),
    ]  # fmt: skip
    for options, name in bad:
        with pytest.raises((ValueError, TypeError), match=f"^{name}:"):
            weight_grad_mvue(dy, x, w.ids, **options)
    with pytest.raises(TypeError, match="^dy: must have dtype"):
        weight_grad_mvue(dy.double(), x.double(), w.ids, seed=0)
    for option, name in (("mvue", "weight_grad"), (Mvue24(seed=-1), "weight_grad.seed"), (Mvue24(counter=3), "weight_grad.counter"),
                         (Mvue24(counter=torch.zeros((), dtype=torch.int64, device="meta")), "weight_grad.counter")):
        with pytest.raises((ValueError, TypeError), match=f"^{name}:"):
            spmm(x, w, weight_grad=option)
