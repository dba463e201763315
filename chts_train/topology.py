"""When and how the topology of a model evolves during training (ALGORITHM section 2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from chts_kernels import Evolution, Operands, SparseWeight, evolve_many

from .dense_gradient import DenseGradients
from .distributed import (
    RankCheck,
    carry_over_rows_,
    first_row,
    gathered,
    gathered_together,
    is_dtensor,
    laid_out_like,
    must_agree,
    plain_name,
    reshard,
    sums,
    unwrapped,
)
from .linear import SparseLinear, sparse_layers
from .moves import Member, move_many
from .new_moments import NEW_MOMENTS, SECOND_MOMENTS, estimate_, link_states

MAX_AGE = 255
"""Link ages are kept in one byte, in updates, and stop here."""
GATHERED_BYTES = 256 << 20
"""Of sharded values that an update gathers at a time (more for a larger layer); sending them takes as much again, and moving a rank's
rows as much as its values and moments of those layers."""
RULES = {
    "soft": ("soft", "greedy", "random"),
    "hard": ("soft", "greedy", "random"),
    "moves": ("gradient", "soft", "random"),
    "soft-moves": ("gradient", "soft", "random"),
}
"""Removal -> the regrowths that go with it."""


@dataclass(frozen=True)
class TopologySchedule:
    """Cadence, removal fraction, temperature and learning-rate ramp of topology updates.

    Args:
        total_steps: optimizer steps of the run, update steps included.
        interval: update at steps interval, 2 * interval, ...
        stop_fraction: ... up to and including ``stop_fraction * total_steps``.
        zeta: fraction of a matrix's active links to remove in an update.
        zeta_end: that fraction at ``stop_fraction * total_steps``, linear between; None keeps ``zeta`` (the paper's rule).
        t_start, t_end: temperature of the soft removal at step 0 and at ``stop_fraction * total_steps``, linear between.
        lr_ramp_steps: after an update the learning rate is 0, 1/r, ..., (r - 1)/r of its value for r steps.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    total_steps: int
    interval: int = 100
    stop_fraction: float = 0.75
    zeta: float = 0.1
    t_start: float = 1.0
    t_end: float = 9.0
    lr_ramp_steps: int = 10
    zeta_end: float | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("total_steps", 1, math.inf),
            ("interval", 1, math.inf),
            ("stop_fraction", 0, 1),
            ("zeta", 0, 1),
            ("zeta_end", 0, 1),
            ("lr_ramp_steps", 0, math.inf),
        ):
            if getattr(self, name) is not None and not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: must be in [{low}, {high}], got {getattr(self, name)}")
        for name in ("t_start", "t_end"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: must be positive and finite, got {getattr(self, name)}")

    def is_update(self, step: int) -> bool:
        """Whether optimizer step ``step`` (counted from 1) updates the topology instead of the weights."""
        return step > 0 and step % self.interval == 0 and step <= self.stop_fraction * self.total_steps

    def temperature(self, step: int) -> float:
        """T of the soft removal at ``step``."""
        return self.t_start + (self.t_end - self.t_start) * self._progress(step)

    def removal_fraction(self, step: int) -> float:
        """zeta at ``step``."""
        if self.zeta_end is None:
            return self.zeta
        return self.zeta + (self.zeta_end - self.zeta) * self._progress(step)

    def _progress(self, step: int) -> float:
        """How far evolution has come: 0 at step 0, 1 from its end on."""
        end = self.stop_fraction * self.total_steps
        return min(step / end, 1.0) if end > 0 else 1.0

    def lr_scale(self, step: int) -> float:
        """Factor on the learning rate at ``step``: the ramp after the latest update, 1 outside of it."""
        last = min(step - 1, math.floor(self.stop_fraction * self.total_steps)) // self.interval * self.interval
        since = step - last - 1
        return since / self.lr_ramp_steps if last > 0 and since < self.lr_ramp_steps else 1.0


class TopologyEvolver:
    """Evolves the topology of every :class:`SparseLinear` of a model while an optimizer trains it.

    Either call it in the loop, once per optimizer step and after the backward pass::

        if evolver.step():
            optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    or :meth:`attach` it once and leave the loop alone. At an update step the topology changes and the optimizer step is
    skipped, since the gradient belongs to the old topology. Values and the optimizer's per-link state follow their links;
    new links start at 0. The learning-rate ramp after an update is applied inside ``optimizer.step`` and taken back after
    it, so that any scheduler goes on undisturbed. Nothing waits for the device.

    In a data-parallel job every rank has its evolver, with the same arguments. Under DDP an update sends nothing but one
    checksum per layer; under FSDP2 (``fully_shard``) it also gathers the values of a few layers at a time (256 MB).

    Args:
        model: with at least one :class:`SparseLinear`; may be wrapped by DDP or ``torch.compile``, or be sharded.
        optimizer: any torch optimizer whose per-parameter state has the parameter's shape (SGD with momentum, Adam, AdamW,
            NAdam, RMSprop, ...) apart from scalars.
        schedule: the cadence.
        removal: "soft" or "hard", the paper's, with regrowth "soft", "greedy" or "random"; or "moves", which replaces whole
            patterns and spends zeta on links that really change (:func:`chts_kernels.choose_moves`), with regrowth "gradient" (by the
            gradient of the dense weight at the update step, see :attr:`needs_dense_gradients`), "soft" (Cannistraci-Hebb scores)
            or "random"; "soft-moves" adds the soft removal's noise to it.
        seed: of the noise. Ranks of a data-parallel job must share it.
        collect_stats: compute :meth:`stats` on the device at every update (one more selection pass).
        verify: where ``torch.distributed`` is initialised, compare the ids of all ranks before the first step and after every
            update; :class:`chts_train.distributed.TopologyMismatch` names the layers and ranks that differ. On a GPU
            it is raised one of the next steps, when the figures have arrived.
        process_group: the ranks that train this model and so must agree, default all of them.
        step_count: optimizer steps that the model has behind it, where it became sparse only then.
        new_moments: "zero", the paper's: new links start with all moments at 0; or "estimated": with second moments estimated from the
            links around them (:mod:`chts_train.new_moments`), which keeps Adam from making huge steps with them.

    Raises:
        ValueError: when there is no sparse layer, the optimizer lacks a layer's values, or an option is unknown.
        NotImplementedError: when values are sharded otherwise than along dim 0.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: TopologySchedule,
        *,
        removal: str = "soft",
        regrowth: str = "soft",
        seed: int = 0,
        collect_stats: bool = True,
        verify: bool = True,
        process_group: Any = None,
        step_count: int = 0,
        new_moments: str = "zero",
    ) -> None:
        if new_moments not in NEW_MOMENTS:
            raise ValueError(f"new_moments: must be one of {list(NEW_MOMENTS)}, got {new_moments!r}")
        if step_count < 0:
            raise ValueError(f"step_count: must not be negative, got {step_count}")
        if removal not in RULES:
            raise ValueError(f"removal: must be one of {list(RULES)}, got {removal!r}")
        if regrowth not in RULES[removal]:
            raise ValueError(f"regrowth: must be one of {list(RULES[removal])} with removal {removal!r}, got {regrowth!r}")
        self.model = unwrapped(model)
        self.layers = {plain_name(name): layer for name, layer in sparse_layers(self.model).items()}
        if not self.layers:
            raise ValueError("model: must have at least one SparseLinear, got none; call sparsify_ first")
        reshard(self.model)  # an evaluation may have left gathered parameters behind
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, layer in self.layers.items() if id(layer.values) not in known]
        if missing:
            raise ValueError(
                f"optimizer: must hold the values of every sparse layer, {len(missing)} are missing, the first of "
                f"{missing[0]!r}; build the optimizer after sparsify_ (and fully_shard)"
            )
        for name, layer in self.layers.items():
            if is_dtensor(layer.values):
                first_row(layer.values, f"{name}.values")
        self.optimizer, self.schedule = optimizer, schedule
        self.removal, self.regrowth, self.seed, self.collect_stats = removal, regrowth, seed, collect_stats
        self.new_moments = new_moments
        self.step_count = self._first_step = step_count
        self.updates = 0
        self.ages = {
            name: torch.zeros_like(layer.values.detach(), dtype=torch.uint8) for name, layer in self.layers.items()
        }
        self._verify, self._check = verify, RankCheck(process_group)
        self._figures: dict[str, dict[str, Any]] = {}
        self._gradients = DenseGradients(self.layers, process_group) if regrowth == "gradient" else None
        self._attached = False
        self._true_lrs: list[Any] | None = None
        self._withheld: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_optimizer_step),
            optimizer.register_step_post_hook(self._after_optimizer_step),
        ]
        self._look_ahead()

    def step(self) -> bool:
        """Count one optimizer step; update the topology if it is due.

        Returns:
            True when the caller should take the optimizer step, False when the topology was updated instead.

        Raises:
            RuntimeError: when the evolver is attached and does this itself.
            TopologyMismatch: when ranks of a data-parallel job hold different ids.
            TypeError: when the optimizer keeps state that cannot follow links; then nothing was changed.
        """
        if self._attached:
            raise RuntimeError("TopologyEvolver.step: must not be called while attached; the optimizer's hooks call it")
        return self._advance()

    def attach(self) -> TopologyEvolver:
        """Let ``optimizer.step()`` drive the evolution: at an update step it finds no gradients and changes nothing."""
        self._attached = True
        return self

    def detach(self) -> None:
        """Undo :meth:`attach`; :meth:`step` is to be called again."""
        self._attached = False

    def close(self) -> None:
        """Remove the hooks from the optimizer, and wait for the last comparison of ranks. The evolver is of no use afterwards.

        Raises:
            TopologyMismatch: when ranks of a data-parallel job hold different ids.
        """
        self._check.finish()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._gradients is not None:
            self._gradients.arm(False)

    @property
    def needs_dense_gradients(self) -> bool:
        """Whether the passes of the coming step are read: they must then run eagerly, uncompiled (no CUDA graph)."""
        return self._gradients is not None and self._gradients.armed

    @property
    def temperature(self) -> float:
        """T of the soft removal at the current step."""
        return self.schedule.temperature(self.step_count)

    @property
    def zeta(self) -> float:
        """The removal fraction at the current step."""
        return self.schedule.removal_fraction(self.step_count)

    def stats(self) -> list[dict[str, Any]]:
        """Figures of the last update, one dict per layer; waits for the device. Empty before the first update.

        Keys: name, n, links, blocks, removed (by rules that move whole patterns: at most so many), can_change_blocks, replaced,
        turnover (replaced / links), noise_changed_blocks (share of blocks where the noisy choice is not the greedy one),
        score_mean, score_var (over the links before the update), score_mean_survivors, score_var_survivors, link_age_mean
        (in updates).
        """
        held = {name: self._figures[name] for name in self.layers if name in self._figures}
        read = _read([number for figures in held.values() for number in figures["device"].values()])
        rows = []
        for name, figures in held.items():
            layer = self.layers[name]
            values = {key: next(read) for key in figures["device"]}
            for key in ("can_change_blocks", "replaced"):
                if key in values:
                    values[key] = int(values[key])
            if "link_age_mean" in values:
                values["link_age_mean"] /= layer.values.numel()
            rows.append(
                {"name": name, "n": layer.n, "links": layer.values.numel(), "blocks": layer.ids.numel(),
                 "removed": figures["removed"], **values}
            )  # fmt: skip
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Counters, settings and link ages (``ages``: uint8 tensors by layer name, DTensors where the values are)."""
        self._check.finish()  # ranks that disagree are nothing to save
        return {
            "step": self.step_count,
            "updates": self.updates,
            "seed": self.seed,
            "removal": self.removal,
            "regrowth": self.regrowth,
            "new_moments": self.new_moments,
            "schedule": asdict(self.schedule),
            "ages": dict(self.ages),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, on any number of ranks.

        Raises:
            ValueError: when the state is of other layers, another seed or another rule; then nothing was changed.
        """
        known = {"new_moments": "zero", **state}  # states of before there was a choice
        for key in ("seed", "removal", "regrowth", "new_moments"):
            if known[key] != getattr(self, key):
                raise ValueError(
                    f"{key}: must be this evolver's {getattr(self, key)!r}, got {known[key]!r} in the state"
                )
        if list(state["ages"]) != list(self.ages):
            raise ValueError(f"ages: must be of the layers {list(self.ages)}, got {list(state['ages'])}")
        for name, age in state["ages"].items():
            if age.shape != self.ages[name].shape:
                raise ValueError(
                    f"ages[{name!r}]: must have shape {tuple(self.ages[name].shape)}, got {tuple(age.shape)}"
                )
        for name, age in state["ages"].items():
            self.ages[name].copy_(laid_out_like(age, self.ages[name]))
        self.step_count, self.updates = state["step"], state["updates"]
        self._look_ahead()

    def _look_ahead(self) -> None:
        """Have the passes of the coming step read, if it is an update that grows by gradients."""
        if self._gradients is not None:
            self._gradients.arm(False)
            self._gradients.arm(self.schedule.is_update(self.step_count + 1))

    def _advance(self) -> bool:
        self._check.poll()
        if self.step_count == self._first_step:
            self._compare("before the first step")
        update = self.schedule.is_update(self.step_count + 1)
        if update:
            reshard(self.model)
            if self._gradients is not None:
                self._gradients.check()
        moments = self._moments() if update else {}  # may raise: before anything is counted or changed
        seconds = self._second_moments(moments) if update else {}
        if update:
            for layer in self.layers.values():
                layer.require_fresh_operands()
        self.step_count += 1
        if update:
            with torch.profiler.record_function("chts::topology_update"):
                self._move(moments) if "moves" in self.removal else self._update(moments)
                for name, tensors in seconds.items():
                    estimate_(self.layers[name], self.ages[name], tensors, name)
            for layer in self.layers.values():
                layer.follow_with_operands()
            self._compare(f"after the update at step {self.step_count}")
        self._look_ahead()
        return not update

    def _compare(self, when: str) -> None:
        if self._verify and must_agree(self._check.group):
            self._check.start({name: layer.ids for name, layer in self.layers.items()}, when)

    @torch.no_grad()
    def _update(self, moments: dict[str, dict[str, torch.Tensor]]) -> None:
        # Layers go in one call for each implementation and device, so that equal shapes share launches.
        groups: dict[tuple[str, torch.device, bool], list[Member]] = {}
        ages = self._older()
        for index, (name, layer) in enumerate(self.layers.items()):
            # A kernel's name names the products; the update knows only one reference and one kernel.
            impl = "reference" if layer.impl == "reference" else "auto"
            kind = impl, layer.ids.device, is_dtensor(layer.values)
            groups.setdefault(kind, []).append((index, name, layer, [*moments[name].values(), ages[name]]))
        for (impl, device, sharded), members in groups.items():
            if sharded:
                for some in _chunks(members, GATHERED_BYTES):
                    self._update_sharded(some, device, impl)
                continue
            results = evolve_many(
                [layer.weight for _, _, layer, _ in members],
                layers=[index for index, *_ in members],
                moments=[tensors for *_, tensors in members],
                impl=impl,
                **self._rule(),
            )
            for (_, name, *_), result in zip(members, results, strict=True):
                self._note(name, result)
        self._note_ages()
        self.updates += 1

    def _update_sharded(self, members: list[Member], device: torch.device, impl: str) -> None:
        """Every rank computes all the new ids, from values gathered for these layers alone, and moves its own rows."""
        whole = gathered_together([layer.values for _, _, layer, _ in members], device)
        weights = [
            SparseWeight.view(layer.ids, values, layer.n, Operands()) for (_, _, layer, _), values in zip(members, whole, strict=True)
        ]
        results = evolve_many(weights, layers=[index for index, *_ in members], impl=impl, **self._rule())
        together: dict[tuple, list[tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]]] = {}
        starts: dict[tuple, int] = {}
        for (_, name, layer, tensors), result in zip(members, results, strict=True):
            rows = [t.to_local() for t in (layer.values, *tensors)]
            layout = layer.ids.shape, layer.values.device_mesh, layer.values.placements
            if layout not in starts:
                starts[layout] = first_row(layer.values, f"{name}.values")
            kind = layer.ids.shape, layer.n, starts[layout], *((t.shape, t.dtype, t.device) for t in rows)
            together.setdefault(kind, []).append((rows, result.old_ids, layer.ids))
            self._note(name, result)
        for (_, n, start, *_), moved in together.items():
            carry_over_rows_(*(list(column) for column in zip(*moved, strict=True)), n, start, impl=impl)

    def _move(self, moments: dict[str, dict[str, torch.Tensor]]) -> None:
        ages = self._older()
        members = [
            (index, name, layer, [*moments[name].values(), ages[name]]) for index, (name, layer) in enumerate(self.layers.items())
        ]
        for name, result in move_many(members, self._gradients, **self._rule()):
            self._note(name, result)
        self._note_ages()
        self.updates += 1

    def _rule(self) -> dict[str, Any]:
        """The arguments of an update that are the same for all layers."""
        return {
            "zeta": self.zeta, "temperature": self.temperature, "removal": self.removal, "regrowth": self.regrowth,
            "seed": self.seed, "step": self.step_count, "stats": self.collect_stats,
        }  # fmt: skip

    def _note(self, name: str, result: Evolution) -> None:
        self._figures[name] = {"removed": result.removed, "device": result.stats or {}}

    def _note_ages(self) -> None:
        """The sums of the links' ages beside the other figures; :meth:`stats` divides them."""
        if not self.collect_stats or not self.ages:
            return
        device = next(iter(self.layers.values())).ids.device
        for name, total in zip(self.ages, sums(list(self.ages.values()), device), strict=True):
            self._figures[name]["device"] = {**self._figures[name]["device"], "link_age_mean": total}

    def _older(self) -> dict[str, torch.Tensor]:
        """The ages of every layer's links, one update more."""
        ages = {name: self._age(name, layer) for name, layer in self.layers.items()}
        local = [age.to_local() if is_dtensor(age) else age for age in ages.values()]
        if self.updates >= MAX_AGE:  # no link is older than there were updates; this takes a launch for each layer
            torch._foreach_clamp_max_(local, MAX_AGE - 1)
        torch._foreach_add_(local, 1)
        return ages

    def _age(self, name: str, layer: SparseLinear) -> torch.Tensor:
        if self.ages[name].device != layer.values.device:  # the model moved after the evolver was built
            self.ages[name] = self.ages[name].to(layer.values.device)
        return self.ages[name]

    def _moments(self) -> dict[str, dict[str, torch.Tensor]]:
        """Per layer the optimizer's tensors that follow links."""
        return {name: link_states(self.optimizer, f"{name}.values", layer.values) for name, layer in self.layers.items()}

    def _second_moments(self, moments: dict[str, dict[str, torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
        """Per layer what is to be estimated for its new links."""
        if self.new_moments == "zero":
            return {}
        found = {name: [t for key, t in of_layer.items() if key in SECOND_MOMENTS] for name, of_layer in moments.items()}
        if any(self.optimizer.state.get(layer.values) and not found[name] for name, layer in self.layers.items()):
            raise ValueError(
                f"new_moments: must be 'zero' with an optimizer that keeps no means of squared gradients, got 'estimated' with "
                f"{type(self.optimizer).__name__}"
            )
        return found

    def _before_optimizer_step(
        self, _: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._prepare_step()
            return None
        prepared = False

        def closure_then_prepare() -> Any:  # gradients exist only when the closure has run, for the first time
            nonlocal prepared
            loss = closure()
            if not prepared:
                prepared = True
                self._prepare_step()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_then_prepare}
        return (args[0], closure_then_prepare, *args[2:]), kwargs

    def _prepare_step(self) -> None:
        if self._attached and not self._only_fills_state() and not self._advance():
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._withheld.append((parameter, parameter.grad))
                        parameter.grad = None
        scale = self.schedule.lr_scale(self.step_count)
        if scale != 1.0:
            self._true_lrs = [_scale_lr(group, scale) for group in self.optimizer.param_groups]

    def _only_fills_state(self) -> bool:
        """Whether this is no training step: torch.distributed.checkpoint gives an optimizer without state one by a step of learning
        rate 0 with gradients of 0."""
        if self.optimizer.state or any(float(group["lr"]) for group in self.optimizer.param_groups):
            return False
        grads = (p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None)
        return not any(bool(gathered(grad.abs().sum())) for grad in grads)

    def _after_optimizer_step(self, *_: Any) -> None:
        for parameter, grad in self._withheld:
            parameter.grad = grad
        self._withheld = []
        if self._true_lrs is not None:
            for group, lr in zip(self.optimizer.param_groups, self._true_lrs, strict=True):
                _set_lr(group, lr)
            self._true_lrs = None


def _chunks(members: list[Member], size: int) -> Iterator[list[Member]]:
    """Layers of one shape side by side, ``size`` bytes of values at a time, or one layer."""
    by_shape = sorted(members, key=lambda member: (tuple(member[2].ids.shape), member[2].n, str(member[2].values.dtype), member[0]))
    chunk: list[Member] = []
    held = 0
    for member in by_shape:
        held += member[2].values.nbytes
        if chunk and held > size:
            yield chunk
            chunk, held = [], member[2].values.nbytes
        chunk.append(member)
    if chunk:
        yield chunk


def _read(numbers: list[torch.Tensor]) -> Iterator[float | int]:
    """0-dim tensors as numbers, in their order: one transfer for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, number in enumerate(numbers):
        groups.setdefault((number.device, number.dtype), []).append(place)
    read: dict[int, float | int] = {}
    for places in groups.values():
        read |= dict(zip(places, torch.stack([numbers[place] for place in places]).tolist(), strict=True))
    return iter([read[place] for place in range(len(numbers))])


def _scale_lr(group: dict[str, Any], scale: float) -> Any:
    """Scale the group's learning rate; return what :func:`_set_lr` needs to restore it."""
    lr = group["lr"]
    true = lr.clone() if isinstance(lr, torch.Tensor) else lr
    _set_lr(group, lr * scale)
    return true


def _set_lr(group: dict[str, Any], lr: Any) -> None:
    # A tensor learning rate is changed in place: a captured graph reads that tensor.
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].copy_(lr)
    else:
        group["lr"] = lr
