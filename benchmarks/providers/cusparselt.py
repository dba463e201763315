"""cuSPARSELt: every algorithm id and both output orders for products, its compression, and its exact tile pruning.

Through torch (``_cslt_compress``, ``_cslt_sparse_mm``), which builds a plan at every call: a graph replay leaves that cost
out, an eager call has it. Pruning is not offered by torch and is called in the library through ctypes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.problems.linear import LinearInputs, LinearProblem
from benchmarks.problems.matrix import PackProblem, PruneProblem
from benchmarks.providers import Unavailable, cuda_only
from benchmarks.providers.cublas import no_grad
from benchmarks.timing import Variant

MOST_IDS = 64
REFUSED = 4
"""So many refused ids in a row end the search where the library does not tell how many there are."""


def build(problem: LinearProblem | PackProblem | PruneProblem, impl: str) -> list[Variant]:
    cuda_only(problem, "cuSPARSELt")
    if not torch.backends.cusparselt.is_available():
        raise Unavailable("this torch is built without cuSPARSELt")
    if isinstance(problem, PruneProblem):
        return [_prune(problem)]
    if isinstance(problem, PackProblem):
        return [_compress(problem)]
    if problem.case.op == "weight_grad":
        raise Unavailable("dW has a sparse output and no sparse operand: cuSPARSELt has no such product")
    return _products(problem)


def _products(problem: LinearProblem) -> list[Variant]:
    transposed = problem.case.op == "input_grad"
    name = "dx" if transposed else "y"
    compressed = [
        torch._cslt_compress(s.dense.t().contiguous() if transposed else s.dense) for s in problem.inputs
    ]
    torch.cuda.synchronize()  # torch compresses on the default stream

    def right(s: LinearInputs) -> torch.Tensor:
        return (s.dy if transposed else s.x).t()

    def variant(row_major: bool, options: dict[str, int], label: str) -> Variant:
        def call(a: torch.Tensor, s: LinearInputs) -> Callable[[], torch.Tensor]:
            b = right(s)
            return lambda: torch._cslt_sparse_mm(a, b, transpose_result=row_major, **options)

        calls = [no_grad(call(a, s)) for a, s in zip(compressed, problem.inputs, strict=True)]
        return Variant(calls, lambda out: {name: out if row_major else out.t()}, label=label)

    variants: list[Variant] = []
    for row_major in (True, False):
        order = "row-major output" if row_major else "column-major output"
        variants += [
            variant(row_major, {"alg_id": i}, f"algorithm {i}, {order}")
            for i in accepted_ids(compressed[0], right(problem.inputs[0]), row_major)
        ]
        found = searched(compressed[0], right(problem.inputs[0]), row_major)
        if found and found.get("split_k", 1) != 1:
            split = f"split-k {found['split_k']} mode {found['split_k_mode']}"
            variants.append(variant(row_major, found, f"algorithm {found['alg_id']}, {split}, {order}"))
    if not variants:
        raise Unavailable("cuSPARSELt refused every algorithm id for this shape")
    return variants


def accepted_ids(a: torch.Tensor, b: torch.Tensor, row_major: bool) -> list[int]:
    """The algorithm ids that the library runs for this product."""
    accepted: list[int] = []
    refused = 0
    for i in range(MOST_IDS):
        try:
            torch._cslt_sparse_mm(a, b, transpose_result=row_major, alg_id=i)
            torch.cuda.synchronize()
            accepted.append(i)
            refused = 0
        except (RuntimeError, ValueError):
            torch.cuda.synchronize()  # raises when it was more than a refusal
            refused += 1
            if refused == REFUSED:
                break
    return accepted


def searched(a: torch.Tensor, b: torch.Tensor, row_major: bool) -> dict[str, int] | None:
    """What the library's own search picks (algorithm, split-k and its mode), where torch offers it."""
    try:
        alg_id, split_k, mode, _ = torch._C._cusparselt.mm_search(a, b, None, None, None, row_major)
        return {"alg_id": int(alg_id), "split_k": int(split_k), "split_k_mode": int(mode)}
    except Exception:  # an optional shortcut of torch's: its absence changes nothing
        torch.cuda.synchronize()
        return None


def _compress(problem: PackProblem) -> Variant:
    if problem.case.op == "pack":
        raise Unavailable("it compresses into values with metadata; see pack_operands")
    eye = torch.eye(problem.columns, device=problem.device, dtype=problem.dtype)

    def call(index: int) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        weight, dense = problem.weights[index], problem.dense[index]
        if problem.case.op == "pack_operands_shared":
            return lambda: (torch._cslt_compress(dense), torch._cslt_compress(dense.t().contiguous()))
        master = weight.to_dense()  # a user of this library keeps a dense master copy

        def from_master() -> tuple[torch.Tensor, torch.Tensor]:
            low = master.to(problem.dtype)
            return torch._cslt_compress(low), torch._cslt_compress(low.t().contiguous())

        return from_master

    def canon(out: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        torch.cuda.synchronize()
        return {"dense": torch._cslt_sparse_mm(out[0], eye)}

    calls = [no_grad(call(i)) for i in range(problem.sets)]
    return Variant(calls, canon, label="W and its transpose from a masked dense weight")


def _prune(problem: PruneProblem) -> Variant:
    if problem.case.op == "prune14":
        raise Unavailable("cuSPARSELt prunes to 2:4 only")
    from benchmarks.providers.cusparselt_prune import TilePruner

    pruner = TilePruner(*problem.dense[0].shape, problem.dtype)
    outputs = [torch.empty_like(dense) for dense in problem.dense]

    def call(index: int) -> Callable[[], Any]:
        def run() -> torch.Tensor:
            pruner(problem.dense[index], outputs[index])
            return outputs[index]

        return run

    return Variant(
        [call(i) for i in range(problem.sets)], lambda out: {"pruned": out}, label="SPMMA_TILE, dense in, dense out"
    )
