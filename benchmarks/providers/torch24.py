"""torch's own semi-structured training path: prune 4x4 tiles greedily, multiply by the compressed weight, dense dW.

What torchao's ``SemiSparseLinear`` did: every step ``_sparse_semi_structured_tile`` picks the pattern and writes both
compressed copies, forward and dX run on sparse tensor cores (cuSPARSELt or CUTLASS, whichever is faster here), dW is dense.
The tile search is told to rank by magnitude; its default ranks by signed value and drops large negative weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.problems.linear import LinearInputs, LinearProblem
from benchmarks.problems.matrix import PruneProblem
from benchmarks.problems.training import ModelProblem
from benchmarks.providers import Unavailable, cuda_only
from benchmarks.providers.cublas import no_grad
from benchmarks.timing import Variant

ALGORITHM = "largest_abs_values_greedy"
BACKENDS = ("cusparselt", "cutlass", "recompressed")
"""recompressed: torch's tile search for the pattern, cuSPARSELt's own compression for the layout. The tile kernel writes the
layout of Ampere, which the library does not read on Hopper."""


def build(problem: LinearProblem | PruneProblem | ModelProblem, impl: str) -> list[Variant]:
    cuda_only(problem, "torch's 2:4 path")
    warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor")
    variants, reasons = [], []
    for backend in BACKENDS:
        try:
            if isinstance(problem, ModelProblem):
                check(backend, problem.device)
                variants.append(_model(problem, backend))
                break  # several models at a time would only cost memory
            elif isinstance(problem, PruneProblem):
                variants.append(_prune(problem, backend))
            else:
                variants.append(_linear(problem, backend))
        except (RuntimeError, NotImplementedError, ValueError) as error:
            reasons.append(f"{backend}: {str(error).splitlines()[0][:160]}")
    if not variants:
        raise Unavailable("; ".join(reasons))
    return variants


def prune(weight: torch.Tensor, backend: str) -> Any:
    """The weight as torch's semi-structured tensor, both orders compressed."""
    if backend == "recompressed":
        tile = torch._sparse_semi_structured_tile(weight, algorithm=ALGORITHM, use_cutlass=False)
        pruned = masked(weight, tile[4])
        return torch.sparse.SparseSemiStructuredTensorCUSPARSELT(
            weight.shape, packed=torch._cslt_compress(pruned), meta=None,
            packed_t=torch._cslt_compress(pruned.t().contiguous()), meta_t=None, compressed_swizzled_bitmask=tile[4],
        )  # fmt: skip
    kind = {
        "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
        "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
    }[backend]
    return kind.prune_dense_static_sort(weight, algorithm=ALGORITHM)


@torch.no_grad()
def check(backend: str, device: torch.device) -> None:
    """Raise ValueError unless this backend multiplies correctly here: the loss of a model would hardly show it."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (2, 256, 256)
    dense, x = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).unbind()
    weight = prune(dense, backend)
    pruned = masked(dense, weight.compressed_swizzled_bitmask)
    for actual, exact in ((x @ weight.t(), x @ pruned.t()), (x @ weight, x @ pruned)):
        if not (actual - exact).norm() < 0.05 * exact.norm():
            raise ValueError("wrong products on this device")


def _linear(problem: LinearProblem, backend: str) -> Variant:
    op = problem.case.op
    calls = [no_grad(_call(op, s, backend)) for s in problem.inputs]
    names = {"forward": ("y",), "input_grad": ("dx",), "layer": ("y", "dx", "dw_dense")}[op]

    def canon(out: Any) -> dict[str, torch.Tensor]:
        return dict(zip(names, out if isinstance(out, tuple) else (out,), strict=True))

    return Variant(calls, canon, label=backend)


def _call(op: str, s: LinearInputs, backend: str) -> Callable[[], Any]:
    if op == "layer":

        def layer() -> tuple[torch.Tensor, ...]:
            weight = prune(s.dense, backend)  # once per optimizer step in training: the weight has changed
            return s.x @ weight.t(), s.dy @ weight, s.dy.t() @ s.x

        return layer
    weight = prune(s.dense, backend)
    return (lambda: s.x @ weight.t()) if op == "forward" else (lambda: s.dy @ weight)


def _prune(problem: PruneProblem, backend: str) -> Variant:
    def call(dense: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
        if backend == "recompressed":

            def whole() -> tuple[torch.Tensor, ...]:
                weight = prune(dense, backend)
                return weight.packed, weight.packed_t, weight.packed, weight.packed_t, weight.compressed_swizzled_bitmask

            return whole
        return lambda: torch._sparse_semi_structured_tile(
            dense, algorithm=ALGORITHM, use_cutlass=backend == "cutlass"
        )

    def canon(out: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        return {"pruned": masked(problem.dense[0], out[4])}

    problem.check(canon(call(problem.dense[0])()))  # refuses shapes here, with a reason of its own for each backend
    return Variant([call(dense) for dense in problem.dense], canon, label=backend)


def masked(dense: torch.Tensor, bitmask: torch.Tensor) -> torch.Tensor:
    """``dense`` with zeros where the tile search put them, in the layout of ``dense``."""
    return torch._sparse_semi_structured_apply_dense(dense, bitmask).contiguous()


class Torch24Linear(nn.Linear):
    """A linear layer on the path above; float32 inputs (the gate's) go through the masked dense weight."""

    backend = "cusparselt"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            low = self.weight.detach().to(torch.bfloat16)
            bitmask = torch._sparse_semi_structured_tile(low, algorithm=ALGORITHM, use_cutlass=False)[4]
            return F.linear(x, self.weight * (masked(low, bitmask) != 0), self.bias)
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        y = _Product.apply(x.to(torch.bfloat16), self.weight.to(torch.bfloat16), self.backend)
        return y if bias is None else y + bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dense: torch.Tensor, backend: str) -> torch.Tensor:
        weight = prune(dense, backend)
        tokens = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(tokens)
        ctx.weight = weight
        return (tokens @ weight.t()).view(*x.shape[:-1], dense.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1])
        return (flat @ ctx.weight).view(*dy.shape[:-1], tokens.shape[-1]), flat.t() @ tokens, None


def _model(problem: ModelProblem, backend: str) -> Variant:
    counts = [0, 0]

    def convert(model: nn.Module) -> nn.Module:
        for module in list(model.modules()):
            if type(module) is not nn.Linear:
                continue
            counts[1] += 1
            try:
                prune(module.weight.detach().to(torch.bfloat16), backend)
            except (RuntimeError, NotImplementedError, ValueError):
                continue  # a size it does not support stays dense; the note counts them
            module.__class__ = Torch24Linear
            module.backend = backend
            counts[0] += 1
        return model

    variant = problem.variant(convert, "")
    if not counts[0]:
        raise Unavailable(f"{backend}: supports none of the {counts[1]} linear layers")
    variant.label = f"{counts[0]} of {counts[1]} linear layers 2:4 by {backend}, {variant.label}"
    return variant
