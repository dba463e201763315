"""Where a run stands, and how it ended."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Counters:
    """Where a run stands; part of its checkpoints."""

    step: int = 0
    seen: int = 0
    """Targets (images) trained on."""
    seconds: float = 0.0
    """Time spent training, without evaluations and checkpoints, over all resumptions."""
    turnover: float | None = None
    """Of the last topology update."""
    loss_sum: float = 0.0
    """Of the steps since the last line of the log."""
    loss_steps: int = 0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.state_dict():
            setattr(self, name, state[name])


@dataclass(frozen=True)
class Outcome:
    """How :meth:`chts_train.trainer.Trainer.train` ended."""

    step: int
    finished: bool
    exit_code: int
    """0, or 128 + the number of the signal that stopped it."""
    checkpoint: Path | None
    """The last one; None where none are written."""
    figures: dict[str, float] = field(default_factory=dict)
    """Of the last evaluation, when finished."""
