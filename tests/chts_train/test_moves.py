"""Updates by moves of whole patterns in training: gradients, moments, resumption, what they are good for."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
from torch import nn

from chts_kernels import unpack
from chts_train import METHODS, TopologyEvolver, TopologySchedule, attach_method, sparse_layers, sparsify_, trainer
from chts_train.cli import make_parser
from chts_train.cli_config import configure
from chts_train.configs import preset
from chts_train.dense_gradient import DenseGradients
from chts_train.linear import SparsityConfig
from chts_train.runs import new_run
from chts_train.trainer import Trainer

RULES = [("moves", "gradient"), ("moves", "random"), ("moves", "soft"), ("soft-moves", "soft"), ("soft-moves", "random")]


def _setup(removal="moves", regrowth="gradient", n=2, seed=0, optimizer=torch.optim.Adam, **changes):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.LayerNorm(32))
    sparsify_(model, SparsityConfig(n=n))
    optimizer = optimizer(model.parameters(), lr=0.01)
    schedule = TopologySchedule(**{"total_steps": 40, "interval": 10, "zeta": 0.2, "lr_ramp_steps": 0, **changes})
    return model, optimizer, TopologyEvolver(model, optimizer, schedule, removal=removal, regrowth=regrowth, seed=4)


def _run(model, optimizer, evolver, first, last, passes=1):
    for step in range(first, last + 1):
        x = torch.randn(8, 3, 32, generator=torch.Generator().manual_seed(step))
        for part in x.chunk(passes):
            (model(part).square().mean() / passes).backward()
        if evolver._attached or evolver.step():
            optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("n", [2, 1])
def test_dense_gradient_is_that_of_the_dense_weight(n):
    model = _setup(n=n)[0].double()  # the order of a sum's terms shows in float32
    gradients = DenseGradients(sparse_layers(model))
    x = torch.randn(4, 3, 32, dtype=torch.float64)
    gradients.arm(True)
    assert gradients.armed
    with torch.no_grad():
        model(x)  # an evaluation in between is none of its business
    for part in x.chunk(2):
        model(part).square().sum().backward()
    gradients.check()
    found = {name: gradients.take(name) for name in sparse_layers(model)}
    gradients.arm(False)
    assert not gradients.armed and not any(layer._forward_hooks for layer in model)
    dense = copy.deepcopy(model)
    for index in (0, 2):
        dense[index] = dense[index].to_linear()
    dense(x).square().sum().backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, dense[int(name)].weight.grad.float(), rtol=1e-6, atol=1e-6)
        values = unpack(model[int(name)].values.grad, model[int(name)].ids, n)
        torch.testing.assert_close(gradient * (values != 0), values.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [2, 1])
@pytest.mark.parametrize(("removal", "regrowth"), RULES)
@pytest.mark.parametrize("attached", [False, True])
def test_an_update_spends_its_budget_and_what_stays_keeps_its_state(removal, regrowth, n, attached):
    model, optimizer, evolver = _setup(removal, regrowth, n)
    if attached:
        evolver.attach()
    _run(model, optimizer, evolver, 1, 9)
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()["state"])
    assert evolver.needs_dense_gradients == (regrowth == "gradient")
    _run(model, optimizer, evolver, 10, 10, passes=2)
    assert not evolver.needs_dense_gradients and evolver.updates == 1
    for place, (row, (name, layer)) in enumerate(zip(evolver.stats(), evolver.layers.items(), strict=True)):
        old = before.get_submodule(name).weight
        both = old.mask() & layer.weight.mask()
        assert torch.equal(layer.weight.to_dense(), old.to_dense() * both)
        kept_old, kept_new = (both[mask].view_as(layer.values) for mask in (old.mask(), layer.weight.mask()))
        for key in ("exp_avg", "exp_avg_sq"):
            moment = optimizer.state[layer.values][key]
            old_moment = state[2 * place][key]  # values, bias, values, bias
            assert torch.equal(moment[kept_new], old_moment[kept_old]) and not moment[~kept_new].any()
        assert torch.equal(evolver.ages[name] == 0, ~kept_new)
        assert row["removed"] == int(0.2 * layer.values.numel())
        assert row["removed"] - 4 * n < row["replaced"] <= row["removed"]
        assert row["replaced"] == int((layer.weight.mask() & ~old.mask()).sum())


@pytest.mark.parametrize(("removal", "regrowth"), RULES)
@pytest.mark.parametrize("cut", [9, 15])
def test_resumed_in_any_place_it_is_the_same_run(removal, regrowth, cut):
    model, optimizer, evolver = _setup(removal, regrowth)
    _run(model, optimizer, evolver, 1, cut)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), evolver.state_dict()))
    _run(model, optimizer, evolver, cut + 1, 32)
    other = _setup(removal, regrowth, seed=9)
    for target, state in zip(other, saved, strict=True):
        target.load_state_dict(state)
    _run(*other, cut + 1, 32)
    assert all(torch.equal(value, other[0].state_dict()[key]) for key, value in model.state_dict().items())
    assert evolver.updates == other[2].updates == 3


def test_nothing_to_spend_changes_nothing():
    for removal, regrowth in RULES:
        model, optimizer, evolver = _setup(removal, regrowth, zeta=0.0)
        before = [layer.ids.clone() for layer in evolver.layers.values()]
        _run(model, optimizer, evolver, 1, 20)
        assert all(torch.equal(a, layer.ids) for a, layer in zip(before, evolver.layers.values(), strict=True))


def test_a_step_whose_passes_were_not_seen_is_refused_before_anything_changes():
    model, optimizer, evolver = _setup()
    _run(model, optimizer, evolver, 1, 9)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="saw none for 2 of 2 layers, the first '0'; run the forward and backward passes"):
        evolver.step()
    assert evolver.step_count == 9 and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    _run(model, optimizer, evolver, 10, 12)
    assert evolver.updates == 1
    evolver.load_state_dict({**evolver.state_dict(), "step": 19})
    assert evolver.needs_dense_gradients
    evolver.close()
    assert not any(layer._forward_hooks for layer in evolver.layers.values())


def test_rules_that_do_not_go_together_are_refused():
    for removal, regrowth in (("soft", "gradient"), ("moves", "greedy")):
        with pytest.raises(ValueError, match=f"regrowth: must be one of .* with removal {removal!r}, got {regrowth!r}"):
            _setup(removal, regrowth)


@pytest.mark.parametrize("n", [2, 1])
def test_growing_by_gradient_finds_links_that_a_static_topology_lacks(n):
    """A teacher of the same sparsity with other patterns: the static student cannot copy it."""
    losses = {}
    for name in ("static", "rigl"):
        method = METHODS[{"static": ("static14", "static"), "rigl": ("rigl14", "rigl24")}[name][n - 1]]
        teacher = nn.Sequential(nn.Linear(32, 32, bias=False))
        torch.manual_seed(1)
        nn.init.normal_(teacher[0].weight)
        sparsify_(teacher, SparsityConfig(n=n, init="magnitude"))
        torch.manual_seed(2)
        student = nn.Sequential(nn.Linear(32, 32, bias=False))
        sparsify_(student, method.sparsity_config(seed=3))
        optimizer = torch.optim.Adam(student.parameters(), lr=0.03)
        schedule = TopologySchedule(total_steps=400, interval=20, zeta=0.3, zeta_end=0.0, lr_ramp_steps=0)
        evolver = attach_method(method, student, optimizer, schedule)
        generator = torch.Generator().manual_seed(4)
        for _ in range(400):
            x = torch.randn(32, 32, generator=generator)
            loss = (student(x) - teacher(x).detach()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            if evolver is None or evolver.step():
                optimizer.step()
        losses[name] = loss.item()
    assert losses["rigl"] < 0.5 * losses["static"], losses


@pytest.mark.parametrize("method", ["rigl24", "chts-moves14"])
def test_the_trainer_repeats_and_resumes_such_a_run(micro, tmp_path, quiet, method):
    config = micro(method=method)
    whole, copied = (Trainer(config, new_run(name, tmp_path / name), replace(quiet, save_interval=5)) for name in "ab")
    whole.train()
    updates = [row for row in whole.log.read() if row["kind"] == "update"]
    assert [row["step"] for row in updates] == [3, 6, 9] and all(0 < row["turnover"] <= 0.1 for row in updates)
    for _ in range(5):  # up to the step before an update
        copied._train_step()
    copied._save()
    resumed = Trainer.resume(tmp_path / "b", quiet)
    assert resumed.evolver.needs_dense_gradients == (method == "rigl24")
    resumed.train()
    assert all(torch.equal(v, resumed.model.state_dict()[k]) for k, v in whole.model.state_dict().items())


def test_compiled_blocks_show_their_gradients_at_updates(micro, tmp_path, quiet, monkeypatch):
    monkeypatch.setattr(trainer, "compile_blocks", functools.partial(trainer.compile_blocks, backend="aot_eager"))
    config, models = micro(method="rigl24", total_steps=4), []
    for mode in ("off", "blocks"):
        run = Trainer(config, new_run(mode, tmp_path / mode), replace(quiet, compile=mode, checkpoints=False))
        run.train()
        assert run.evolver.updates == 1
        models.append(run.model.state_dict())
    assert all(torch.equal(value, models[1][key]) for key, value in models[0].items() if key.endswith("ids"))


def test_the_command_line_gives_such_a_method_its_schedule():
    for options, expected in (
        (["--method", "rigl14"], (25, 0.3, 0.0, 0.1, 0)),
        (["--method", "rigl14", "--zeta", "0.2", "--lr-ramp-steps", "4", "--interval", "50"], (50, 0.2, 0.0, 0.1, 4)),
        (["--method", "chts14"], (100, 0.1, None, 0.75, 10)),
    ):
        config = configure(make_parser().parse_args(["pretrain", *options]), preset("60m"))
        assert (config.interval, config.zeta, config.zeta_end, config.stop_fraction, config.lr_ramp_steps) == expected


def test_copies_and_pickles_of_a_model_that_is_read_are_not_read(tmp_path):
    model, _, evolver = _setup(interval=1)
    copied = copy.deepcopy(model)
    torch.save(model, tmp_path / "model")
    for other in (copied, torch.load(tmp_path / "model", weights_only=False)):
        other(torch.randn(4, 32)).square().mean().backward()
    assert not evolver._gradients._sums


def test_inputs_changed_in_place_under_autocast_are_read_as_they_were():
    model, _, evolver = _setup(interval=1)
    x, sums = torch.randn(8, 32), []
    for change in (False, True):
        evolver._gradients.arm(False)
        evolver._gradients.arm(True)
        given = x.clone()
        with torch.autocast("cpu", torch.bfloat16):
            y = model[0](x=given)  # also by name
        if change:
            given.zero_()
        y.float().square().mean().backward()
        sums.append(evolver._gradients._sums["0"])
    assert torch.equal(*sums) and sums[0].any()


def test_half_precision_sums_and_steps_that_a_scaler_leaves_out_stay_finite():
    model, optimizer, evolver = _setup(interval=1)
    evolver.attach()
    with torch.autocast("cpu", torch.float16):
        y = model[0](torch.ones(4096, 32))
    y.backward(torch.full_like(y, 100.0))
    assert model[0].values.grad.isfinite().all() and (evolver._gradients._sums["0"] == 409600).all()
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (torch.inf, 1.0):
        scaler.scale(model(torch.randn(4, 32)).square().mean() * factor).backward()
        assert all(total.isfinite().all() for total in evolver._gradients._sums.values())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert evolver.updates == 1
