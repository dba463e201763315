"""Two result files side by side: what got slower, what got faster, what appeared and what is gone."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.cases import Case, shape_text
from benchmarks.results import IDENTITY, Results
from benchmarks.view import Table, View, geomean, milliseconds, times

BASELINES = ("cublas", "eager", "cusparselt", "torch24")
"""What a speed-up is taken over: the first that both files have."""


def compare(a: Results, b: Results, threshold: float = 5.0, absolute: bool = False) -> tuple[list[Table], int]:
    """Tables, and the number of cases that lost more than ``threshold`` per cent.

    Cards of one kind differ by 10 per cent and the same card's clock moves, so by default it is our speed-up over a
    competitor measured in the same run that is compared; ``absolute`` compares times, which is right for two runs on one
    machine. Cases without a competitor are compared by time.
    """
    old, new = View(a), View(b)
    differing = [(key, a.environment.get(key), b.environment.get(key)) for key in (*IDENTITY, "commit", "power.limit")]
    heads = [[key, str(x), str(y)] for key, x, y in differing if x != y]
    tables = [Table("What differs between the runs", ["", "A", "B"], heads)] if heads else []
    shared = [case for case in old.table if case in new.table]
    lines, changes, lost = [], [], 0
    for case in shared:
        figure = "eager_ms" if case.suite == "host" else "gpu_ms"
        mine, other = old.ms(case, "chts", figure), new.ms(case, "chts", figure)
        if mine is None or other is None:
            if mine is not None:
                row = new.row(case, "chts")
                lines.append([*_name(case), milliseconds(mine), "", "", "", f"lost: {row.error if row else 'no row'}"])
                lost += 1
            continue
        base = None if absolute else _baseline(old, new, case, figure)
        before = old.speedup(case, base, figure) if base else 1.0
        after = new.speedup(case, base, figure) if base else mine / other
        change = after / before
        changes.append(change)
        word = "slower" if change < 1 - threshold / 100 else "faster" if change > 1 + threshold / 100 else ""
        lost += word == "slower"
        if word:
            over = f"{times(before)} -> {times(after)} {base}" if base else "time"
            text = f"{100 * (change - 1):+.1f} %"
            lines.append([*_name(case), milliseconds(mine), milliseconds(other), over, text, word])
    lines.sort(key=lambda line: (line[-1] != "slower" and not line[-1].startswith("lost"), line[0], line[1]))
    title = f"Changes beyond {threshold:g} % in {len(shared)} shared cases, {lost} of them losses"
    table = Table(title, ["case", "dtype", "A", "B", "speed-up over", "change", ""], lines)
    for i, line in enumerate(lines):
        table.emphasis[i, 6] = "good" if line[-1] == "faster" else "bad"
    mean = geomean(changes)
    if mean:
        table.rows.append([f"geomean of {len(changes)}", "", "", "", "", f"{100 * (mean - 1):+.1f} %", ""])
        table.summary = 1
    table.remarks = [
        *_missing("only in A", [case for case in old.table if case not in new.table]),
        *_missing("only in B", [case for case in new.table if case not in old.table]),
    ]
    return [*tables, table], lost


def _name(case: Case) -> list[str]:
    return [f"{case.suite} {case.op} {shape_text(case.dims)}", case.dtype]


def _baseline(old: View, new: View, case: Case, figure: str) -> str | None:
    return next((p for p in BASELINES if old.ms(case, p, figure) and new.ms(case, p, figure)), None)


def _missing(text: str, cases: Sequence[Case]) -> list[str]:
    return [f"{text}: {len(cases)} cases, such as {cases[0].id}"] if cases else []
