"""The command line: what it does, what it prints, and every error in one line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from chts_train import METHODS
from chts_train.cli import main, make_parser
from chts_train.cli_config import configure
from chts_train.configs import PRESETS, preset
from chts_train.metrics import METRICS, read_metrics

ROOT = Path(__file__).resolve().parents[2]
MODEL = {
    "model.hidden_size": 16, "model.intermediate_size": 24, "model.num_hidden_layers": 1, "model.num_attention_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def arguments(text_folder):
    """Options that make a run take a second."""
    sets = [part for key, value in MODEL.items() for part in ("--set", f"{key}={value}")]
    sizes = "--steps 12 --batch-size 4 --seq-len 24 --interval 3 --eval-interval 6 --eval-tokens 200 --log-interval 2"
    return ["--data", str(text_folder), *sets, *sizes.split(), "--device", "cpu"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, arguments):
    """A folder with a finished run "r", to be copied: pictures take longer than training here."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(["pretrain", *arguments, "--out", str(folder / "r"), "--quiet"]) == 0
    return folder


@pytest.fixture
def done(finished, folder):
    shutil.copytree(finished / "r", folder / "r")
    return folder


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def fails(capsys, *arguments):
    """The one line on stderr of a command that must fail with exit code 2."""
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as left:  # argparse
        code = left.code
    out = capsys.readouterr()
    assert code == 2, out
    assert out.err.count("\n") == 1 and "Traceback" not in out.err
    return out.err


# --- what the commands do ---


def test_pretrain_writes_and_prints_everything(capsys, folder, arguments):
    code, out, err = run(capsys, "pretrain", *arguments)
    assert code == 0 and err == ""
    home = folder / "runs" / "tiny-chts24-s0"
    assert {p.name for p in home.iterdir()} >= {
        "config.json", "metrics.jsonl", "updates.jsonl", "checkpoints", "plots", "summary.json"
    }  # fmt: skip
    names = {"loss", "perplexity", "turnover", "score_variance", "noise", "overview"}
    assert {p.stem for p in (home / "plots").iterdir()} == names
    assert re.search(r"held-out perplexity [\d.]+ over [\d,]+ tokens \(unigram model: [\d.]+\) after 12 steps", out)
    for what in ("pretrain --resume", "eval", "plot", "export"):
        assert f"chts {what} runs/tiny-chts24-s0" in out
    assert re.search(r"step 12/12  loss [\d.]+  ppl [\d.]+  [\d.]+k? tokens/s  turnover [\d.]+%  ETA 0:00", out)


def test_the_commands_it_prints_work(capsys, done):
    _, out, _ = run(capsys, "pretrain", "--resume", "r")
    commands = [line.split()[1:5] for line in out.splitlines() if re.match(r"  (resume|evaluate|plot|export) ", line)]
    assert len(commands) == 4
    for words in commands:
        words = words[1:] if "--resume" in words else words[1:3]
        assert run(capsys, *words)[0] == 0, words


def test_runs_are_numbered_and_never_overwritten(capsys, folder, arguments):
    for _ in range(2):
        assert run(capsys, "pretrain", *arguments, "--method", "static", "--seed", 3, "--steps", 2)[0] == 0
    assert sorted(p.name for p in (folder / "runs").iterdir()) == ["tiny-static-s3", "tiny-static-s3-2"]


def test_dense_then_retrain_then_compare(capsys, folder, arguments):
    assert run(capsys, "pretrain", *arguments, "--method", "dense", "--out", "dense")[0] == 0
    code, out, _ = run(capsys, "retrain", "dense", "--steps", 8, "--interval", 2, "--log-interval", 2)
    assert code == 0 and "dense: held-out loss" in out and "step 0: held-out loss" in out
    config = json.loads((folder / "runs" / "tiny-retrain-chts24-s0" / "config.json").read_text())
    wanted = {"init": "magnitude", "t_start": 1.0, "t_end": 3.0, "total_steps": 8, "batch_size": 4}
    assert config["run"].items() >= wanted.items() and config["origin"]["step"] == 12
    assert run(capsys, "retrain", "dense", "--method", "nvidia", "--steps", 4, "--t-end", 5, "--out", "nv")[0] == 0
    code, out, _ = run(capsys, "plot", "dense", "runs/tiny-retrain-chts24-s0", "nv", "--out", "compare")
    assert code == 0 and "compare/overview.png" in out
    code, out, _ = run(capsys, "info", "runs/tiny-retrain-chts24-s0")
    assert "verified, step 8 of 8" in out and "from dense " in out and "7 sparse layers" in out


def test_retrain_from_an_exported_file(capsys, folder, arguments):
    run(capsys, "pretrain", *arguments, "--method", "dense", "--out", "dense", "--steps", 2)
    assert run(capsys, "export", "dense", "--out", "plain")[0] == 0
    assert "--preset: must be given with plain/model.safetensors" in fails(capsys, "retrain", "plain")
    assert "must hold exactly the model's tensors" in fails(capsys, "retrain", "plain", "--preset", "20m")


def test_eval_info_and_export(capsys, done):
    code, out, _ = run(capsys, "eval", "r", "--json")
    figures = json.loads(out)
    assert code == 0 and figures["step"] == 12 and figures["val_ppl"] > 1 and figures["unigram_ppl"] > 1
    (done / "other.txt").write_text("quite another text. " * 200)
    code, out, _ = run(capsys, "eval", "r/checkpoints/step-00000006", "--data", "other.txt", "--max-tokens", 48)
    assert code == 0 and "step 6" in out and "other.txt" in out and "over 48 tokens" in out
    code, out, _ = run(capsys, "export", "r")
    assert code == 0 and "r/export/model.safetensors" in out and "of them zero" in out
    code, out, _ = run(capsys, "info", "r")
    assert "chts24 on tiny, seed 0" in out and "24 x 16  2:4  192 links" in out and "held-out loss" in out
    code, out, _ = run(capsys, "info")
    assert code == 0 and "torch" in out and "cpu" in out


def test_image_training(capsys, folder, image_file):
    small = ["--set", "model.embed_dim=16", "--set", "model.num_heads=2", "--set", "model.depth=1"]
    sizes = ["--steps", 8, "--batch-size", 12, "--interval", 2, "--eval-interval", 4]
    code, out, err = run(capsys, "pretrain", "--preset", "vit-tiny", "--data", image_file, *small, *sizes, "--out", "v")
    assert code == 0, err
    assert re.search(r"held-out accuracy [\d.]+% over \d+ images \(most frequent class: 33.33%\) after 8 steps", out)
    assert (folder / "v" / "plots" / "accuracy.png").exists()
    assert run(capsys, "eval", "v")[0] == run(capsys, "export", "v")[0] == 0


def test_ctrl_c_and_resume_in_processes(capsys, folder, arguments):
    """SIGINT to a real process: exit code 130, then --resume goes on to the end."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "chts_train.cli", "pretrain", *arguments, "--steps", "100000", "--out", "r"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == ""
    stopped = re.search(r"SIGINT: stopped after step ([\d,]+) of 100,000, saved r/checkpoints/step-", out)
    assert stopped and "chts pretrain --resume r" in out
    config = json.loads((folder / "r" / "config.json").read_text())
    assert config["run"]["warmup_steps"] == 10_000  # 60 of 600, scaled
    assert "--lr: must not be given with --resume" in fails(capsys, "pretrain", "--resume", "r", "--lr", "1")


def test_resume_goes_on_where_a_run_was_stopped(capsys, folder, arguments, monkeypatch):
    from chts_train.trainer import Trainer

    step = Trainer._train_step

    def stop_at_5(self):
        step(self)
        if self.counters.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stop_at_5)
        code, out, _ = run(capsys, "pretrain", *arguments, "--out", "r")
    assert code == 143 and "SIGTERM: stopped after step 5 of 12" in out and "goes on where it stopped" in out
    code, out, _ = run(capsys, "pretrain", "--resume", "r", "--log-interval", 4)
    assert code == 0 and "resumed from r/checkpoints/step-00000005 at step 5 of 12" in out
    assert [r["step"] for r in read_metrics(folder / "r" / METRICS) if r["kind"] == "update"] == [3, 6, 9]
    code, out, _ = run(capsys, "pretrain", "--resume", "r/checkpoints/step-00000006", "--out", "branch")
    assert code == 0 and (folder / "branch" / "summary.json").exists()


# --- options ---


def test_options_become_fields():
    words = "--lr 0.5 --zeta 0.2 --interval 7 --t-start 2 --t-end 4 --seed 9 --optimizer sgd --vocab-size 300 --precision fp32"
    options = make_parser().parse_args(["pretrain", *words.split(), "--set", "betas=[0.5, 0.6]", "--set", "name=mine"])
    config = configure(options, preset("tiny"))
    assert (config.lr, config.zeta, config.interval, config.t_start, config.t_end) == (0.5, 0.2, 7, 2.0, 4.0)
    assert (config.seed, config.optimizer, config.data.vocab, config.precision) == (9, "sgd", 300, "fp32")
    assert config.betas == (0.5, 0.6) and config.name == "mine"


def test_warm_up_and_micro_batch_follow():
    base = preset("60m")
    options = make_parser().parse_args(["pretrain", "--steps", "500", "--batch-size", "96"])
    config = configure(options, base)
    assert (config.warmup_steps, config.micro_batch, config.batch_size) == (50, 48, 96)
    options = make_parser().parse_args(["pretrain", "--steps", "500", "--warmup-steps", "7", "--micro-batch", "32"])
    config = configure(options, base)
    assert (config.warmup_steps, config.micro_batch, config.batch_size) == (7, 32, 256)


def test_data_paths_become_absolute(folder):
    (folder / "a.txt").write_text("x")
    options = make_parser().parse_args(["pretrain", "--data", "a.txt", "owner/name", "--tokenizer", "a.txt"])
    config = configure(options, preset("tiny"))
    assert config.data.spec == (str(folder / "a.txt"), "owner/name") and config.data.tokenizer == str(folder / "a.txt")
    assert configure(make_parser().parse_args(["pretrain", "--data", "stdlib"]), preset("tiny")).data.spec == "stdlib"


def test_help_teaches(capsys):
    for command in ("pretrain", "retrain", "eval", "export", "plot", "info"):
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        out = capsys.readouterr().out
        assert left.value.code == 0 and "examples:" in out and f"chts {command}" in out
        if command in ("pretrain", "retrain"):
            assert all(f"  {name} " in out for name in [*METHODS, *PRESETS])
        assert max(map(len, out.splitlines())) <= 130


# --- errors ---


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "chts: error: the following arguments are required: COMMAND"),
        ("trian", "invalid choice: 'trian'"),
        ("pretrain --stepz 5", "unrecognized arguments: --stepz 5"),
        ("pretrain --steps many", "argument --steps: invalid int value: 'many'"),
        ("pretrain --steps 0", "chts pretrain: error: total_steps must be at least 1, got 0"),
        ("pretrain --preset huge", "preset must be one of tiny, 20m"),
        ("pretrain --method chts", r"method: must be one of \['dense', 'chts24'.*got 'chts'"),
        ("pretrain --lr -1", "lr must be positive and finite, got -1.0"),
        ("pretrain --zeta 2", r"zeta must be in \[0, 1\], got 2.0"),
        ("pretrain --interval 0", "interval must be at least 1, got 0"),
        ("pretrain --t-end 0", "t_end must be positive and finite, got 0.0"),
        ("pretrain --precision fp8", "precision must be one of auto, fp32, bf16, got 'fp8'"),
        ("pretrain --optimizer lion", "optimizer must be one of adam, adamw, sgd, got 'lion'"),
        (
            "pretrain --batch-size 8 --micro-batch 3",
            "micro_batch must be at least 1 and a divisor of batch_size=8, got 3",
        ),
        ("pretrain --seq-len 99999", "seq_len must be at most model.max_position_embeddings=2048, got 99999"),
        ("pretrain --set steps", "--set: must be KEY=VALUE, got 'steps'"),
        ("pretrain --set zetta=1", r"unknown field zetta; did you mean zeta\?"),
        ("pretrain --set model.hiden_size=8", r"unknown field model.hiden_size; did you mean model.hidden_size\?"),
        ("pretrain --set foo.bar=8", "--set: must name a field of the config, of model or of data, got 'foo.bar'"),
        ("pretrain --set lr=fast", "lr must be float, got 'fast'"),
        ("pretrain --set model.hidden_size=20", "hidden_size must be a multiple of 2"),
        (
            "pretrain --data nothing.txt",
            "data must be 'stdlib', an existing file or folder, or a data set, got 'nothing.txt'",
        ),
        ("pretrain --tokenizer none.json", "tokenizer must be an existing file, got 'none.json'"),
        ("pretrain --device tpu", "device: must be auto, cpu, cuda or cuda:<number>, got 'tpu'"),
        ("pretrain --device cuda:77", "device: must exist, got 'cuda:77'"),
        ("pretrain --threads 0", "--threads: must be at least 1, got 0"),
        ("pretrain --log-interval 0", "log_interval: must be at least 1, got 0"),
        ("pretrain --keep 0", "keep: must be at least 1, got 0"),
        ("pretrain --out .", r"--out \.: must not exist or be an empty folder; to continue a run use --resume \."),
        ("pretrain --resume none", "none: must exist"),
        ("pretrain --resume none --preset tiny", "--preset: must not be given with --resume"),
        ("pretrain --resume none --set lr=1", "--set: must not be given with --resume"),
        ("retrain", "the following arguments are required: DENSE"),
        ("retrain none", "none: must exist"),
        ("retrain none.safetensors --preset tiny", "none.safetensors: must exist"),
        ("retrain .", "must be a run folder, or hold checkpoint.json or model.safetensors, got none of them"),
        ("eval .", "must hold checkpoint.json or checkpoints/, got neither"),
        ("export .", "must hold checkpoint.json or checkpoints/, got neither"),
        ("plot .", "must be a run folder with metrics.jsonl, got none"),
        ("info none", "none: must exist"),
    ],
)
def test_errors_are_one_line(capsys, folder, words, message):
    (folder / "something").write_text("x")
    assert re.search(message, fails(capsys, *words.split()))
    assert {p.name for p in folder.iterdir()} <= {"something", "runs"} and not list(folder.glob("runs/*"))


def test_errors_about_runs(capsys, done):
    assert "have dense weights to prune" in fails(capsys, "retrain", "r")
    assert "--dtype: must be one of float32" in fails(capsys, "export", "r", "--dtype", "fp4")
    assert "precision must be one of" in fails(capsys, "eval", "r", "--precision", "fp4")
    assert "limit must be at least 1" in fails(capsys, "eval", "r", "--max-tokens", "0")
    run(capsys, "export", "r")
    assert "must not have a model.safetensors yet; --force replaces it" in fails(capsys, "export", "r")
    assert "must be its run's latest checkpoint" in fails(capsys, "pretrain", "--resume", "r/checkpoints/step-00000006")
    for file in (done / "r" / "checkpoints" / "step-00000012").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    for words in (["eval", "r"], ["info", "r"], ["export", "r", "--out", "e"], ["pretrain", "--resume", "r"]):
        assert re.search(r"must be complete JSON \(also there: step-00000006\), got 100 bytes", fails(capsys, *words))


def test_the_traceback_is_there_for_those_who_want_it(capsys, monkeypatch):
    monkeypatch.setenv("CHTS_DEBUG", "1")
    with pytest.raises(ValueError, match="must hold checkpoint.json"):
        main(["eval", "."])


def test_a_missing_package_is_named(capsys, monkeypatch, folder, arguments):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    err = fails(capsys, "pretrain", *arguments)
    assert not list(folder.glob("runs/*"))
    assert re.search(r'error: saving checkpoints needs the package safetensors: pip install "chts\[train\]"', err)
