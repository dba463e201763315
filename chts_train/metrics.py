"""The log of a run: one JSON object per line, each with ``kind`` and ``step``.

metrics.jsonl: ``start`` (method, preset, device, what a model without context reaches), ``dense`` (re-training: the
dense model, evaluated), ``train`` (loss, ppl, lr, tokens_per_s or images_per_s, turnover, zeta, T; loss and speed since
the line before), ``eval`` (val_loss, val_ppl or val_accuracy) and ``update`` (a topology update, over all layers).
updates.jsonl: the same updates layer by layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .storage import write_text

METRICS, UPDATES = "metrics.jsonl", "updates.jsonl"


class MetricsLog:
    """Appends lines to a file; every line is handed to the system at once, so a killed run keeps them.

    ``enabled=False`` writes nothing: of the processes of a run only the first one does.
    """

    def __init__(self, path: str | Path, *, enabled: bool = True) -> None:
        self.path, self.enabled = Path(path), enabled

    def write(self, kind: str, step: int, **values: Any) -> dict[str, Any]:
        """Append one line and return it as a dict."""
        row = {"kind": kind, "step": step, **values}
        if self.enabled:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return row

    def read(self) -> list[dict[str, Any]]:
        """All lines so far."""
        return list(read_metrics(self.path)) if self.path.exists() else []

    def truncate(self, step: int) -> None:
        """Drop the lines after ``step``: a resumed run writes them again."""
        if self.enabled and self.path.exists():
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.read() if row["step"] <= step))


def read_metrics(path: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a log. A last line cut short by a killed run is left out.

    Raises:
        ValueError: when another line is not a JSON object with ``kind`` and ``step``.
        FileNotFoundError: when there is no such file.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                row["kind"], row["step"]
            except (ValueError, KeyError, TypeError) as error:
                if not line.endswith("\n"):
                    return
                raise ValueError(f"{path}: line {number} must be a JSON object with kind and step") from error
            yield row


def update_summary(layers: Iterable[dict[str, Any]]) -> dict[str, float | int]:
    """One topology update over all layers, from :meth:`TopologyEvolver.stats`.

    links, blocks, removed, replaced and can_change_blocks are sums; turnover = replaced / links;
    noise_changed_blocks is the share of all blocks; scores (means and variances) and link age are means over
    layers weighted by links.
    """
    layers = list(layers)
    sums: dict[str, float | int] = {
        key: sum(layer[key] for layer in layers)
        for key in ("links", "blocks", "removed", "replaced", "can_change_blocks")
    }

    def mean(key: str, weight: str) -> float:
        return sum(layer[key] * layer[weight] for layer in layers) / max(1, sums[weight])

    averages = ("score_mean", "score_var", "score_mean_survivors", "score_var_survivors", "link_age_mean")
    return sums | {
        "turnover": sums["replaced"] / max(1, sums["links"]),
        "noise_changed_blocks": mean("noise_changed_blocks", "blocks"),
        **{key: mean(key, "links") for key in averages},
    }
