"""Rendering: result files to tables between markers in Markdown files, so that no figure is ever typed by hand.

A Markdown file marks a region with ``<!-- report:begin NAME -->`` and ``<!-- report:end NAME -->``; NAME is "all", one of
:data:`PARTS`, or "distributed" (what :mod:`benchmarks.distributed` and :mod:`benchmarks.curves` measured). Without result files a
region says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks import tables, targets
from benchmarks.cases import OPS
from benchmarks.results import RESULTS, Results
from benchmarks.view import Table, View

ROOT = Path(__file__).parent.parent
DOCUMENTS = (Path(__file__).parent / "README.md", ROOT / "README.md")
NOTHING = "No result file has been committed yet.\n"
REGION = re.compile(r"(<!-- report:begin (\w+) -->\n)(.*?)(<!-- report:end \2 -->)", re.DOTALL)


def committed() -> list[Path]:
    """The result files that the documents show: everything in ``benchmarks/results`` but quick runs and the CPU's."""
    files = sorted(RESULTS.glob("*.json"))
    return [f for f in files if not f.stem.endswith("-quick") and f.stem != "cpu"]


def environment_table(view: View) -> Table:
    """What was measured on, and the roofs."""
    e = view.environment
    rows = [["device", _text(e.get("gpu"))]]
    if e.get("compute_capability"):
        rows.append(["compute capability", f"{e['compute_capability']}, {e.get('multiprocessors')} multiprocessors"])
        rows.append(["L2, memory", f"{e['l2_bytes'] / 2**20:.0f} MiB, {e['memory_bytes'] / 2**30:.0f} GiB"])
    if e.get("power.limit"):
        rows.append(["power limit", f"{e['power.limit']:g} W (largest {e.get('power.max_limit')} W)"])
        rows.append(["largest clocks", f"{e.get('clocks.max.sm'):g} MHz, memory {e.get('clocks.max.mem'):g} MHz"])
    rows.append(["driver, CUDA", f"{_text(e.get('driver'))}, {_text(e.get('cuda'))}"])
    rows.append(["torch, Triton, cuSPARSELt", ", ".join(_text(e.get(k)) for k in ("torch", "triton", "cusparselt"))])
    rows.append(["commit, kernel sources", f"{_text(e.get('commit'))}, {_text(e.get('kernel_hash'))}"])
    for name, title, unit, scale in (
        ("copy_bytes_per_s", "copy bandwidth, read + written", "TB/s", 1e12),
        ("gemm_flop_per_s", "dense bf16 8192^3, sustained", "TFLOP/s", 1e12),
        ("gemm_burst_flop_per_s", "dense bf16 8192^3, burst", "TFLOP/s", 1e12),
    ):
        if view.roof(name):
            rows.append([title, f"{view.roof(name) / scale:.3g} {unit}"])
    days = sorted({s["started"][:10] for s in e.get("sessions", [])})
    rows.append(["measured", f"{', '.join(days)} in {len(e.get('sessions', []))} session(s)"])
    return Table("Environment", ["", ""], rows)


PARTS = {
    "environment": lambda view: [environment_table(view)],
    "summary": lambda view: [tables.summary(view)],
    "targets": lambda view: [targets.table(view)],
    "linear": lambda view: [tables.linear(view, op, dtype) for op in OPS["linear"] for dtype in ("bf16", "fp16", "fp32")],
    "prune": lambda view: [tables.bytes_bound(view, "prune")],
    "pack": lambda view: [tables.bytes_bound(view, "pack")],
    "topology": lambda view: [tables.topology(view)],
    "optimizer": lambda view: [tables.bytes_bound(view, "optimizer")],
    "model": lambda view: [tables.models(view)],
    "host": lambda view: [tables.host(view)],
}
"""Region name -> tables of a view (None where there are no rows)."""


def part(name: str, view: View) -> list[Table]:
    """The tables of a region.

    Raises:
        ValueError: when there is no region of that name.
    """
    if name == "all":
        return [table for key in PARTS for table in part(key, view)]
    if name not in PARTS:
        raise ValueError(f"report region: must be one of {['all', *PARTS]}, got {name!r}")
    return [table for table in PARTS[name](view) if table is not None]


def render(name: str, files: Sequence[Path]) -> str:
    """The Markdown of a region: a section for each result file, with its plots where they exist."""
    if name == "distributed":
        from benchmarks.distributed import markdown

        return "\n".join(markdown(Results.load(path)) for path in sorted((RESULTS / name).glob("*.json"))) or NOTHING
    sections = []
    for path in files:
        view = View(Results.load(path))
        blocks = [table.markdown() for table in part(name, view)]
        if name == "all":
            plots = sorted(path.parent.glob(f"{path.stem}-*.png"))
            blocks += [f"![{p.stem}]({p.relative_to(Path(__file__).parent).as_posix()})" for p in plots]
        if blocks:
            heading = f"### {_text(view.environment.get('gpu'))}\n\n" if name == "all" or len(files) > 1 else ""
            sections.append(heading + "\n\n".join(blocks))
    return "\n\n".join(sections) + "\n" if sections else NOTHING


def refresh(document: Path, files: Sequence[Path]) -> tuple[str, str]:
    """(text as it is, text as it should be) of a Markdown file; equal where it has no region or is up to date."""
    old = document.read_text()
    return old, REGION.sub(lambda m: m[1] + render(m[2], files) + m[4], old)


def stale(files: Sequence[Path] | None = None) -> list[Path]:
    """The documents whose tables are not what the result files say."""
    found = committed() if files is None else files
    pairs = {document: refresh(document, found) for document in DOCUMENTS if document.exists()}
    return [document for document, (old, new) in pairs.items() if old != new]


def write(files: Sequence[Path]) -> list[Path]:
    """Bring every document up to date; returns those that changed."""
    changed = stale(files)
    for document in changed:
        document.write_text(refresh(document, files)[1])
    return changed


def _text(value: object) -> str:
    return "none" if value is None else str(value)
