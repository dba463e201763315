"""Work on one weight matrix: choosing its pattern (prune) and laying it out for the sparse tensor cores (pack)."""

from __future__ import annotations

import torch

from benchmarks import gate
from benchmarks.cases import Case
from benchmarks.problems.linear import TORCH_DTYPE
from chts_kernels import SparseWeight, pack, pack_operands_, prune, random_ids, unpack
from chts_kernels.ops.pack import empty_operands

OPERANDS = ("operand", "meta", "operand_t", "meta_t")


def blocks(matrix: torch.Tensor) -> torch.Tensor:
    """[N, K] to [N/4, K/4, 4, 4]."""
    rows, columns = matrix.shape
    return matrix.reshape(rows // 4, 4, columns // 4, 4).transpose(1, 2)


class PruneProblem:
    """Dense random normal matrices. The answer is the exact best pattern of every block by ``|w|``.

    The gate knows ``ids`` (equal to the reference's), ``values`` and the operands (equal to those of the reference's ids),
    and ``pruned``, a dense matrix with zeros: its pattern must be legal and its values untouched; how often it is the best
    one goes into the note, since a greedy search is no wrong result.
    """

    def __init__(self, case: Case, device: torch.device, sets: int) -> None:
        self.case, self.device, self.sets = case, device, sets
        self.dtype = TORCH_DTYPE[case.dtype]
        generator = torch.Generator(device).manual_seed(0)
        size = (case.dims["out"], case.dims["in"])
        self.dense = [torch.randn(size, generator=generator, device=device, dtype=self.dtype) for _ in range(sets)]
        self._best: torch.Tensor | None = None

    @property
    def best(self) -> torch.Tensor:
        """The reference's pattern ids of set 0."""
        if self._best is None:
            self._best = prune(self.dense[0], self.case.n, impl="reference")
        return self._best

    def check(self, outputs: dict[str, torch.Tensor]) -> str | None:
        remark = None
        if "ids" in outputs:
            gate.equal(outputs["ids"], self.best, "ids")
        if "pruned" in outputs:
            remark = self._check_pruned(outputs["pruned"])
        if "values" in outputs:
            gate.equal(outputs["values"], pack(self.dense[0], self.best, self.case.n, impl="reference"), "values")
        if "meta" in outputs:
            check_operands(outputs, pack(self.dense[0], self.best, self.case.n), self.best, self.case.n)
        return remark

    def _check_pruned(self, pruned: torch.Tensor) -> str:
        dense = self.dense[0]
        links = pruned != 0
        gate.equal(torch.where(links, dense, torch.zeros_like(dense)), pruned, "pruned")
        n = self.case.n
        most = max(int(blocks(links).sum(axis).max()) for axis in (-1, -2))
        gate.at_most(most, n, "pruned: links in one row or column of a block")
        ones = torch.ones(dense.shape[0], dense.shape[1] // 4 * n, device=self.device)
        mask = unpack(ones, self.best, n).bool()
        kept = blocks(pruned.double().abs()).sum((-1, -2))
        best = blocks(dense.double().abs() * mask).sum((-1, -2))
        share = (kept >= best * (1 - 1e-6)).double().mean()
        return f"best pattern in {100 * share:.2f} % of blocks, {100 * kept.sum() / best.sum():.2f} % of the magnitude"


class PackProblem:
    """A random weight: dense with zeros, ids, values. ``pack_operands`` starts from float32 values (a master copy)."""

    def __init__(self, case: Case, device: torch.device, sets: int) -> None:
        self.case, self.device, self.sets = case, device, sets
        self.dtype = TORCH_DTYPE[case.dtype]
        self.rows, self.columns = case.dims["out"], case.dims["in"]
        generator = torch.Generator(device).manual_seed(0)
        self.weights, self.dense, self.buffers = [], [], []
        value_dtype = torch.float32 if case.op == "pack_operands" else self.dtype
        for seed in range(sets):
            ids = random_ids(self.rows, self.columns, case.n, seed=seed, device=device)
            shape = (self.rows, self.columns // 4 * case.n)
            values = torch.randn(shape, generator=generator, device=device, dtype=value_dtype)
            self.weights.append(SparseWeight(ids, values, case.n))
            self.dense.append(self.weights[-1].to_dense().to(self.dtype))
            self.buffers.append(empty_operands(self.rows, self.columns, self.dtype, device))

    def check(self, outputs: dict[str, torch.Tensor]) -> str | None:
        weight = self.weights[0]
        if "values" in outputs:
            gate.equal(outputs["values"], pack(self.dense[0], weight.ids, weight.n, impl="reference"), "values")
        if "dense" in outputs:
            gate.equal(outputs["dense"], self.dense[0], "dense")
        if "meta" in outputs:
            check_operands(outputs, weight.values, weight.ids, weight.n)
        return None


def check_operands(outputs: dict[str, torch.Tensor], values: torch.Tensor, ids: torch.Tensor, n: int) -> None:
    """Raise GateError unless the operands among ``outputs`` are those that the reference packs from values and ids."""
    rows, columns = ids.shape[0] * 4, ids.shape[1] * 4
    expected = empty_operands(rows, columns, outputs["operand_t"].dtype, ids.device)
    pack_operands_(values, ids, n, *expected, impl="reference")
    for name, tensor in zip(OPERANDS, expected, strict=True):
        if name in outputs:
            gate.equal(outputs[name], tensor, name)
