"""The training loop: bit-identical resumption, accumulation, signals, logs, re-training, export."""

import contextlib
import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch

from chts_train import METHODS, SparseLinear, STELinear, sparse_layers
from chts_train.checkpoint import CheckpointError, read_checkpoint
from chts_train.export import export_run
from chts_train.loading import load_dense, load_run
from chts_train.metrics import METRICS, UPDATES, read_metrics
from chts_train.report import describe, verdict
from chts_train.retrain import retrain, retrain_config, start_retraining
from chts_train.runs import RunError, RunLock, new_run
from chts_train.settings import Settings, resolve_device
from chts_train.storage import load_tensors, save_tensors
from chts_train.trainer import Trainer, TrainingError

TIMES = {"tokens_per_s", "images_per_s", "seconds"}


def train(config, run, settings, stop_after=None, number=signal.SIGTERM):
    """Train; with ``stop_after`` the process gets a signal in the middle of that step."""
    run.mkdir(exist_ok=True)
    trainer = Trainer(config, run, settings)
    return interrupt(trainer, stop_after, number) if stop_after else trainer.train()


def interrupt(trainer, step, number=signal.SIGTERM):
    original = trainer.optimizer.zero_grad

    def send(**options):
        if trainer.counters.step == step:
            os.kill(os.getpid(), number)
        original(**options)

    trainer.optimizer.zero_grad = send
    return trainer.train()


def logged(run, name=METRICS):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(run / name)]


def rows(run, kind):
    return [row for row in read_metrics(run / METRICS) if row["kind"] == kind]


def assert_same_end(one, other):
    """Same bits: model, ids, moments, step counters, generator states, data position, link ages; and the same log."""
    a, b = read_checkpoint(one), read_checkpoint(other)
    for name in ("model.safetensors", "training.safetensors"):
        mine, theirs = load_tensors(a.path / name), load_tensors(b.path / name)
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert torch.equal(mine[key], theirs[key]), key
    states = [c.training["parts"] | {"counters": c.training["parts"]["counters"] | {"seconds": 0}} for c in (a, b)]
    for key in ("counters", "scheduler", "batches"):
        assert states[0][key] == states[1][key]
    for name in (METRICS, UPDATES):
        if (one / name).exists():
            assert logged(one, name) == logged(other, name)


# --- resuming ---


@pytest.mark.parametrize(
    "method", ["chts24", "chts14", "random-regrow", "greedy", "static14", "nvidia", "ste14", "srste24", "dense"]
)
def test_resumed_training_has_the_same_bits(tmp_path, micro, quiet, method):
    """Stopped right after a topology update (step 6) and again between two (step 8)."""
    config = micro(method=method)
    train(config, tmp_path / "whole", quiet)
    outcome = train(config, tmp_path / "parts", quiet, stop_after=6)
    assert (outcome.step, outcome.finished, outcome.exit_code) == (6, False, 143)
    assert interrupt(Trainer.resume(tmp_path / "parts", quiet), 8).step == 8
    outcome = Trainer.resume(tmp_path / "parts", quiet).train()
    assert (outcome.step, outcome.finished, outcome.exit_code) == (12, True, 0)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("optimizer, decay", [("sgd", 0.0), ("adamw", 0.05)])
def test_resumed_training_with_other_optimizers(tmp_path, micro, quiet, optimizer, decay):
    config = micro(optimizer=optimizer, weight_decay=decay)
    train(config, tmp_path / "whole", quiet)
    train(config, tmp_path / "parts", quiet, stop_after=7)
    Trainer.resume(tmp_path / "parts", quiet).train()
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_resumed_image_training_with_drop_path_and_augmentation(tmp_path, micro_image, quiet):
    config = micro_image()
    train(config, tmp_path / "whole", quiet)
    train(config, tmp_path / "parts", quiet, stop_after=5)
    Trainer.resume(tmp_path / "parts", quiet).train()
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    assert rows(tmp_path / "whole", "eval")[-1].keys() >= {"val_accuracy", "val_loss", "val_images"}
    assert "ppl" not in rows(tmp_path / "whole", "train")[-1]


def test_a_crash_goes_back_to_the_last_checkpoint(tmp_path, micro, quiet):
    """Lines of the log after it are written again, not twice."""
    config = micro(eval_interval=4)
    train(config, tmp_path / "whole", quiet)
    (tmp_path / "parts").mkdir()
    trainer = Trainer(config, tmp_path / "parts", quiet)
    step = trainer._train_step

    def crash():
        if trainer.counters.step == 7:
            raise OSError("no space left")
        step()

    trainer._train_step = crash
    with pytest.raises(OSError):
        trainer.train()
    assert logged(tmp_path / "parts")[-1]["step"] == 6
    Trainer.resume(tmp_path / "parts", quiet).train()
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_resuming_a_complete_run_changes_nothing(tmp_path, micro, quiet):
    first = train(micro(), tmp_path / "run", quiet)
    before = logged(tmp_path / "run")
    again = Trainer.resume(tmp_path / "run", quiet).train()
    assert again == first and logged(tmp_path / "run") == before


def test_branching_off_an_older_checkpoint(tmp_path, micro, quiet):
    train(micro(), tmp_path / "run", quiet)
    older = tmp_path / "run" / "checkpoints" / "step-00000006"
    with pytest.raises(
        RunError, match=r"step-00000006: must be its run's latest .*step-00000012\); give --out to branch"
    ):
        Trainer.resume(older, quiet)
    before = logged(tmp_path / "run")
    (tmp_path / "branch").mkdir()
    Trainer.resume(older, quiet, run=tmp_path / "branch").train()
    assert logged(tmp_path / "run") == before
    assert_same_end(tmp_path / "run", tmp_path / "branch")


def test_resuming_with_other_data_is_refused(tmp_path, micro, quiet, text_folder):
    copy = tmp_path / "text"
    copy.mkdir()
    for file in text_folder.iterdir():
        (copy / file.name).write_text(file.read_text())
    config = micro()
    train(replace(config, data=replace(config.data, spec=str(copy))), tmp_path / "run", quiet, stop_after=6)
    for i in range(8):
        (copy / f"more{i}.txt").write_text("more " * 400)
    with pytest.raises(CheckpointError, match='must hold a fitting state of "batches", got the state has'):
        Trainer.resume(tmp_path / "run", quiet)


# --- signals ---


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_leaves(tmp_path, micro, quiet, number, code):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    outcome = train(micro(), tmp_path / "run", quiet, stop_after=4, number=number)
    assert (outcome.step, outcome.exit_code, outcome.finished) == (4, code, False)
    assert read_checkpoint(tmp_path / "run").step == 4
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_a_signal_during_an_evaluation(tmp_path, micro, quiet, monkeypatch):
    """The evaluation is dropped, and made up for after resuming."""
    train(micro(), tmp_path / "whole", quiet)
    (tmp_path / "run").mkdir()
    trainer = Trainer(micro(), tmp_path / "run", quiet)
    forward = trainer.task.losses

    def losses(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return forward(*arguments)

    monkeypatch.setattr(type(trainer.task), "losses", lambda self, *arguments: losses(*arguments))
    outcome = trainer.train()
    assert (outcome.step, outcome.exit_code) == (6, 130) and not rows(tmp_path / "run", "eval")
    monkeypatch.undo()
    Trainer.resume(tmp_path / "run", quiet).train()
    assert_same_end(tmp_path / "whole", tmp_path / "run")


def test_a_second_ctrl_c_interrupts_at_once(tmp_path, micro, quiet):
    (tmp_path / "run").mkdir()
    trainer = Trainer(micro(), tmp_path / "run", quiet)

    def send(**_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    trainer.optimizer.zero_grad = send
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def test_one_process_per_run_folder(tmp_path, micro, quiet):
    train(micro(), tmp_path / "run", quiet, stop_after=2)
    with RunLock(tmp_path / "run"), pytest.raises(RunError, match="run: must not be in use, got another process"):
        Trainer.resume(tmp_path / "run", quiet).train()


# --- the step ---


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_accumulation_changes_nothing(tmp_path, micro, quiet, micro_batch):
    """Also where micro-batches hold different numbers of targets; SGD, since Adam blows up the last bits."""
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text("some words of text " * (1 + i % 3))
    config = micro(method="static", optimizer="sgd", batch_size=6, micro_batch=6, total_steps=6, seq_len=60)
    config = replace(config, data=replace(config.data, spec=str(tmp_path)))
    weights = []
    for size in (6, micro_batch):
        (tmp_path / str(size)).mkdir()
        trainer = Trainer(replace(config, micro_batch=size), tmp_path / str(size), quiet)
        _, targets = next(trainer.task.batches())
        assert (targets == -100).sum(1).unique().numel() > 1, "no padding: this test would mean nothing"
        trainer.train()
        weights.append(trainer.model.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=2e-5, atol=1e-7, msg=name)


def test_updates_take_the_place_of_optimizer_steps(tmp_path, micro, quiet):
    (tmp_path / "run").mkdir()
    trainer = Trainer(micro(), tmp_path / "run", quiet)
    trainer.train()
    updates = rows(tmp_path / "run", "update")
    assert [row["step"] for row in updates] == [3, 6, 9]
    steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {12 - 3}
    assert [row["zeta"] for row in updates] == [0.1] * 3
    assert [row["T"] for row in updates] == pytest.approx([1 + 8 * step / 9 for step in (3, 6, 9)])
    for row in updates:
        assert row["turnover"] == row["replaced"] / row["links"] <= row["removed"] / row["links"] <= 0.1
    layers = list(read_metrics(tmp_path / "run" / UPDATES))
    assert [row["step"] for row in layers] == [3, 6, 9]
    assert {layer["name"] for layer in layers[0]["layers"]} == set(sparse_layers(trainer.model))


def test_updates_are_logged_with_their_own_figures_however_late_they_are_read(tmp_path, micro, quiet):
    found = []
    for interval in (1, 12):
        run = tmp_path / str(interval)
        train(micro(), run, replace(quiet, log_interval=interval))
        found.append((rows(run, "update"), list(read_metrics(run / UPDATES))))
    assert len(found[0][0]) == 3 and found[0] == found[1]


def test_the_log_of_a_run(tmp_path, micro, quiet):
    outcome = train(micro(), tmp_path / "run", quiet)
    start, *_ = read_metrics(tmp_path / "run" / METRICS)
    assert start["kind"] == "start" and start["method"] == "chts24" and start["unigram_ppl"] > 1
    lines = rows(tmp_path / "run", "train")
    assert [row["step"] for row in lines] == [2, 4, 6, 8, 10, 12]
    wanted = {"loss", "ppl", "lr", "tokens_per_s", "tokens", "turnover", "zeta", "T", "seconds"}
    assert all(row.keys() >= wanted for row in lines)
    assert lines[0]["ppl"] == pytest.approx(math.exp(lines[0]["loss"]))
    # Warm-up over 2 steps; the ramp of one step after the update at step 3 makes step 4's rate 0.
    assert lines[0]["lr"] == pytest.approx(1e-2) and lines[1]["lr"] == 0.0
    assert lines[5]["lr"] == pytest.approx(1e-2 * (0.1 + 0.45 * (1 + math.cos(math.pi * 9 / 10))))
    assert [row["step"] for row in rows(tmp_path / "run", "eval")] == [6, 12]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["val_ppl"] == outcome.figures["val_ppl"] == pytest.approx(math.exp(summary["val_loss"]))
    assert summary["unigram_ppl"] == start["unigram_ppl"]


def test_training_learns(tmp_path, micro, quiet):
    """A micro model gets under the unigram model within a hundred steps."""
    config = micro(total_steps=150, batch_size=16, micro_batch=16, interval=20, warmup_steps=10, eval_tokens=None)
    config = replace(config, model=replace(config.model, hidden_size=32, intermediate_size=64))
    (tmp_path / "run").mkdir()
    trainer = Trainer(config, tmp_path / "run", quiet)
    outcome = trainer.train()
    assert outcome.figures["val_ppl"] < 0.9 * trainer.baseline["unigram_ppl"]
    assert "(unigram model: " in verdict(trainer, outcome)


def test_a_diverged_run_stops_and_keeps_its_checkpoints(tmp_path, micro, quiet):
    (tmp_path / "run").mkdir()
    trainer = Trainer(micro(total_steps=40), tmp_path / "run", quiet)
    step = trainer._train_step

    def poisoned():
        if trainer.counters.step == 8:
            with torch.no_grad():
                next(trainer.model.parameters()).fill_(math.nan)
        step()

    trainer._train_step = poisoned
    with pytest.raises(TrainingError, match="loss: must be finite, got nan at step 10; try a lower --lr than 0.01"):
        trainer.train()
    assert read_checkpoint(tmp_path / "run").step == 6


def test_bf16_autocast_keeps_fp32_masters(tmp_path, micro, quiet):
    (tmp_path / "run").mkdir()
    trainer = Trainer(micro(precision="bf16", total_steps=4), tmp_path / "run", quiet)
    seen = []
    layer = next(iter(sparse_layers(trainer.model).values()))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert all(s["exp_avg_sq"].dtype == torch.float32 for s in trainer.optimizer.state.values())


def test_same_seed_same_run_other_seed_other_run(tmp_path, micro, quiet):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(micro(seed=seed, total_steps=4), tmp_path / name, quiet)
    assert_same_end(tmp_path / "a", tmp_path / "b")
    a, c = read_checkpoint(tmp_path / "a").model, read_checkpoint(tmp_path / "c").model
    assert not any(torch.equal(a[key], c[key]) for key in a if key.endswith("ids"))


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_builds_its_layers(tmp_path, micro, quiet, method):
    (tmp_path / "run").mkdir()
    trainer = Trainer(micro(method=method), tmp_path / "run", quiet)
    kinds = {SparseLinear: "sparse", STELinear: "ste"}
    found = {kinds[type(m)] for m in trainer.model.modules() if type(m) in kinds} or {"dense"}
    assert found == {METHODS[method].kind}
    assert (trainer.evolver is not None) == METHODS[method].evolves
    assert describe(trainer)[0].startswith(f"{method} on micro: ")


def test_srste_lambda_of_the_config(tmp_path, micro, quiet):
    trainer = Trainer(micro(method="srste24", srste_lambda=6e-5), tmp_path, quiet)
    assert {m.srste_lambda for m in trainer.model.modules() if isinstance(m, STELinear)} == {6e-5}


def test_a_run_without_any_update_says_so(tmp_path, micro, quiet):
    lines = describe(Trainer(micro(interval=10), tmp_path, quiet))
    assert lines[-1].startswith(
        "note: the topology never changes: updates come every 10 steps, the last possible one at 9"
    )


# --- re-training and export ---


@pytest.fixture
def dense_run(tmp_path, micro, quiet):
    train(micro(method="dense", total_steps=20), tmp_path / "dense", quiet)
    return tmp_path / "dense"


@pytest.mark.parametrize("method", ["chts24", "chts14", "nvidia"])
def test_retraining_prunes_by_magnitude_and_goes_on(tmp_path, quiet, dense_run, method):
    from chts_kernels import prune

    n = METHODS[method].n
    weights, dense, origin = load_dense(dense_run)
    config = retrain_config(dense, method=method, total_steps=12)
    assert (config.t_start, config.t_end, config.init) == (1.0, 3.0, "magnitude")
    trainer = start_retraining(weights, config, origin, out=tmp_path / "run", settings=quiet)
    first = {name: layer.ids.clone() for name, layer in sparse_layers(trainer.model).items()}
    for name, ids in first.items():
        assert torch.equal(ids, prune(weights[f"{name}.weight"], n))
    outcome = trainer.train()
    assert outcome.finished
    changed = [not torch.equal(layer.ids, first[name]) for name, layer in sparse_layers(trainer.model).items()]
    assert any(changed) == (method != "nvidia")
    assert [row["step"] for row in rows(tmp_path / "run", "eval")] == [0, 6, 12]
    pruned, dense_ppl = rows(tmp_path / "run", "eval")[0]["val_ppl"], rows(tmp_path / "run", "dense")[0]["val_ppl"]
    assert pruned != dense_ppl and "dense" in read_checkpoint(tmp_path / "run").config["origin"]


def test_a_resumed_retraining_has_the_same_bits(tmp_path, quiet, dense_run):
    retrain(dense_run, out=tmp_path / "whole", settings=quiet, total_steps=12).train()
    interrupt(retrain(dense_run, out=tmp_path / "parts", settings=quiet, total_steps=12), 6)
    Trainer.resume(tmp_path / "parts", quiet).train()
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_what_cannot_be_retrained(tmp_path, micro, quiet, dense_run):
    train(micro(total_steps=2), tmp_path / "sparse", quiet)
    with pytest.raises(CheckpointError, match="must have dense weights to prune; .* got a chts24 run"):
        load_dense(tmp_path / "sparse")
    for method in ("dense", "ste24"):
        with pytest.raises(ValueError, match=f"method: must be one of chts24, .*, got '{method}'"):
            retrain(dense_run, method=method, out=tmp_path / "no")
    assert not (tmp_path / "no").exists()
    save_tensors(tmp_path / "other.safetensors", {"weight": torch.ones(2)})
    with pytest.raises(ValueError, match="--preset: must be given with "):
        load_dense(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="must hold exactly the model's tensors, got missing lm_head.weight"):
        load_dense(tmp_path / "other.safetensors", micro())
    (tmp_path / "bad.safetensors").write_bytes(b"12345678901")
    with pytest.raises(CheckpointError, match="bad.safetensors: must be a safetensors file"):
        load_dense(tmp_path / "bad.safetensors", micro())
    with pytest.raises(CheckpointError, match="none: must exist"):
        load_dense(tmp_path / "none", micro())


@pytest.mark.parametrize("method", ["chts24", "chts14", "ste24", "dense"])
def test_export_gives_the_plain_model_with_zeros(tmp_path, micro, quiet, method):
    (tmp_path / "run").mkdir()
    trainer = Trainer(micro(method=method, total_steps=4), tmp_path / "run", quiet)
    trainer.train()
    done = export_run(tmp_path / "run", tmp_path / "out")
    tensors = load_tensors(tmp_path / "out" / "model.safetensors")
    plain = trainer.config.build_model()
    plain.load_state_dict(tensors)
    tokens = torch.randint(0, 256, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(tokens), trainer.model.eval()(tokens), rtol=1e-5, atol=1e-6)
    n = METHODS[method].n
    if method != "dense":
        weight = tensors["model.layers.0.mlp.up_proj.weight"]
        blocks = (weight != 0).reshape(6, 4, 4, 4)  # [block rows, rows, block columns, columns]
        assert (blocks.sum(3) <= n).all() and (blocks.sum(1) <= n).all()
    assert done.zeros == sum(int((t == 0).sum()) for t in tensors.values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["vocab_size"] == 257 and config["chts"]["method"] == method


def test_export_types_and_existing_folders(tmp_path, micro, quiet):
    train(micro(total_steps=2), tmp_path / "run", quiet)
    export_run(tmp_path / "run", tmp_path / "out", dtype="bfloat16")
    assert {t.dtype for t in load_tensors(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    with pytest.raises(RunError, match="must not have a model.safetensors yet; --force replaces it"):
        export_run(tmp_path / "run", tmp_path / "out")
    export_run(tmp_path / "run", tmp_path / "out", force=True)
    with pytest.raises(ValueError, match="--dtype: must be one of float32, bfloat16, float16, got 'int8'"):
        export_run(tmp_path / "run", tmp_path / "out", dtype="int8")


def test_an_exported_dense_model_can_be_retrained(tmp_path, micro, quiet, dense_run):
    export_run(dense_run, tmp_path / "out", dtype="bfloat16")
    weights, config, _ = load_dense(tmp_path / "out", micro(total_steps=3))
    assert {t.dtype for t in weights.values()} == {torch.float32}
    assert start_retraining(weights, retrain_config(config), {}, out=tmp_path / "run", settings=quiet).train().finished


def test_a_loaded_run_evaluates_as_it_did(tmp_path, micro, quiet):
    from chts_train.tasks import evaluate, make_task

    outcome = train(micro(eval_tokens=None), tmp_path / "run", quiet)
    model, config, _ = load_run(tmp_path / "run")
    task = make_task(config, config.load_data())
    figures = evaluate(task, model, device=torch.device("cpu"), autocast=contextlib.nullcontext)
    assert figures == outcome.figures


# --- folders and settings ---


def test_new_runs_never_overwrite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(new_run("x")) for _ in range(3)] == ["runs/x", "runs/x-2", "runs/x-3"]
    assert new_run("x", "given").is_dir() and new_run("x", "given").is_dir()
    (tmp_path / "given" / "file").write_text("x")
    with pytest.raises(RunError, match="--out given: must not exist or be an empty folder; .* use --resume given"):
        new_run("x", "given")


@pytest.mark.parametrize("name, value", [("log_interval", 0), ("save_interval", -1), ("keep", 0)])
def test_settings_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name}: must be at least .*, got {value}"):
        Settings(**{name: value})


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cuda:99", "cpu:0:0"])
def test_devices_are_checked(name):
    with pytest.raises(ValueError, match=f"device: must .*, got '{name}'"):
        resolve_device(name)
    assert resolve_device("cpu") == torch.device("cpu")
