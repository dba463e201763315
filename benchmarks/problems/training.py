"""Whole training steps: an optimizer on one weight, and forward + backward + optimizer on a model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from benchmarks import gate
from benchmarks.cases import Case
from benchmarks.problems.models import random_batch, stack
from benchmarks.timing import Variant
from chts_train import densify_, sparse_layers

LEARNING_RATE = 1e-3
LOSS_ERROR = 0.02
"""Relative difference allowed between the loss under bf16 autocast and the float32 loss of the same weights."""


class OptimizerProblem:
    """Adam (torch's fused kernel) on a weight [N, K]: dense for the competitor, its links for us.

    The gate knows ``param``: after one step from fresh state every element moved by ``lr * g / (|g| + eps)``.
    """

    def __init__(self, case: Case, device: torch.device, sets: int) -> None:
        self.case, self.device, self.sets = case, device, sets

    def variant(self, columns: int, label: str) -> Variant:
        """Steps over parameters of [N, columns], one optimizer for each set."""
        generator = torch.Generator(self.device).manual_seed(0)
        cuda = self.device.type == "cuda"
        calls: list[Callable[[], torch.Tensor]] = []
        first: list[torch.Tensor] = []
        for index in range(self.sets):
            shape = (2, self.case.dims["out"], columns)
            start, grad = torch.randn(shape, generator=generator, device=self.device).unbind()
            parameter = nn.Parameter(start.clone())
            parameter.grad = grad.contiguous()
            optimizer = torch.optim.Adam([parameter], lr=LEARNING_RATE, fused=cuda, capturable=cuda)
            if not index:
                first = [start.contiguous(), parameter.grad, parameter]

            def step(optimizer: torch.optim.Optimizer = optimizer, parameter: nn.Parameter = parameter) -> torch.Tensor:
                optimizer.step()
                return parameter.detach()

            calls.append(step)

        def canon(param: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"param": param, "start": first[0], "grad": first[1]}

        return Variant(calls, canon, label=label, restore=lambda: first[2].data.copy_(first[0]))

    def check(self, outputs: dict[str, torch.Tensor]) -> str | None:
        grad = outputs["grad"].double()
        exact = outputs["start"].double() - LEARNING_RATE * grad / (grad.abs() + 1e-8)
        gate.at_most(float((outputs["param"].double() - exact).abs().max()), 1e-6, "param: the largest error")
        return None


class ModelProblem:
    """Training steps with float32 parameters under bf16 autocast. The gate knows ``loss`` and ``exact_loss``."""

    def __init__(self, case: Case, device: torch.device, sets: int) -> None:
        self.case, self.device, self.sets = case, device, 1
        torch.manual_seed(0)
        self.model, self.spec = stack(case.dims["model"])
        self.model.to(device)
        self.batch = random_batch(self.spec, device)

    def variant(self, convert: Callable[[nn.Module], nn.Module], label: str) -> Variant:
        """Steps of ``convert(copy of the model)``; its loss before the first step is compared with the float32 one."""
        model = convert(copy.deepcopy(self.model))
        cuda = self.device.type == "cuda"
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=cuda, capturable=cuda)
        plain = copy.deepcopy(getattr(model, "_orig_mod", model))
        densify_(plain)
        with torch.no_grad():
            exact = plain(*self.batch).detach()
        del plain

        def step() -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = model(*self.batch)
            loss.backward()
            optimizer.step()
            return loss.detach()

        def canon(loss: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": loss.clone(), "exact_loss": exact}

        def resident() -> int:
            tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
            tensors += [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
            operands = sum(layer._operands.nbytes for layer in sparse_layers(model).values())
            return operands + sum(t.nbytes for t in tensors)

        layers = f"{self.spec.layers} of {self.spec.all_layers} blocks"
        # The gate sees the first step only: later ones have other weights.
        return Variant([step], canon, label=f"{label}{layers}", restore=lambda: None, resident=resident)

    def check(self, outputs: dict[str, torch.Tensor]) -> str | None:
        loss, exact = float(outputs["loss"]), float(outputs["exact_loss"])
        gate.at_most(abs(loss - exact) / abs(exact), LOSS_ERROR, f"loss {loss:.5g} against {exact:.5g}: relative error")
        return None
