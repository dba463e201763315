"""A callback that evolves the topology inside Lightning's ``Trainer``."""

from __future__ import annotations

from typing import Any

from ..distributed import whole_tree
from ..extras import require
from ..topology import TopologyEvolver
from ._build import build_evolver, check_options

_pytorch = require("lightning.pytorch", "the adapter of the Lightning Trainer", "lightning")


class TopologyCallback(_pytorch.Callback):
    """Topology updates for a sparsified model that ``lightning.Trainer`` trains::

        sparsify_(module)                                 # in the LightningModule's __init__, or before fit
        trainer = lightning.Trainer(max_steps=10_000, callbacks=[TopologyCallback(interval=100)])
        trainer.fit(module, data)                         # or trainer.fit(module, data, ckpt_path="last.ckpt")

    The number of steps is the trainer's. Checkpoints hold pattern ids among the model's weights, and counters and link ages as this
    callback's state. Of several optimizers it takes the one that holds the sparse layers; its steps count, under automatic
    and manual optimization.

    Args:
        options: of :class:`chts_train.TopologySchedule` and :class:`chts_train.TopologyEvolver`, by name.

    Raises:
        TypeError, ValueError: an option that does not exist or is out of range. When training begins: what the evolver
            raises, and ``total_steps`` missing where the trainer has no end.

    The attribute ``evolver`` is the :class:`chts_train.TopologyEvolver` of the latest training, with its ``stats()``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        check_options(options)
        self.options = options
        self.evolver: TopologyEvolver | None = None
        self._restored: dict[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.evolver is not None:
            self.evolver.close()
        self.evolver = build_evolver(pl_module, trainer.optimizers, trainer.estimated_stepping_batches, self.options)
        if self._restored is not None:
            self.evolver.load_state_dict(self._restored)
            self._restored = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.evolver is not None:
            self.evolver.close()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of the trainer holds of the evolution; of a sharded model every rank takes part."""
        return {} if self.evolver is None else whole_tree(self.evolver.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning calls it before there is an optimizer: the state waits for the start of the training."""
        self._restored = state_dict
