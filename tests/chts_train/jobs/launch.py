"""Starts jobs and reads their results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from .checks import NAMES

ROOT = Path(__file__).parents[3]


def environment(**more: str) -> dict[str, str]:
    """This process' environment for another one that imports this repository."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def checks(module: ModuleType) -> list[str]:
    """Names of a module's checks, without those that compile: they take most of the time, and more ranks add nothing to them."""
    return [name for name in vars(module) if name.startswith("check_") and "compiled" not in name]


def start(folder: Path, world: int, names: Sequence[str], device: str = "cpu", limit: float = 240) -> None:
    """Run the checks of these names on ``world`` processes, on the CPU, on a GPU each ("cuda") or on one GPU ("cuda:0").

    After ``limit`` seconds they are killed.
    """
    processes = []
    for rank in range(world):
        with open(folder / f"{world}-{rank}.log", "w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.chts_train.jobs", folder, *names], cwd=ROOT, stdout=log, stderr=log,
                    env=environment(WORLD_SIZE=str(world), RANK=str(rank), JOBS_DEVICE=device),
                )
            )  # fmt: skip
    deadline = time.monotonic() + limit
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def read(folder: Path, world: int) -> list[dict]:
    """What each rank found, or the ends of all logs where it found nothing."""
    files = [folder / f"{world}-{rank}.json" for rank in range(world)]
    logs = "\n".join((folder / f"{world}-{rank}.log").read_text()[-2000:] for rank in range(world))
    return [json.loads(f.read_text()) if f.exists() else {"log": logs} for f in files]


def require_ok(results: list[dict], names: Sequence[str]) -> None:
    """Fail with the tracebacks of the ranks where a check went wrong."""
    wrong = [
        f"rank {rank}, {name}: {result.get(name, f'not reached, after {result}')}"
        for name in names
        for rank, result in enumerate(results)
        if result.get(name) != "ok"
    ]
    assert not wrong, "\n".join(wrong[: 2 * len(results)])


__all__ = ["NAMES", "checks", "environment", "read", "require_ok", "start"]
