"""FusedAdamW: torch's AdamW on the CPU bit for bit, the kernel's path interpreted and on a GPU, and everything around a step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from chts_kernels import Operands, SparseWeight, random_ids
from chts_kernels.ops import _triton
from chts_train import FusedAdamW, SparsityConfig, TopologyEvolver, TopologySchedule, sparse_layers, sparsify_
from chts_train.optim import make_optimizer, parameter_groups

INTERPRETED = _triton.interpreting()
CPU = pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="runs under TRITON_INTERPRET=1"))
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="interpreting")])
ON_DEVICES = pytest.mark.parametrize("device", [CPU, CUDA])
PLAIN = pytest.mark.skipif(INTERPRETED, reason="tests torch's path")
OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.99), "weight_decay": 0.1}


def build(device="cpu", n=2, width=32, **config):
    torch.manual_seed(0)
    wide = 2 * width
    model = nn.Sequential(nn.Linear(width, wide), nn.LayerNorm(wide), nn.Linear(wide, width), nn.Linear(width, 16, bias=False))
    sparsify_(model, SparsityConfig(n=n, **config))
    return model.to(device)


def backward(model, step, scale=1.0):
    """Gradients that depend on the step alone, not on the weights: what is compared then is the optimizer."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = scale * torch.randn(p.shape, generator=generator).to(p.device)


def train(model, optimizer, steps=3, start=0):
    for step in range(start, start + steps):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_same(one, other, rtol=0.0, atol=0.0):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach().cpu(), rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@PLAIN
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}])
def test_without_a_device_it_is_torch_adamw(options):
    ours, theirs = build(), build()
    one = FusedAdamW(ours.parameters(), model=ours, **OPTIONS, **options)
    other = torch.optim.AdamW(theirs.parameters(), **OPTIONS, **options)
    assert_same(train(ours, one), train(theirs, other))
    mine, torchs = one.state_dict(), other.state_dict()
    assert mine["param_groups"] == torchs["param_groups"]
    for index, state in torchs["state"].items():
        assert mine["state"][index].keys() == state.keys()
        assert all(torch.equal(mine["state"][index][key], value) for key, value in state.items())


@PLAIN
def test_states_are_exchanged_with_torch():
    ours, theirs = build(), build()
    one, other = FusedAdamW(ours.parameters(), model=ours, **OPTIONS), torch.optim.AdamW(theirs.parameters(), **OPTIONS)
    train(ours, one), train(theirs, other)
    one2, other2 = FusedAdamW(ours.parameters(), model=ours), torch.optim.AdamW(theirs.parameters())
    one2.load_state_dict(other.state_dict())
    other2.load_state_dict(one.state_dict())
    assert_same(train(ours, one2, start=3), train(theirs, other2, start=3))
    assert one2.param_groups[0]["lr"] == OPTIONS["lr"]


@PLAIN
def test_groups_schedulers_and_closures():
    ours, theirs = build(), build()
    pair = []
    for model, kind in ((ours, FusedAdamW), (theirs, torch.optim.AdamW)):
        options = {"model": model} if kind is FusedAdamW else {}
        optimizer = kind(parameter_groups(model, 0.1), lr=0.1, **options)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6)
        for step in range(4):
            assert optimizer.step(lambda model=model, step=step: backward(model, step) or step) == step
            scheduler.step()
        pair.append(model)
    assert_same(*pair)


@PLAIN
def test_low_precision_moments_are_unbiased_kept_and_loaded():
    exact, low = build(), build()
    reference = FusedAdamW(exact.parameters(), model=exact, lr=1e-3)
    optimizer = FusedAdamW(low.parameters(), model=low, lr=1e-3, moment_dtype=torch.bfloat16, seed=3)
    train(exact, reference, 8), train(low, optimizer, 8)
    for name, layer in sparse_layers(low).items():
        state = optimizer.state[layer.values]
        assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}
        wanted = reference.state[exact.get_submodule(name).values]["exp_avg_sq"]
        assert abs(float((state["exp_avg_sq"].float() / wanted).mean()) - 1) < 2e-3
    assert optimizer.state[low[1].weight]["exp_avg"].dtype == torch.float32  # a layer norm
    assert_same(low, exact, atol=2e-3)
    again = build()
    again.load_state_dict(low.state_dict())
    other = FusedAdamW(again.parameters(), model=again, lr=1e-3, moment_dtype=torch.bfloat16, seed=3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares the counters otherwise
    assert other.state[again[0].values]["exp_avg"].dtype == torch.bfloat16
    assert_same(train(low, optimizer, start=8), train(again, other, start=8))


@PLAIN
def test_the_evolver_carries_the_moments():
    for options in ({}, {"moment_dtype": torch.bfloat16}):
        model = build()
        optimizer = FusedAdamW(model.parameters(), model=model, lr=1e-2, **options)
        evolver = TopologyEvolver(model, optimizer, TopologySchedule(8, interval=2, zeta=0.3)).attach()
        before = [layer.ids.clone() for layer in sparse_layers(model).values()]
        train(model, optimizer, 6)
        assert evolver.updates == 3
        assert any(not torch.equal(a, b.ids) for a, b in zip(before, sparse_layers(model).values(), strict=True))
        assert float(optimizer.state[model[0].values]["step"]) == 3  # of six, three updated the topology


@PLAIN
def test_copies_and_pickles_are_plain_adamw():
    model = build()
    optimizer = FusedAdamW(model.parameters(), model=model, **OPTIONS)
    train(model, optimizer)
    twin, copied = copy.deepcopy((model, optimizer))
    assert_same(train(model, optimizer, start=3), train(twin, copied, start=3))


@PLAIN
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": 3}, "model: must be a module or None, got int"),
        ({"moment_dtype": torch.float16}, "moment_dtype: must be torch.bfloat16 or None, got torch.float16"),
        ({"amsgrad": True, "moment_dtype": torch.bfloat16}, "amsgrad: must be False with moment_dtype, got True"),
        ({"seed": -1}, "seed: must"),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        FusedAdamW([nn.Parameter(torch.ones(1))], **options)


# --- the kernel's path


@pytest.mark.skipif(INTERPRETED, reason="this is the process it starts")
@pytest.mark.timeout(600)
def test_under_the_interpreter(interpreted):
    assert interpreted.returncode == 0, interpreted.stdout[-6000:] + interpreted.stderr[-2000:]


def launches(monkeypatch):
    """Counts the launches of the kernel."""
    from chts_kernels.ops.adamw import triton_adamw

    count = []
    launch = triton_adamw._launch
    monkeypatch.setattr(triton_adamw, "_launch", lambda *args: (count.append(len(args[0])), launch(*args)))
    return count


@ON_DEVICES
@pytest.mark.parametrize("n", (1, 2))
def test_one_launch_per_group_and_the_result_of_torch(n, device, monkeypatch):
    count = launches(monkeypatch)
    ours, theirs = build(device, n), build(device, n)
    one = FusedAdamW(ours.parameters(), model=ours, **OPTIONS)
    other = torch.optim.AdamW(theirs.parameters(), **OPTIONS)
    assert_same(train(ours, one), train(theirs, other), rtol=2e-6, atol=2e-7)
    assert count == [3, 3, 3]
    assert one.state[ours[0].values].keys() == {"step", "exp_avg", "exp_avg_sq"} and float(one.state[ours[0].values]["step"]) == 3


@ON_DEVICES
def test_operands_are_written_and_stay_fresh(device, monkeypatch):
    dtype = torch.float16  # which the interpreter rounds to as a device does
    model = build(device)
    optimizer = FusedAdamW(model.parameters(), model=model, **OPTIONS)
    layers = list(sparse_layers(model).values())
    for layer in layers[:2]:
        layer.weight.operands(dtype)
    train(model, optimizer, 1)
    fresh = [layer._operands._freshness.holds((layer.values, layer.ids), dtype) for layer in layers]
    assert fresh == [True, True, False]
    for layer in layers:
        expected = SparseWeight(layer.ids, layer.values.detach(), layer.n).operands(dtype)
        operands = layer.weight.operands(dtype)
        for name in ("values", "values_t", "meta", "meta_t"):
            assert torch.equal(getattr(operands, name), getattr(expected, name)), name
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(1, device=device))], lr=0.1)
    other.step()  # any other optimizer outdates them
    assert not layers[0]._operands._freshness.holds((layers[0].values, layers[0].ids), dtype)


@ON_DEVICES
@pytest.mark.parametrize("n", (1, 2))
def test_resident_operands_are_written_by_the_same_launch(n, device, monkeypatch):
    model = build(device, n)
    optimizer = FusedAdamW(model.parameters(), model=model, resident_operands=torch.float16, **OPTIONS)
    count, packs = launches(monkeypatch), []
    monkeypatch.setattr(Operands, "pack", lambda *_: packs.append(1))
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1, device=device))], lr=0.1).step()  # of no account
    train(model, optimizer, 2)
    assert count == [3, 3] and packs == []
    monkeypatch.undo()
    for layer in sparse_layers(model).values():
        layer.require_fresh_operands()
        expected = SparseWeight(layer.ids, layer.values.detach(), layer.n).operands(torch.float16)
        for name in ("values", "values_t", "meta", "meta_t"):
            assert torch.equal(getattr(layer._operands, name), getattr(expected, name)), name


@ON_DEVICES
def test_new_ids_outdate_operands_and_the_step_leaves_them_so(device):
    model = build(device)
    optimizer = FusedAdamW(model.parameters(), model=model, **OPTIONS)
    for step in range(3):
        for index, layer in enumerate(sparse_layers(model).values()):
            operands = layer.weight.operands(torch.float16)
            expected = SparseWeight(layer.ids, layer.values.detach()).operands(torch.float16)
            assert torch.equal(operands.values, expected.values) and torch.equal(operands.meta_t, expected.meta_t)
            if step % 2:
                layer.ids.copy_(random_ids(layer.out_features, layer.in_features, seed=step, layer=index))
        train(model, optimizer, 1, start=step)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="interpreting")
def test_grad_scaler_skips_and_unscales():
    ours, theirs = build("cuda"), build("cuda")
    optimizers = FusedAdamW(ours.parameters(), model=ours, **OPTIONS), torch.optim.AdamW(theirs.parameters(), fused=True, **OPTIONS)
    pair = list(zip((ours, theirs), optimizers, strict=True))
    for model, optimizer in pair:
        scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
        for step in range(4):
            scaler.scale(torch.ones(1, device="cuda"))
            backward(model, step, scale=256.0 if step != 3 else 128.0)
            if step == 2:
                model[0].bias.grad[0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
    assert_same(ours, theirs, rtol=2e-6, atol=2e-7)
    assert float(pair[0][1].state[ours[0].values]["step"]) == 3


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="interpreting")
def test_captured_training_follows_eager_training():
    def train_step(model, optimizer, x):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        return loss

    models = [build("cuda", width=128) for _ in range(2)]
    x = torch.randn(64, 128, device="cuda")
    rate = [torch.tensor(1e-2, device="cuda") for _ in models]
    pair = [(m, FusedAdamW(m.parameters(), lr=r, model=m, capturable=True)) for m, r in zip(models, rate, strict=True)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for model, optimizer in pair:
            train_step(model, optimizer, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train_step(*pair[1], x)
    for step in range(4):
        for r in rate:
            r.fill_(1e-2 / (step + 1))
        train_step(*pair[0], x)
        graph.replay()
    assert_same(*models, rtol=1e-4, atol=1e-5)
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="capturable=True"):
        backward_free = FusedAdamW([nn.Parameter(torch.ones(4, device="cuda"))])
        backward_free.param_groups[0]["params"][0].grad = torch.ones(4, device="cuda")
        backward_free.step()


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="interpreting")
def test_the_trainer_gets_it_on_a_gpu():
    assert type(make_optimizer("adam", build("cuda"), lr=0.1)) is FusedAdamW
    assert type(make_optimizer("adam", build("cuda"), lr=0.1, weight_decay=0.1)) is torch.optim.Adam
    assert type(make_optimizer("adamw", nn.Linear(4, 4, device="cuda"), lr=0.1)) is torch.optim.AdamW
