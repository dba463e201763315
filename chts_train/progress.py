"""What a training run shows: a rich progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO


def duration(seconds: float) -> str:
    """``h:mm:ss`` or ``m:ss``."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def count(value: float) -> str:
    """A number with the suffix k, M or G and three digits: 23.4k."""
    for suffix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def figures(row: dict[str, Any]) -> str:
    """The figures of a training line of the log, for people: loss, perplexity, speed, turnover."""
    parts = [f"loss {row['loss']:.3f}"]
    if "ppl" in row:
        parts.append(f"ppl {row['ppl']:.4g}")
    parts += [f"{count(row[key])} {key[:-6]}/s" for key in ("tokens_per_s", "images_per_s") if key in row]
    if row.get("turnover") is not None:
        parts.append(f"turnover {row['turnover']:.2%}")
    return "  ".join(parts)


class Progress:
    """Shows the steps of a run between ``with`` and its end. ``message`` prints a line that stays.

    Args:
        total: steps of the run; ``done``: those finished before (a resumed run).
        stream: where to print; a progress bar only when it is a terminal and rich is installed.
        lines: plain lines to print over the whole run, at most.
        quiet: print nothing.
    """

    def __init__(
        self, total: int, done: int = 0, *, stream: TextIO | None = None, lines: int = 40, quiet: bool = False
    ) -> None:
        self.total, self.done, self.quiet = total, done, quiet
        self.stream = stream or sys.stdout
        self._every = max(1, total // lines)
        self._printed = done
        self._start, self._first = time.monotonic(), done
        self._bar = None if quiet else self._make_bar()

    def __enter__(self) -> Progress:
        self._start, self._first = time.monotonic(), self.done
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """``step`` steps are done."""
        self.done = step
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show(self, row: dict[str, Any]) -> None:
        """A new training line of the log."""
        if self._bar is not None:
            self._bar.update(self._task, figures=figures(row))
        elif row["step"] - self._printed >= self._every or row["step"] == self.total:
            self._printed = row["step"]
            width = len(str(self.total))
            self.message(f"step {row['step']:>{width}}/{self.total}  {figures(row)}  ETA {duration(self._left())}")

    def message(self, text: str) -> None:
        """Print a line that stays."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    def _left(self) -> float:
        passed = time.monotonic() - self._start
        return passed / max(1, self.done - self._first) * (self.total - self.done)

    def _make_bar(self) -> Any:
        if not self.stream.isatty():
            return None
        try:
            from rich import progress
            from rich.console import Console
        except ImportError:
            return None
        bar = progress.Progress(
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[figures]}", markup=False),
            progress.TextColumn("ETA"),
            progress.TimeRemainingColumn(compact=True),
            console=Console(file=self.stream),
            refresh_per_second=4,
        )
        self._task = bar.add_task("", total=self.total, completed=self.done, figures="")
        return bar
