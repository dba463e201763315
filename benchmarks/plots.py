"""PNG plots of a result file: a roofline of the products and speed-ups of everything. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.cases import OPS, Case, shape_text
from benchmarks.cost import flops, least_bytes
from benchmarks.results import Results
from benchmarks.tables import _order
from benchmarks.view import PROVIDER_TITLES, View

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = {
    "chts": "#D55E00",
    "cublas": "#0072B2",
    "cusparselt": "#009E73",
    "torch24": "#CC79A7",
    "eager": "#56B4E9",
    "mma_twin": "#E69F00",
    "compile": "#999999",
    "chts_compile": "#F0E442",
}
COLUMNS = 3
MARKERS = {"forward": "o", "input_grad": "s", "weight_grad": "^", "weight_grad_mvue": "v", "layer": "D", "layer_mvue": "P"}


def draw(results: Results, folder: Path, stem: str) -> list[Path]:
    """Write ``<stem>-roofline.png`` and ``<stem>-speedup.png`` where there are rows for them; returns the paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    view = View(results)
    written = []
    for name, plot in (("roofline", roofline), ("speedup", speedups)):
        figure = plot(view, plt)
        if figure is None:
            continue
        path = folder / f"{stem}-{name}.png"
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
        written.append(path)
    return written


def roofline(view: View, plt: Any) -> Any | None:
    """Dense-equivalent rate over arithmetic intensity (least compressed bytes), with the machine's measured roofs."""
    cases = [case for case in view.cases("linear") if case.dtype == "bf16" and flops(case)]
    copy, gemm = view.roof("copy_bytes_per_s"), view.roof("gemm_flop_per_s")
    if not cases:
        return None
    figure, axes = plt.subplots(figsize=(9, 6))
    seen: set[str] = set()
    for case in cases:
        intensity = flops(case) / least_bytes(case)
        for provider in view.table[case]:
            rate = view.teraflops(case, provider)
            if rate is None:
                continue
            label = None if provider in seen else PROVIDER_TITLES[provider]
            seen.add(provider)
            axes.scatter(intensity, rate, c=COLOURS[provider], marker=MARKERS[case.op], s=28, alpha=0.8, label=label)
    low, high = axes.get_xlim()
    low = max(low, 1.0)
    if copy and gemm:
        for scale, style, text in ((1, "-", "dense roof"), (2, "--", "twice the dense roof: 2:4")):
            knee = scale * gemm / copy
            points = [low, min(max(knee, low), high), high]
            heights = [min(p * copy, scale * gemm) / 1e12 for p in points]
            axes.plot(points, heights, style, c="black", lw=1, label=text)
    axes.set(xscale="log", yscale="log", xlabel="dense-equivalent FLOP per least byte", ylabel="TFLOP/s, dense-equivalent")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_title(f"Products of a linear layer, bf16, sustained: {view.environment.get('gpu')}")
    for op in dict.fromkeys(case.op for case in cases):
        axes.scatter([], [], c="black", marker=MARKERS[op], s=28, label=op)
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8, ncols=2)
    return figure


def speedups(view: View, plt: Any) -> Any | None:
    """A panel for each operation, a line for each case, a dot for each competitor: how many times faster we are."""
    panels = []
    for suite, ops in OPS.items():
        for op in ops if suite != "host" else ():
            cases = [c for c in sorted(view.cases(suite, op), key=_order) if _ratios(view, c)]
            if cases:
                panels.append((f"{suite} {op}" if suite != "linear" else op, cases))
    if not panels:
        return None
    rows = -(-len(panels) // COLUMNS)
    longest = [max(len(cases) for _, cases in panels[r * COLUMNS : (r + 1) * COLUMNS]) for r in range(rows)]
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(4.6 * COLUMNS, 0.9 * rows + 0.17 * sum(longest)), squeeze=False,
        gridspec_kw={"height_ratios": [n + 3 for n in longest]}, layout="constrained",
    )  # fmt: skip
    for panel, (title, cases) in zip(axes.flat, panels, strict=False):
        _panel(panel, title, cases, view)
    for panel in list(axes.flat)[len(panels) :]:
        panel.set_visible(False)
    figure.suptitle(f"Times faster than each competitor (line: equal): {view.environment.get('gpu')}", fontsize=11)
    return figure


def _panel(axes: Any, title: str, cases: list[Case], view: View) -> None:
    seen: set[str] = set()
    largest = 1.0
    for place, case in enumerate(cases):
        for provider, ratio in _ratios(view, case):
            label = None if provider in seen else PROVIDER_TITLES[provider]
            seen.add(provider)
            largest = max(largest, ratio)
            axes.scatter(ratio, place, c=COLOURS[provider], s=18, label=label, zorder=2)
    names = [shape_text(c.dims) + (f" {c.dtype}" if c.suite == "linear" and c.dtype != "bf16" else "") for c in cases]
    axes.set_yticks(range(len(cases)), names, fontsize=6)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.axvline(1, c="black", lw=1, zorder=1)
    if largest > 8:
        axes.set_xscale("log")
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(alpha=0.25)
    axes.set_title(title, fontsize=9, loc="left")
    axes.legend(fontsize=6, loc="best")


def _ratios(view: View, case: Case) -> list[tuple[str, float]]:
    found = [(p, view.speedup(case, p)) for p in PROVIDER_TITLES if p != "chts"]
    return [(p, ratio) for p, ratio in found if ratio]
