"""Runs whose weights change their form: a dense start, and a window of masked dense weights between compressed ones."""

from __future__ import annotations

import json
import re
from dataclasses import replace
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
DENSE_START = {"method": "dense-start24", "dense_fraction": START / STEPS}
WINDOW = {"method": "ste-window24", "ste_window": (START / STEPS, END / STEPS)}


def lines(run, kind="train"):
    return [(row["step"], row.get("loss")) for row in read_metrics(run / METRICS) if row["kind"] == kind]


def make(micro, folder, **changes):
    folder.mkdir()
    settings = Settings(device="cpu", quiet=True, log_interval=1, save_interval=1, keep=20)
    return Trainer(micro(**changes), folder, settings)


def snapshot(trainer):
    names = dict(trainer.model.named_parameters())
    return {name: p.detach().clone() for name, p in names.items()}, dense_states(trainer.model, trainer.optimizer)


@pytest.mark.parametrize(("method", "n"), (("dense-start24", 2), ("dense-start14", 1), ("chts24", 2)))
def test_a_dense_run_until_the_weights_are_compressed(micro, tmp_path, method, n):
    dense = make(micro, tmp_path / "dense", method="dense")
    dense.train()
    ours = make(micro, tmp_path / "ours", method=method, dense_fraction=START / STEPS)
    seen = {}
    change = ours._change_form

    def watched(form):
        names = dict(ours.model.named_parameters())
        seen["weights"] = {name: p.detach().clone() for name, p in names.items()}
        seen["moments"] = {name: ours.optimizer.state[p]["exp_avg_sq"].clone() for name, p in names.items()}
        change(form)
        seen["rate"] = ours.optimizer.param_groups[0]["lr"]
        layers = sparse_layers(ours.model)
        assert layers and ours.records
        for name, p in ours.model.named_parameters():
            source = name.removesuffix(".values") + ".weight" if name.endswith(".values") else name
            weight, moment = seen["weights"][source], seen["moments"][source]
            if name.endswith(".values"):
                ids = layers[name.removesuffix(".values")].ids
                assert torch.equal(ids, prune(weight, n))
                weight, moment = (pack(t, ids, n) for t in (weight, moment))
            assert torch.equal(p, weight) and torch.equal(ours.optimizer.state[p]["exp_avg_sq"], moment)
            assert int(ours.optimizer.state[p]["step"]) == START

    ours._change_form = watched
    assert not sparse_layers(ours.model) and ours.form == "dense"
    outcome = ours.train()
    assert outcome.finished and ours.form == "sparse" and seen
    assert lines(ours.run)[:START] == lines(dense.run)[:START]
    first, before = lines(ours.run)[START], lines(dense.run)[START]
    assert first[0] == before[0] == START + 1 and first[1] != before[1]  # of the pruned weights
    rates = {row["step"]: row["lr"] for row in read_metrics(dense.run / METRICS) if row["kind"] == "train"}
    assert seen["rate"] == pytest.approx(rates[START + 1])
    assert lines(ours.run, "compress") == [(START, None)]
    updates = [step for step, _ in lines(ours.run, "update")]
    assert updates == ([6, 9] if method == "chts24" else [])  # not at step 3, when it was dense


@pytest.mark.parametrize(("method", "n"), (("ste-window24", 2), ("ste-window14", 1), ("chts24", 2)))
def test_weights_and_moments_go_through_the_window(micro, tmp_path, method, n):
    static = make(micro, tmp_path / "static", method=method)
    static.train()
    ours = make(micro, tmp_path / "ours", **WINDOW | {"method": method})
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


@pytest.mark.parametrize(
    ("changes", "step", "form"),
    (
        *((DENSE_START, step, "dense" if step <= START else "sparse") for step in (2, START, START + 1, 8)),
        *((WINDOW, step, "ste" if START < step <= END else "sparse") for step in (2, START, START + 1, END, END + 1)),
    ),
)
def test_runs_resume_in_every_form(micro, tmp_path, changes, step, form):
    whole = make(micro, tmp_path / "whole", **changes | {"method": "chts24"})
    whole.train()
    settings = Settings(device="cpu", quiet=True, log_interval=1)
    checkpoint = whole.run / "checkpoints" / f"step-{step:08d}"
    (tmp_path / "branch").mkdir()
    branch = Trainer.resume(checkpoint, settings, run=tmp_path / "branch")
    assert branch.form == form
    assert branch.train().finished
    assert lines(branch.run) == lines(whole.run)
    for (name, a), (_, b) in zip(branch.model.state_dict().items(), whole.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    model, _, _ = load_run(checkpoint)
    assert bool(sparse_layers(model)) == (form == "sparse")
    exported = export_run(checkpoint, tmp_path / "exported")
    facts = json.loads((exported.files[0].parent / "config.json").read_text())["chts"]
    assert facts["n"] == (None if form == "dense" else 2)


def test_a_window_after_a_dense_start_or_at_the_start(micro, tmp_path):
    trainer = make(micro, tmp_path / "a", **WINDOW | DENSE_START)
    assert trainer.form == "dense" and trainer.train().finished and trainer.form == "sparse"
    assert lines(trainer.run, "expand") == [(START, None)] and lines(trainer.run, "compress") == [(END, None)]
    trainer = make(micro, tmp_path / "b", **WINDOW | {"ste_window": (0.0, 0.5)}, srste_lambda=0.5)
    assert trainer.form == "ste"
    assert all(m.srste_lambda == 0.5 for m in trainer.model.modules() if isinstance(m, STELinear))
    assert trainer.train().finished and trainer.form == "sparse"
    trainer = make(micro, tmp_path / "c", **WINDOW | {"ste_window": (0.5, 0.999)})  # the last step always trains what is kept
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
    ours = make(micro, tmp_path / "ours", **WINDOW | {"ste_window": (0.0, 0.5)}, srste_lambda=1e-2)
    theirs = make(micro, tmp_path / "theirs", method="srste24", srste_lambda=1e-2)
    ours.train(), theirs.train()
    assert lines(ours.run)[: STEPS // 2] == lines(theirs.run)[: STEPS // 2]


def test_sgd_keeps_its_momentum(micro, tmp_path):
    trainer = make(micro, tmp_path / "a", **WINDOW, optimizer="sgd", lr=1e-2)
    change, seen = trainer._change_form, []

    def watched(form):
        before = snapshot(trainer)[1]
        change(form)
        after = snapshot(trainer)[1]
        weight = dict(trainer.model.named_modules())["model.layers.0.mlp.up_proj"]
        links = weight.mask() if form == "ste" else weight.weight.mask()
        name = "model.layers.0.mlp.up_proj.weight"
        seen.append(torch.equal(before[name]["momentum_buffer"] * links, after[name]["momentum_buffer"]))

    trainer._change_form = watched
    assert trainer.train().finished and seen == [True, True]


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
    trainer = make(micro, tmp_path / "a", method="static")
    trainer.train()
    states = dense_states(trainer.model, trainer.optimizer)
    before = {p: {k: v.clone() for k, v in state.items()} for p, state in trainer.optimizer.state.items()}
    load_dense_states_(trainer.model, trainer.optimizer, states)
    for parameter, state in before.items():
        for key, value in state.items():
            assert torch.equal(trainer.optimizer.state[parameter][key], value), key


def test_states_that_do_not_fit_are_refused(micro, tmp_path):
    trainer = make(micro, tmp_path / "a", method="static")
    trainer.train()
    states, before = dense_states(trainer.model, trainer.optimizer), dict(trainer.optimizer.state)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match="states: must be of this model's parameters, got 1 others, the first 'nowhere'"):
        load_dense_states_(trainer.model, trainer.optimizer, states | {"nowhere": states[name]})
    short = {key: value[:4] if value.dim() else value for key, value in states[name].items()}
    with pytest.raises(ValueError, match=r"up_proj.weight'\]\['exp_avg'\]: must have the weight's shape \(24, 16\), got \(4, 16\)"):
        load_dense_states_(trainer.model, trainer.optimizer, states | {name: short})
    assert all(trainer.optimizer.state[p] is state for p, state in before.items())
    layer = sparse_layers(trainer.model)[name.removesuffix(".weight")]
    trainer.optimizer.state[layer.values]["exp_avg_sq_row"] = torch.zeros(24)
    with pytest.raises(TypeError, match=r"exp_avg_sq_row'\] = a tensor of shape \(24,\) for model.layers.0.mlp.up_proj.values"):
        dense_states(trainer.model, trainer.optimizer)


def test_the_change_of_form_in_the_readme(micro, tmp_path):
    [code] = re.findall(r"```python\n(# A window.*?)```", (Path(__file__).parents[2] / "README.md").read_text(), re.S)
    scope = {"torch": torch}
    exec(code, scope)
    trainer = make(micro, tmp_path / "a", method="static", optimizer="adamw")
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


def test_what_cannot_start_densely_is_refused(micro, tmp_path):
    with pytest.raises(ValueError, match="dense_fraction must be 0 with method srste24, got 0.3"):
        make(micro, tmp_path / "a", method="srste24", dense_fraction=0.3)
    with pytest.raises(ValueError, match="dense_fraction must be 0 with method dense, got 0.3"):
        make(micro, tmp_path / "b", method="dense", dense_fraction=0.3)
    with pytest.raises(ValueError, match=r"dense_fraction must be in \[0, 1\), got 1.0"):
        make(micro, tmp_path / "c", method="static", dense_fraction=1.0)
    with pytest.raises(RuntimeError, match="wgmma_sp"):  # now, not after the dense steps
        make(micro, tmp_path / "d", **DENSE_START, impl="wgmma_sp")
    state = torch.get_rng_state()
    odd = replace(micro().model, hidden_size=18, intermediate_size=27, num_attention_heads=3)
    with pytest.raises(ValueError, match="must have a linear layer that can be made sparse"):
        make(micro, tmp_path / "e", **DENSE_START, model=odd)
    assert torch.equal(torch.get_rng_state(), state)
    assert METHODS["dense-start24"].settings == {"dense_fraction": 0.25} and not METHODS["dense-start14"].evolves


def test_what_cannot_have_a_window_is_refused(micro, tmp_path):
    with pytest.raises(ValueError, match="ste_window must be None with method srste24, got"):
        make(micro, tmp_path / "a", **WINDOW | {"method": "srste24"})
    with pytest.raises(ValueError, match="ste_window must be None with method dense, got"):
        make(micro, tmp_path / "b", **WINDOW | {"method": "dense"})
    for window in ((0.5, 0.5), (0.6, 0.4), (-0.1, 0.5), (0.5, 1.0)):
        with pytest.raises(ValueError, match=r"ste_window must be None, or two rising numbers in \[dense_fraction=0, 1\), got"):
            make(micro, tmp_path / "c", **WINDOW | {"ste_window": window})
        (tmp_path / "c").rmdir()
    with pytest.raises(ValueError, match=r"ste_window must hold a step of total_steps=12, got \(0.5, 0.51\)"):
        make(micro, tmp_path / "c", **WINDOW | {"ste_window": (0.5, 0.51)})
    with pytest.raises(ValueError, match=r"in \[dense_fraction=0.5, 1\), got \(0.25, 0.75\)"):
        make(micro, tmp_path / "d", **WINDOW | {"ste_window": (0.25, 0.75)}, dense_fraction=0.5)
    with pytest.raises(RuntimeError, match="wgmma_sp"):  # now, not after the window
        make(micro, tmp_path / "e", **WINDOW | {"ste_window": (0.0, 0.5)}, impl="wgmma_sp")
    assert METHODS["ste-window24"].settings == {"ste_window": (0.15, 0.85)} and not METHODS["ste-window14"].evolves
