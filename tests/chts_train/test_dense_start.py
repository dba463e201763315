"""Dense starts: some steps of dense training, then weights and optimizer state are pruned and compressed in place."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from chts_kernels import pack, prune
from chts_train import METHODS, sparse_layers
from chts_train.export import export_run
from chts_train.loading import load_run
from chts_train.metrics import METRICS, read_metrics
from chts_train.settings import Settings
from chts_train.trainer import Trainer

SWITCH = 4


def lines(run, kind="train"):
    return [(row["step"], row.get("loss")) for row in read_metrics(run / METRICS) if row["kind"] == kind]


def make(micro, folder, method="dense-start24", fraction=SWITCH / 12, **changes):
    folder.mkdir()
    settings = Settings(device="cpu", quiet=True, log_interval=1, save_interval=1, keep=20)
    return Trainer(micro(method=method, dense_fraction=fraction, **changes), folder, settings)


@pytest.mark.parametrize(("method", "n"), (("dense-start24", 2), ("dense-start14", 1), ("chts24", 2)))
def test_a_dense_run_until_the_weights_are_compressed(micro, tmp_path, method, n):
    dense = make(micro, tmp_path / "dense", "dense", 0.0)
    dense.train()
    ours = make(micro, tmp_path / "ours", method)
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
            assert int(ours.optimizer.state[p]["step"]) == SWITCH

    ours._change_form = watched
    assert not sparse_layers(ours.model) and ours.form == "dense"
    outcome = ours.train()
    assert outcome.finished and ours.form == "sparse" and seen
    assert lines(ours.run)[:SWITCH] == lines(dense.run)[:SWITCH]
    first, before = lines(ours.run)[SWITCH], lines(dense.run)[SWITCH]
    assert first[0] == before[0] == SWITCH + 1 and first[1] != before[1]  # of the pruned weights
    rates = {row["step"]: row["lr"] for row in read_metrics(dense.run / METRICS) if row["kind"] == "train"}
    assert seen["rate"] == pytest.approx(rates[SWITCH + 1])
    assert lines(ours.run, "compress") == [(SWITCH, None)]
    updates = [step for step, _ in lines(ours.run, "update")]
    assert updates == ([6, 9] if method == "chts24" else [])  # not at step 3, when it was dense


@pytest.mark.parametrize("step", (2, SWITCH, SWITCH + 1, 8))
def test_runs_resume_on_both_sides(micro, tmp_path, step):
    whole = make(micro, tmp_path / "whole", "chts24")
    whole.train()
    settings = Settings(device="cpu", quiet=True, log_interval=1)
    checkpoint = whole.run / "checkpoints" / f"step-{step:08d}"
    (tmp_path / "branch").mkdir()
    branch = Trainer.resume(checkpoint, settings, run=tmp_path / "branch")
    assert branch.form == ("dense" if step <= SWITCH else "sparse")
    assert branch.train().finished
    assert lines(branch.run) == lines(whole.run)
    for (name, a), (_, b) in zip(branch.model.state_dict().items(), whole.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    model, _, _ = load_run(checkpoint)
    assert bool(sparse_layers(model)) == (step > SWITCH)
    exported = export_run(checkpoint, tmp_path / "exported")
    facts = json.loads((exported.files[0].parent / "config.json").read_text())["chts"]
    assert facts["n"] == (2 if step > SWITCH else None)


def test_what_cannot_start_densely_is_refused(micro, tmp_path):
    with pytest.raises(ValueError, match="dense_fraction must be 0 with method srste24, got 0.3"):
        make(micro, tmp_path / "a", "srste24", 0.3)
    with pytest.raises(ValueError, match="dense_fraction must be 0 with method dense, got 0.3"):
        make(micro, tmp_path / "b", "dense", 0.3)
    with pytest.raises(ValueError, match=r"dense_fraction must be in \[0, 1\), got 1.0"):
        make(micro, tmp_path / "c", "static", 1.0)
    with pytest.raises(RuntimeError, match="wgmma_sp"):  # now, not after the dense steps
        make(micro, tmp_path / "d", impl="wgmma_sp")
    state = torch.get_rng_state()
    odd = replace(micro().model, hidden_size=18, intermediate_size=27, num_attention_heads=3)
    with pytest.raises(ValueError, match="must have a linear layer that can be made sparse"):
        make(micro, tmp_path / "e", model=odd)
    assert torch.equal(torch.get_rng_state(), state)
    assert METHODS["dense-start24"].settings == {"dense_fraction": 0.25} and not METHODS["dense-start14"].evolves
