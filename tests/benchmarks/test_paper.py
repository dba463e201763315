"""The paper's experiments at their smallest: stopped, continued, reported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.paper import arms, figures, flops, report, schedule
from benchmarks.paper.__main__ import main
from benchmarks.paper.protocol import (
    LAMBDAS,
    TABLES,
    Arm,
    Places,
    arms_of,
    config_of,
    fingerprint,
    method_name,
    protocol_of,
)
from benchmarks.paper.results import Paper, path_of, tuned
from chts_kernels import prune
from chts_train import sparse_layers
from chts_train.configs import preset

TINY = ("--scale", "tiny", "--jobs", "0", "--seeds", "0")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def call(tmp_path: Path):
    """A function: options of a run in this process -> exit status; results and runs go to the test's folder."""
    return lambda *options: main([*TINY, "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"), *options])


def test_every_arm_of_every_table_has_a_config() -> None:
    for table in TABLES:
        for arm in arms_of(table, [0, 1], {"srste24": 2e-4, "srste14": None}):
            config = config_of(arm, "reduced", Places())
            assert (config.method, config.seed, config.srste_lambda) == (arm.method, arm.seed, arm.decay)
            if arm.group == "llama":
                assert (config.total_steps, config.batch_size, config.seq_len) == (4000, 64, 256)
            if arm.needs is not None:
                assert arm.needs.method == "dense" and arm.needs.group in ("llama", "vit")
            if arm.group.endswith("-retrain"):
                assert config.init == "magnitude" and config.t_end == 3.0
    lengths = {config_of(arm, "reduced", Places()).total_steps for arm in arms_of(3, [0], {}) if arm.group == "vit-retrain"}
    assert len(lengths) == 1  # equal epochs


def test_srste_is_tuned_on_seed_0_before_other_seeds_run() -> None:
    first = [arm.key for arm in arms_of(1, [1, 2], {}, ["srste24"])]
    assert first == [f"llama/srste24@{decay:g}/s0" for decay in LAMBDAS]
    rows = [
        {"method": "srste24", "seed": 0, "srste_lambda": decay, "figures": {"val_loss": loss}}
        for decay, loss in zip(LAMBDAS, (3.0, 2.5, 2.7), strict=True)
    ]
    assert tuned(rows[:2]) == {"srste24": None} and tuned(rows) == {"srste24": LAMBDAS[1]}
    after = [arm.key for arm in arms_of(1, [1, 2], tuned(rows), ["srste24"])]
    assert set(after) - set(first) == {"llama/srste24@0.0002/s1", "llama/srste24@0.0002/s2"}


def test_what_decides_most_comes_first(tmp_path: Path) -> None:
    plan = schedule.Plan([Paper(tmp_path / "table1.json", 1, {})], [0, 1, 2], [], "tiny", Places(), Places(), tmp_path)
    names = [arm.key.removeprefix("llama/") for arm in plan.waiting()]
    first = "dense chts24 random-regrow static srste24@6e-05 srste24@0.0002 srste24@0.0006 ste24 ste-window24 dense-start24 rigl24 "
    first += "random-moves chts14 static14 srste14@6e-05 srste14@0.0002 srste14@0.0006 ste-window14 dense-start14 rigl14"
    assert names[:20] == [f"{name}/s0" for name in first.split()]
    assert names[20:22] == ["dense/s1", "chts24/s1"] and names[-1] == "random-moves14/s2" and len(set(names)) == len(names)
    for arm in plan.waiting()[:1]:
        schedule._note_failure(plan, arm)
    assert plan.waiting()[-1].key == "llama/dense/s0"  # another try only after all others


def test_files_take_groups_that_come_later(tmp_path: Path) -> None:
    path, places = path_of(tmp_path, 3, "tiny"), Places()
    Paper.open(path, 3, protocol_of(3, "tiny", places, ["vit"])).save()
    more = Paper.open(path, 3, protocol_of(3, "tiny", places, ["llama"]))
    assert set(more.protocol["groups"]) == set(TABLES[3])
    more.save()
    with pytest.raises(ValueError, match=r"groups\.vit\.data\.spec"):
        Paper.open(path, 3, protocol_of(3, "tiny", Places(images="/x/cifar10_jpeg.npz"), ["vit"]))
    assert {arm.group for arm in arms_of(3, [0], {}, models=["llama"])} == {"llama", "llama-retrain"}


def test_what_was_not_run_is_listed() -> None:
    def row(arm: Arm) -> dict:
        return {"key": arm.key, "method": arm.method, "seed": arm.seed, "srste_lambda": arm.decay, "figures": {"val_loss": 1.0}}

    done = [arm for arm in arms_of(1, [0, 1], {"srste24": LAMBDAS[0], "srste14": None}) if arm.method != "static14"]
    table = report.not_run([row(arm) for arm in done])
    lines = {(line[0], line[1]): line[2] for line in table.rows}
    assert all(text in lines["1", "llama"] for text in ("static14 (0, 1, 2)", "chts24 (2)", "srste24@6e-05 (2)"))
    assert lines["2", "llama"] == "greedy (0, 1, 2), soft-regrow (0, 1, 2), chts24 (2)" and ("3", "vit-retrain") in lines
    everything = [arm for t in TABLES for arm in arms_of(t, [0, 1, 2], {"srste24": LAMBDAS[0], "srste14": LAMBDAS[0]})]
    assert report.not_run([row(arm) for arm in everything]) is None


def test_a_lost_gpu_ends_the_invocation(tmp_path: Path, monkeypatch) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(schedule.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(schedule.torch.cuda, "synchronize", lost)
    assert not schedule._free_memory()


def test_fingerprints_know_protocols_not_places() -> None:
    arm = Arm("llama", "chts24", 0)
    here, there = Places(("/a/t.u16.xz", "/a/v.u16.xz")), Places(("/b/t.u16", "/b/v.u16"))
    assert fingerprint(arm, "reduced", here) == fingerprint(arm, "reduced", there)
    assert len({fingerprint(arm, s, p) for s, p in (("reduced", here), ("reduced", Places()), ("tiny", Places()))}) == 3
    assert (method_name("static24"), method_name("chts24"), method_name("random-regrow")) == ("static", "chts24", "random-regrow")
    with pytest.raises(ValueError, match="method"):
        method_name("nothing24")


def test_arms_stop_go_on_and_are_reported(call, tmp_path: Path, monkeypatch, capsys) -> None:
    options = ("--table", "1", "--arms", "dense", "chts24")
    stop_in_the_middle(monkeypatch)
    assert call(*options) == 0  # dense is stopped, and so is the invocation
    printed = capsys.readouterr().out
    assert "stopped, to be continued" in printed and "2 arm(s) left" in printed
    monkeypatch.undo()
    assert call(*options) == 0
    assert "complete" in capsys.readouterr().out
    file = Paper.load(tmp_path / "out" / "table1-tiny.json")
    dense, sparse = sorted(file.rows, key=lambda row: row["n"] or 0)
    assert (dense["method"], sparse["method"], sparse["steps"], sparse["turnover"]["updates"]) == ("dense", "chts24", 24, 3)
    assert dense["figures"]["val_ppl"] > 1 and dense["tokens"] == sparse["tokens"] > 0 and dense["environment"]["torch"]
    assert len(sparse["curves"]["score_var_survivors"]) == 3 and set(sparse["layers"]) >= {"q_proj", "down_proj"}
    assert str(tmp_path) not in json.dumps(file.rows)  # no machine's paths

    # An uninterrupted run in another folder ends with the same figures.
    whole = tmp_path / "whole"
    arm = Arm("llama", "dense", 0)
    assert arms.train_arm(arm, "tiny", Places(), whole)
    assert arms.collect(arm, "tiny", Places(), whole)["figures"] == dense["figures"]

    # Table 2 takes chts24 from table 1, and the figures are drawn from both.
    def forbidden(*_: object) -> bool:
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr(schedule, "train_arm", forbidden)
    assert call("--table", "2", "--arms", "chts24", "--figure", "3", "4") == 0
    assert main(["report", "--out", str(tmp_path / "out"), "--scale", "tiny"]) == 0
    text = (tmp_path / "out" / "report-tiny.md").read_text()
    assert "chts24" in text and "minus dense" in text and "Appendix J" in text
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {f"figure{i}-tiny.png" for i in (2, 3, 4)}


def stop_in_the_middle(monkeypatch) -> None:
    """The first arm gets its signal at step 7, as if time were up; no other one starts."""
    import os
    import signal

    from chts_train.trainer import Trainer

    step = Trainer._train_step

    def train_step(self: Trainer) -> None:
        step(self)
        if self.counters.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_train_step", train_step)
    here = schedule._here

    def once(*arguments):
        assert not here(*arguments)  # a signal from outside ends the invocation, not only the arm
        return False

    monkeypatch.setattr(schedule, "_here", once)


def test_dense_to_sparse_starts_from_the_dense_arm(call, tmp_path: Path, capsys) -> None:
    labels = np.arange(60) % 3
    noise = np.random.default_rng(0).integers(0, 120, (60, 8, 8))
    images = (noise + 60 * labels[:, None, None]).astype(np.uint8)
    np.savez(tmp_path / "cifar10_jpeg.npz", images=images, labels=labels)
    options = ("--arms", "dense", "nvidia", "chts24", "--data", str(tmp_path), "--minutes", "1")
    assert call("--table", "3", *options) == 0
    assert "complete" in capsys.readouterr().out
    file = Paper.load(path_of(tmp_path / "out", 3, "tiny"))
    rows = {row["key"]: row for row in file.rows}
    assert len(rows) == 8
    before, source = rows["vit-retrain/nvidia/s0"]["before"], rows["vit/dense/s0"]
    assert before["dense"].keys() == before["pruned"].keys() == source["figures"].keys()
    assert rows["vit-retrain/nvidia/s0"]["turnover"] is None and rows["vit-retrain/chts24/s0"]["turnover"]["updates"] == 3
    titles = [table.title for table in report.tables_of(file)]
    assert len(titles) == 4 and all("retrain" in title for title in titles)
    values = report.values_of([row for row in file.rows if row["group"] == "llama-retrain"])
    assert set(values) == {"dense, at the start", "one-shot prune", "dense, trained on", "nvidia", "chts24"}


def test_tickets_take_patterns_and_nothing_else(call, tmp_path: Path, monkeypatch, capsys) -> None:
    seen = {}
    take = arms.take_patterns_

    def watched(trainer, weights, *, redraw):
        random = {name: layer.ids.clone() for name, layer in sparse_layers(trainer.model).items()}
        state = torch.get_rng_state()
        take(trainer, weights, redraw=redraw)
        assert torch.equal(torch.get_rng_state(), state)
        for name, layer in sparse_layers(trainer.model).items():
            dense = weights[f"{name}.weight"].float()
            assert torch.equal(layer.ids, prune(dense, layer.n)) and not torch.equal(layer.ids, random[name])
            seen[trainer.config.name, trainer.config.method, name] = layer.weight.to_dense().detach()

    monkeypatch.setattr(arms, "take_patterns_", watched)
    assert call("--table", "4", "--minutes", "2") == 0
    assert "complete" in capsys.readouterr().out
    torch.manual_seed(0)
    first = config_of(Arm("llama", "dense", 0), "tiny", Places()).build_model().state_dict()
    for (group, method, name), dense in seen.items():
        links = dense != 0
        assert links.sum() == links.numel() // (2 if method == "static" else 4)
        assert torch.equal(dense[links], first[f"{name}.weight"][links]) == (group == "llama-ticket")
    assert {key[:2] for key in seen} == {(f"llama-{kind}", method) for kind in ("ticket", "redrawn") for method in ("static", "static14")}
    file = Paper.load(path_of(tmp_path / "out", 4, "tiny"))
    assert len(file.rows) == 7
    shown, _ = report.tables_of(file)
    assert {line[0] for line in shown.rows} >= {"dense", "static", "static14, other values, patterns of the trained dense model"}


def test_other_settings_have_rows_of_their_own(call, tmp_path: Path, capsys) -> None:
    options = ("--table", "1", "--arms", "chts24", "--set", "lr_ramp_steps=0", "new_moments=estimated")
    for jobs in ("1", "0"):  # the second one finds the row that the worker's arm left
        assert call(*options, "--jobs", jobs, "--minutes", "1") == 0
        printed = capsys.readouterr().out
        assert "complete" in printed and ("starts" in printed) == (jobs == "1")
    (row,) = Paper.load(path_of(tmp_path / "out", 1, "tiny")).rows
    assert row["key"] == "llama/chts24+lr_ramp_steps=0+new_moments=estimated/s0"
    assert row["changes"] == {"lr_ramp_steps": 0, "new_moments": "estimated"}
    arm = Arm.of(row)
    assert arm.key == row["key"] and row["fingerprint"] == fingerprint(arm, "tiny", Places()) != fingerprint(
        Arm("llama", "chts24", 0), "tiny", Places()
    )
    config = config_of(arm, "tiny", Places())
    assert (config.lr_ramp_steps, config.new_moments) == (0, "estimated")
    betas = Arm("llama", "chts24", 0, changes=(("betas", (0.9, 0.95)),))
    assert Arm.of({"group": "llama", "method": "chts24", "seed": 0, "srste_lambda": None, "changes": {"betas": [0.9, 0.95]}}) == betas
    assert betas.name == "chts24+betas=[0.9,0.95]" and config_of(betas, "tiny", Places()).betas == (0.9, 0.95)
    assert len(fingerprint(betas, "tiny", Places())) == 12
    for wrong in ("lr_ramp_steps", "seed=3", "data.spec=x", "=1"):
        assert call("--table", "1", "--set", wrong) == 2
        rule = "--set: must be KEY=VALUE with a field of the config that arms do not set themselves"
        assert f"{rule}, got {wrong!r}" in capsys.readouterr().err
    assert call("--table", "1", "--arms", "static", "--set", "lr_rampsteps=0") == 2
    assert "did you mean lr_ramp_steps?" in capsys.readouterr().err


def test_rows_of_other_folders_are_taken(tmp_path: Path, capsys) -> None:
    def folder(name: str, groups: dict, *keys: str, ppl: float = 1.0) -> Path:
        rows = [{"key": key, "figures": {"val_ppl": ppl}} for key in keys]
        Paper(path_of(tmp_path / name, 1, "tiny"), 1, {"scale": "tiny", "groups": groups}, {"gpu": name}, rows).save()
        return tmp_path / name

    here = folder("here", {"llama": {"lr": 1}}, "a", "b")
    one, two = folder("one", {"llama": {"lr": 1}}, "b", "c", ppl=2.0), folder("two", {"vit": {"lr": 2}}, "d", ppl=3.0)
    merge = ["merge", "--scale", "tiny", "--out", str(here)]
    assert main([*merge, str(one), str(two)]) == 0 and "4 rows" in capsys.readouterr().out
    file = Paper.load(path_of(here, 1, "tiny"))
    assert [(row["key"], row["figures"]["val_ppl"]) for row in file.rows] == [("a", 1.0), ("b", 1.0), ("c", 2.0), ("d", 3.0)]
    assert file.protocol["groups"] == {"llama": {"lr": 1}, "vit": {"lr": 2}} and file.environment == {"gpu": "here"}
    text = path_of(here, 1, "tiny").read_text()
    assert main([*merge, str(folder("three", {"llama": {"lr": 1}}, "e")), str(folder("four", {"llama": {"lr": 5}}, "f"))]) == 2
    assert "groups.llama.lr" in capsys.readouterr().err and path_of(here, 1, "tiny").read_text() == text
    assert main([*merge, str(tmp_path)]) == 2 and "must hold result files such as table1-tiny.json" in capsys.readouterr().err
    new = tmp_path / "new"
    assert main(["merge", "--scale", "tiny", "--out", str(new), str(one)]) == 0
    assert Paper.load(path_of(new, 1, "tiny")).environment == {"gpu": "one"}


def test_processes_stop_in_time_and_go_on(call, tmp_path: Path, capsys) -> None:
    """One worker process; the invocation gives it no time to finish, or just enough."""
    assert call("--table", "1", "--arms", "dense", "--jobs", "1", "--minutes", "0.02") == 0
    first = capsys.readouterr().out
    assert "llama/dense/s0: starts" in first
    assert call("--table", "1", "--arms", "dense", "--jobs", "1", "--minutes", "1") == 0
    assert "complete" in capsys.readouterr().out
    assert Paper.load(path_of(tmp_path / "out", 1, "tiny")).rows[0]["jobs"] in (1, None)


def test_a_failing_arm_is_told_and_others_go_on(call, monkeypatch, capsys) -> None:
    train = arms.train_arm

    def fails(arm: Arm, *rest, **options):
        if arm.method == "dense":
            raise RuntimeError("out of luck")
        return train(arm, *rest, **options)

    monkeypatch.setattr(schedule, "train_arm", fails)
    assert call("--table", "1", "--arms", "dense", "static") == 1
    printed = capsys.readouterr()
    assert "llama/dense/s0: RuntimeError: out of luck" in printed.err and "llama/static/s0: finished" in printed.out


def test_whole_arms_are_begun_only_where_time_suffices(call, tmp_path: Path, monkeypatch, capsys) -> None:
    trained = []
    train = arms.train_arm

    def training(arm: Arm, *rest, **options):
        trained.append((arm.method, options["whole"]))
        return train(arm, *rest, **options)

    monkeypatch.setattr(schedule, "train_arm", training)
    monkeypatch.setattr(schedule.Plan, "expected", lambda self, arm: 1e9 if arm.method == "static" else 0.0)
    assert call("--table", "1", "--whole-arms", "--arms", "static", "chts24", "chts14", "dense", "--compile", "off") == 0
    assert trained == [("chts24", True), ("dense", True), ("chts14", True)]  # 2:4 before 1:4
    assert "1 arm(s) left" in capsys.readouterr().out
    file = Paper.load(path_of(tmp_path / "out", 1, "tiny"))
    assert len(file.rows) == 3 and all(row["jobs"] == 1 for row in file.rows)
    saved = {path.parts[-3] for path in (tmp_path / "runs").glob("tiny/*/checkpoints/latest")}
    assert len(saved) == 1 and next(iter(saved)).startswith("llama-dense")  # re-training starts from it


def test_how_long_an_arm_is_expected_to_take() -> None:
    plan = schedule.Plan([], [0], [], "tiny", Places(), Places(), Path("nowhere"))
    dense, chts, other = (Arm("llama", method, 0) for method in ("dense", "chts24", "random-regrow"))
    assert plan.expected(dense) == 0  # nothing is known
    plan.known["llama/dense/s1"] = {"group": "llama", "seconds": 40.0, "steps": 24}
    assert plan.expected(dense) == pytest.approx(44 + schedule.COMPILING_S)
    assert plan.expected(Arm("llama-retrain", "chts24", 0)) == pytest.approx(22 + schedule.COMPILING_S)  # half the steps
    assert plan.expected(Arm("vit", "dense", 0)) == 0
    plan.seconds_of[schedule._program(chts)] = 50.0 / 24  # that one's start is paid
    assert plan.expected(other) == pytest.approx(52.5) and plan.expected(dense) == pytest.approx(44 + schedule.COMPILING_S)
    plan = schedule.Plan([], [0], [], "reduced", Places(), Places(), Path("nowhere"))
    assert 70 < plan.expected(dense) < 90  # one H100, before anything is known


def test_other_protocols_are_refused(call, tmp_path: Path, capsys) -> None:
    path = path_of(tmp_path / "out", 1, "tiny")
    Paper(path, 1, {"scale": "tiny", "groups": {"llama": {"lr": 5.0}}}).save()
    assert call("--table", "1") == 2
    assert "groups.llama.lr" in capsys.readouterr().err
    assert main([*TINY]) == 2 and main(["report", "--out", str(tmp_path / "none")]) == 1


def test_paired_differences() -> None:
    def row(method: str, seed: int, ppl: float, n: int | None = 2) -> dict:
        return {
            "group": "llama", "method": method, "arm": method, "seed": seed, "n": n, "srste_lambda": None,
            "figures": {"val_ppl": ppl, "val_loss": 1.0},
        }  # fmt: skip

    rows = [row("chts24", s, 40.0 + s) for s in range(3)] + [row("static", s, 41.0 + 2 * s) for s in range(3)]
    table = report.differences("T", rows)
    line = next(r for r in table.rows if r[1] == "chts24")
    assert line[table.columns.index("minus static")] == "-2.00 ± 0.58 (3)"

    # SR-STE: all runs are shown while the tuning is not done, and compared once it is, by the chosen one.
    tried = [row("srste24", 0, 50.0 + i) | {"srste_lambda": d, "arm": f"srste24@{d:g}"} for i, d in enumerate(LAMBDAS)]
    for i, r in enumerate(tried):
        r["figures"]["val_loss"] = 3.0 + i
    assert [len(report.chosen(rows + tried[:2], pending=p)) - len(rows) for p in (True, False)] == [2, 0]
    table = report.differences("T", rows + tried)
    line = next(r for r in table.rows if r[1] == "chts24")
    assert line[table.columns.index("minus srste")] == "-10.00 (1)"
    assert {r[1] for r in table.rows} == {"chts24", "static", "srste24@6e-05"}
    assert report.spread([1.0, 3.0]) == "2.00 ± 1.41" and report.spread([2.0]) == "2.00 (one seed)"


def test_the_target_for_rules() -> None:
    def rows(method: str, values: list[float], n: int | None = 2, **more) -> list[dict]:
        return [
            {"group": "llama", "method": method, "arm": method, "seed": seed, "n": n, "srste_lambda": None,
             "figures": {"val_ppl": value, "val_loss": 1.0}} | more
            for seed, value in enumerate(values)
        ]  # fmt: skip

    held = rows("dense", [40.0, 41.0, 42.0], None) + rows("chts24", [44.0, 45.0, 46.0]) + rows("static", [43.0] * 3)
    for decay in LAMBDAS:
        worse = 0 if decay == LAMBDAS[0] else 1
        held += rows("srste24", [43.0, 44.2, 45.0][: 1 if worse else 3], srste_lambda=decay, arm=f"srste24@{decay:g}",
                     figures={"val_ppl": 43.0, "val_loss": 1.0 + worse})  # fmt: skip
    held += rows("rigl24", [41.5, 42.0, 41.9]) + rows("random-moves", [42.5, 43.9, 42.8])
    found = {line[1]: line[2:] for line in report.targets("T", held).rows}
    assert found["rigl24"] == ["-1.20 ± 0.15 (3)", "80 %", "met"]
    assert found["random-moves"] == ["+0.07 ± 0.43 (3)", "48 %", "missed"]
    assert found["chts24"] == ["+2.00 ± 0.58 (3)", "", "missed"] and "static" not in found and "dense" not in found
    one = [row for row in held if row["seed"] == 0]
    assert {line[4] for line in report.targets("T", one).rows} == {"one seed"}
    assert report.targets("T", rows("rigl24", [41.0])) is None


def test_flops_are_the_papers_where_its_terms_are_used() -> None:
    (table,) = flops.tables()
    cells = {(row[0], row[1]): row for row in table.rows}
    model = "the paper's (1280 wide)"
    assert cells[model, "dense"][3] == cells[model, "dense"][2] == "243.0"
    assert cells[model, "SR-STE"][3] == cells[model, "SR-STE"][2] == "194.8"
    assert float(cells[model, "CHTs24"][3]) == pytest.approx(170.9, abs=0.3)
    assert cells[model, "CHTs24"][4] == "194.8"  # the weight gradient is not halved; updates hardly count
    cost = flops.cost(preset("60m"))
    assert cost.sparse_able == 25_296_896 and cost.update == 2 * cost.update_paper > 0


def test_a_worker_that_fails_is_quoted(call, tmp_path: Path, capsys) -> None:
    broken = tmp_path / "runs" / "tiny"
    broken.parent.mkdir()
    broken.write_text("a file where the run folders should be")
    assert call("--table", "1", "--arms", "dense", "--jobs", "1", "--minutes", "1") == 1
    assert "llama/dense/s0: exit status 1: " in capsys.readouterr().err


def test_lines_of_a_figure(tmp_path: Path) -> None:
    def row(method: str, seed: int, losses: list[float], n: int | None = 2, **more) -> dict:
        curve = [[100 * (i + 1), loss] for i, loss in enumerate(losses)]
        return {"group": "llama", "method": method, "arm": method, "seed": seed, "n": n, "srste_lambda": None,
                "key": f"llama/{method}/s{seed}{more}", "curves": {"val_loss": curve}} | more  # fmt: skip

    rows = [
        row("dense", 0, [4.0, 3.0], None), row("dense", 1, [4.5, 3.5], None), row("static", 0, [4.25, 3.5]), row("static", 1, [4.25, 3.25]),
        row("static", 2, [9.0, 9.0]), row("static14", 0, [5.0, 4.0], 1),
    ]  # fmt: skip
    both = figures.Panel("val_loss", "", n=2, minus_dense=True)
    assert figures._lines(rows, both) == {("static", 2): [{100: 0.25, 200: 0.5}, {100: -0.25, 200: -0.25}]}  # seed 2 has no dense arm
    assert figures._lines(rows, figures.Panel("val_loss", "", n=1)).keys() == {("dense", None), ("static14", 1)}
    assert figures._lines(rows, figures.Panel("turnover", "")) == {}

    rows.append(row("static", 0, [1.0, 1.0], changes={"interval": 50}, arm="static+interval=50"))
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_draw", lambda axes, lines, families, panel: drawn.append((panel.title, sorted(arm for arm, _ in lines))))
        Paper(path_of(tmp_path, 1, "reduced"), 1, {"groups": {}}, {}, rows).save()
        [written] = figures.draw(tmp_path, "reduced", [2, 3])
    assert written.name == "figure2.png" and [arms for _, arms in drawn] == [["static"], ["static14"]]  # not one with changes
