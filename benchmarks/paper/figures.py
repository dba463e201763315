"""Figures 2, 3 and 4 from the curves in the result files; a line per arm is the mean over its seeds, the band their range."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.paper.protocol import FIGURES
from benchmarks.paper.report import chosen
from benchmarks.paper.results import Paper, path_of
from chts_train.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS: dict[int, Sequence[tuple[str, str, str]]] = {
    2: (("val_ppl", "Held-out perplexity", "log"), ("turnover", "Links replaced per update, share", "log")),
    3: (("score_var", "Variance of CH2-L3n scores, links", "log"), ("score_var_survivors", "Variance of CH2-L3n scores, survivors", "log")),
    4: (("noise_changed_blocks", "Blocks changed by regrowth noise, share", "linear"),),
}
"""Figure -> panels (curve, title, scale): training, spread of the scores, effect of soft regrowth."""
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
        rows = [row for row in chosen(Paper.load(source).rows) if row["group"] == "llama"]
        panels = [panel for panel in PANELS[number] if any(panel[0] in row["curves"] for row in rows)]
        if not panels:
            continue
        families = list(dict.fromkeys(_family(row["arm"]) for row in rows))  # of all panels: a method keeps its colour
        figure = require("matplotlib.figure", "plotting").Figure(figsize=(6.2 * len(panels), 4.2), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
            _panel(axes, rows, families, *panel)
        written.append(source.with_name(source.name.replace(f"table{FIGURES[number]}", f"figure{number}")).with_suffix(".png"))
        figure.savefig(written[-1], dpi=120, metadata={"Software": None})
    return written


def _panel(axes: Axes, rows: Sequence[dict[str, Any]], families: Sequence[str], key: str, title: str, scale: str) -> None:
    arms: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if key in row["curves"]:
            arms.setdefault(row["arm"], []).append(row)
    for arm, held in arms.items():
        points: dict[int, list[float]] = {}
        for row in held:
            for step, value in row["curves"][key]:
                points.setdefault(step, []).append(value)
        steps = sorted(points)
        colour = COLOURS[families.index(_family(arm)) % len(COLOURS)]
        mean = [statistics.fmean(points[step]) for step in steps]
        axes.plot(steps, mean, STYLES[held[0]["n"]], color=colour, lw=1.4, label=f"{arm} ({len(held)})")
        if len(held) > 1:
            low, high = ([f(points[step]) for step in steps] for f in (min, max))
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
    axes.set(title=title, xlabel="optimizer step", yscale=scale)
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False, fontsize=7)


def _family(arm: str) -> str:
    """The method without n: both sparsities share a colour."""
    name = arm.partition("@")[0]
    return name.removesuffix("24").removesuffix("14")
