"""Schedules, the evolver in a loop and through hooks, optimizers, statistics, state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from chts_train import SparseLinear, TopologyEvolver, TopologySchedule, sparse_layers, sparsify_


def _setup(seed=0, optimizer=None, **schedule):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.LayerNorm(32))
    sparsify_(model)
    optimizer = (optimizer or (lambda p: torch.optim.Adam(p, lr=0.1)))(model.parameters())
    schedule = TopologySchedule(**{"total_steps": 40, "interval": 10, "zeta": 0.3, **schedule})
    return model, optimizer, schedule


def _backward(model, step=0):
    generator = torch.Generator().manual_seed(step)
    model.zero_grad()
    model(torch.randn(8, 32, generator=generator)).square().mean().backward()


def test_schedule_cadence_temperature_and_ramp():
    s = TopologySchedule(total_steps=1000)
    assert [t for t in range(1001) if s.is_update(t)] == [100, 200, 300, 400, 500, 600, 700]
    assert TopologySchedule(total_steps=800, interval=200).is_update(600)  # "up to and including"
    assert (s.temperature(0), s.temperature(375), s.temperature(750), s.temperature(1000)) == (1, 5, 9, 9)
    assert [s.removal_fraction(t) for t in (0, 500, 1000)] == [0.1, 0.1, 0.1]
    falling = TopologySchedule(total_steps=1000, zeta=0.3, zeta_end=0.1)
    assert [round(falling.removal_fraction(t), 6) for t in (0, 375, 750, 1000)] == [0.3, 0.2, 0.1, 0.1]
    assert [round(s.lr_scale(100 + i), 3) for i in range(1, 13)] == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1]
    assert all(s.lr_scale(t) == 1.0 for t in range(1, 101))
    assert [s.lr_scale(t) for t in (701, 705, 711, 801)] == [0, 0.4, 1, 1]  # after the last update too, once


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("total_steps", 0, r"total_steps: must be in \[1, inf\], got 0"),
        ("interval", 0, r"interval: must be in \[1, inf\], got 0"),
        ("stop_fraction", 1.5, r"stop_fraction: must be in \[0, 1\], got 1.5"),
        ("zeta", -0.1, r"zeta: must be in \[0, 1\], got -0.1"),
        ("zeta", float("nan"), r"zeta: must be in \[0, 1\], got nan"),
        ("zeta_end", 1.1, r"zeta_end: must be in \[0, 1\], got 1.1"),
        ("t_start", 0, "t_start: must be positive and finite, got 0"),
        ("t_end", float("inf"), "t_end: must be positive and finite, got inf"),
        ("lr_ramp_steps", -1, r"lr_ramp_steps: must be in \[0, inf\], got -1"),
    ],
)
def test_schedule_refuses(name, value, message):
    with pytest.raises(ValueError, match=message):
        TopologySchedule(**{"total_steps": 10, name: value})


def _run(model, optimizer, evolver, steps, attached, start=0):
    for step in range(start + 1, start + steps + 1):
        _backward(model, step)
        if attached or evolver.step():
            optimizer.step()


def test_attached_and_explicit_use_are_the_same():
    results = []
    for attached in (False, True):
        model, optimizer, schedule = _setup()
        evolver = TopologyEvolver(model, optimizer, schedule)
        if attached:
            evolver.attach()
        _run(model, optimizer, evolver, 40, attached)
        results.append((model.state_dict(), evolver.step_count, evolver.updates, optimizer.param_groups[0]["lr"]))
    (first, *counts), (second, *counts_attached) = results
    assert counts == counts_attached == [40, 3, 0.1]
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_update_step_changes_nothing_but_the_topology():
    model, optimizer, schedule = _setup()
    evolver = TopologyEvolver(model, optimizer, schedule).attach()
    _run(model, optimizer, evolver, 9, True)
    before = copy.deepcopy(model)
    steps = [int(s["step"]) for s in optimizer.state.values()]
    _backward(model, 10)
    grads = [p.grad for p in model.parameters()]
    optimizer.step()
    assert [p.grad for p in model.parameters()] == grads  # handed back
    assert [int(s["step"]) for s in optimizer.state.values()] == steps  # per-tensor counters kept, not advanced
    assert torch.equal(model[3].weight, before[3].weight)
    for name, layer in sparse_layers(model).items():
        old = before.get_submodule(name).weight
        new = layer.weight
        both = old.mask() & new.mask()
        assert not torch.equal(layer.ids, before.get_submodule(name).ids)
        assert torch.equal(new.to_dense(), old.to_dense() * both)  # kept links keep weights, new ones are 0


def test_learning_rate_ramp_is_seen_by_the_optimizer_only():
    model, _, schedule = _setup(lr_ramp_steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    seen = []
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    evolver = TopologyEvolver(model, optimizer, schedule)
    optimizer.register_step_pre_hook(lambda opt, *_: seen.append(opt.param_groups[0]["lr"]))
    for step in range(1, 16):
        _backward(model, step)
        if evolver.step():
            optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1 / (1 + step))  # the scheduler moves undisturbed
    plain = [1 / t for t in (*range(1, 10), *range(11, 16))]
    assert seen == pytest.approx([*plain[:9], 0, plain[10] * 0.25, plain[11] * 0.5, plain[12] * 0.75, plain[13]])


def test_tensor_learning_rate_is_ramped_in_place():
    lr = torch.tensor(0.1)
    model, optimizer, schedule = _setup(optimizer=lambda p: torch.optim.Adam(p, lr=lr, foreach=False, capturable=False))
    evolver = TopologyEvolver(model, optimizer, schedule)
    _run(model, optimizer, evolver, 12, False)
    assert optimizer.param_groups[0]["lr"] is lr and float(lr) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "factory",
    [
        lambda p: torch.optim.SGD(p, lr=0.01),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        lambda p: torch.optim.NAdam(p),
        lambda p: torch.optim.RAdam(p),
        lambda p: torch.optim.Adamax(p),
        lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
        lambda p: torch.optim.Adagrad(p),
    ],
)
def test_moments_of_any_shaped_like_optimizer_follow_links(factory):
    model, optimizer, schedule = _setup(optimizer=factory)
    evolver = TopologyEvolver(model, optimizer, schedule)
    _run(model, optimizer, evolver, 9, False)
    layer = model[0]
    before = {k: v.clone() for k, v in optimizer.state[layer.values].items() if isinstance(v, torch.Tensor)}
    old_mask = layer.weight.mask()
    _backward(model)
    assert not evolver.step()
    both = old_mask & layer.weight.mask()
    kept_new = both[layer.weight.mask()].view(64, -1)
    kept_old = both[old_mask].view(64, -1)
    for key, tensor in optimizer.state[layer.values].items():
        if isinstance(tensor, torch.Tensor) and tensor.shape == layer.values.shape:
            assert torch.equal(tensor[kept_new], before[key][kept_old]), key
            assert not tensor[~kept_new].any(), key


def test_optimizers_with_factored_state_are_refused_by_name_before_anything_changes():
    model, optimizer, schedule = _setup(optimizer=lambda p: torch.optim.Adafactor(p))
    evolver = TopologyEvolver(model, optimizer, schedule)
    _run(model, optimizer, evolver, 9, False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match=r"got Adafactor with state\['row_var'\] = a tensor of shape \(64, 1\) for 0.values"):
        evolver.step()
    assert evolver.step_count == 9 and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_gradient_accumulation_counts_optimizer_steps():
    model, optimizer, schedule = _setup()
    evolver = TopologyEvolver(model, optimizer, schedule)
    for _ in range(10):
        for _micro in range(3):
            (model(torch.randn(4, 32)).square().mean() / 3).backward()
        if evolver.step():
            optimizer.step()
        optimizer.zero_grad()
    assert (evolver.step_count, evolver.updates) == (10, 1)


def test_zeta_follows_its_schedule():
    model, optimizer, schedule = _setup(zeta=0.3, zeta_end=0.1)
    evolver = TopologyEvolver(model, optimizer, schedule)
    removed = []
    for step in range(1, 31):
        _run(model, optimizer, evolver, 1, False, start=step - 1)
        if schedule.is_update(step):
            removed.append(evolver.stats()[0]["removed"])
    assert removed == [int(schedule.removal_fraction(t) * 1024) for t in (10, 20, 30)] and removed[0] > removed[2]


def test_stats():
    model, optimizer, schedule = _setup(zeta=0.3)
    evolver = TopologyEvolver(model, optimizer, schedule)
    assert evolver.stats() == []
    _run(model, optimizer, evolver, 9, False)
    old = {name: layer.weight.mask() for name, layer in evolver.layers.items()}
    _run(model, optimizer, evolver, 1, False, start=9)
    stats = evolver.stats()
    assert [row["name"] for row in stats] == ["0", "2"]
    for row in stats:
        layer = evolver.layers[row["name"]]
        new_links = int((layer.weight.mask() & ~old[row["name"]]).sum())
        assert (row["links"], row["blocks"], row["removed"]) == (1024, 128, 307)
        assert row["replaced"] == new_links and row["turnover"] == pytest.approx(new_links / 1024)
        assert 0 < row["can_change_blocks"] <= 128 and 0 <= row["noise_changed_blocks"] <= 1
        assert row["score_mean_survivors"] > row["score_mean"] > 0 and row["score_var"] > 0
        assert row["link_age_mean"] == pytest.approx(1 - new_links / 1024)  # kept links are one update old


def test_reading_the_figures_of_all_layers_waits_for_the_device_twice(monkeypatch):
    model, optimizer, schedule = _setup(zeta=0.3)
    evolver = TopologyEvolver(model, optimizer, schedule)
    _run(model, optimizer, evolver, 10, False)
    reads = []
    read = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.dtype) or read(self))
    evolver.stats()
    assert sorted(map(str, reads)) == ["torch.float64", "torch.int64"]  # of all layers together


def test_ages_end_at_255():
    model, optimizer, schedule = _setup(zeta=0.0)
    evolver = TopologyEvolver(model, optimizer, schedule)
    evolver.updates = 254
    for age, start in zip(evolver.ages.values(), (0, 254), strict=True):
        age.fill_(start)
    _run(model, optimizer, evolver, 20, False)
    assert [int(age.max()) for age in evolver.ages.values()] == [2, 255]


def test_state_dict_resumes_bit_for_bit():
    model, optimizer, schedule = _setup()
    evolver = TopologyEvolver(model, optimizer, schedule, seed=4)
    _run(model, optimizer, evolver, 15, False)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), evolver.state_dict()))
    _run(model, optimizer, evolver, 20, False, start=15)

    model2, optimizer2, _ = _setup(seed=9)
    evolver2 = TopologyEvolver(model2, optimizer2, schedule, seed=4)
    for target, state in zip((model2, optimizer2, evolver2), saved, strict=True):
        target.load_state_dict(state)
    _run(model2, optimizer2, evolver2, 20, False, start=15)
    assert all(torch.equal(v, model2.state_dict()[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, evolver2.ages[k]) for k, v in evolver.ages.items())


def test_state_of_another_run_is_refused():
    model, optimizer, schedule = _setup()
    evolver = TopologyEvolver(model, optimizer, schedule, seed=4)
    state = evolver.state_dict()
    with pytest.raises(ValueError, match="seed: must be this evolver's 4, got 5 in the state"):
        evolver.load_state_dict({**state, "seed": 5})
    with pytest.raises(ValueError, match=r"ages: must be of the layers \['0', '2'\], got \['0'\]"):
        evolver.load_state_dict({**state, "ages": {"0": state["ages"]["0"]}})
    with pytest.raises(ValueError, match=r"ages\['0'\]: must have shape \(64, 16\), got \(1,\)"):
        evolver.load_state_dict({**state, "ages": {**state["ages"], "0": torch.zeros(1)}})


def test_misuse_is_refused():
    model, optimizer, schedule = _setup()
    with pytest.raises(ValueError, match="removal: must be one of .*'hard', 'moves'.*, got 'no'"):
        TopologyEvolver(model, optimizer, schedule, removal="no")
    with pytest.raises(ValueError, match="regrowth: must be one of .*got 'no'"):
        TopologyEvolver(model, optimizer, schedule, regrowth="no")
    with pytest.raises(ValueError, match="must have at least one SparseLinear, got none"):
        TopologyEvolver(nn.Linear(4, 4), optimizer, schedule)
    late = nn.Sequential(SparseLinear(8, 8))
    with pytest.raises(ValueError, match="1 are missing, the first of '0'; build the optimizer after sparsify_"):
        TopologyEvolver(late, optimizer, schedule)
    evolver = TopologyEvolver(model, optimizer, schedule).attach()
    with pytest.raises(RuntimeError, match="must not be called while attached"):
        evolver.step()
    evolver.detach()
    assert evolver.step() is True
    evolver.close()


@pytest.mark.parametrize("removal", ["soft", "hard"])
@pytest.mark.parametrize("regrowth", ["soft", "greedy", "random"])
def test_two_ranks_compute_the_same_topology(removal, regrowth):
    runs = []
    for _ in range(2):
        model, optimizer, schedule = _setup()
        evolver = TopologyEvolver(model, optimizer, schedule, removal=removal, regrowth=regrowth, seed=2)
        _run(model, optimizer, evolver, 20, False)
        runs.append([layer.ids for layer in evolver.layers.values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
