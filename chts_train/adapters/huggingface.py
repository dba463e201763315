"""A callback that evolves the topology inside the ``Trainer`` of transformers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..distributed import whole_tree
from ..extras import require
from ..storage import load_tensors, replacing, save_tensors
from ..topology import TopologyEvolver
from ._build import build_evolver, check_options

_callbacks = require("transformers.trainer_callback", "the adapter of the Hugging Face Trainer", "hf")

AGES = "topology_ages.safetensors"
"""File in a checkpoint folder: the age of every link, a uint8 tensor per layer."""

logger = logging.getLogger("chts_train")


class TopologyCallback(_callbacks.TrainerCallback, _callbacks.ExportableState):
    """Topology updates for a sparsified model that ``transformers.Trainer`` trains::

        sparsify_(model)
        trainer = Trainer(model, TrainingArguments(...), train_dataset=data, callbacks=[TopologyCallback(interval=100)])
        trainer.train()                                   # or trainer.train(resume_from_checkpoint=True)

    The number of steps is the trainer's. A checkpoint of the trainer holds pattern ids (in the model's weights), the counters of the
    evolution (in ``trainer_state.json``) and the ages of the links (:data:`AGES`), which are a statistic: where that file is
    missing they start again from 0 and the topology evolves as it would have.

    Args:
        options: of :class:`chts_train.TopologySchedule` and :class:`chts_train.TopologyEvolver`, by name.

    Raises:
        TypeError, ValueError: an option that does not exist or is out of range. When training begins: what the evolver
            raises, and a checkpoint to resume from that no such callback wrote.

    The attribute ``evolver`` is the :class:`chts_train.TopologyEvolver` of the latest training, with its ``stats()``.
    """

    def __init__(self, **options: Any) -> None:
        check_options(options)
        self.options = options
        self.evolver: TopologyEvolver | None = None

    def state(self) -> dict[str, Any]:
        """What the trainer keeps in ``trainer_state.json``: options and counters."""
        counters = None
        if self.evolver is not None:
            counters = {key: value for key, value in self.evolver.state_dict().items() if key != "ages"}
        options = {key: value for key, value in self.options.items() if key != "process_group"}  # the rest is JSON
        return {"args": options, "attributes": {"counters": counters}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        if self.evolver is not None:
            self.evolver.close()
        self.evolver = build_evolver(model, [optimizer], state.max_steps, self.options)
        if state.global_step > 0:
            self._resume(args, state)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.evolver is not None
        ages = whole_tree(self.evolver.state_dict()["ages"])  # of a sharded model: every rank takes part
        folder = self._folder(args, state)
        if args.should_save and folder.is_dir():
            with replacing(folder / AGES) as temporary:
                save_tensors(temporary, ages)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self.evolver is not None:
            self.evolver.close()

    def _resume(self, args: Any, state: Any) -> None:
        assert self.evolver is not None
        stored = state.stateful_callbacks.get(type(self).__name__) or {}
        counters = stored.get("attributes", {}).get("counters")
        if counters is None:
            raise ValueError(
                f"resume_from_checkpoint: must be a checkpoint that was written with a {type(self).__name__}, got one of "
                f"step {state.global_step} without its counters"
            )
        given = args.resume_from_checkpoint
        folders = [self._folder(args, state), *([Path(given)] if isinstance(given, str) else [])]
        file = next((folder / AGES for folder in folders if (folder / AGES).is_file()), None)
        if file is None:
            logger.warning("%s: no %s in %s, link ages start again from 0", type(self).__name__, AGES, folders[0])
        ages = self.evolver.ages if file is None else load_tensors(file)
        # safetensors sorts names, the evolver compares them in module order
        self.evolver.load_state_dict({**counters, "ages": {name: ages[name] for name in self.evolver.ages if name in ages}})

    @staticmethod
    def _folder(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"
