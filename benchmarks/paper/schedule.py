"""Which arm runs when: several at a time as processes of their own, until all are finished or time is up."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper.arms import collect, folder_of, forget, has_checkpoint, is_finished, train_arm
from benchmarks.paper.protocol import GROUPS, ROOT, Arm, Places, arms_of, base_of, config_of, fingerprint, urgency
from benchmarks.paper.results import Paper, tuned
from chts_train.methods import get_method

COMPILING_S = 20.0
"""What starting and the last evaluation take, about, where a model with another kind of layer has to be compiled."""
STEP_S = {"llama": 0.0136, "vit": 0.013}
"""Seconds of a step at the scale "reduced" on one H100, about: while no row tells. The ViT's is a guess."""
GRACE_S = 45.0
"""How long a stopped arm may take to save its checkpoint."""


@dataclass
class Plan:
    """What an invocation is asked for.

    files: the tables' result files. seeds, only: see :func:`arms_of`. places: the data, as the protocol names it;
    held: the same, unpacked. home: where run folders are. environment: a few facts that go into every row.
    """

    files: list[Paper]
    seeds: Sequence[int]
    only: Sequence[str]
    scale: str
    places: Places
    held: Places
    home: Path
    environment: dict[str, Any] = field(default_factory=dict)
    say: Callable[[str], None] = print
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    compile: str = "auto"
    models: Sequence[str] = GROUPS
    changes: tuple[tuple[str, Any], ...] = ()
    """Of every arm: fields of its config with other values than the protocol has."""
    whole: bool = False
    """Arms are trained from beginning to end, without checkpoints; none is begun for which the time left is too short."""
    seconds_of: dict[tuple[str, str, int], float] = field(default_factory=dict)
    """:func:`_program` -> seconds per step, start-up and evaluations included, of the quickest such arm of this invocation."""
    jobs_of: dict[str, int] = field(default_factory=dict)
    """Key -> the most arms that shared the device with an arm, itself included, in this invocation."""

    def learn(self, rows: Sequence[dict[str, Any]]) -> None:
        """Note finished rows (of any table); rows of another protocol are no use here."""
        for row in rows:
            arm = Arm.of(row)
            if row["fingerprint"] == fingerprint(arm, self.scale, self.places):
                self.known[row["key"]] = row

    def wanted(self, file: Paper) -> list[Arm]:
        return arms_of(file.table, self.seeds, tuned(self.known.values()), self.only, self.models, self.changes)

    def folder(self, arm: Arm) -> Path:
        return folder_of(arm, self.scale, self.held, self.home)

    def record(self) -> None:
        """Bring run folders into ``known`` and ``known`` into the result files."""
        for file in self.files:
            for arm in self.wanted(file):
                if arm.key not in self.known and is_finished(self.folder(arm)):
                    row = collect(arm, self.scale, self.held, self.home)
                    self.known[arm.key] = row | {"jobs": self.jobs_of.get(arm.key), "environment": self.environment}
                    if arm.method != "dense":  # a dense model is what re-training starts from
                        forget(self.folder(arm))
            changed = [file.add(self.known[arm.key]) for arm in self.wanted(file) if arm.key in self.known]
            if any(changed):
                file.save()

    def waiting(self) -> list[Arm]:
        """Arms still to train whose dense model is there: begun ones first, those that failed before last; then table by table."""
        found: dict[str, Arm] = {}
        for file in self.files:
            for arm in self.wanted(file):
                if arm.key in self.known:
                    continue
                source = arm.needs
                if source is not None and not (is_finished(self.folder(source)) and has_checkpoint(self.folder(source))):
                    arm = source  # again, where its row came from another machine
                found.setdefault(arm.key, arm)
        order = {key: number for number, key in enumerate(found)}  # of tables, and of methods in a table
        tables = {arm.key: number for number, file in reversed([*enumerate(self.files)]) for arm in self.wanted(file)}

        def place(arm: Arm) -> tuple[Any, ...]:
            begun = has_checkpoint(self.folder(arm))
            return self.failure(arm).exists(), not begun, tables.get(arm.key, 0), urgency(arm), order[arm.key]

        return sorted(found.values(), key=place)

    def failure(self, arm: Arm) -> Path:
        """A file that is there when the arm has failed: others come first from then on, also in the next invocation."""
        return self.home / "failed" / self.folder(arm).name

    def expected(self, arm: Arm) -> float:
        """Seconds that the arm will take: what the same program took in this invocation, else by the steps of rows, else by STEP_S."""
        steps = config_of(arm, self.scale, self.places).total_steps
        if _program(arm) in self.seconds_of:
            return 1.05 * steps * self.seconds_of[_program(arm)]
        # Rows have seconds without start-up and evaluations; another kind of layer has to be compiled first.
        group = base_of(arm.group)
        known = [row["seconds"] / row["steps"] for row in self.known.values() if base_of(row["group"]) == group]
        if not known and self.scale == "reduced":
            known = [STEP_S[group]]
        return 1.1 * steps * max(known) + COMPILING_S if known else 0.0

    def left(self) -> int:
        """Arms of the tables without a row (the SR-STE runs that wait for the tuning are not among them yet)."""
        return len({arm.key for file in self.files for arm in self.wanted(file)} - self.known.keys())


def run(plan: Plan, deadline: float, jobs: int, data: Path | None) -> list[str]:
    """Train until nothing is left or ``deadline`` (of ``time.monotonic``) has passed.

    Args:
        plan: what to train; rows are recorded as arms finish.
        deadline: then running arms save a checkpoint and end.
        jobs: arms at a time, each a process of its own; 0: one after the other in this process.
        data: the folder that the workers are told to read data from.

    Returns:
        One line per arm that failed; the others were not disturbed.
    """
    failed: dict[str, str] = {}
    running: dict[str, tuple[Arm, subprocess.Popen[bytes]]] = {}
    stopped = 0.0  # when the running arms were last told to stop
    try:
        while True:
            for key, (arm, process) in list(running.items()):
                if process.poll() is not None:
                    del running[key]
                    if not is_finished(plan.folder(arm)) and not stopped:
                        failed[key] = f"{key}: exit status {process.returncode}: {_last_words(plan, arm)}"
                        _note_failure(plan, arm)
                    _tell(plan, arm, failed)
            plan.record()
            ready = [arm for arm in plan.waiting() if arm.key not in failed and arm.key not in running]
            now = time.monotonic()
            if plan.whole:
                ready = [arm for arm in ready if plan.expected(arm) <= deadline - now]
            if now < deadline and ready and jobs == 0:
                if not _here(plan, ready[0], deadline - now, failed):
                    return list(failed.values())
                continue
            while now < deadline and ready and len(running) < jobs:
                arm = ready.pop(0)
                running[arm.key] = (arm, _start(plan, arm, jobs, data))
            for key in running:
                plan.jobs_of[key] = max(plan.jobs_of.get(key, 0), len(running))
            if not running:
                return list(failed.values())
            if now >= deadline and now - stopped > 2:  # again and again: one may have been starting up
                stopped = now
                for _, process in running.values():
                    if now < deadline + GRACE_S:
                        process.terminate()
                    else:
                        process.kill()
            time.sleep(0.2)
    finally:
        for _, process in running.values():
            process.terminate()


def _start(plan: Plan, arm: Arm, jobs: int, data: Path | None) -> subprocess.Popen[bytes]:
    plan.say(f"{arm.key}: {'goes on' if has_checkpoint(plan.folder(arm)) else 'starts'}")
    options = ["--group", arm.group, "--method", arm.method, "--seed", str(arm.seed), "--scale", plan.scale]
    options += ["--runs", str(plan.home), "--compile", plan.compile, *(["--whole-arms"] if plan.whole else [])]
    options += [] if arm.decay is None else ["--decay", repr(arm.decay)]
    options += ["--set", *(f"{key}={json.dumps(value)}" for key, value in arm.changes)] if arm.changes else []
    options += [] if data is None else ["--data", str(data)]
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    log = _log(plan, arm)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.paper", "worker", *options],
            cwd=ROOT, env={"OMP_NUM_THREADS": threads} | os.environ, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip


def _here(plan: Plan, arm: Arm, seconds: float, failed: dict[str, str]) -> bool:
    """Train an arm in this process; False when no other one can follow: a signal came, or the GPU is lost to this process."""
    plan.jobs_of[arm.key] = 1
    start = time.monotonic()
    stopped = False
    try:
        stopped = not train_arm(arm, plan.scale, plan.held, plan.home, seconds, compile=plan.compile, whole=plan.whole)
    except Exception as error:  # whatever one arm dies of, the others are still wanted
        failed[arm.key] = f"{arm.key}: {type(error).__name__}: {error}"
        _note_failure(plan, arm)
    gc.collect()  # the arm's captured graphs and their memory
    usable = _free_memory()
    taken = time.monotonic() - start
    if is_finished(plan.folder(arm)):
        # The first one compiled.
        each = taken / config_of(arm, plan.scale, plan.places).total_steps
        plan.seconds_of[_program(arm)] = min(each, plan.seconds_of.get(_program(arm), each))
    _tell(plan, arm, failed, f" in {taken:.1f} s")
    plan.record()
    return usable and not stopped


def _free_memory() -> bool:
    """Give unused memory back; False when the GPU answers nothing but errors from now on."""
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
    return True


def _note_failure(plan: Plan, arm: Arm) -> None:
    plan.failure(arm).parent.mkdir(parents=True, exist_ok=True)
    plan.failure(arm).touch()


def _program(arm: Arm) -> tuple[str, str, int]:
    """What arms have in common that run the same compiled code."""
    method = get_method(arm.method)
    forms = [name for name in ("dense_fraction", "ste_window") if name in method.settings]
    kind = " and ".join([method.kind, *forms])
    return arm.group, kind, 0 if method.kind == "dense" else method.n


def _tell(plan: Plan, arm: Arm, failed: dict[str, str], took: str = "") -> None:
    finished = is_finished(plan.folder(arm))
    again = "to be begun again" if plan.whole else "to be continued"
    plan.say(failed.get(arm.key) or f"{arm.key}: {'finished' if finished else f'stopped, {again}'}{took}")


def _log(plan: Plan, arm: Arm) -> Path:
    return plan.home / "logs" / f"{plan.folder(arm).name}.log"


def _last_words(plan: Plan, arm: Arm) -> str:
    """The last line that a worker wrote: of a traceback, the error."""
    lines = _log(plan, arm).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"
