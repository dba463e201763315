"""Result files: one JSON per table with its protocol, environment and rows, grown arm by arm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.paper.protocol import LAMBDAS, TUNING_SEED
from benchmarks.results import RESULTS
from chts_train.runs import read_json
from chts_train.storage import write_json

FOLDER = RESULTS / "paper"
SCHEMA = 1


@dataclass
class Paper:
    """One table's file. ``rows`` holds a row of :func:`benchmarks.paper.arms.collect` per arm and seed."""

    path: Path
    table: int
    protocol: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> Paper:
        """A file as it is.

        Raises:
            ValueError: it is missing, damaged, or of another schema.
        """
        values = read_json(path)
        if not isinstance(values, dict) or values.get("schema") != SCHEMA:
            raise ValueError(f"{path}: must be a result file of schema {SCHEMA}")
        return cls(path, *(values[key] for key in ("table", "protocol", "environment", "rows")))

    @classmethod
    def open(cls, path: Path, table: int, protocol: dict[str, Any]) -> Paper:
        """The file to add rows to; a new one where there is none. Groups that it has no protocol of yet join it.

        Raises:
            ValueError: rows of another protocol are in it.
        """
        if not path.exists():
            return cls(path, table, protocol)
        held = cls.load(path)
        held._join(protocol, "this invocation's")
        return held

    def _join(self, protocol: dict[str, Any], whose: str) -> None:
        # One invocation may know of fewer groups than another: it had the data of one model only.
        groups = protocol["groups"] | self.protocol["groups"]
        protocol = {**protocol, "groups": self.protocol["groups"] | protocol["groups"]}
        if differing := sorted(_differing({**self.protocol, "groups": groups}, protocol)):
            raise ValueError(
                f"{self.path}: must have {whose} protocol, got other {', '.join(differing)}; give the same --data and "
                "--scale as before, leave a model out (--model), or move the file away"
            )
        self.protocol = protocol

    def take(self, other: Paper) -> None:
        """Add the rows of another file of this table that this one lacks; of a row that both have, this file's stays.

        Raises:
            ValueError: it is of another protocol.
        """
        self._join(other.protocol, f"{other.path}'s")
        held = {row["key"] for row in self.rows}
        self.environment = self.environment or other.environment
        for row in other.rows:
            if row["key"] not in held:
                self.add(row)

    def save(self) -> None:
        """Write the file atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        keys = ("table", "protocol", "environment", "rows")
        write_json(self.path, {"schema": SCHEMA, **{key: getattr(self, key) for key in keys}})

    def add(self, row: dict[str, Any]) -> bool:
        """Take a row, in place of the one with its key; False when it is there already."""
        if row in self.rows:
            return False
        self.rows = sorted([r for r in self.rows if r["key"] != row["key"]] + [row], key=lambda r: r["key"])
        return True


def path_of(folder: Path, table: int, scale: str) -> Path:
    """``table1.json``; other scales than the one of record say so in their name."""
    return folder / f"table{table}{'' if scale == 'reduced' else f'-{scale}'}.json"


def tuned(rows: Iterable[dict[str, Any]]) -> dict[str, float | None]:
    """SR-STE method -> the decay with the lowest held-out loss on the tuning seed; None until all have been tried."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        if row["srste_lambda"] is not None and row["seed"] == TUNING_SEED:
            found.setdefault(row["method"], {})[row["srste_lambda"]] = row["figures"]["val_loss"]
    return {
        method: min(losses, key=losses.__getitem__) if losses.keys() >= set(LAMBDAS) else None
        for method, losses in found.items()
    }


def _differing(a: Any, b: Any, name: str = "") -> set[str]:
    """Dotted names of what two JSON values differ in."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return {name} if a != b else set()
    return {
        item for key in a.keys() | b.keys() for item in _differing(a.get(key), b.get(key), f"{name}.{key}" if name else key)
    }
