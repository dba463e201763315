"""Figures 2, 3 and 4 from the curves in the result files; a line per arm is the mean over its seeds, the band their range."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.paper.protocol import FIGURES
from benchmarks.paper.report import chosen
from benchmarks.paper.results import Paper, path_of
from chts_train.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Panel:
    """What is drawn over the steps: a curve of rows, of the arms with n links per group (None: of all); ``minus_dense``: its difference
    from that of the dense arm of the same seed."""

    curve: str
    title: str
    scale: str = "linear"
    n: int | None = None
    minus_dense: bool = False


PANELS: dict[int, Sequence[Panel]] = {
    2: (
        Panel("val_ppl", "Held-out perplexity, dense and 2:4", "log", n=2),
        Panel("val_loss", "Held-out loss minus dense's, nats per token, 2:4", n=2, minus_dense=True),
        Panel("turnover", "Links replaced per update, share", "log"),
        Panel("val_loss", "Held-out loss minus dense's, nats per token, 1:4", n=1, minus_dense=True),
    ),
    3: (
        Panel("score_var", "Variance of CH2-L3n scores, links", "log"),
        Panel("score_var_survivors", "Variance of CH2-L3n scores, survivors", "log"),
    ),
    4: (Panel("noise_changed_blocks", "Blocks changed by regrowth noise, share"),),
}
"""Of every figure: training, spread of the scores, effect of soft regrowth."""
STYLES = {2: "-", 1: "--", None: ":"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F",
           "#8C510A", "#6A3D9A", "#B5CF6B", "#17BECF")  # fmt: skip


def draw(folder: Path, scale: str, numbers: Sequence[int]) -> list[Path]:
    """Write ``figure<N>.png`` for those numbers that have rows; returns the paths. Raises ImportError without matplotlib."""
    written = []
    for number in numbers:
        source = path_of(folder, FIGURES[number], scale)
        if not source.exists():
            continue
        rows = [row for row in chosen(Paper.load(source).rows) if row["group"] == "llama" and not row.get("changes")]
        panels = {panel: lines for panel in PANELS[number] if (lines := _lines(rows, panel))}
        if not panels:
            continue
        families = list(dict.fromkeys(_family(row["arm"]) for row in rows))  # of all panels: a method keeps its colour
        across = min(2, len(panels))
        down = -(-len(panels) // across)
        figure = require("matplotlib.figure", "plotting").Figure(figsize=(7.2 * across, 4.2 * down), layout="constrained")
        for place, (panel, lines) in enumerate(panels.items(), 1):
            _draw(figure.add_subplot(down, across, place), lines, families, panel)
        written.append(source.with_name(source.name.replace(f"table{FIGURES[number]}", f"figure{number}")).with_suffix(".png"))
        figure.savefig(written[-1], dpi=110, metadata={"Software": None})
    return written


def _lines(rows: Sequence[dict[str, Any]], panel: Panel) -> dict[tuple[str, int | None], list[dict[int, float]]]:
    """(arm, its n) -> of every seed, step -> value."""
    dense = {row["seed"]: dict(row["curves"].get(panel.curve, ())) for row in rows if row["method"] == "dense"}
    found: dict[tuple[str, int | None], list[dict[int, float]]] = {}
    for row in rows:
        curve, base = dict(row["curves"].get(panel.curve, ())), dense.get(row["seed"], {})
        if row["n"] != panel.n and panel.n is not None and (row["method"] != "dense" or panel.minus_dense):
            continue
        if panel.minus_dense:
            curve = {step: value - base[step] for step, value in curve.items() if step in base}
        if curve:
            found.setdefault((row["arm"], row["n"]), []).append(curve)
    return found


def _draw(axes: Axes, lines: dict[tuple[str, int | None], list[dict[int, float]]], families: Sequence[str], panel: Panel) -> None:
    def end(line: tuple[Any, list[dict[int, float]]]) -> float:
        return statistics.fmean(curve[max(curve)] for curve in line[1])

    for (arm, n), curves in sorted(lines.items(), key=end, reverse=True):  # the legend has the order of the curves' ends
        points: dict[int, list[float]] = {}
        for curve in curves:
            for step, value in curve.items():
                points.setdefault(step, []).append(value)
        steps = sorted(points)
        colour = COLOURS[families.index(_family(arm)) % len(COLOURS)]
        mean = [statistics.fmean(points[step]) for step in steps]
        axes.plot(steps, mean, STYLES[n], color=colour, lw=1.4, label=f"{arm} ({len(curves)})")
        if len(curves) > 1:
            low, high = ([f(points[step]) for step in steps] for f in (min, max))
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
    if panel.minus_dense:
        axes.axhline(0.0, color="black", lw=0.8)
    axes.set(title=panel.title, xlabel="optimizer step", yscale=panel.scale)
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _family(arm: str) -> str:
    """The method without n: both sparsities share a colour."""
    name = arm.partition("@")[0]
    return name.removesuffix("24").removesuffix("14")
