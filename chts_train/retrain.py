"""eDSrT: from a dense model to a sparse one (ALGORITHM section 4).

Phase 1 prunes: every block takes the pattern with the largest sum of ``|w|``. Phase 2 trains on with topology
updates, the temperature rising from 1 to 3. The method ``nvidia`` does phase 1 only and keeps the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .configs import RunConfig
from .loading import load_dense
from .methods import METHODS, get_method
from .runs import starting_run
from .settings import Settings
from .trainer import Trainer

DEFAULTS = {"method": "chts24", "init": "magnitude", "t_start": 1.0, "t_end": 3.0}
"""What re-training changes in the config of the dense model."""

METHODS_FOR_RETRAINING = tuple(name for name, method in METHODS.items() if method.kind == "sparse")


def retrain_config(dense: RunConfig, **changes: Any) -> RunConfig:
    """The config of a re-training from the config that the dense model was, or would be, trained with.

    Same steps, data and learning rate, as in the usual recipe of pruning; :data:`DEFAULTS` and then ``changes`` replace
    fields.

    Raises:
        ValueError: values out of range.
    """
    return RunConfig.from_dict(dense.to_dict() | DEFAULTS | changes)


def start_retraining(
    weights: Mapping[str, Any],
    config: RunConfig,
    origin: Mapping[str, Any],
    *,
    out: str | Path | None = None,
    settings: Settings | None = None,
) -> Trainer:
    """A trainer whose model is ``weights``, pruned; call its ``train``.

    Args:
        weights, origin: from :func:`chts_train.loading.load_dense`.
        config: from :func:`retrain_config`.
        out: run folder, default ``runs/<name>-retrain-<method>-s<seed>``.
        settings: default :class:`Settings`.

    Raises:
        ValueError: a method that does not store sparse weights; what :class:`Trainer` raises.
        RunError: ``out`` is not empty.
    """
    if get_method(config.method).kind != "sparse":
        raise ValueError(f"method: must be one of {', '.join(METHODS_FOR_RETRAINING)}, got {config.method!r}")
    with starting_run(f"{config.name}-retrain-{config.method}-s{config.seed}", out) as run:
        return Trainer(config, run, settings, weights=weights, origin=origin)


def retrain(
    source: str | Path, *, out: str | Path | None = None, settings: Settings | None = None, **changes: Any
) -> Trainer:
    """The three steps in one: ``retrain("runs/dense", method="chts14").train()``.

    Args:
        source: a dense run folder, checkpoint, or exported folder.
        out, settings: see :func:`start_retraining`.
        changes: fields of :class:`RunConfig`.
    """
    weights, dense, origin = load_dense(source)
    return start_retraining(weights, retrain_config(dense, **changes), origin, out=out, settings=settings)
