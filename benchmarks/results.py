"""Result files: one JSON of an environment and rows, written after every case, resumed by the next run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cases import Case

RESULTS = Path(__file__).parent / "results"
ASKED = "asked for by --impl"
DIED = "the process died while this ran"
APART = "measured apart"
"""Note of a row whose provider did not take turns with the others of its case."""
NOT_OFFERED = "not offered"
"""Note of an error that no second try will change: the provider has no such operation, or not here."""
IDENTITY = ("gpu", "torch", "triton", "cuda", "driver", "cusparselt", "kernel_hash")
"""Entries of the environment that must agree before rows of two runs may share a file."""


@dataclass
class Row:
    """One provider on one case. Times are per call; ``None`` is "not measured" and ``error`` says why.

    ``gpu_ms``: median device time, sustained (back to back), as CUDA-graph replays where the call can be captured.
    ``burst_ms``: median of about ten calls after an idle pause; large products only. ``eager_ms``: median wall time of
    one call in a loop of eager calls (suite host: host time alone). ``peak_bytes``: device memory that one call adds,
    its outputs included; suite model: the training step's peak. ``note``: spread (p20-p80) and remarks.
    """

    suite: str
    op: str
    shape: dict[str, Any]
    dtype: str
    provider: str
    impl: str | None = None
    gpu_ms: float | None = None
    burst_ms: float | None = None
    eager_ms: float | None = None
    peak_bytes: int | None = None
    error: str | None = None
    note: str = ""

    @classmethod
    def of(cls, case: Case, provider: str, **values: Any) -> Row:
        return cls(case.suite, case.op, case.dims, case.dtype, provider, **values)

    @property
    def case(self) -> Case:
        return Case(self.suite, self.op, tuple(self.shape.items()), self.dtype)

    @property
    def spread(self) -> tuple[float, float] | None:
        """(p20, p80) of ``gpu_ms`` as :func:`spread_note` wrote them."""
        found = re.match(r"p20-p80 ([0-9.e-]+) to ([0-9.e-]+) ms", self.note)
        return (float(found[1]), float(found[2])) if found else None


    @property
    def trials(self) -> dict[str, float]:
        """Ms per call of a provider's variants, as :func:`trials_note` wrote them."""
        found = re.search(r"(?:^|; )trials ([^;]+)", self.note)
        pairs = [part.removesuffix(" ms").rsplit(" ", 1) for part in found[1].split(", ")] if found else []
        return {label: float(ms) for label, ms in pairs}


def trials_note(trials: dict[str, float]) -> str:
    return "trials " + ", ".join(f"{label} {ms:.4g} ms" for label, ms in trials.items())


def spread_note(p20: float, p80: float) -> str:
    return f"p20-p80 {p20:.5g} to {p80:.5g} ms"


@dataclass
class Results:
    """The content of a result file and where it lives (``path`` None: nowhere)."""

    environment: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    path: Path | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Results:
        """Read a file.

        Raises:
            ValueError: when it is not of this schema; the message names the file.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text())
            return cls(content["environment"], [Row(**row) for row in content["rows"]], path)
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: must be a result file of this suite: {error!r}") from error

    def save(self) -> None:
        """Write the file whole and then move it into place, so that an interrupted run leaves the last good one."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n  ".join(json.dumps(asdict(row)) for row in self.rows)
        environment = json.dumps(self.environment, indent=1)
        temporary = self.path.with_name(self.path.name + ".new")
        temporary.write_text(f'{{\n"environment": {environment},\n"rows": [\n  {rows}\n]\n}}\n')
        temporary.replace(self.path)

    def of_case(self, case: Case) -> list[Row]:
        return [row for row in self.rows if row.case == case]

    def replace(self, rows: Sequence[Row]) -> None:
        """Put the rows of a case in place of older ones of the same providers."""
        new = {(row.case, row.provider, _slot(row)) for row in rows}
        self.rows = [r for r in self.rows if (r.case, r.provider, _slot(r)) not in new] + list(rows)

    def has(self, case: Case, providers: Iterable[str], impl: str) -> bool:
        """Whether every provider has its row for this case and this ``--impl``."""
        rows = self.of_case(case)
        slot = None if impl == "auto" else impl
        present = {row.provider for row in rows if row.provider != "chts" or _slot(row) == slot}
        return set(providers) <= present

    def drop_errors(self) -> int:
        """Forget the rows whose measurement failed; returns their number."""
        before = len(self.rows)
        self.rows = [row for row in self.rows if row.error is None or NOT_OFFERED in row.note]
        return before - len(self.rows)

    def add(self, other: Results) -> None:
        """Take the rows and sessions of another part of the same measurement; where both have a row, the other's stays.

        Raises:
            ValueError: when it was measured on something else.
        """
        reason = self.mismatch(other.environment)
        if reason:
            raise ValueError(f"{other.path} was measured on something else than {self.path}: {reason}")
        self.environment.setdefault("sessions", []).extend(other.environment.get("sessions", []))
        self.replace(other.rows)

    def mismatch(self, environment: dict[str, Any]) -> str | None:
        """Why rows measured in ``environment`` must not join this file, or None."""
        if not self.rows:
            return None
        for key in IDENTITY:
            mine, other = self.environment.get(key), environment.get(key)
            if mine != other:
                return f"{key} is {mine!r} there and {other!r} here"
        return None


def _slot(row: Row) -> str | None:
    """Two implementations of ours may stand beside each other; of anything else there is one row."""
    return row.impl if ASKED in row.note else None


def default_path(gpu: str, *, quick: bool = False) -> Path:
    """``benchmarks/results/<gpu>.json``; a quick run never takes the place of the full one."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower().replace("nvidia", "")).strip("-") or "cpu"
    return RESULTS / f"{slug}{'-quick' if quick else ''}.json"


def resolve_path(out: str | None, gpu: str, *, quick: bool = False) -> Path:
    """The file that ``--out`` names: a .json file, a folder to put the default name in, or nothing."""
    default = default_path(gpu, quick=quick)
    if out is None:
        return default
    path = Path(out)
    return path if path.suffix == ".json" else path / default.name
