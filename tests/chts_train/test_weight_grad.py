"""SparseLinear with ``weight_grad="mvue24"``: the option's way through the configs, and noise that a resumed run repeats."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from chts_kernels import weight_grad_mvue
from chts_train import SparseLinear, SparsityConfig, sparsify_
from chts_train.configs import preset
from chts_train.methods import get_method


def model(mode="mvue24"):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
    sparsify_(net, SparsityConfig(seed=5, weight_grad=mode))
    return net


def step(net, number):
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(number))
    net.zero_grad()
    net(x).square().sum().backward()
    return [p.grad.clone() for p in net.parameters()]


def test_noise_is_drawn_for_the_layers_seed_and_number_and_pass():
    layer = model()[2]
    x, dy = torch.randn(12, 32), torch.randn(12, 8)
    for number in range(3):
        layer.values.grad = None
        layer(x).backward(dy)
        assert torch.equal(layer.values.grad, weight_grad_mvue(dy, x, layer.ids, 2, seed=5, layer=1, step=number))
    assert layer.draws == 3


def test_a_resumed_run_draws_the_same_bits():
    net = model()
    step(net, 0)
    saved = copy.deepcopy(net.state_dict())
    assert {"0.draws", "2.draws"} <= set(saved)
    expected = [step(net, 1), step(net, 2)]
    other = model()
    other.load_state_dict(saved)
    for number, gradients in enumerate(expected, 1):
        assert all(torch.equal(a, b) for a, b in zip(step(other, number), gradients, strict=True))


def test_evaluation_draws_nothing_and_exact_layers_keep_no_counter():
    net = model()
    with torch.no_grad():
        net(torch.randn(4, 16))
    net.eval()(torch.randn(4, 16))
    assert net[0].draws == 0
    assert not any("draws" in key for key in model("exact").state_dict())


def test_the_option_can_be_changed_and_shows():
    layer = SparseLinear(8, 8)
    assert layer.weight_grad == "exact" and "weight_grad" not in repr(layer)
    layer.weight_grad = "mvue24"
    assert layer.draws.dtype == torch.int64 and "weight_grad='mvue24'" in repr(layer)
    assert layer.to(torch.bfloat16).draws.dtype == torch.int64
    layer.weight_grad = "exact"
    assert layer.weight_grad == "exact" and "draws" not in layer.state_dict()
    with pytest.raises(ValueError, match="^weight_grad: must be 'exact' or 'mvue24', got 'fast'"):
        layer.weight_grad = "fast"


def test_memory_given_later_starts_the_count_at_zero():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 8))
    sparsify_(net, SparsityConfig(weight_grad="mvue24"))
    assert net.to_empty(device="cpu")[0].draws == 0


def test_the_option_travels_through_the_configs():
    config = preset("tiny", weight_grad="mvue24")
    assert type(config).from_dict(config.to_dict()) == config
    assert get_method("chts24").sparsity_config(weight_grad=config.weight_grad).weight_grad == "mvue24"
    with pytest.raises(ValueError, match="weight_grad must be exact or mvue24"):
        preset("tiny", weight_grad="fast")
    for name in ("dense", "srste24"):
        with pytest.raises(ValueError, match=f"weight_grad: must be 'exact' for the method {name}"):
            get_method(name).sparsity_config(weight_grad="mvue24")
    with pytest.raises(ValueError, match="weight_grad"):
        SparsityConfig(kind="ste", weight_grad="mvue24")


@pytest.mark.gpu
def test_captured_training_draws_what_eager_training_draws():
    eager = model().cuda()
    captured = copy.deepcopy(eager)
    x = torch.randn(64, 16, device="cuda")

    def step(net):
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = net(x).float().square().mean()
        loss.backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(captured)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for parameter in captured.parameters():
            parameter.grad.zero_()
        step(captured)
    step(eager)
    seen = []
    for _ in range(3):
        graph.replay()
        eager.zero_grad()
        step(eager)
        for a, b in zip(eager.parameters(), captured.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
        seen.append(eager[0].values.grad.clone())
    assert not torch.equal(seen[0], seen[1]) and captured[0].draws == 4
