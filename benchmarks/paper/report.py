"""Tables of the result files: mean and deviation over seeds, and differences paired by seed against the controls."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper import flops
from benchmarks.paper.protocol import FIGURES, REDRAWN, RETRAIN, SEEDS, TABLES, TICKET, arms_of
from benchmarks.paper.results import Paper, path_of, tuned
from benchmarks.view import Table
from chts_train.methods import get_method

Rows = Sequence[dict[str, Any]]
Values = dict[str, dict[int, float]]
"""Arm -> seed -> figure."""
CONTROLS = ("dense", "static", "random-regrow", "random-moves", "srste", "nvidia")
TITLES = {
    1: "training from scratch",
    2: "hard and soft rules",
    3: "dense to sparse",
    4: "what a pattern is worth",
}


def write(folder: Path, scale: str, *, plots: bool = True) -> int:
    """Show every table on screen, write ``report.md`` and the figures; returns the exit status, 1 where nothing is there."""
    from benchmarks.console import Screen

    screen = Screen()
    tables = render(folder, scale)
    if not tables:
        screen.say(f"no result files in {folder} yet: run python -m benchmarks.paper --table 1")
        return 1
    for table in tables:
        screen.table(table)
    blocks = [table.markdown() for table in tables]
    if plots:
        from benchmarks.paper.figures import draw

        for path in draw(folder, scale, list(FIGURES)):
            screen.say(f"plot: {path}")
            blocks.append(f"![{path.stem}]({path.name})")
    (folder / f"report{'' if scale == 'reduced' else f'-{scale}'}.md").write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    return 0


def render(folder: Path, scale: str) -> list[Table]:
    """The tables of all result files there are, what has not been run, Appendix I and J; empty without any."""
    found: list[Table] = []
    rows: dict[str, dict[str, Any]] = {}
    for number in TABLES:
        path = path_of(folder, number, scale)
        if path.exists():
            file = Paper.load(path)
            found += tables_of(file)
            rows |= {row["key"]: row for row in file.rows}
    if not found:
        return []
    held = list(rows.values())
    return [*found, *filter(None, [not_run(held), timing(held)]), *flops.tables()]


def tables_of(file: Paper) -> list[Table]:
    """Per group of a table: its protocol, means, paired differences, what rules add to SR-STE, and its tuning."""
    found = []
    if file.table == 4 and file.rows:  # tickets beside what they are to be compared with
        title = f"Table 4 ({file.protocol['scale']}): {TITLES[4]}, llama"
        return [means(title, file, "llama", file.rows), *filter(None, [differences(title, file.rows)])]
    for group in TABLES[file.table]:
        rows = [row for row in file.rows if row["group"] == group]
        # The dense start of a re-training group is in that group's own table.
        if not rows or (f"{group}{RETRAIN}" in TABLES[file.table] and any(r["group"] == f"{group}{RETRAIN}" for r in file.rows)):
            continue
        title = f"Table {file.table} ({file.protocol['scale']}): {TITLES[file.table]}, {group}"
        found += [means(title, file, group, rows)]
        found += filter(None, [differences(title, rows), targets(title, rows), tuning(title, rows)])
    return found


def measure(rows: Rows) -> tuple[str, str, float, int]:
    """(key, name, factor, sign) of the figure that counts; sign -1: less is better."""
    if any("val_ppl" in row["figures"] for row in rows):
        return "val_ppl", "perplexity", 1.0, -1
    return "val_accuracy", "accuracy, %", 100.0, 1


def not_run(rows: Rows) -> Table | None:
    """The arms of every table without a row; None when there are none."""
    keys, best = {row["key"] for row in rows}, tuned(rows)
    lines = []
    for number, groups in TABLES.items():
        for group in groups:
            wanted: dict[str, list[int]] = {}
            for arm in arms_of(number, SEEDS, best):
                if arm.group == group and arm.key not in keys:
                    wanted.setdefault(arm.name, []).append(arm.seed)
            if wanted:
                lines.append([str(number), group, ", ".join(f"{arm} ({_list(set(seeds))})" for arm, seeds in wanted.items())])
    untuned = [f"{method}: its other seeds wait for the tuning" for method, decay in sorted(best.items()) if decay is None]
    return Table("Not run", ["table", "group", "arms (seeds)"], lines, remarks=untuned) if lines else None


def chosen(rows: Rows, *, pending: bool = False) -> list[dict[str, Any]]:
    """Rows without the SR-STE runs that lost the tuning; ``pending``: with all of them while it is not done."""
    best = tuned(rows)

    def taken(row: dict[str, Any]) -> bool:
        decay = best.get(row["method"])
        return row["srste_lambda"] is None or (pending if decay is None else row["srste_lambda"] == decay)

    return [row for row in rows if taken(row)]


def values_of(rows: Rows) -> Values:
    """Arm -> seed -> figure of rows; re-training adds what was there before: "dense, at the start" and "one-shot prune"."""
    key, _, factor, _ = measure(rows)
    found: Values = {}
    for row in rows:
        before = row.get("before")
        if before:
            found.setdefault("dense, at the start", {})[row["seed"]] = factor * before["dense"][key]
            if row["n"] is not None:
                name = "one-shot prune" + ("" if row["n"] == 2 else f" {row['n']}:4")
                found.setdefault(name, {})[row["seed"]] = factor * before["pruned"][key]
    for row in rows:
        found.setdefault(_title(row), {})[row["seed"]] = factor * row["figures"][key]
    return found


def means(title: str, file: Paper, group: str, rows: Rows) -> Table:
    """One line per arm: mean and sample deviation over seeds, each seed, turnover, length."""
    _, name, _, sign = measure(rows)
    by_arm: dict[str, list[dict[str, Any]]] = {}
    shown = chosen(rows, pending=True)
    for row in shown:
        by_arm.setdefault(_title(row), []).append(row)
    lines = []
    values = values_of(shown)
    for arm in sorted(values, key=lambda arm: -sign * statistics.fmean(values[arm].values())):
        held = by_arm.get(arm, [])
        turnover = [row["turnover"]["mean"] for row in held if row["turnover"]]
        seen = {row["tokens"] or row["images"] for row in held}
        each = ", ".join(f"{seed}: {value:.2f}" for seed, value in sorted(values[arm].items()))
        cells = [arm, spread(list(values[arm].values())), str(len(values[arm])), each]
        cells.append(f"{100 * statistics.fmean(turnover):.2f} %" if turnover else "")
        lines.append([*cells, _list({row["steps"] for row in held}), _list(seen)])
    columns = ["arm", f"held-out {name}", "seeds", "by seed", "turnover per update", "steps", "tokens or images"]
    return Table(title, columns, lines, remarks=_protocol(file, group, rows))


def differences(title: str, rows: Rows) -> Table | None:
    """Arm minus control, seed by seed, with the standard error of the mean; None where there are no pairs."""
    _, name, _, sign = measure(rows)
    held = chosen(rows)
    by_n = {n: values_of([r for r in held if r["n"] in (n, None)]) for n in sorted({r["n"] for r in held if r["n"]}, reverse=True)}
    arms = {_title(row): row["method"] for row in held}
    lines = []
    for n, values in by_n.items():
        controls = [arm for arm in values if arms.get(arm, arm).rstrip("0123456789") in CONTROLS]
        for arm in values:
            if arm not in arms or arms[arm] == "dense":
                continue
            cells = [_pair(values[arm], values[control]) if control != arm else "" for control in controls]
            lines.append((n, controls, [arm, *cells]))
    names = list(dict.fromkeys(_plain(c) for _, controls, _ in lines for c in controls))
    made = []
    for n, controls, (arm, *cells) in lines:
        found = {_plain(control): cell for control, cell in zip(controls, cells, strict=True)}
        made.append([f"{n}:4", arm, *(found.get(control, "") for control in names)])
    if not any(any(row[2:]) for row in made):
        return None
    better = "below" if sign < 0 else "above"
    remark = f"mean difference ± its standard error (number of seeds that both have); {better} 0 the arm is better than the control"
    return Table(f"{title}: {name}, differences by seed", ["", "arm", *(f"minus {c}" for c in names)], made, remarks=[remark])


def targets(title: str, rows: Rows) -> Table | None:
    """Issue 8's target: a rule that beats SR-STE by more than two standard errors, and at 2:4 closes half of the gap between the
    faithful rule and dense. None without such pairs."""
    _, name, _, sign = measure(rows)
    held = chosen(rows)
    dense = values_of([r for r in held if r["n"] is None]).get("dense", {})
    lines = []
    for n in (2, 1):
        of_n = [r for r in held if r["n"] == n]
        values = values_of(of_n)
        srste = next((values[_title(r)] for r in of_n if r["srste_lambda"] is not None), {})
        faithful = values.get(f"chts{n}4", {})
        rules = {_title(r): r["method"] for r in of_n if get_method(r["method"]).evolves or get_method(r["method"]).settings}
        for arm in sorted(rules):
            seeds = sorted(values[arm].keys() & srste.keys())
            if not seeds:
                continue
            better = [sign * (values[arm][seed] - srste[seed]) for seed in seeds]
            error = statistics.stdev(better) / math.sqrt(len(seeds)) if len(seeds) > 1 else None
            beats = error is not None and statistics.fmean(better) > 2 * error
            common = sorted(values[arm].keys() & faithful.keys() & dense.keys())
            closed = None
            if common and arm != f"chts{n}4":
                gap = statistics.fmean(dense[seed] - faithful[seed] for seed in common)
                closed = statistics.fmean(values[arm][seed] - faithful[seed] for seed in common) / gap if gap else None
            met = beats and (n == 1 or (closed is not None and closed >= 0.5))
            verdict = "one seed" if error is None else "met" if met else "missed"
            lines.append([f"{n}:4", arm, _pair(values[arm], srste), "" if closed is None else f"{100 * closed:.0f} %", verdict])
    if not lines:
        return None
    columns = ["", "rule", "minus SR-STE", "gap closed", "target"]
    remarks = ["gap closed: of the difference between the faithful rule and dense",
               "target: better than SR-STE by more than two standard errors and, at 2:4, half of the gap closed"]  # fmt: skip
    return Table(f"{title}: {name}, what rules add", columns, lines, remarks=remarks)


def tuning(title: str, rows: Rows) -> Table | None:
    """SR-STE's runs on the tuning seed."""
    key, name, factor, _ = measure(rows)
    best = tuned(rows)
    lines = [
        [row["method"], f"{row['srste_lambda']:g}", f"{factor * row['figures'][key]:.2f}",
         "chosen" if row["srste_lambda"] == best.get(row["method"]) else ""]
        for row in sorted(rows, key=lambda r: (r["method"], r["srste_lambda"] or 0))
        if row["srste_lambda"] is not None and row["seed"] == 0
    ]  # fmt: skip
    if not lines:
        return None
    remark = "chosen on the held-out text that the table reports, seed 0: this favours SR-STE slightly"
    return Table(f"{title}: SR-STE's lambda", ["method", "lambda", name, ""], lines, remarks=[remark])


def timing(rows: Rows) -> Table | None:
    """Appendix I: what updates cost; only arms that had the device to themselves."""
    lines = []
    for row in rows:
        time = row["time"]
        if row["turnover"] is None or row.get("jobs") != 1 or time["update_ms"] is None:
            continue
        share = time["update_ms"] * row["turnover"]["updates"] / (time["step_ms"] * row["steps"])
        lines.append([row["key"], f"{time['step_ms']:.2f}", f"{time['update_ms']:.2f}", f"{100 * share:.3f} %"])
    remark = "update: medians of ten-step windows with one, less those without; it takes the place of an optimizer step"
    columns = ["arm", "step, ms", "update adds, ms", "of all training time"]
    return Table("Appendix I: time of topology updates", columns, lines, remarks=[remark]) if lines else None


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    mean = statistics.fmean(values)
    return f"{mean:.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f} (one seed)"


def _pair(mine: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    pairs = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
    if not pairs:
        return ""
    error = f" ± {statistics.stdev(pairs) / math.sqrt(len(pairs)):.2f}" if len(pairs) > 1 else ""
    return f"{statistics.fmean(pairs):+.2f}{error} ({len(pairs)})"


def _title(row: Mapping[str, Any]) -> str:
    name = row["arm"]
    if row["group"].endswith((TICKET, REDRAWN)):
        return f"{name}, {'first' if row['group'].endswith(TICKET) else 'other'} values, patterns of the trained dense model"
    return f"{name}, trained on" if row["group"].endswith(RETRAIN) and row["method"] == "dense" else name


def _plain(control: str) -> str:
    """A control's name without n and lambda, as a column's heading."""
    name, _, end = control.partition("@")
    return name.rstrip("0123456789") if end or name.rstrip("0123456789") in CONTROLS else name


def _protocol(file: Paper, group: str, rows: Rows) -> list[str]:
    s = file.protocol["groups"][group]
    data = ", ".join(s["data"]["spec"])
    size = f"{s['batch_size']} sequences of {s['seq_len']} tokens" if s["task"] == "text" else f"{s['batch_size']} images"
    devices = sorted({str(row["environment"].get("gpu")) for row in rows if row.get("environment")})
    commits = sorted({_commit(row["environment"].get("commit")) for row in rows if row.get("environment")})
    own = {arm: get_method(arm).settings for arm in sorted({row["method"] for row in rows})}
    others = [f"{arm}: {', '.join(f'{k} {_spell(v)}' for k, v in values.items())}" for arm, values in own.items() if values]
    return [
        f"protocol: {s['total_steps']:,} steps of {size}{_seen(s)}, {s['optimizer']}, learning rate {s['lr']:g}, "
        f"warm-up {s['warmup_steps']:,}, weight decay {s['weight_decay']:g}",
        f"updates every {s['interval']} steps, zeta {s['zeta']:g}, T {s['t_start']:g} to {s['t_end']:g}",
        *others,
        f"data: {data}; device: {', '.join(devices)}; commit {', '.join(commits)}; paper's scale and data differ",
    ]


def _spell(value: Any) -> str:
    return " to ".join(f"{part:g}" for part in (value if isinstance(value, tuple) else (value,)))


def _seen(s: Mapping[str, Any]) -> str:
    """What all steps see at most: padding is no target."""
    return f" (up to {s['total_steps'] * s['batch_size'] * s['seq_len'] / 1e6:.3g}M tokens)" if s["task"] == "text" else ""


def _list(values: set[Any]) -> str:
    return ", ".join(f"{value:,}" for value in sorted(v for v in values if v is not None))


def _commit(text: str | None) -> str:
    """Twelve digits of a commit, and whether the tree had changes; a machine without git does not know."""
    return "unknown" if text is None else text[:12] + text[40:]
