"""What the screen shows: a line for each finished case, then the tables. Needs rich."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.cases import Case, shape_text
from benchmarks.results import Results, Row
from benchmarks.view import PROVIDER_TITLES, Table, View, milliseconds, times

STYLES = {"good": "green", "bad": "bold red"}


class Screen:
    """Prints with rich, plainly where the output is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self._said: set[str] = set()
        self.console = Console(highlight=False)
        if not self.console.is_terminal:  # a log file has no width; tables must not be folded to 80 columns
            self.console = Console(highlight=False, width=200)

    def say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False)

    def table(self, table: Table) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as RichTable
        from rich.text import Text

        made = RichTable(title=table.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
        texts = _text_columns(table)
        for index, column in enumerate(table.columns):
            made.add_column(column, justify="left" if index in texts else "right", overflow="fold")
        for i, row in enumerate(table.rows):
            last = i >= len(table.rows) - table.summary
            if table.summary and i == len(table.rows) - table.summary:
                made.add_section()
            style = "bold" if last else ""
            made.add_row(*(Text(cell, style=STYLES.get(table.emphasis.get((i, j), ""), style)) for j, cell in enumerate(row)))
        self.console.print(made)
        for remark in table.remarks:
            self.say(f"  {remark}", "dim")
        self.say("")

    def case(self, done: int, count: int, case: Case, rows: Sequence[Row], seconds: float, elapsed: float) -> None:
        """One line: where and when we are, the case, our time, our speed-up over each other. A reason is told once."""
        view = View(Results(rows=list(rows)))
        figure = "eager_ms" if case.suite == "host" else "gpu_ms"
        ours = view.row(case, "chts")
        parts = []
        for row in rows:
            title = PROVIDER_TITLES[row.provider]
            if row.error:
                parts.append(f"{title} -")
            elif row.provider == "chts" or ours is None or ours.error:
                parts.append(f"{title} {milliseconds(getattr(row, figure))}")
            else:
                parts.append(f"{times(view.speedup(case, row.provider, figure))} {title}")
        name = f"{case.suite} {case.op}"
        place = f"{elapsed:>5.0f} s [{done:>3}/{count}]"
        self.say(f"{place} {name:<24} {shape_text(case.dims):<17} {case.dtype}  {'  |  '.join(parts)}  ({seconds:.1f} s)")
        for row in rows:
            reason = f"{PROVIDER_TITLES[row.provider]}: {row.error}"
            if row.error and reason not in self._said:
                self._said.add(reason)
                self.say(f"{'':>10}{reason}", "yellow")


def _text_columns(table: Table) -> set[int]:
    """Columns of words are flushed left, columns of figures right."""
    return {
        j for j in range(len(table.columns))
        if any(row[j] and not row[j][0].isdigit() and row[j] not in ("-", "") for row in table.rows[: len(table.rows) - table.summary])
        and not any(row[j][:1].isdigit() for row in table.rows)
    } | {0}  # fmt: skip
