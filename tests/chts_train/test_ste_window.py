"""A window of masked dense weights in the middle of a run with compressed ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from chts_kernels import pack, prune, unpack
from chts_train import METHODS, sparse_layers
from chts_train.baselines import STELinear
from chts_train.export import export_run
from chts_train.forms import dense_states, load_dense_states_
from chts_train.loading import load_run
from chts_train.methods import WINDOW_LAMBDA
from chts_train.metrics import METRICS, read_metrics
from chts_train.new_moments import spread
from chts_train.settings import Settings
from chts_train.trainer import Trainer

START, END, STEPS = 4, 8, 12
WINDOW = (START / STEPS, END / STEPS)


def lines(run, kind="train"):
    return [(row["step"], row.get("loss")) for row in read_metrics(run / METRICS) if row["kind"] == kind]


def make(micro, folder, method="ste-window24", window=WINDOW, **changes):
    folder.mkdir()
    settings = Settings(device="cpu", quiet=True, log_interval=1, save_interval=1, keep=20)
    return Trainer(micro(method=method, ste_window=window, **changes), folder, settings)


def snapshot(trainer):
    names = dict(trainer.model.named_parameters())
    return {name: p.detach().clone() for name, p in names.items()}, dense_states(trainer.model, trainer.optimizer)


@pytest.mark.parametrize(("method", "n"), (("ste-window24", 2), ("ste-window14", 1), ("chts24", 2)))
def test_weights_and_moments_go_through_the_window(micro, tmp_path, method, n):
    static = make(micro, tmp_path / "static", method, None)
    static.train()
    ours = make(micro, tmp_path / "ours", method)
    change, seen = ours._change_form, []

    def watched(form):
        layers = sparse_layers(ours.model) or {name: m for name, m in ours.model.named_modules() if isinstance(m, STELinear)}
        (weights, states), step = snapshot(ours), ours.counters.step
        ids = {name: layer.ids.clone() if form == "ste" else prune(layer.weight, n) for name, layer in layers.items()}
        change(form)
        seen.append((form, step, ours.optimizer.param_groups[0]["lr"]))
        now, after = snapshot(ours)
        assert set(after) == set(states)
        for name, layer in ours.model.named_modules():
            if name not in layers:
                continue
            weight, state, mine = f"{name}.weight", states[f"{name}.weight"], after[f"{name}.weight"]
            links = unpack(torch.ones_like(pack(state["exp_avg"], ids[name], n)), ids[name], n)
            if form == "ste":
                assert isinstance(layer, STELinear) and layer.srste_lambda == WINDOW_LAMBDA
                assert torch.equal(now[weight], unpack(weights[f"{name}.values"], ids[name], n))
                # The model computes what it did. (Which of several masks, where links are new and still 0, does not matter.)
                assert torch.equal(layer.weight * layer.mask(), layer.weight)
                assert method == "chts24" or torch.equal(layer.mask(), links)
                assert bool((ours.optimizer.state[layer.weight]["exp_avg"][links == 0] == 0).all())
                assert bool((ours.optimizer.state[layer.weight]["exp_avg_sq"][links == 0] > 0).all())
            else:
                assert torch.equal(layer.ids, ids[name])
                assert torch.equal(layer.values, pack(weights[weight], ids[name], n))
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(mine[key] * links, state[key] * links), key
            assert int(mine["step"]) == int(state["step"]) == step - (method == "chts24" and step > 3)
        for name in now.keys() & weights.keys():
            assert torch.equal(now[name], weights[name])

    ours._change_form = watched
    assert ours.form == "sparse" and ours.train().finished and ours.form == "sparse"
    rates = {row["step"]: row["lr"] for row in read_metrics(static.run / METRICS) if row["kind"] == "train"}
    assert [(form, step) for form, step, _ in seen] == [("ste", START), ("sparse", END)]
    if method != "chts24":  # whose log has the ramp in it
        assert [rate for *_, rate in seen] == [pytest.approx(rates[START + 1]), pytest.approx(rates[END + 1])]
    assert lines(ours.run)[: START + 1] == lines(static.run)[: START + 1]  # the first masked pass computes the same
    assert lines(ours.run)[START + 1] != lines(static.run)[START + 1]
    assert lines(ours.run, "expand") == [(START, None)] and lines(ours.run, "compress") == [(END, None)]
    assert [step for step, _ in lines(ours.run, "update")] == ([3, 9] if method == "chts24" else [])  # none inside
    assert any(
        not torch.equal(layer.ids, sparse_layers(static.model)[name].ids) for name, layer in sparse_layers(ours.model).items()
    )


@pytest.mark.parametrize("step", (2, START, START + 1, END, END + 1))
def test_runs_resume_in_every_form(micro, tmp_path, step):
    whole = make(micro, tmp_path / "whole", "chts24")
    whole.train()
    settings = Settings(device="cpu", quiet=True, log_interval=1)
    checkpoint = whole.run / "checkpoints" / f"step-{step:08d}"
    (tmp_path / "branch").mkdir()
    branch = Trainer.resume(checkpoint, settings, run=tmp_path / "branch")
    inside = START < step <= END
    assert branch.form == ("ste" if inside else "sparse")
    assert branch.train().finished
    assert lines(branch.run) == lines(whole.run)
    for (name, a), (_, b) in zip(branch.model.state_dict().items(), whole.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    model, _, _ = load_run(checkpoint)
    assert bool(sparse_layers(model)) != inside
    exported = export_run(checkpoint, tmp_path / "exported")
    assert json.loads((exported.files[0].parent / "config.json").read_text())["chts"]["n"] == 2


def test_a_window_after_a_dense_start_or_at_the_start(micro, tmp_path):
    trainer = make(micro, tmp_path / "a", "static", dense_fraction=START / STEPS)
    assert trainer.form == "dense" and trainer.train().finished and trainer.form == "sparse"
    assert lines(trainer.run, "expand") == [(START, None)] and lines(trainer.run, "compress") == [(END, None)]
    trainer = make(micro, tmp_path / "b", window=(0.0, 0.5), srste_lambda=0.5)
    assert trainer.form == "ste"
    assert all(m.srste_lambda == 0.5 for m in trainer.model.modules() if isinstance(m, STELinear))
    assert trainer.train().finished and trainer.form == "sparse"
    trainer = make(micro, tmp_path / "c", window=(0.5, 0.999))  # the last step always trains what is kept
    assert trainer.train().finished and trainer.form == "sparse"
    assert lines(trainer.run, "compress") == [(STEPS - 1, None)]


def test_an_update_right_before_the_window_is_logged(micro, tmp_path):
    (tmp_path / "run").mkdir()
    config = micro(method="chts24", ste_window=(0.25, 0.75), interval=3, eval_interval=12)
    trainer = Trainer(config, tmp_path / "run", Settings(device="cpu", quiet=True, log_interval=12, checkpoints=False))
    assert trainer.train().finished
    [update] = [row for row in read_metrics(trainer.run / METRICS) if row["kind"] == "update"]
    assert update["step"] == 3 and update["turnover"] > 0 and lines(trainer.run, "expand") == [(3, None)]


def test_inside_the_window_training_is_that_of_srste(micro, tmp_path):
    ours = make(micro, tmp_path / "ours", window=(0.0, 0.5), srste_lambda=1e-2)
    theirs = make(micro, tmp_path / "theirs", "srste24", None, srste_lambda=1e-2)
    ours.train(), theirs.train()
    assert lines(ours.run)[: STEPS // 2] == lines(theirs.run)[: STEPS // 2]


def test_sgd_keeps_its_momentum(micro, tmp_path):
    trainer = make(micro, tmp_path / "a", optimizer="sgd", lr=1e-2)
    assert trainer.train().finished


def test_second_moments_are_spread_exactly_where_they_are_an_outer_product():
    generator = torch.Generator().manual_seed(0)
    for n in (2, 1):
        rows, columns = torch.rand(16, generator=generator) + 0.5, torch.rand(24, generator=generator) + 0.5
        ids = prune(torch.randn(16, 24, generator=generator), n)
        ones = torch.ones(16, 24)
        assert torch.equal(spread(pack(ones, ids, n), ids, n), ones)
        moment = pack(rows[:, None] * columns, ids, n)
        found = spread(moment, ids, n)
        assert torch.equal(pack(found, ids, n), moment) and bool((found > 0).all())
        wide = unpack(moment, ids, n)
        row, column = wide.sum(1) / n / 6, wide.sum(0) / n / 4
        expected = row[:, None] * column / (wide.sum() / (n * 96))
        missing = wide == 0
        torch.testing.assert_close(found[missing], expected[missing])
        zeros = torch.zeros_like(moment)
        assert torch.equal(spread(zeros, ids, n), torch.zeros(16, 24))
        assert spread(moment.bfloat16(), ids, n).dtype == torch.bfloat16


def test_states_survive_a_round_trip(micro, tmp_path):
    trainer = make(micro, tmp_path / "a", window=None)
    trainer.train()
    states = dense_states(trainer.model, trainer.optimizer)
    before = {p: {k: v.clone() for k, v in state.items()} for p, state in trainer.optimizer.state.items()}
    load_dense_states_(trainer.model, trainer.optimizer, states)
    for parameter, state in before.items():
        for key, value in state.items():
            assert torch.equal(trainer.optimizer.state[parameter][key], value), key


def test_the_change_of_form_in_the_readme(micro, tmp_path):
    [code] = re.findall(r"```python\n(# A window.*?)```", (Path(__file__).parents[2] / "README.md").read_text(), re.S)
    scope = {"torch": torch}
    exec(code, scope)
    trainer = make(micro, tmp_path / "a", window=None, optimizer="adamw")
    trainer.train()
    model = trainer.model
    before = {name: layer.weight.to_dense() for name, layer in sparse_layers(model).items()}
    optimizer = scope["change_form"](model, trainer.optimizer, "ste")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, STELinear)}
    assert all(torch.equal(layer.weight * layer.mask(), before[name]) for name, layer in layers.items())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer = scope["change_form"](model, optimizer, "sparse")
    assert sparse_layers(model).keys() == before.keys()
    for parameter in model.parameters():
        assert int(optimizer.state[parameter]["step"]) == STEPS + 1


def test_what_cannot_have_a_window_is_refused(micro, tmp_path):
    with pytest.raises(ValueError, match="ste_window must be None with method srste24, got"):
        make(micro, tmp_path / "a", "srste24")
    with pytest.raises(ValueError, match="ste_window must be None with method dense, got"):
        make(micro, tmp_path / "b", "dense")
    for window in ((0.5, 0.5), (0.6, 0.4), (-0.1, 0.5), (0.5, 1.0)):
        with pytest.raises(ValueError, match=r"ste_window must be None, or two rising numbers in \[dense_fraction=0, 1\), got"):
            make(micro, tmp_path / "c", window=window)
        (tmp_path / "c").rmdir()
    with pytest.raises(ValueError, match=r"in \[dense_fraction=0.5, 1\), got \(0.25, 0.75\)"):
        make(micro, tmp_path / "d", window=(0.25, 0.75), dense_fraction=0.5)
    with pytest.raises(RuntimeError, match="wgmma_sp"):  # now, not after the window
        make(micro, tmp_path / "e", window=(0.0, 0.5), impl="wgmma_sp")
    assert METHODS["ste-window24"].settings == {"ste_window": (0.25, 0.75)} and not METHODS["ste-window14"].evolves
