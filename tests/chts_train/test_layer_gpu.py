"""The layer on CUDA with the kernels that `auto` picks: numbers, packing, capture, evolution. Run with `pytest -m gpu`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import chts_kernels.format
from chts_kernels import evolve
from chts_train import SparseLinear, SparsityConfig, TopologyEvolver, TopologySchedule, sparsify_

pytestmark = pytest.mark.gpu

SHAPES = [(512, 1376, 333), (1376, 512, 128), (768, 768, 4097), (36, 20, 17), (256, 128, 0), (4, 4, 1)]


def _error(actual, exact):
    return (actual.double() - exact).norm() / exact.norm().clamp_min(1e-300)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns, rows, tokens", SHAPES)
def test_three_passes_are_no_worse_than_dense_torch(columns, rows, tokens, dtype, n):
    layer = SparseLinear(columns, rows, n=n, device="cuda")
    dense = layer.to_linear()
    x = torch.randn(tokens, columns, device="cuda", dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, rows, device="cuda", dtype=dtype)
    mask = layer.weight.mask()

    def passes(module, x, dy, dtype):
        x = x.detach().to(dtype).requires_grad_()
        with torch.autocast("cuda", dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            y = module(x)
        y.backward(dy.to(dtype))
        weight = module.values.grad if isinstance(module, SparseLinear) else module.weight.grad[mask].view(rows, -1)
        return y, x.grad, weight, module.bias.grad

    exact = passes(copy.deepcopy(dense).double(), x, dy, torch.float64)
    plain = passes(dense, x, dy, dtype)
    ours = passes(layer, x, dy, dtype)
    for name, a, b, c in zip(("y", "dx", "dvalues", "dbias"), ours, plain, exact, strict=True):
        assert a.shape == c.shape, name
        assert _error(a, c) <= 2 * _error(b, c) + 1e-6, name
    assert ours[2].dtype == torch.float32


def test_operands_are_packed_once_per_weight_change(monkeypatch):
    layer = SparseLinear(256, 256, device="cuda", dtype=torch.float32)
    packs = []
    pack = chts_kernels.format.PACK_OPERANDS_
    monkeypatch.setattr(chts_kernels.format, "PACK_OPERANDS_", lambda *args: packs.append(1) or pack(*args))
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for _ in range(3):
        layer(x).float().sum().backward()
    assert len(packs) == 1
    with torch.no_grad():
        layer.values.mul_(2)
    y = layer(x)
    assert len(packs) == 2
    torch.testing.assert_close(y, layer.to_linear().bfloat16()(x), rtol=2e-2, atol=2e-2)


def test_a_layer_that_keeps_no_operands_computes_the_same():
    layers = [SparseLinear(256, 128, device="cuda") for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    layers[1].keep_operands = False
    for step in range(3):  # the first call of a kind goes another way than those that follow
        x, gradients = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16), []
        for layer in layers:
            layer.zero_grad()
            own = x.clone().requires_grad_()
            with torch.autocast("cuda", torch.bfloat16):
                y = layer(own)
            y.float().square().sum().backward()
            gradients.append((y, own.grad, layer.values.grad, layer.bias.grad))
        for kept, fresh in zip(*gradients, strict=True):
            assert torch.equal(kept, fresh), step
    assert layers[1]._operands.nbytes == 0 < layers[0]._operands.nbytes


def test_captured_step_stays_valid_across_topology_updates():
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)).cuda()
    sparsify_(eager, SparsityConfig(seed=1))
    captured = copy.deepcopy(eager)
    x, target = torch.randn(64, 128, device="cuda"), torch.randn(64, 128, device="cuda")

    def step(model, optimizer):
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = nn.functional.mse_loss(model(x).float(), target)
        loss.backward()
        optimizer.step()

    def adam(model):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return torch.optim.Adam(model.parameters(), lr=1e-3, capturable=True)

    def update(model, optimizer, number):
        for index, layer in enumerate(m for m in model if isinstance(m, SparseLinear)):
            moments = [optimizer.state[layer.values][k] for k in ("exp_avg", "exp_avg_sq")]
            evolve(layer.weight, zeta=0.3, seed=3, layer=index, step=number, moments=moments)

    optimizers = adam(eager), adam(captured)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(captured, optimizers[1])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured, optimizers[1])
    for _ in range(3):
        step(eager, optimizers[0])
    for number in range(6):
        graph.replay()
        step(eager, optimizers[0])
        if number % 2 == 1:
            update(captured, optimizers[1], number)
            update(eager, optimizers[0], number)
        for (name, a), b in zip(eager.state_dict().items(), captured.state_dict().values(), strict=True):
            assert torch.equal(a, b), (number, name)


def test_evolver_waits_for_nothing_and_matches_the_reference():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 256), nn.Linear(256, 512)).cuda()
    sparsify_(model)
    host = copy.deepcopy(model).cpu()
    runs = []
    for candidate in (model, host):
        optimizer = torch.optim.AdamW(candidate.parameters())
        evolver = TopologyEvolver(candidate, optimizer, TopologySchedule(total_steps=4, interval=1, stop_fraction=1.0))
        device = next(candidate.parameters()).device
        candidate(torch.ones(8, 512, device=device)).sum().backward()
        mode = torch.cuda.get_sync_debug_mode()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            evolver.step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        runs.append((evolver.stats(), [m.ids.cpu() for m in candidate]))
    for gpu, cpu in zip(*(r[1] for r in runs), strict=True):
        assert (gpu != cpu).float().mean() < 1e-3  # equal but for sums that round differently
    for gpu, cpu in zip(*(r[0] for r in runs), strict=True):
        assert gpu["removed"] == cpu["removed"] and abs(gpu["turnover"] - cpu["turnover"]) < 1e-3
