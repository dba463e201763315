"""FusedAdamW: torch.optim.AdamW whose step updates all sparse layers in one kernel and leaves their operands fresh."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from chts_kernels import check
from chts_kernels.freshness import derived_in_step
from chts_kernels.ops._batch import why_not
from chts_kernels.ops._triton import READABLE
from chts_kernels.ops.adamw import ADAMW_

from .distributed import is_dtensor
from .linear import SparseLinear, sparse_layers
from .resident import make_operands_resident_

MOMENTS = ("exp_avg", "exp_avg_sq")


class FusedAdamW(torch.optim.AdamW):
    """AdamW for models with :class:`SparseLinear` layers; a drop-in for ``torch.optim.AdamW`` with the same state.

    On a GPU one launch per parameter group updates the compressed values and moments of all sparse layers and, where the
    operands of the sparse tensor cores were fresh before the step, writes the new operands in the same pass, so that the next
    forward pass does not pack. All other parameters go through torch's fused AdamW; without a GPU everything does
    (:func:`torch.optim.adamw.adamw`). Parameter groups, schedulers, hooks, ``GradScaler``, ``state_dict`` and
    :class:`TopologyEvolver` work as they do with torch's class, and state dicts can be exchanged with it. Nothing waits for
    the device. Build it after ``sparsify_``.

    Args:
        params: parameters, named parameters or groups, as for every torch optimizer.
        lr, betas, eps, weight_decay, amsgrad, maximize, capturable: torch's. ``amsgrad`` has no kernel here: torch's is used.
        model: whose sparse layers are to be found; without it this is ``torch.optim.AdamW``.
        moment_dtype: ``torch.bfloat16`` keeps the moments of sparse layers in half the memory, rounded stochastically (an
            exponential average with beta2 = 0.999 would stand still if rounded to the nearest). None: the dtype of the values.
        seed: of that rounding; the noise depends on (seed, layer, step, place) alone, so that a run can be repeated and all
            ranks of a data-parallel job agree.
        fused: None: True where all parameters are on CUDA devices.
        resident_operands: bfloat16 or float16, the dtype that the passes compute in: compiled and captured passes read the operands
            that this optimizer writes, and pack no more. Operands are packed at once, so the model must be on its device and
            wrapped as it is to be. :func:`chts_train.make_operands_resident_` has the rules. None: nothing changes.

    Raises:
        ValueError: when an option is out of range or ``model`` is no module; the message names it.
        RuntimeError: in ``step``, inside a CUDA graph capture without ``capturable=True``, and where resident operands are out of date.

    Inside a graph capture operands that are not resident are not written: the captured forward pass packs for itself, since a
    replay cannot tell what happened before it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        model: nn.Module | None = None,
        moment_dtype: torch.dtype | None = None,
        seed: int = 0,
        maximize: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
        resident_operands: torch.dtype | None = None,
    ) -> None:
        check.require(model is None or isinstance(model, nn.Module), "model", "be a module or None", type(model).__name__)
        check.require(moment_dtype in (None, torch.bfloat16), "moment_dtype", "be torch.bfloat16 or None", moment_dtype)
        check.require(not (amsgrad and moment_dtype), "amsgrad", "be False with moment_dtype", amsgrad)
        check.unsigned(seed, "seed", 63)
        check.require(resident_operands is None or model is not None, "model", "be given with resident_operands", model)
        params = [{**p, "params": list(p["params"])} if isinstance(p, dict) else p for p in params]
        if fused is None:
            fused = all(p.is_cuda and p.is_floating_point() for p in _tensors(params)) or None
        self._layers = _by_values(model)
        self.moment_dtype, self.seed = moment_dtype, seed
        super().__init__(
            params, lr, tuple(betas), eps, weight_decay, amsgrad, maximize=maximize, capturable=capturable, fused=fused
        )  # fmt: skip
        if resident_operands is not None:
            make_operands_resident_(model, resident_operands)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of a copy or a pickle: it has not got the layers
        for name, default in (("_layers", {}), ("moment_dtype", None), ("seed", 0)):
            self.__dict__.setdefault(name, default)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Torch's or this class's state; moments are converted to this optimizer's dtypes (bfloat16: to the nearest)."""
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            if self.moment_dtype is not None and self._layer(p) is not None:
                state.update({key: state[key].to(self.moment_dtype) for key in MOMENTS if key in state})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step over all parameters that have a gradient; see ``torch.optim.AdamW.step``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for layer, _ in self._layers.values():  # before anything is written
            if layer._operands.resident and layer.values.grad is not None:
                layer.require_fresh_operands()
        derived = []
        for group in self.param_groups:
            batches: dict[tuple, list[tuple[nn.Parameter, dict[str, Any], SparseLinear, int]]] = {}
            others: list[tuple[nn.Parameter, dict[str, Any]]] = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                found = self._layer(p)
                state = self._state(p, group, found is not None)
                if found is None or not self._fits(p, state, group):
                    others.append((p, state))
                else:
                    layer, index = found
                    batches.setdefault(_kind(layer, state), []).append((p, state, layer, index))
            _check_capture(group, [p for p, _ in others] + [p for batch in batches.values() for p, *_ in batch])
            for kind, batch in batches.items():
                derived += self._step_links(group, kind, batch)
            if others:
                self._step_others(group, others)
                for p, _ in others:
                    if self._layer(p) is not None:
                        self._layer(p)[0]._refresh_resident()
        derived_in_step(self, derived)
        return loss

    def follows_with_operands(self, p: nn.Parameter) -> bool:
        """Whether a step leaves the resident operands of the layer that has ``p`` as its values up to date."""
        return self._layer(p) is not None

    def _layer(self, p: nn.Parameter) -> tuple[SparseLinear, int] | None:
        found = self._layers.get(id(p))
        return found if found is not None and found[0].values is p and not is_dtensor(p) else None

    def _state(self, p: nn.Parameter, group: dict[str, Any], sparse: bool) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            if p.grad.is_sparse:
                raise RuntimeError("FusedAdamW: gradients must not be sparse tensors; torch.optim.SparseAdam takes those")
            on_device = group["fused"] or group["capturable"]
            dtype = torch.float32 if on_device or torch.get_default_dtype() != torch.float64 else torch.float64
            state["step"] = torch.zeros((), dtype=dtype, device=p.device if on_device else "cpu")
            moment_dtype = self.moment_dtype if sparse and self.moment_dtype else p.dtype
            for key in (*MOMENTS, *(["max_exp_avg_sq"] if group["amsgrad"] else [])):
                state[key] = torch.zeros_like(p, dtype=moment_dtype, memory_format=torch.preserve_format)
        return state

    def _fits(self, p: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> bool:
        """Whether the links of this layer go through ``chts::adamw_``: always where torch cannot mix dtypes."""
        if group["amsgrad"]:
            return False
        if state["exp_avg"].dtype != p.dtype:
            return True
        return p.dtype in READABLE and state["step"].device == p.device and why_not(p) is None

    def _step_links(self, group: dict[str, Any], kind: tuple, batch: list[tuple]) -> list[Any]:
        n, *_, operand_dtype, has_operand = kind
        parameters, states, layers, indices = (list(column) for column in zip(*batch, strict=True))
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        device = parameters[0].device
        scale, found_inf = (_on(getattr(self, name, None), device) for name in ("grad_scale", "found_inf"))
        lr = group["lr"]
        lr_tensor = lr if isinstance(lr, torch.Tensor) and lr.device == device != torch.device("cpu") else None
        beta1, beta2 = group["betas"]
        ADAMW_(
            [p.detach() for p in parameters], [p.grad for p in parameters], *([s[key] for s in states] for key in MOMENTS), steps,
            [layer.ids for layer in layers], n,
            [layer._operands.values for layer in layers] if has_operand else [],
            [layer._operands.values_t for layer in layers] if operand_dtype else [],
            indices, lr_tensor, 0.0 if lr_tensor is not None else float(lr), float(beta1), float(beta2), group["eps"],
            float(group["weight_decay"]), group["maximize"], scale, found_inf,
            self.seed if states[0]["exp_avg"].dtype == torch.bfloat16 == self.moment_dtype else None,
            impl="auto",
        )  # fmt: skip
        if found_inf is not None:
            torch._foreach_sub_(steps, [found_inf] * len(steps))
        if operand_dtype is None:
            for layer in layers:  # resident ones that this launch could not write: another implementation was asked for
                layer.follow_with_operands()
            return []
        for layer in layers:
            layer._operands.mark(layer.values, layer.ids)
        return [layer._operands._freshness for layer in layers]

    def _step_others(self, group: dict[str, Any], others: list[tuple[nn.Parameter, dict[str, Any]]]) -> None:
        parameters = [p for p, _ in others]
        state = [s for _, s in others]
        adamw(
            parameters, [p.grad for p in parameters], [s["exp_avg"] for s in state], [s["exp_avg_sq"] for s in state],
            [s["max_exp_avg_sq"] for s in state] if group["amsgrad"] else [], [s["step"] for s in state],
            foreach=group["foreach"], capturable=group["capturable"], differentiable=False, fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None), found_inf=getattr(self, "found_inf", None),
            has_complex=any(map(torch.is_complex, parameters)), amsgrad=group["amsgrad"], beta1=group["betas"][0],
            beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            maximize=group["maximize"],
        )  # fmt: skip


def _tensors(params: list[Any]) -> list[torch.Tensor]:
    entries = [e for p in params for e in (p["params"] if isinstance(p, dict) else [p])]
    return [e[1] if isinstance(e, tuple) else e for e in entries]


def _by_values(model: nn.Module | None) -> dict[int, tuple[SparseLinear, int]]:
    layers = sparse_layers(model) if model is not None else {}
    return {id(layer.values): (layer, index) for index, layer in enumerate(layers.values())}


def _kind(layer: SparseLinear, state: dict[str, Any]) -> tuple:
    """What layers of one launch have in common: n, dtypes, and which operands are to be written."""
    operands, dtype, has_operand = layer._operands, None, False
    captured = layer.values.is_cuda and torch.cuda.is_current_stream_capturing()
    written = layer.impl != "reference" and layer.keep_operands and (operands.resident or not captured)
    if written and operands.fresh(layer.values, layer.ids):  # fresh now means that the metadata is that of today's ids
        dtype, has_operand = operands.values_t.dtype, not operands._shared
    values, device = layer.values, layer.values.device
    return layer.n, device, values.dtype, values.grad.dtype, state["exp_avg"].dtype, dtype, has_operand


def _on(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)


def _check_capture(group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
    if group["capturable"] or not any(p.is_cuda for p in parameters):
        return
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("FusedAdamW: must be built with capturable=True to step inside a CUDA graph capture, got False")
