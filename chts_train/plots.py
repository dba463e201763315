"""Pictures of one or more runs, drawn from their metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .extras import require
from .metrics import METRICS, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = list[dict[str, Any]]

COLOURS = ("#1b6ca8", "#d1603d", "#3a7d44", "#8a4f9e", "#b8860b", "#4d4d4d", "#c2185b", "#00838f")


@dataclass(frozen=True)
class Run:
    """A run's name and the lines of its log."""

    name: str
    rows: Rows

    def series(self, kind: str, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of ``key`` in the lines of ``kind`` that have it."""
        rows = [r for r in self.rows if r["kind"] == kind and r.get(key) is not None]
        return [r["step"] for r in rows], [r[key] for r in rows]


def load_run(path: str | Path) -> Run:
    """The run folder ``path`` (or its metrics.jsonl).

    Raises:
        ValueError: when there is no log, or it is empty or damaged.
    """
    path = Path(path)
    file = path / METRICS if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path}: must be a run folder with {METRICS}, got none")
    rows = list(read_metrics(file))
    if not rows:
        raise ValueError(f"{file}: must have at least one line, got none")
    return Run(file.resolve().parent.name, rows)


Line = tuple[str, str, str, dict[str, Any]]


def _draw(axes: Axes, runs: Sequence[Run], lines: Sequence[Line]) -> bool:
    """Lines (kind, key, label, style) of every run; the label tells apart lines of one run. True if any exist."""
    drawn = False
    for run, colour in zip(runs, _colours(len(runs)), strict=True):
        for kind, key, label, style in lines:
            steps, values = run.series(kind, key)
            if not steps:
                continue
            names = [run.name] * (len(runs) > 1) + [label] * bool(label)
            axes.plot(steps, values, label=" ".join(names), **{"color": colour, "linewidth": 1.4, **style})
            drawn = True
    return drawn


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


MARKED = {"marker": "o", "markersize": 3.5}
FAINT = {"alpha": 0.45, "linewidth": 1.0}
DASHED = {"linestyle": "--"}


def _loss(axes: Axes, runs: Sequence[Run]) -> bool:
    return _draw(axes, runs, [("train", "loss", "train", FAINT), ("eval", "val_loss", "held out", MARKED)])


def _perplexity(axes: Axes, runs: Sequence[Run]) -> bool:
    if not _draw(axes, runs, [("train", "ppl", "train", FAINT), ("eval", "val_ppl", "held out", MARKED)]):
        return False
    axes.set_yscale("log")
    baselines = {v for run in runs for v in run.series("start", "unigram_ppl")[1]}
    for baseline in sorted(baselines):
        axes.axhline(baseline, color="#888888", linestyle=":", linewidth=1.2, label="unigram model, held out")
    return True


def _accuracy(axes: Axes, runs: Sequence[Run]) -> bool:
    return _draw(axes, runs, [("eval", "val_accuracy", "held out", MARKED)])


def _turnover(axes: Axes, runs: Sequence[Run]) -> bool:
    if not _draw(axes, runs, [("update", "turnover", "replaced", MARKED)]):
        return False
    _draw(axes, runs, [("update", "zeta", "removed (zeta)", DASHED)])
    axes.set_yscale("log")
    return True


def _scores(axes: Axes, runs: Sequence[Run]) -> bool:
    survivors = {**DASHED, "marker": "o", "markersize": 3.5, "markerfacecolor": "white"}
    lines = [
        ("update", "score_var", "mask", MARKED),
        ("update", "score_var_survivors", "survivors", survivors),
    ]
    if not _draw(axes, runs, lines):
        return False
    axes.set_yscale("log")  # the links that were removed score an order of magnitude lower than the rest
    return True


def _noise(axes: Axes, runs: Sequence[Run]) -> bool:
    return _draw(axes, runs, [("update", "noise_changed_blocks", "", MARKED)])


@dataclass(frozen=True)
class Panel:
    """One picture: ``draw`` returns False when the runs have nothing to show in it."""

    file: str
    title: str
    ylabel: str
    draw: Callable[[Axes, Sequence[Run]], bool]


PANELS = (
    Panel("loss", "Loss", "cross entropy (nats)", _loss),
    Panel("perplexity", "Perplexity", "perplexity (log)", _perplexity),
    Panel("accuracy", "Accuracy", "share of held-out images", _accuracy),
    Panel("turnover", "Turnover per topology update", "share of active links (log)", _turnover),
    Panel("score_variance", "Variance of the CH2-L3n scores", "variance over links (log)", _scores),
    Panel("noise", "Blocks changed by the regrowth noise", "share of blocks", _noise),
)


def plot_runs(paths: Sequence[str | Path], out: str | Path) -> list[Path]:
    """Draw every panel that has data, and ``overview.png`` with all of them.

    Args:
        paths: run folders; several are overlaid.
        out: folder for the PNG files (made when missing).

    Returns:
        The files written.

    Raises:
        ValueError: a path that is no run.
        ImportError: matplotlib is missing; the message says how to install it.
    """
    runs = [load_run(path) for path in paths]
    figures = require("matplotlib.figure", "plotting")  # figures without pyplot: no display, no global state
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    written, shown = [], []
    for panel in PANELS:
        figure = figures.Figure(figsize=(6.4, 4.0), layout="constrained")
        if _fill(figure.subplots(), panel, runs):
            shown.append(panel)
            written.append(out / f"{panel.file}.png")
            figure.savefig(written[-1], dpi=130)
    columns = min(3, len(shown))
    if columns:
        rows = -(-len(shown) // columns)
        figure = figures.Figure(figsize=(5.2 * columns, 3.6 * rows), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for panel, place in zip(shown, axes, strict=False):
            _fill(place, panel, runs)
        for place in axes[len(shown) :]:
            place.set_axis_off()
        written.append(out / "overview.png")
        figure.savefig(written[-1], dpi=110)
    return written


def _fill(axes: Axes, panel: Panel, runs: Sequence[Run]) -> bool:
    if not panel.draw(axes, runs):
        return False
    axes.set(title=panel.title, xlabel="optimizer step", ylabel=panel.ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if any(label for label in axes.get_legend_handles_labels()[1]):
        axes.legend(frameon=False, fontsize=8)
    return True
