"""The command line under torchrun: the same run, one voice, and an end when a process ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from chts_train.cli import main
from chts_train.parallel import Processes, joined, on_main
from chts_train.settings import Settings
from chts_train.trainer import Trainer

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.timeout(300),
]

SIZES = ("--set", "model.hidden_size=20", "--set", "model.intermediate_size=28", "--set", "model.num_attention_heads=2",
         "--set", "model.num_hidden_layers=1", "--set", "data.val_fraction=0.2", "--set", "lr_ramp_steps=1")  # fmt: skip


def arguments(text_folder: Path, out: Path, steps: int = 6) -> list[str]:
    return ["pretrain", "--data", str(text_folder), "--steps", str(steps), "--interval", "3", "--batch-size", "4",
            "--micro-batch", "2", "--seq-len", "24", "--zeta", "0.3", "--eval-interval", "3", "--eval-tokens", "100",
            "--log-interval", "1", "--device", "cpu", "--out", str(out), *SIZES]  # fmt: skip


def torchrun(*options: str, processes: int = 2) -> subprocess.Popen:
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
               "-m", "chts_train", *options]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def rows(run: Path, *kinds: str) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] in kinds]


def test_two_processes_compute_the_run_of_one(text_folder, tmp_path, capsys):
    job = torchrun(*arguments(text_folder, tmp_path / "two"), "--parallel", "fsdp")
    assert main(arguments(text_folder, tmp_path / "one")) == 0
    alone = capsys.readouterr().out
    out, errors = job.communicate(timeout=200)
    assert job.returncode == 0, errors
    assert out.count("2 processes (fsdp)") == out.count("held-out perplexity") == out.count("saved in") == 1
    assert len(out.splitlines()) == len(alone.splitlines())
    one, two = (rows(tmp_path / name, "train", "eval", "update") for name in ("one", "two"))
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "val_loss", "turnover", "removed"):
            if a.get(key) is not None:
                assert b[key] == pytest.approx(a[key], rel=1e-4), (a, b)
    # What two processes saved, one goes on with.
    assert Trainer.resume(tmp_path / "two", Settings(device="cpu", quiet=True)).counters.step == 6


@pytest.mark.parametrize(("processes", "kind"), ((2, "ddp"), (4, "fsdp")))
def test_a_killed_process_ends_the_run(text_folder, tmp_path, processes, kind):
    run = tmp_path / "run"
    options = "--batch-size", str(2 * processes), "--parallel", kind
    job = torchrun(*arguments(text_folder, run, steps=100_000), *options, processes=processes)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (run / "checkpoints" / "latest").exists():
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.1)
    children = [int(pid) for pid in _children(job.pid)]
    victim = next(pid for pid in children if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(victim, signal.SIGKILL)
    _, errors = job.communicate(timeout=100)
    assert job.returncode != 0
    assert f"error: process 0 of {processes} lost another one at step" in errors or "SIGTERM" in errors, errors
    assert "Signal 9 (SIGKILL)" in errors  # torchrun's report names the one that was killed
    assert Trainer.resume(run, Settings(device="cpu", quiet=True)).counters.step >= 3  # what was saved is intact


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_mistakes_are_said_once(tmp_path):
    job = torchrun("pretrain", "--parallel", "fdsp", "--out", str(tmp_path / "run"))
    _, errors = job.communicate(timeout=100)
    assert errors.count("argument --parallel: invalid choice: 'fdsp'") == 1 and job.returncode != 0
    assert not (tmp_path / "run").exists()


def test_alone(tmp_path):
    assert Processes.here() == Processes() and Processes().main and Processes().largest(3) == 3
    assert on_main(lambda: 5) == 5
    with joined():
        assert not torch.distributed.is_initialized()
    with pytest.raises(ValueError, match="parallel: must be one of auto, ddp, fsdp, got 'both'"):
        Processes.here("both")
    with pytest.raises(ValueError, match="parallel: must be auto for a single process, got 'fsdp'; start it with torchrun"):
        Processes.here("fsdp")
