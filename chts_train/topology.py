"""When and how the topology of a model evolves during training (ALGORITHM section 2)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from chts_kernels import evolve_many

from .linear import SparseLinear, sparse_layers

MAX_AGE = 255
"""Link ages are kept in one byte, in updates, and stop here."""


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

    Args:
        model: with at least one :class:`SparseLinear`.
        optimizer: any torch optimizer whose per-parameter state has the parameter's shape (SGD with momentum, Adam, AdamW,
            NAdam, RMSprop, ...) apart from scalars.
        schedule: the cadence.
        removal: "soft" or "hard"; regrowth: "soft", "greedy" or "random".
        seed: of the noise. Ranks of a data-parallel job must share it.
        collect_stats: compute :meth:`stats` on the device at every update (one more selection pass).

    Raises:
        ValueError: when there is no sparse layer, the optimizer lacks a layer's values, or an option is unknown.
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
    ) -> None:
        for name, value, options in (
            ("removal", removal, ("soft", "hard")),
            ("regrowth", regrowth, ("soft", "greedy", "random")),
        ):
            if value not in options:
                raise ValueError(f"{name}: must be one of {list(options)}, got {value!r}")
        self.layers = sparse_layers(model)
        if not self.layers:
            raise ValueError("model: must have at least one SparseLinear, got none; call sparsify_ first")
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, layer in self.layers.items() if id(layer.values) not in known]
        if missing:
            raise ValueError(
                f"optimizer: must hold the values of every sparse layer, {len(missing)} are missing, the first of "
                f"{missing[0]!r}; build the optimizer after sparsify_"
            )
        self.optimizer, self.schedule = optimizer, schedule
        self.removal, self.regrowth, self.seed, self.collect_stats = removal, regrowth, seed, collect_stats
        self.step_count = 0
        self.updates = 0
        self.ages = {name: torch.zeros_like(layer.values, dtype=torch.uint8) for name, layer in self.layers.items()}
        self._figures: dict[str, dict[str, Any]] = {}
        self._attached = False
        self._true_lrs: list[Any] | None = None
        self._withheld: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_optimizer_step),
            optimizer.register_step_post_hook(self._after_optimizer_step),
        ]

    def step(self) -> bool:
        """Count one optimizer step; update the topology if it is due.

        Returns:
            True when the caller should take the optimizer step, False when the topology was updated instead.

        Raises:
            RuntimeError: when the evolver is attached and does this itself.
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
        """Remove the hooks from the optimizer. The evolver is of no use afterwards."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

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

        Keys: name, n, links, blocks, removed, can_change_blocks, replaced, turnover (replaced / links),
        noise_changed_blocks (share of blocks where the noisy choice is not the greedy one), score_mean, score_var (over
        the links before the update), score_mean_survivors, score_var_survivors, link_age_mean (in updates).
        """
        rows = []
        for name, figures in self._figures.items():
            layer = self.layers[name]
            numbers = figures["device"]
            read = torch.stack(list(numbers.values())).tolist() if numbers else []
            values = dict(zip(numbers, read, strict=True)) if numbers else {}
            for key in ("can_change_blocks", "replaced"):
                if key in values:
                    values[key] = int(values[key])
            rows.append(
                {"name": name, "n": layer.n, "links": layer.values.numel(), "blocks": layer.ids.numel(),
                 "removed": figures["removed"], **values}
            )  # fmt: skip
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Counters, settings and link ages (``ages``: uint8 tensors by layer name)."""
        return {
            "step": self.step_count,
            "updates": self.updates,
            "seed": self.seed,
            "removal": self.removal,
            "regrowth": self.regrowth,
            "schedule": asdict(self.schedule),
            "ages": dict(self.ages),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            ValueError: when the state is of other layers, another seed or another rule; then nothing was changed.
        """
        for key in ("seed", "removal", "regrowth"):
            if state[key] != getattr(self, key):
                raise ValueError(
                    f"{key}: must be this evolver's {getattr(self, key)!r}, got {state[key]!r} in the state"
                )
        if list(state["ages"]) != list(self.ages):
            raise ValueError(f"ages: must be of the layers {list(self.ages)}, got {list(state['ages'])}")
        for name, age in state["ages"].items():
            if age.shape != self.ages[name].shape:
                raise ValueError(
                    f"ages[{name!r}]: must have shape {tuple(self.ages[name].shape)}, got {tuple(age.shape)}"
                )
        for name, age in state["ages"].items():
            self.ages[name].copy_(age)
        self.step_count, self.updates = state["step"], state["updates"]

    def _advance(self) -> bool:
        update = self.schedule.is_update(self.step_count + 1)
        moments = self._moments() if update else {}  # may raise: before anything is counted or changed
        self.step_count += 1
        if update:
            self._update(moments)
        return not update

    @torch.no_grad()
    def _update(self, moments: dict[str, list[torch.Tensor]]) -> None:
        # Layers go in one call for each implementation and device, so that equal shapes share launches.
        groups: dict[tuple[str, torch.device], list[tuple[int, str, SparseLinear]]] = {}
        for index, (name, layer) in enumerate(self.layers.items()):
            # A kernel's name names the products; the update knows only one reference and one kernel.
            impl = "reference" if layer.impl == "reference" else "auto"
            groups.setdefault((impl, layer.values.device), []).append((index, name, layer))
        for (impl, _), members in groups.items():
            ages = [self._age(name, layer) for _, name, layer in members]
            for age in ages:
                age += age < MAX_AGE
            results = evolve_many(
                [layer.weight for _, _, layer in members],
                zeta=self.zeta,
                temperature=self.temperature,
                removal=self.removal,
                regrowth=self.regrowth,
                seed=self.seed,
                layers=[index for index, _, _ in members],
                step=self.step_count,
                moments=[[*moments[name], age] for (_, name, _), age in zip(members, ages, strict=True)],
                stats=self.collect_stats,
                impl=impl,
            )
            for (_, name, _), age, result in zip(members, ages, results, strict=True):
                numbers = {**result.stats, "link_age_mean": age.double().mean()} if result.stats else {}
                self._figures[name] = {"removed": result.removed, "device": numbers}
        self.updates += 1

    def _age(self, name: str, layer: SparseLinear) -> torch.Tensor:
        if self.ages[name].device != layer.values.device:  # the model moved after the evolver was built
            self.ages[name] = self.ages[name].to(layer.values.device)
        return self.ages[name]

    def _moments(self) -> dict[str, list[torch.Tensor]]:
        """Per layer the optimizer's tensors that follow links."""
        return {name: self._moments_of(name, layer.values) for name, layer in self.layers.items()}

    def _moments_of(self, name: str, values: nn.Parameter) -> list[torch.Tensor]:
        found = []
        for key, entry in self.optimizer.state.get(values, {}).items():
            if isinstance(entry, torch.Tensor) and entry.shape == values.shape:
                found.append(entry)
            elif not (
                entry is None
                or isinstance(entry, int | float)
                or (isinstance(entry, torch.Tensor) and entry.numel() == 1)
            ):
                what = (
                    f"a tensor of shape {tuple(entry.shape)}"
                    if isinstance(entry, torch.Tensor)
                    else type(entry).__name__
                )
                raise TypeError(
                    f"optimizer: must keep per-parameter state in the parameter's shape for links to carry it along, got "
                    f"{type(self.optimizer).__name__} with state[{key!r}] = {what} for {name}.values {tuple(values.shape)}"
                )
        return found

    def _before_optimizer_step(self, *_: Any) -> None:
        if self._attached and not self._advance():
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._withheld.append((parameter, parameter.grad))
                        parameter.grad = None
        scale = self.schedule.lr_scale(self.step_count)
        if scale != 1.0:
            self._true_lrs = [_scale_lr(group, scale) for group in self.optimizer.param_groups]

    def _after_optimizer_step(self, *_: Any) -> None:
        for parameter, grad in self._withheld:
            parameter.grad = grad
        self._withheld = []
        if self._true_lrs is not None:
            for group, lr in zip(self.optimizer.param_groups, self._true_lrs, strict=True):
                _set_lr(group, lr)
            self._true_lrs = None


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
