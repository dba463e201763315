"""STE and SR-STE layers, and the table of methods."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from chts_kernels import SparseWeight
from chts_train import (
    METHODS,
    STELinear,
    TopologySchedule,
    attach_method,
    attach_srste_decay,
    get_method,
    make_masks_resident_,
    sparse_layers,
    sparsify_,
)


@pytest.mark.parametrize("n", [1, 2])
def test_ste_masks_forward_and_passes_gradients_to_all_weights(n):
    layer = STELinear(16, 8, n=n, dtype=torch.float64)
    x = torch.randn(5, 16, dtype=torch.float64)
    y = layer(x)
    best = SparseWeight.from_dense(layer.weight.detach(), n).to_dense()
    torch.testing.assert_close(y, x @ best.t() + layer.bias)
    dy = torch.randn_like(y)
    y.backward(dy)
    torch.testing.assert_close(layer.weight.grad, dy.t() @ x)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_ste_passes_run_on_sparse_tensor_cores(n, resident, compiled):
    """bfloat16 autocast over a float32 weight, two weights one after the other: against the masked weight's dense products."""
    torch.manual_seed(n)
    layer = STELinear(512, 1024, n=n, device="cuda")
    layer.impl = "wgmma_sp" if torch.cuda.get_device_capability()[0] == 9 else "mma_sp"  # or an error
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    if resident:
        make_masks_resident_(layer, optimizer)
    run = torch.compile(layer, fullgraph=True) if compiled else layer
    for _ in range(2):
        layer.zero_grad()
        x = torch.randn(2, 96, 512, device="cuda", requires_grad=True)
        twin = x.detach().bfloat16().requires_grad_()
        masked = (layer.weight * layer.mask()).detach().bfloat16().requires_grad_()
        expected = torch.nn.functional.linear(twin, masked, layer.bias.bfloat16())
        dy = torch.randn_like(expected)
        with torch.autocast("cuda", torch.bfloat16):
            y = run(x)
        y.backward(dy)
        expected.backward(dy)
        assert y.dtype == torch.bfloat16 and layer.weight.grad.dtype == x.grad.dtype == torch.float32
        for found, wanted in ((y, expected), (x.grad, twin.grad), (layer.weight.grad, masked.grad)):
            assert (found.float() - wanted.float()).norm() <= 4e-3 * wanted.float().norm()
        with torch.no_grad():
            layer.weight.copy_(torch.randn_like(layer.weight) * 0.05)
        optimizer.step()  # resident masks follow


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_ste_trains_on_after_a_validation(mode):
    layer, x = STELinear(16, 16), torch.randn(4, 16)
    with mode():
        y = layer(x)
        mask = layer.mask()
    again = layer(x)
    again.sum().backward()
    assert torch.equal(again, y) and bool((layer.weight.grad != 0).all()) and layer.mask() is mask
    assert not mask.is_inference()


def test_ste_mask_follows_the_weight():
    layer = STELinear(8, 8)
    first = layer.mask()
    assert layer.mask() is first
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8, 8))
    assert torch.equal(layer.mask(), SparseWeight.from_dense(layer.weight.detach()).mask().float())


def test_srste_decay_enters_once_per_step_on_masked_out_weights():
    torch.manual_seed(0)
    model = nn.Sequential(STELinear(8, 8, bias=False, srste_lambda=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = attach_srste_decay(model, optimizer)
    weight, mask = model[0].weight.detach().clone(), model[0].mask().clone()
    model[0].weight.grad = torch.zeros(8, 8)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), weight - 0.5 * (1 - mask) * weight)
    handle.remove()
    before = model[0].weight.detach().clone()
    model[0].weight.grad = torch.zeros(8, 8)
    optimizer.step()
    assert torch.equal(model[0].weight, before)


def test_ste_to_linear_and_repr():
    layer = STELinear(8, 8, n=1, srste_lambda=2e-4).eval()
    dense = layer.to_linear()
    assert torch.equal(dense.weight, layer.weight * layer.mask()) and not dense.training
    assert repr(layer) == "STELinear(in_features=8, out_features=8, bias=True, n=1, srste_lambda=0.0002)"
    with pytest.raises(ValueError, match="divisible by 4"):
        STELinear.from_linear(nn.Linear(8, 6))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(name):
    method = get_method(name)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    config = method.sparsity_config(seed=1)
    if config is not None:
        sparsify_(model, config)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    evolver = attach_method(method, model, optimizer, TopologySchedule(total_steps=60, interval=10, zeta=0.3), seed=1)
    assert (evolver is not None) == method.evolves
    start = {k: v.ids.clone() for k, v in sparse_layers(model).items()}
    x = torch.randn(64, 16)
    target = torch.roll(x, 1, dims=1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(nn.functional.mse_loss(model(x), target))
        losses[-1].backward()
        if evolver is None or evolver.step():
            optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    changed = [not torch.equal(start[k], v.ids) for k, v in sparse_layers(model).items()]
    assert all(changed) if method.evolves else not any(changed)
    expected = {"dense": 0, "sparse": 2, "ste": 0}[method.kind]
    assert len(changed) == expected


def test_methods_cover_the_issue():
    assert {
        "dense", "chts24", "chts14", "random-regrow", "random-regrow14", "greedy", "soft-regrow", "static", "static14",
        "ste24", "ste14", "srste24", "srste14", "nvidia", "nvidia14",
    } <= set(METHODS)  # fmt: skip
    assert METHODS["chts14"].n == METHODS["srste14"].n == METHODS["static14"].n == 1
    assert (METHODS["greedy"].removal, METHODS["greedy"].regrowth) == ("hard", "greedy")
    assert (METHODS["soft-regrow"].removal, METHODS["soft-regrow"].regrowth) == ("hard", "soft")
    assert METHODS["nvidia"].sparsity_config().init == "magnitude"
    assert METHODS["srste24"].sparsity_config(srste_lambda=6e-5).srste_lambda == 6e-5
    assert METHODS["ste24"].sparsity_config(srste_lambda=6e-5).srste_lambda == 0
    assert METHODS["chts24"].sparsity_config(init="magnitude").init == "magnitude"
    with pytest.raises(ValueError, match=r"method: must be one of \['dense', .*got 'chts'"):
        get_method("chts")


def test_attach_method_hooks_the_decay():
    model = nn.Sequential(nn.Linear(8, 8))
    sparsify_(model, METHODS["srste24"].sparsity_config(srste_lambda=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert attach_method(METHODS["srste24"], model, optimizer, TopologySchedule(total_steps=10)) is None
    weight, mask = model[0].weight.detach().clone(), model[0].mask().clone()
    model[0].weight.grad = torch.zeros(8, 8)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), weight * (1 - 0.5 * (1 - mask)))
    assert isinstance(model[0], STELinear)
