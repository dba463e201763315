"""Whole training steps: an optimizer on one weight, and forward + backward + optimizer on a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks import gate
from benchmarks.cases import Case
from benchmarks.problems.models import random_batch, stack
from benchmarks.timing import Variant
from chts_kernels import SparseWeight, random_ids
from chts_kernels.ops.adamw import adamw_
from chts_kernels.ops.pack import empty_operands
from chts_train import FusedAdamW, densify_, sparse_layers

LEARNING_RATE = 1e-3
LOSS_ERROR = 0.02
"""Relative difference allowed between the loss under bf16 autocast and the float32 loss of the same weights."""


class OptimizerProblem:
    """AdamW on a weight [N, K]: torch's fused kernel on the dense one, ours on its links, fresh bf16 operands both ways included.

    The gate knows ``param``: after one step from fresh state every element moved by ``lr * g / (|g| + eps)``; and of ours
    ``operand`` and ``operand_t``, which must be those of ``param``.
    """

    def __init__(self, case: Case, device: torch.device, sets: int) -> None:
        self.case, self.device, self.sets = case, device, sets
        self.ids = random_ids(case.dims["out"], case.dims["in"], 2, seed=0, device=device)

    def dense(self, label: str) -> Variant:
        """Torch's optimizer on the dense weight, one for each set."""
        calls, first = [], []
        for start, grad in self._draw(self.case.dims["in"]):
            parameter = nn.Parameter(start.clone())
            parameter.grad = grad
            cuda = self.device.type == "cuda"
            optimizer = torch.optim.AdamW([parameter], lr=LEARNING_RATE, weight_decay=0.0, fused=cuda, capturable=cuda)
            first = first or [start, grad, parameter]

            def step(optimizer: torch.optim.Optimizer = optimizer, parameter: nn.Parameter = parameter) -> tuple[torch.Tensor]:
                optimizer.step()
                return (parameter.detach(),)

            calls.append(step)
        return self._variant(calls, first, label)

    def links(self, label: str, impl: str) -> Variant:
        """Our kernel on the links, and the operands of the new values."""
        calls, first = [], []
        rows, columns = self.case.dims["out"], self.case.dims["in"]
        for start, grad in self._draw(columns // 2):
            values, moments = start.clone(), [torch.zeros_like(start) for _ in range(2)]
            operand, _, operand_t, _ = empty_operands(rows, columns, torch.bfloat16, self.device)
            count = torch.zeros((), device=self.device)
            arguments = [values], [grad], *([m] for m in moments), [count], [self.ids]
            written = {"operands": [operand], "operands_t": [operand_t]}
            first = first or [start, grad, values]

            def step(arguments=arguments, written=written, count=count, out=(values, operand, operand_t)) -> tuple[torch.Tensor, ...]:
                count += 1
                adamw_(*arguments, 2, lr=LEARNING_RATE, impl=impl, **written)
                return out

            calls.append(step)
        return self._variant(calls, first, label)

    def _draw(self, columns: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator(self.device).manual_seed(0)
        for _ in range(self.sets):
            shape = (self.case.dims["out"], columns)
            yield tuple(torch.randn(shape, generator=generator, device=self.device) for _ in range(2))

    def _variant(self, calls: list[Callable], first: list[torch.Tensor], label: str) -> Variant:
        start, grad, parameter = first

        def canon(out: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
            return dict(zip(("param", "operand", "operand_t"), out, strict=False)) | {"start": start, "grad": grad}

        return Variant(calls, canon, label=label, restore=lambda: parameter.data.copy_(start))

    def check(self, outputs: dict[str, torch.Tensor]) -> str | None:
        grad, param = outputs["grad"].double(), outputs["param"]
        exact = outputs["start"].double() - LEARNING_RATE * grad / (grad.abs() + 1e-8)
        gate.at_most(float((param.double() - exact).abs().max()), 1e-6, "param: the largest error")
        if "operand" in outputs:
            expected = SparseWeight(self.ids, param.contiguous()).operands(torch.bfloat16)
            gate.equal(outputs["operand"], expected.values, "operand")
            gate.equal(outputs["operand_t"], expected.values_t, "operand_t")
        return None


class ModelProblem:
    """Training steps with float32 parameters under bf16 autocast. The gate knows ``loss`` and ``exact_loss``."""

    def __init__(self, case: Case, device: torch.device, sets: int) -> None:
        self.case, self.device, self.sets = case, device, 1
        torch.manual_seed(0)
        with device:  # drawn there: the host would take seconds for a large model
            self.model, self.spec = stack(case.dims["model"])
        self.batch = random_batch(self.spec, device)

    def variant(self, convert: Callable[[nn.Module], nn.Module], label: str, *, resident: bool = False) -> Variant:
        """Steps of ``convert(copy of the model)``; its loss before the first step is compared with the float32 one.

        The same rule updates all parameters of all providers; sparse layers get our kernel, the others torch's fused one. ``resident``:
        the passes read the operands that the optimizer wrote.
        """
        model = convert(copy.deepcopy(self.model))
        options = {"lr": LEARNING_RATE, "weight_decay": 0.0, "capturable": self.device.type == "cuda"}
        optimizer = FusedAdamW(model.parameters(), model=model, resident_operands=torch.bfloat16 if resident else None, **options)
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
