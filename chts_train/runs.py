"""Run folders: naming them, never overwriting one, and one process at a time in each."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from .parallel import on_main
from .storage import write_json

CONFIG, SUMMARY, PLOTS = "config.json", "summary.json", "plots"


class RunError(ValueError):
    """A run folder that cannot be used; one line with the folder, the rule and what was found."""


def new_run(name: str, out: str | Path | None = None) -> Path:
    """Make the folder of a new run.

    Args:
        name: it becomes ``runs/<name>``, or ``runs/<name>-2`` and so on where that exists.
        out: the folder itself, instead; must not exist or must be empty.

    Raises:
        RunError: when ``out`` has something in it.
    """
    if out is not None:
        out = Path(out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RunError(f"--out {out}: must not exist or be an empty folder; to continue a run use --resume {out}")
        out.mkdir(parents=True, exist_ok=True)
        return out
    number = 1
    while True:
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return path


@contextlib.contextmanager
def starting_run(name: str, out: str | Path | None = None) -> Iterator[Path]:
    """:func:`new_run` around what may still fail: if it does, and nothing was written, the folder goes again.

    One folder for all the processes of a run.
    """
    path = on_main(lambda: new_run(name, out))
    try:
        yield path
    except BaseException:
        with contextlib.suppress(OSError):
            path.rmdir()
        raise


class RunLock:
    """Held while a process trains in a run folder; the system frees it when the process ends, however it ends.

    Raises:
        RunError: on entering, when another process holds it.
    """

    def __init__(self, run: Path) -> None:
        self.path = Path(run) / ".lock"

    def __enter__(self) -> RunLock:
        import fcntl

        self._file = open(self.path, "a")  # noqa: SIM115 - it stays open for as long as the lock is held
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise RunError(f"{self.path.parent}: must not be in use, got another process training in it") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def write_config(run: Path, config: dict[str, Any]) -> None:
    """Write ``config.json``, for people and for ``chts info``; checkpoints carry their own copy."""
    write_json(run / CONFIG, config)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        RunError: when it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path}: must exist, got no such file") from None
    except ValueError as error:
        raise RunError(f"{path}: must be complete JSON, got {error}") from None


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(path) for name in names)
