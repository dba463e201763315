"""A parent that outlives crashes and hangs: a kernel that aborts its process, loses the device or never ends costs one row,
not the run."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

MOST_RESTARTS = 8
LOST = 75
"""Exit status of a worker whose device stopped answering (EX_TEMPFAIL): another process may go on."""
ABORTED = 134
HANG_S, LEAST_HANG_S = 240.0, 45.0
"""A worker that has not moved on to another provider or step for so long hangs; compiling a model takes half of it. With a
budget: a quarter of that, and at least the second figure."""
LEAST_S = 5.0
MARKER, EARLIER = "CHTS_BENCHMARK_MARKER", "CHTS_BENCHMARK_EARLIER"


def is_worker() -> bool:
    return MARKER in os.environ


def has_gpu() -> bool:
    """Whether the CUDA driver counts a device; without importing torch, which takes seconds and is the worker's to do."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def supervise(arguments: Sequence[str], budget: float | None) -> int:
    """Run ``python -m benchmarks`` as a worker, and again after a crash or a hang; the worker resumes from the result file.

    A worker ended by a signal, with :data:`LOST`, or by us after :data:`HANG_S`, is started again with what is left of the
    budget; it reads in the marker file which provider was running and gives that one a row with the reason. Every other
    exit status is final.
    """
    start = time.perf_counter()
    hang_s = HANG_S if budget is None else max(LEAST_HANG_S, min(HANG_S, budget / 4))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # let _watch take the worker along
    status, how = 0, ""
    with tempfile.TemporaryDirectory(prefix="chts-benchmark-") as folder:
        marker = Path(folder) / "running"
        for attempt in range(MOST_RESTARTS + 1):
            left = None if budget is None else budget - (time.perf_counter() - start)
            if left is not None and left < LEAST_S:
                break
            # What throws rows away happens once.
            again = [a for a in arguments if not attempt or a not in ("--fresh", "--retry")]
            command = [sys.executable, "-m", "benchmarks", *again]
            if left is not None:
                command += ["--budget", f"{left:.1f}"]
            status, how = _watch(command, os.environ | {MARKER: str(marker), EARLIER: how}, marker, hang_s)
            if not how:
                return status
            print(f"benchmarks: the worker {how}; another one goes on", file=sys.stderr, flush=True)
    return status


def _watch(command: list[str], environment: dict[str, str], marker: Path, hang_s: float = HANG_S) -> tuple[int, str]:
    """Run a worker to its end: (exit status, how it ended when that was no proper end)."""
    worker = subprocess.Popen(command, env=environment)
    moved = time.monotonic()
    seen = None
    try:
        while True:
            try:
                status = worker.wait(timeout=min(1.0, hang_s))
                break
            except subprocess.TimeoutExpired:
                now = marker.stat().st_mtime_ns if marker.exists() else None
                if now != seen:
                    seen, moved = now, time.monotonic()
                elif time.monotonic() - moved > hang_s:
                    worker.kill()
                    return worker.wait(), f"hung for {hang_s:.0f} s and was killed"
    except BaseException:  # Ctrl-C reaches the worker too, but a worker in a kernel does not hear it
        worker.kill()
        worker.wait()
        raise
    if status < 0:
        return status, f"was ended by signal {-status}"
    if status in (LOST, ABORTED):
        return status, "lost its device" if status == LOST else "aborted"
    return status, ""


def earlier_end() -> str | None:
    """In a restarted worker: how the one before it ended."""
    return os.environ.get(EARLIER) or None


class Marker:
    """The file that tells the parent, and the next worker, what is running; nothing where there is no parent."""

    def __init__(self) -> None:
        path = os.environ.get(MARKER)
        self.path = Path(path) if path else None

    def write(self, case_id: str, provider: str) -> None:
        if self.path:
            self.path.write_text(f"{case_id}\n{provider}\n")

    def read(self) -> tuple[str, str] | None:
        """(case id, provider) or None; no provider means that the inputs were being made."""
        try:
            case_id, provider = self.path.read_text().splitlines()[:2] if self.path else ("", "")
        except (OSError, ValueError):
            return None
        return (case_id, provider) if case_id else None

    def clear(self) -> None:
        if self.path:
            self.path.unlink(missing_ok=True)
