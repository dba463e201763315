"""A model converter for torchtitan: sparse layers, and their evolution behind the trainer's optimizer.

It follows torchtitan's ``ModelConverter`` protocol by shape alone, so nothing of torchtitan is imported.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..linear import HEAD_NAMES, FilterFn, SparsityConfig, sparse_layers, sparsify_
from ..topology import TopologyEvolver
from ._build import build_evolver, check_options

STEP = "topology_step"
"""Buffer of the model, int64 scalar: optimizer steps so far. It takes the evolution through the trainer's checkpoints."""


class TopologyConverter:
    """Sparse training under torchtitan's trainer, or any other that calls these two methods::

        converter = TopologyConverter(SparsityConfig(n=2), total_steps=10_000, interval=100)
        converter.convert(model)                          # before sharding; the model may be on the meta device
        ...                                               # fully_shard, to_empty, init_weights, optimizers
        converter.post_optimizer_hook(model_parts)        # after each step of the optimizers

    The topology evolves inside the optimizer's step, by hooks that find the optimizer when it first steps; after resuming, too. The
    model's state dict carries ids and the step (:data:`STEP`); link ages, a statistic, start again from 0 when it is loaded.
    While ``model.init_weights`` runs, ``layer.weight`` of a sparse layer is the tensor of its values, so initialisers that draw
    every element alike (``trunc_normal_``, ``normal_``) work unchanged; those that read the fan see a smaller one.

    Args:
        sparsity: of :func:`chts_train.sparsify_`.
        filter_fn: the same; default: all but output heads, torchtitan's ``output`` among them.
        options: of :class:`chts_train.TopologySchedule` and :class:`chts_train.TopologyEvolver`, by name; ``total_steps`` is needed.

    Raises:
        TypeError, ValueError: an option that is missing, does not exist or is out of range.

    The attribute ``evolvers`` lists one :class:`chts_train.TopologyEvolver` per model part (pipeline stage).
    """

    def __init__(
        self, sparsity: SparsityConfig | None = None, *, filter_fn: FilterFn | None = None, **options: Any
    ) -> None:
        check_options(options)
        if "total_steps" not in options:
            raise TypeError("total_steps: must be given, the number of optimizer steps of the run")
        self.sparsity, self.options = sparsity, options
        self.filter_fn = filter_fn or _no_head
        self.evolvers: list[TopologyEvolver] = []
        self._parts: list[nn.Module] = []
        self._handle: Any = None

    def convert(self, model: nn.Module) -> None:
        """Make the linear layers of ``model`` sparse, in place; its optimizers are built afterwards."""
        sparsify_(model, self.sparsity, self.filter_fn)
        device = next(model.parameters()).device
        model.register_buffer(STEP, torch.zeros((), dtype=torch.int64, device=device))
        self._parts = [model]
        if hasattr(model, "init_weights"):
            # A bound method, as a copy of the model (a pipeline stage) then calls it on itself.
            model.init_weights = types.MethodType(self._initialiser(), model)
        self._handle = register_optimizer_step_pre_hook(self._before_any_step)

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Write the step into the model, for its state dict. Nothing waits for the device.

        Raises:
            RuntimeError: when no optimizer with the sparse layers' values has stepped.
        """
        if not self.evolvers:
            raise RuntimeError("post_optimizer_hook: must follow a step of the optimizer of the converted model, got none")
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        for evolver in self.evolvers:
            getattr(evolver.model, STEP).fill_(evolver.step_count)

    def key_filter(self) -> None:
        """No keys of the state dict are the converter's own."""

    def state_dict_transform(self) -> None:
        """State dicts are saved as they are."""

    def format_adapter(self) -> None:
        """There is no external format."""

    def _initialiser(self) -> Any:
        parts: list[nn.Module] = []

        def init_weights(part: nn.Module, *args: Any, **kwargs: Any) -> None:
            with _values_for_weights(part):
                type(part).init_weights(part, *args, **kwargs)
            getattr(part, STEP).zero_()
            if all(part is not other for other in parts):
                parts.append(part)
            self._parts = parts

        return init_weights

    def _before_any_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if hasattr(optimizer, "optimizers"):  # torchtitan's container: the ones inside do the work
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for part in self._parts:
            layers = sparse_layers(part).values()
            if not any(id(layer.values) in held for layer in layers) or any(e.model is part for e in self.evolvers):
                continue
            evolver = build_evolver(part, [optimizer], self.options["total_steps"], self.options)
            done = int(getattr(part, STEP))  # 0, or that of a checkpoint
            updates = sum(evolver.schedule.is_update(step) for step in range(1, done + 1))
            evolver.load_state_dict(evolver.state_dict() | {"step": done, "updates": updates})
            self.evolvers.append(evolver)


def _no_head(name: str, _: nn.Module) -> bool:
    return name.rpartition(".")[2] not in (*HEAD_NAMES, "output")


@contextlib.contextmanager
def _values_for_weights(model: nn.Module) -> Iterator[None]:
    """Have ``layer.weight`` be the tensor of the values, which initialisers can fill."""
    layers = [(layer, layer.__class__) for layer in sparse_layers(model).values()]
    for layer, kind in layers:  # FSDP gives modules classes of their own: derive from whatever it is
        layer.__class__ = type(kind.__name__, (kind,), {"weight": property(lambda self: self.values)})
    try:
        yield
    finally:
        for layer, kind in layers:
            layer.__class__ = kind
