"""Training steps without host time: a model's blocks through ``torch.compile``, whole steps as CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .models.llama import DecoderLayer, NextTokenLoss
from .models.vit import Block

RECOMPILATIONS = 64
"""torch gives up after 8 versions of one function, and for it all modules are one function: 5 kinds of linear layer are 5 versions."""


def compile_blocks(model: nn.Module, **options: Any) -> nn.Module:
    """Compile the transformer blocks of ``model`` in place, each as one graph, and the loss over a vocabulary.

    Blocks of one kind share their code, also those of a later model in the same process. What is around them stays eager. Names of
    parameters stay what they are. Changes torch's compiler settings for the process (:func:`allow_blocks`).

    Args:
        model: with blocks of :mod:`chts_train.models`.
        options: of ``torch.compile``, such as ``backend``.

    Returns:
        ``model``; unchanged where it has no such blocks.
    """
    allow_blocks()
    rates = {module.drop_path.rate for module in model.modules() if isinstance(module, Block)}
    found: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, DecoderLayer | NextTokenLoss) or (isinstance(module, Block) and len(rates) == 1):
            found.append(module)
        elif isinstance(module, Block):  # another drop rate in every block: compiled whole, each would be a program of its own
            found += [module.attn, module.mlp]
    for module in found:
        module.compile(fullgraph=True, dynamic=False, **options)
    return model


def allow_blocks() -> None:
    """Set, for the whole process, what torch's compiler needs to know of models compiled block by block: many versions of one function;
    and under DDP no further splits of a block at the borders of gradient buckets, whose pieces cost more host time than they gain."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILATIONS)
    config.optimize_ddp = False


class StepGraphs:
    """Forward and backward passes as one CUDA graph, the optimizer's step as another.

    The first ``WARM_UP`` steps run as they would without graphs (and compile what is to be compiled); then steps are captured once
    and replayed. What is outside the graphs - topology updates, evaluations, checkpoints - sees parameters, moments and
    gradients where they always were: graphs write into the same memory. Learning rates go through tensors.

    Args:
        run_pass: ``run_pass(inputs, targets, share)`` on device tensors: forward and backward of one micro-batch that is ``share`` (a
            float or a tensor without dimensions) of the batch. It must not wait for the device.
        optimizer: its step is captured where torch allows that (fused Adam and AdamW, :class:`chts_train.FusedAdamW`) and runs eagerly
            elsewhere.
        device: a CUDA device.

    All micro-batches must have one shape.
    """

    WARM_UP = 3

    def __init__(
        self, run_pass: Callable[[Tensor, Tensor, Any], None], optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        self._run_pass, self._optimizer, self._device = run_pass, optimizer, device
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if device.type == "cuda":
            self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self._warm = 0
        self._passes: dict[bool, torch.cuda.CUDAGraph] = {}  # the first pass of a step sets gradients, others add to them
        self._static: tuple[Tensor, Tensor, Tensor] | None = None
        self._step: torch.cuda.CUDAGraph | None = None
        self._outdated: list[Tensor] = []
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]

    def gradients(self, batches: Iterable[tuple[Tensor, Tensor, float]], *, eager: bool = False) -> None:
        """Leave the gradients of the micro-batches (inputs and targets on the CPU, share) in the parameters.

        ``eager``: of this step without graphs, for what reads the passes in Python.
        """
        first = True
        if eager or self._warm < self.WARM_UP:
            if self._passes:
                torch._foreach_zero_([p.grad for p in self._parameters if p.grad is not None])
            else:
                self._warm += not eager
            with self._aside():
                for inputs, targets, share in batches:
                    self._run_pass(inputs.to(self._device), targets.to(self._device), share)
            return
        for inputs, targets, share in batches:
            if self._static is None:
                self._static = (
                    torch.empty_like(inputs, device=self._device), torch.empty_like(targets, device=self._device),
                    torch.zeros((), device=self._device),
                )  # fmt: skip
            for place, tensor in zip(self._static, (inputs, targets), strict=False):
                self._upload(place, tensor)
            self._static[2].fill_(share)
            if first not in self._passes:
                self._passes[first] = self._capture_pass(first)
            self._passes[first].replay()
            first = False

    def step(self, scale: float = 1.0) -> None:
        """The optimizer's step, its learning rates times ``scale`` (which hooks of the optimizer apply where the step is eager)."""
        if self._step is None:
            if not self._passes or scale != 1.0 or not self._can_capture():
                self._optimizer.step()
                return
            self._step = self._capture_step()
            self._outdated = [p for p in self._parameters if not self._follows(p)]
        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            rate.fill_(group["lr"] * scale)
        self._step.replay()
        torch.autograd.graph.increment_version(self._outdated)  # what is derived from them has to notice

    def clear(self) -> None:
        """Drop the step's gradients, unless graphs own them."""
        if not self._passes:
            self._optimizer.zero_grad(set_to_none=True)

    def _capture_pass(self, first: bool) -> torch.cuda.CUDAGraph:
        if first:
            self._optimizer.zero_grad(set_to_none=True)
        return self._capture(lambda: self._run_pass(*self._static))

    def _can_capture(self) -> bool:
        """Whether torch can capture this optimizer now: without state, the step would make it, at every replay again."""
        groups, state = self._optimizer.param_groups, self._optimizer.state
        return all(group.get("fused") and "capturable" in group for group in groups) and all(
            state.get(p) for p in self._parameters if p.grad is not None
        )

    def _follows(self, parameter: Tensor) -> bool:
        """Whether the captured step writes along all that is derived from a parameter: resident operands."""
        layer, _ = getattr(self._optimizer, "_layers", {}).get(id(parameter), (None, 0))
        return layer is not None and layer.resident_operands is not None

    def _capture_step(self) -> torch.cuda.CUDAGraph:
        def body() -> None:
            with self._capturable():
                self._optimizer.step()

        return self._capture(body)

    def _capture(self, body: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            body()
        return graph

    @staticmethod
    def _upload(place: Tensor, tensor: Tensor) -> None:
        place.copy_(tensor.pin_memory(), non_blocking=True)

    @contextlib.contextmanager
    def _capturable(self) -> Iterator[None]:
        """Learning rates in tensors. Only meanwhile: checkpoints, schedulers and people go on with numbers."""
        before = [(group, group["lr"], group["capturable"]) for group in self._optimizer.param_groups]
        try:
            for rate, (group, _, _) in zip(self._rates, before, strict=True):
                group["lr"], group["capturable"] = rate, True
            yield
        finally:
            for group, lr, capturable in before:
                group["lr"], group["capturable"] = lr, capturable

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """On the stream that captures: what autograd and libraries set up per stream is then there."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
