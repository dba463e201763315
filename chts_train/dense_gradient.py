"""The gradient of whole dense weights for one optimizer step, for rules that grow links where it is large."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from .distributed import must_agree
from .linear import SparseLinear


class DenseGradients:
    """Sums ``dY^T X`` of every layer over the backward passes of one step, while it is :attr:`armed`.

    Costs one dense weight-gradient product per layer and, from the backward pass to the topology update, a float32 [N, K] for
    every layer: what a dense model's gradients take. Between those steps there is nothing, not even a hook. It reads what goes
    through the layers' ``__call__``: inside a captured CUDA graph or a compiled region nothing is seen, and :meth:`check` says so. A
    backward pass that gave a layer anything infinite or NaN, as with too large a loss scale, counts as zeros for it.

    Args:
        layers: by name.
        group: the processes whose gradients are added up; None: all of them.
    """

    def __init__(self, layers: Mapping[str, SparseLinear], group: Any = None) -> None:
        self._layers, self._group = layers, group
        self._sums: dict[str, torch.Tensor] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def armed(self) -> bool:
        """Whether the next forward and backward passes are read."""
        return bool(self._handles)

    def arm(self, on: bool) -> None:
        """Read the passes from now on, or forget what was read and stop."""
        if on and not self._handles:
            self._handles = [
                layer.register_forward_hook(_Reader(self, name), with_kwargs=True) for name, layer in self._layers.items()
            ]
        elif not on:
            for handle in self._handles:
                handle.remove()
            self._handles, self._sums = [], {}

    def check(self) -> None:
        """Raises RuntimeError, naming the first layer, when the step had no backward pass through one that could be read."""
        missing = [name for name in self._layers if name not in self._sums]
        if missing:
            raise RuntimeError(
                f"regrowth='gradient': must read the backward pass of a step that updates the topology, saw none for {len(missing)} of "
                f"{len(self._layers)} layers, the first {missing[0]!r}; run the forward and backward passes of such a step (evolver."
                "needs_dense_gradients) eagerly: not as a CUDA graph, and compiled modules under torch.compiler.set_stance('force_eager')"
            )

    @torch.no_grad()
    def take(self, name: str) -> torch.Tensor:
        """float32 [N, K]: the layer's sum over all processes, then forgotten here. All must take the layers in one order."""
        total = self._sums.pop(name)
        if must_agree(self._group):
            torch.distributed.all_reduce(total, group=self._group)
        return total

    @torch.no_grad()
    def _add(self, name: str, dy: torch.Tensor, x: torch.Tensor) -> None:
        if dy.dtype == torch.float16:  # scaled losses: sums over tokens go beyond its range where the values' float32 gradient does not
            dy = dy.float()
        dy = dy.reshape(-1, dy.shape[-1])
        part = (dy.t() @ x.reshape(-1, x.shape[-1]).to(dy.dtype)).float()
        part = torch.where(part.isfinite().all(), part, 0.0)  # of a pass that overflowed, whose step a GradScaler leaves out
        if name in self._sums:
            self._sums[name] += part
        else:
            self._sums[name] = part


class _Reader:
    """The forward hook of one layer. A copy or a pickle of the layer has one that reads nothing."""

    def __init__(self, gradients: DenseGradients | None, name: str) -> None:
        self._gradients, self._name = gradients, name

    def __call__(
        self, _: SparseLinear, inputs: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor], output: torch.Tensor
    ) -> None:
        if self._gradients is not None and output.requires_grad:
            # A copy under autocast, as autograd has it: what the layer read may be changed in place before the backward pass.
            x = (inputs[0] if inputs else named["x"]).detach().to(output.dtype)
            add, name = self._gradients._add, self._name
            output.register_hook(lambda dy: add(name, dy.detach(), x))

    def __reduce__(self) -> tuple:
        return _Reader, (None, self._name)
