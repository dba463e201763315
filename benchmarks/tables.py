"""The tables, on screen and in README.md alike: one line per shape, losing shapes included, geometric means last."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.cases import LINEAR_SETS, OPS, Case, shape_text
from benchmarks.results import APART, Row
from benchmarks.view import PROVIDER_TITLES, Table, View, geomean, mebibytes, milliseconds, percent, times, verdict

OP_TITLES = {
    "forward": "y = x W^T",
    "input_grad": "dx = dy W",
    "weight_grad": "dW = dy^T x, exact",
    "weight_grad_mvue": "dW = dy^T x, unbiased 2:4 estimate (MVUE); competitors exact",
    "layer": "layer: pack + forward + dx + dW",
    "layer_mvue": "layer with the MVUE dW; competitors exact",
}
SETS_WITH_MEANS = ("S", "L")
SUMMARY_OPS = (
    ("prune", "prune_pack", "dense to pruned and packed"),
    ("pack", "pack_operands", "packing after an optimizer step"),
    ("topology", "update", "topology update, operands included"),
    ("model", "step", "training step of a stack"),
)
SUMMARY_SHAPES = ("4096x4096", "llama-60m")


def summary(view: View) -> Table | None:
    """The few lines that a reader of the first page wants: geometric means of the products, times of the rest."""
    others = ("cublas", "cusparselt", "torch24", "eager")
    table = Table("How many times faster", ["what", "on", "our time", *(f"than {PROVIDER_TITLES[p]}" for p in others)], [])
    for op in OPS["linear"]:
        for name in SETS_WITH_MEANS:
            cases = view.linear_set(name, op)
            for regime, figure in (("sustained", "gpu_ms"), ("burst", "burst_ms")):
                means = [geomean(view.speedup(case, other, figure) for case in cases) for other in others]
                if any(means) and (figure == "gpu_ms" or name == "L"):
                    words = f"{name}, {len(cases)} shapes" + (f", {regime}" if name == "L" else "")
                    _add(table, [OP_TITLES[op], words, ""], means)
    for suite, op, title in SUMMARY_OPS:
        for case in sorted(view.cases(suite, op), key=_order):
            if view.ms(case, "chts") and (suite == "model" or shape_text(case.dims) in SUMMARY_SHAPES):
                ratios = [view.speedup(case, other) for other in others]
                _add(table, [title, shape_text(case.dims), milliseconds(view.ms(case, "chts"))], ratios)
    return table if table.rows else None


def linear(view: View, op: str, dtype: str) -> Table | None:
    """Products: times of all providers, our rate, speed-ups sustained and in bursts."""
    cases = [case for case in view.cases("linear", op) if case.dtype == dtype]
    if not cases:
        return None
    shown = _providers(view, cases)
    against = [p for p in shown if p != "chts"]
    columns = ["tokens", "out", "in", *(PROVIDER_TITLES[p] for p in shown), "TFLOP/s"]
    figures: list[tuple[str, Callable[[Case], float | None]]] = [
        (f"vs {PROVIDER_TITLES[p]}", lambda case, p=p: view.speedup(case, p)) for p in against
    ]
    bursts: list[tuple[str, Callable[[Case], float | None]]] = [
        (f"burst vs {PROVIDER_TITLES[p]}", lambda case, p=p: view.speedup(case, p, "burst_ms"))
        for p in against
        if p in ("cublas", "cusparselt") and any(view.speedup(c, p, "burst_ms") for c in cases)
    ]
    figures += bursts
    table = Table(f"{OP_TITLES[op]} ({dtype})", [*columns, *(title for title, _ in figures)], [])
    cases = sorted(cases, key=_order)
    for case in cases:
        d = case.dims
        rate = view.teraflops(case)
        cells = [str(d[k]) for k in ("tokens", "out", "in")]
        cells += [_cell(view.row(case, p)) for p in shown]
        cells.append("" if rate is None else f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}")
        _add(table, cells, [figure(case) for _, figure in figures])
    groups = {f"geomean {name}": view.linear_set(name, op, dtype) for name in SETS_WITH_MEANS}
    groups = {name: members for name, members in groups.items() if len(members) > 1}
    for name, members in {**groups, f"geomean of {len(cases)}": cases}.items():
        means = [geomean(figure(case) for case in members) for _, figure in figures]
        _add(table, [name, *[""] * (len(columns) - 1)], means)
        table.summary += 1
    table.remarks = _reasons(view, cases)
    return table


def bytes_bound(view: View, suite: str) -> Table | None:
    """Work that moves bytes: times, our share of the copy rate, speed-ups."""
    cases = view.cases(suite)
    if not cases:
        return None
    shown = _providers(view, cases)
    against = [p for p in shown if p != "chts"]
    columns = ["op", "out x in", "dtype", *(PROVIDER_TITLES[p] for p in shown), "of copy rate"]
    columns += [f"vs {PROVIDER_TITLES[p]}" for p in against]
    table = Table({"prune": "Pruning", "pack": "Packing", "optimizer": "Optimizer step"}[suite], columns, [])
    for case in sorted(cases, key=lambda c: (OPS[suite].index(c.op), c.dtype, _order(c))):
        cells = [case.op, shape_text(case.dims), case.dtype, *(_cell(view.row(case, p)) for p in shown)]
        cells.append(percent(view.share_of_copy(case)))
        _add(table, cells, [view.speedup(case, p) for p in against])
    table.remarks = _reasons(view, cases, notes=True)
    return table


def topology(view: View) -> Table | None:
    """The update and its parts against eager Algorithm 1 (the faster precision, and float32), with the memory that each needs."""
    cases = view.cases("topology")
    if not cases:
        return None
    columns = ["op", "layer", "eager", "eager, fp32", "chts", "vs eager", "vs fp32", "of copy rate", "memory, eager", "memory, chts"]
    table = Table("Topology update (float32)", columns, [])
    for case in sorted(cases, key=lambda c: (OPS["topology"].index(c.op), _order(c))):
        eager, ours = view.row(case, "eager"), view.row(case, "chts")
        ratio = view.speedup(case, "eager")
        byte_bound = case.op in ("remove", "regrow", "carry_over")
        full, mine = eager.trials.get("fp32") if eager else None, view.ms(case, "chts")
        cells = [case.op, shape_text(case.dims), _cell(eager), milliseconds(full), _cell(ours), times(ratio)]
        cells.append(times(full / mine if full and mine else None))
        cells.append(percent(view.share_of_copy(case)) if byte_bound else "")
        cells += [mebibytes(row.peak_bytes if row and not row.error else None) for row in (eager, ours)]
        table.rows.append(cells)
        if verdict(ratio):
            table.emphasis[len(table.rows) - 1, 5] = verdict(ratio)
    table.remarks = _reasons(view, cases)
    return table


def models(view: View) -> Table | None:
    """Training steps: time and memory."""
    cases = view.cases("model")
    if not cases:
        return None
    shown = _providers(view, cases)
    against = [p for p in shown if not p.startswith("chts")]  # like with like: compiled with compiled
    columns = ["model", *(PROVIDER_TITLES[p] for p in shown), *(f"vs {PROVIDER_TITLES[p]}" for p in against)]
    columns += [f"memory, {PROVIDER_TITLES[p]}" for p in shown]
    table = Table("Training step of a stack of blocks (bf16 autocast, float32 parameters, Adam)", columns, [])
    for case in cases:
        name = shape_text(case.dims) + (", MVUE dW" if case.op == "step_mvue" else "")
        cells = [name, *(_cell(view.row(case, p)) for p in shown)]
        ratios = [view.speedup(case, p, ours="chts_compile" if p == "compile" else "chts") for p in against]
        _add(table, cells, ratios)
        rows = [view.row(case, p) for p in shown]
        table.rows[-1] += [mebibytes(r.peak_bytes if r and not r.error else None) for r in rows]
    table.remarks = _reasons(view, cases, notes=True)
    return table


def host(view: View) -> Table | None:
    """Host time of one eager call."""
    cases = view.cases("host")
    if not cases:
        return None
    shown = _providers(view, cases)
    table = Table("Host time of one eager call", ["op", *(PROVIDER_TITLES[p] for p in shown)], [])
    for case in sorted(cases, key=lambda c: OPS["host"].index(c.op)):
        table.rows.append([case.op, *(_cell(view.row(case, p), "eager_ms") for p in shown)])
    table.remarks = _reasons(view, cases)
    return table


def _add(table: Table, cells: list[str], ratios: Sequence[float | None]) -> None:
    row = len(table.rows)
    for offset, ratio in enumerate(ratios):
        if verdict(ratio):
            table.emphasis[row, len(cells) + offset] = verdict(ratio)
    table.rows.append([*cells, *map(times, ratios)])


def _providers(view: View, cases: Sequence[Case]) -> list[str]:
    """Who has a time in any of these rows, ours last: next to the ratios. Who has none is only a remark."""
    present = {provider for case in cases for provider, row in view.table[case].items() if row.error is None}
    return [p for p in PROVIDER_TITLES if p in present and p != "chts"] + (["chts"] if "chts" in present else [])


def _cell(row: Row | None, figure: str = "gpu_ms") -> str:
    if row is None:
        return ""
    return "-" if row.error else milliseconds(getattr(row, figure))


def _reasons(view: View, cases: Sequence[Case], *, notes: bool = False) -> list[str]:
    """Under the table: why a provider has no time, each reason once; with ``notes`` also what it says of itself."""
    said: dict[str, list[str]] = {}
    for case in cases:
        for provider, row in view.table[case].items():
            where = f"{case.op} {shape_text(case.dims)}"
            if row.error:
                said.setdefault(f"{PROVIDER_TITLES[provider]}: {row.error}", []).append(where)
                continue
            if APART in row.note:
                said.setdefault(f"{PROVIDER_TITLES[provider]}: measured after the others, not in turns with them", []).append(where)
            if notes:
                words = [w for w in row.note.split("; ") if w and not _is_measurement(w)]
                if words:
                    said.setdefault(f"{PROVIDER_TITLES[provider]}: {'; '.join(words)}", []).append(where)
    return [text if len(places) == len(cases) else f"{text} ({_some(places)})" for text, places in said.items()]


def _is_measurement(words: str) -> bool:
    return words.startswith(("p20-p80", "sustained ", "trials ", "best of ", "inputs ", APART)) or words.endswith("GHz")


def _some(places: list[str]) -> str:
    return ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")


def _order(case: Case) -> tuple:
    """Named sets first in their own order, then by size."""
    d = case.dims
    if "model" in d:
        return (9, 0, d["model"])
    sizes = tuple(d[k] for k in ("tokens", "out", "in") if k in d)
    for place, name in enumerate(SETS_WITH_MEANS):
        if sizes in LINEAR_SETS[name]:
            return (place, LINEAR_SETS[name].index(sizes), "")
    product = 1
    for size in sizes:
        product *= size
    return (5, product, "")
