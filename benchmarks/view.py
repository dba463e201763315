"""Rows arranged for reading: by case and provider, with speed-ups, rates, shares of the roofs and geometric means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.cases import LINEAR_SETS, Case
from benchmarks.cost import flops, least_bytes
from benchmarks.results import ASKED, Results, Row

PROVIDER_TITLES = {
    "chts": "chts",
    "cublas": "cuBLAS",
    "cusparselt": "cuSPARSELt",
    "torch24": "torch 2:4",
    "eager": "eager",
    "mma_twin": "mma twin",
    "compile": "compile",
    "chts_compile": "chts compiled",
}


@dataclass
class Table:
    """Text cells ready to print. ``emphasis``: (row, column) -> "good" or "bad". ``remarks`` go under the table."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    emphasis: dict[tuple[int, int], str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    summary: int = 0
    """The last so many rows summarise the others."""

    def markdown(self) -> str:
        lines = ["| " + " | ".join(self.columns) + " |", "|" + " --- |" * len(self.columns)]
        for i, row in enumerate(self.rows):
            bold = i >= len(self.rows) - self.summary
            cells = [f"**{c}**" if c and (bold or self.emphasis.get((i, j)) == "bad") else c for j, c in enumerate(row)]
            lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
        return "\n".join([f"#### {self.title}", "", *lines, *(["", *(f"- {r}" for r in self.remarks)] if self.remarks else [])])


class View:
    """The rows of one result file."""

    def __init__(self, results: Results) -> None:
        self.environment = results.environment
        self.table: dict[Case, dict[str, Row]] = {}
        for row in results.rows:
            held = self.table.setdefault(row.case, {})
            # An implementation that was asked for by name does not speak for the package where a free choice exists.
            if row.provider not in held or ASKED not in row.note:
                held[row.provider] = row

    def cases(self, suite: str, op: str | None = None) -> list[Case]:
        return [case for case in self.table if case.suite == suite and op in (None, case.op)]

    def row(self, case: Case, provider: str) -> Row | None:
        return self.table.get(case, {}).get(provider)

    def ms(self, case: Case, provider: str, figure: str = "gpu_ms") -> float | None:
        row = self.row(case, provider)
        return None if row is None or row.error else getattr(row, figure)

    def speedup(self, case: Case, other: str, figure: str = "gpu_ms", ours: str = "chts") -> float | None:
        """How many times faster ``ours`` is than ``other``."""
        mine, theirs = self.ms(case, ours, figure), self.ms(case, other, figure)
        return theirs / mine if mine and theirs else None

    def over_best(self, case: Case, others: Sequence[str], figure: str = "gpu_ms") -> float | None:
        """Speed-up over the fastest of several others."""
        found = [s for s in (self.speedup(case, other, figure) for other in others) if s is not None]
        return min(found) if found else None

    def teraflops(self, case: Case, provider: str = "chts", figure: str = "gpu_ms") -> float | None:
        ms, count = self.ms(case, provider, figure), flops(case)
        return count / ms / 1e9 if ms and count else None

    def share_of_copy(self, case: Case, provider: str = "chts") -> float | None:
        """Least bytes over time, as a share of this machine's copy bandwidth."""
        ms, size, roof = self.ms(case, provider), least_bytes(case), self.roof("copy_bytes_per_s")
        return size / (ms / 1e3) / roof if ms and size and roof else None

    def roof(self, name: str) -> float | None:
        """The median over the file's sessions of a measured ceiling."""
        found = sorted(s[name] for s in self.environment.get("sessions", []) if s.get(name))
        return found[len(found) // 2] if found else None

    def linear_set(self, name: str, op: str, dtype: str = "bf16") -> list[Case]:
        """The measured cases of a named set of shapes, in its order."""
        wanted = [Case("linear", op, (("tokens", t), ("out", o), ("in", i)), dtype) for t, o, i in LINEAR_SETS[name]]
        return [case for case in wanted if case in self.table]


def geomean(values: Iterable[float | None]) -> float | None:
    found = [v for v in values if v]
    return math.exp(sum(map(math.log, found)) / len(found)) if found else None


def milliseconds(ms: float | None) -> str:
    """In microseconds below one millisecond; four digits."""
    if ms is None:
        return ""
    return f"{ms * 1e3:.4g} µs" if ms < 1 else f"{ms:.4g} ms"


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x" if ratio < 20 else f"{ratio:.0f}x"


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def mebibytes(size: float | None) -> str:
    if size is None:
        return ""
    return f"{size / 2**20:,.0f} MiB" if size >= 1e4 * 2**20 else f"{size / 2**20:.4g} MiB"


def verdict(ratio: float | None) -> str:
    """Emphasis of a speed-up."""
    return "" if ratio is None else "good" if ratio >= 1 else "bad"
