"""CUDA graphs across topology updates: what was captured goes on with today's ids and values. Run with `pytest -m gpu`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from chts_train import FusedAdamW, SparsityConfig, TopologyEvolver, TopologySchedule, sparsify_

pytestmark = pytest.mark.gpu

SCHEDULE = TopologySchedule(total_steps=100, interval=3, stop_fraction=1.0, zeta=0.3, lr_ramp_steps=2)
STEPS = 8


def pair(n: int = 2) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)).cuda()
    sparsify_(model, SparsityConfig(n=n, seed=1))
    return model, copy.deepcopy(model)


def batches() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(64, 128, generator=draw).cuda() for _ in range(STEPS)]


def loss_of(network, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        return network(x).float().square().mean()


def train(model, optimizer, gradients) -> TopologyEvolver:
    """``gradients(x)`` leaves the gradients of a batch in the parameters."""
    evolver = TopologyEvolver(model, optimizer, SCHEDULE, seed=5)
    for x in batches():
        gradients(x)
        if evolver.step():
            optimizer.step()
    assert evolver.updates == 2
    return evolver


def make_optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "ours":
        return FusedAdamW(model.parameters(), lr=1e-2, model=model)
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def eagerly(model: nn.Module, kind: str) -> TopologyEvolver:
    def gradients(x: torch.Tensor) -> None:
        model.zero_grad()
        loss_of(model, x).backward()

    return train(model, make_optimizer(kind, model), gradients)


def same(a: nn.Module, b: nn.Module) -> None:
    for (name, left), right in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize("kind", ("torch", "ours"))
@pytest.mark.parametrize("n", (1, 2))
def test_captured_gradients_with_the_optimizer_and_the_evolver_outside(n, kind):
    eager, model = pair(n)
    static = torch.zeros(64, 128, device="cuda")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            loss_of(model, static).backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for parameter in model.parameters():
            parameter.grad.zero_()
        loss_of(model, static).backward()

    def gradients(x: torch.Tensor) -> None:
        static.copy_(x)
        graph.replay()

    train(model, make_optimizer(kind, model), gradients)
    eagerly(eager, kind)
    same(model, eager)
    with torch.no_grad():  # nothing stale is left behind for eager use
        assert torch.equal(model(static.bfloat16()), eager(static.bfloat16()))


@pytest.mark.parametrize("kind", ("torch", "ours"))
def test_graphed_callables(kind):
    eager, model = pair()
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        network = torch.cuda.make_graphed_callables(model, (torch.zeros(64, 128, device="cuda"),))

    def gradients(x: torch.Tensor) -> None:
        model.zero_grad()
        loss_of(network, x).backward()

    train(model, make_optimizer(kind, model), gradients)
    eagerly(eager, kind)
    same(model, eager)
