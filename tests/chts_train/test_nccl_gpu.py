"""Several GPUs of one host through NCCL: layers, checkpoints, the trainer and the command line. Run with `pytest -m gpu`."""

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

from chts_train.settings import Settings
from chts_train.trainer import Trainer
from tests.chts_train.jobs import dcp, ddp, fsdp, trainer
from tests.chts_train.jobs.launch import ROOT, checks, environment, read, require_ok, start

DEVICE = "cuda"
GPUS = torch.cuda.device_count() if torch.distributed.is_available() and torch.distributed.is_nccl_available() else 0
WORLDS = [
    pytest.param(n, marks=pytest.mark.skipif(n > GPUS, reason=f"needs {n} CUDA devices, found {GPUS}")) for n in (2, 4, 8)
]
TWO = WORLDS[:1]
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(200)]
LIMIT = 85


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("module", (ddp, fsdp, trainer), ids=("ddp", "fsdp", "trainer"))
def test_ranks_compute_what_one_process_does(tmp_path, text_folder, module, world):
    """Values close, ids equal after every update, checksums on: each rank compares with a single process of its own."""
    (tmp_path / "text").symlink_to(text_folder)
    start(tmp_path, world, checks(module), DEVICE, LIMIT)
    require_ok(read(tmp_path, world), checks(module))


@pytest.mark.parametrize("world", WORLDS)
def test_distributed_checkpoints_change_world_size(tmp_path, world):
    """1 -> 2 -> 1 and on to 4 and 8; every process compares with a training that was never interrupted."""
    worlds = [size for size in (2, 4, 8) if size <= world]
    for size, names in ((1, ["first_checkpoint"]), *((size, checks(dcp)) for size in worlds), (1, ["back_on_one"])):
        start(tmp_path, size, names, DEVICE, LIMIT)
        require_ok(read(tmp_path, size), names)


# --- the command line


def arguments(text_folder: Path, steps: int = 16) -> list[str]:
    return ["--preset", "tiny", "--data", str(text_folder), "--steps", str(steps), "--interval", "4", "--zeta", "0.3",
            "--batch-size", "16", "--micro-batch", "2", "--seq-len", "48", "--warmup-steps", "2", "--eval-interval", "8",
            "--eval-tokens", "2000", "--log-interval", "1", "--keep", "3", "--lr-ramp-steps", "1",
            "--set", "data.val_fraction=0.2"]  # fmt: skip


def pretrain(world: int, out: Path, *options: str) -> subprocess.Popen:
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "-m"] if world > 1 else []
    command = [sys.executable, "-m", *several, "chts_train", "pretrain", *options, "--device", DEVICE, "--out", str(out)]
    with open(out.with_suffix(".log"), "w") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment())


def finished(jobs: dict[Path, subprocess.Popen]) -> None:
    deadline = time.monotonic() + LIMIT
    try:
        for out, job in jobs.items():
            code = job.wait(max(0.1, deadline - time.monotonic()))
            assert code == 0, f"{out.name}: {out.with_suffix('.log').read_text()[-4000:]}"
    finally:
        for job in jobs.values():
            job.terminate()


def rows(run: Path, *kinds: str) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] in kinds]


def compare(run: Path, truth: Path, loss: float = 0.02) -> None:
    """The same rows in both, losses and turnovers apart by rounding in bfloat16 and what it moves."""
    ours, theirs = (rows(folder, "train", "eval", "update") for folder in (run, truth))
    assert [(row["kind"], row["step"]) for row in ours] == [(row["kind"], row["step"]) for row in theirs], run.name
    assert sum(row["kind"] == "update" for row in ours) == 3
    for a, b in zip(ours, theirs, strict=True):
        for key in ("loss", "val_loss"):
            assert key not in b or a[key] == pytest.approx(b[key], rel=loss), (run.name, a, b)
        assert b["kind"] != "update" or a["turnover"] == pytest.approx(b["turnover"], abs=0.02), (run.name, a, b)


@pytest.mark.parametrize("world", WORLDS)
def test_the_command_line_follows_one_gpu(text_folder, tmp_path, world):
    options = arguments(text_folder)
    runs = {kind: tmp_path / kind for kind in ("one", "ddp", "fsdp")}
    finished({
        out: pretrain(1, out, *options) if kind == "one" else pretrain(world, out, *options, "--parallel", kind)
        for kind, out in runs.items()
    })  # fmt: skip
    for kind in ("ddp", "fsdp"):
        compare(runs[kind], runs["one"])
        assert f"{world} processes ({kind})" in runs[kind].with_suffix(".log").read_text()
    # From half way on with another number of GPUs.
    half = {kind: str(out / "checkpoints" / "step-00000008") for kind, out in runs.items()}
    branches = {
        tmp_path / "fsdp-one": (1, half["fsdp"]),
        tmp_path / "one-fsdp": (world, half["one"], "--parallel", "fsdp"),
        tmp_path / "one-ddp": (world, half["one"], "--parallel", "ddp"),
    }
    finished({out: pretrain(size, out, "--log-interval", "1", "--resume", *more) for out, (size, *more) in branches.items()})
    for out in branches:
        compare(out, runs["one"])


@pytest.mark.parametrize("world", TWO)
@pytest.mark.parametrize("kind", ("ddp", "fsdp"))
def test_compiled_blocks_follow_eager_ones(text_folder, tmp_path, kind, world):
    options = arguments(text_folder)
    runs = {name: tmp_path / name for name in ("eager", "compiled")}
    finished({
        runs["eager"]: pretrain(1, runs["eager"], *options),
        runs["compiled"]: pretrain(world, runs["compiled"], *options, "--parallel", kind, "--compile", "blocks"),
    })  # fmt: skip
    compare(runs["compiled"], runs["eager"], loss=0.03)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", ("ddp", "fsdp"))
def test_a_killed_rank_ends_all(text_folder, tmp_path, kind, world):
    """torchrun ends the others, at the latest 30 s after, also those that wait inside a collective."""
    run = tmp_path / "run"
    job = pretrain(world, run, *arguments(text_folder, steps=100_000), "--parallel", kind)
    log = run.with_suffix(".log")
    try:
        deadline = time.monotonic() + 60
        while not (run / "checkpoints" / "latest").exists():
            assert job.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.1)
        children = [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
        ranks = {pid: b"\0" + Path(f"/proc/{pid}/environ").read_bytes() for pid in children}
        os.kill(next(pid for pid, text in ranks.items() if b"\0RANK=1\0" in text), signal.SIGKILL)
        assert job.wait(60) != 0
    finally:
        job.terminate()
    errors = log.read_text()
    assert "Signal 9 (SIGKILL)" in errors, errors[-4000:]  # torchrun's report names the one that was killed
    assert not any(alive(pid) for pid in children)
    resumed = Trainer.resume(run, Settings(device=DEVICE, quiet=True))
    done = resumed.counters.step
    assert done >= 8
    for _ in range(3):
        resumed._train_step()
    resumed._read_loss()  # finite, or it raises
    assert resumed.counters.step == done + 3
