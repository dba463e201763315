"""One topology update and its parts, on random weights with the two moments of Adam."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks import gate
from benchmarks.cases import Case
from benchmarks.problems.matrix import blocks, check_operands
from benchmarks.problems.models import stack
from chts_kernels import SparseWeight, carry_over_, evolve, random_ids, regrow, remove, score, unpack
from chts_kernels.ops.score.reference import link_mask

ZETA, TEMPERATURE, SEED, STEP = 0.1, 3.0, 0, 100
MOST_DIFFERENT = 1e-3
"""Share of blocks that may differ from the float64 reference: rounding decides ties between patterns."""
SCORE_ERROR = 1e-3
"""Largest relative error of a score: what tf32 products leave. Scores of missing links differ by 3 to 5 per cent."""


class TopologyProblem:
    """Per set: a weight (float32), its two moments, and what the reference makes of it up to the new ids.

    The gate knows ``survivors`` and ``ids`` (bit-equal given equal inputs), ``scores`` (against float64), ``tensors`` (three
    carried tensors, stacked, bit-equal) and an update's ``update_ids``, ``update_values`` and refreshed operands.
    Providers with noise of their own give dense ``free_survivors``, ``free_mask``, ``free_weight``: they are checked for
    being a legal update rather than this one.
    """

    def __init__(self, case: Case, device: torch.device, sets: int) -> None:
        self.case, self.device, self.sets, self.n = case, device, sets, case.n
        rows, columns = case.dims["out"], case.dims["in"]
        generator = torch.Generator(device).manual_seed(0)
        self.ids, self.values, self.moments = [], [], []
        self.survivors, self.scores, self.new_ids = [], [], []
        for seed in range(sets):
            self.ids.append(random_ids(rows, columns, self.n, seed=seed, device=device))
            shape = (3, rows, columns // 4 * self.n)
            values, *moments = torch.randn(shape, generator=generator, device=device).unbind()
            self.values.append(values.contiguous())
            self.moments.append([m.contiguous() for m in moments])
            if case.op == "remove" or (case.op.startswith("update") and seed):
                continue  # nothing of what follows is read
            options = {"seed": SEED, "layer": 0, "step": STEP, "impl": "reference"}
            survivors = remove(
                values, self.ids[-1], self.n, zeta=ZETA, temperature=TEMPERATURE, **options
            )  # fmt: skip
            self.survivors.append(survivors)
            if case.op != "score":
                scores = score(survivors, dtype=torch.float32, impl="reference")
                self.scores.append(scores if case.op in ("regrow", "carry_over") else None)
                if case.op == "carry_over":
                    self.new_ids.append(regrow(scores, survivors, self.n, **options))

    def weight(self, index: int) -> tuple[SparseWeight, list[torch.Tensor]]:
        """A copy of a set's weight and moments, for a provider to change."""
        values, ids = self.values[index].clone(), self.ids[index].clone()
        return SparseWeight(ids, values, self.n), [m.clone() for m in self.moments[index]]

    def check(self, outputs: dict[str, torch.Tensor]) -> str | None:
        options = {"seed": SEED, "layer": 0, "step": STEP, "impl": "reference"}
        remark = None
        if "survivors" in outputs:
            expected = remove(
                self.values[0], self.ids[0], self.n, zeta=ZETA, temperature=TEMPERATURE, **options
            )  # fmt: skip
            gate.equal(outputs["survivors"], expected, "survivors")
        if "scores" in outputs:
            remark = self._check_scores(outputs["scores"], self.survivors[0])
        if "ids" in outputs:
            gate.equal(outputs["ids"], regrow(self.scores[0], self.survivors[0], self.n, **options), "ids")
        if "tensors" in outputs:
            expected = [self.values[0].clone(), *(m.clone() for m in self.moments[0])]
            carry_over_(expected, self.ids[0], self.new_ids[0], self.n, impl="reference")
            gate.equal(outputs["tensors"], torch.stack(expected), "tensors")
        if "update_ids" in outputs:
            weight, moments = self.weight(0)
            share = check_update(weight, moments, outputs["update_ids"], outputs["update_values"], layer=0)
            remark = f"{100 * share:.3g} % of blocks unlike the float64 reference"
        if "meta" in outputs:  # the operands after an update are those of the new ids and values
            check_operands(outputs, outputs["update_values"], outputs["update_ids"], self.n)
        if "free_survivors" in outputs or "free_mask" in outputs:
            self._check_free(outputs)
        return remark

    def _check_free(self, outputs: dict[str, torch.Tensor]) -> None:
        links = unpack(torch.ones_like(self.values[0]), self.ids[0], self.n)
        if "free_survivors" in outputs:
            survivors = outputs["free_survivors"]
            gate.at_most(int((survivors > links).sum()), 0, "survivors that were no links")
            count = int(links.sum()) - int(ZETA * self.values[0].numel())
            gate.at_most(abs(int(survivors.sum()) - count), 0, f"survivors: deviation from {count}")
            return
        mask = outputs["free_mask"]
        if self.case.op == "regrow":
            lost = (link_mask(self.survivors[0], torch.float32) > mask).sum()
            gate.at_most(int(lost), 0, "survivors that the new pattern lacks")
        check_legal(mask, self.n)
        if "free_weight" in outputs:
            kept = unpack(self.values[0], self.ids[0], self.n) * mask
            gate.equal(outputs["free_weight"], kept, "weight")

    def _check_scores(self, scores: torch.Tensor, survivors: torch.Tensor) -> str:
        exact = score(survivors, dtype=torch.float64, impl="reference")
        error = float(((scores.double() - exact).abs() / exact.clamp_min(1.0)).max())
        gate.at_most(error, SCORE_ERROR, "scores: the largest relative error")
        return f"largest relative error {error:.1e}"


def check_update(
    weight: SparseWeight, moments: list[torch.Tensor], ids: torch.Tensor, values: torch.Tensor, layer: int
) -> float:
    """Hold an update's ids against the float64 reference's, and its values against what carrying over to its ids gives.

    Returns the share of blocks with another pattern than the reference's. ``weight`` and ``moments`` are changed.
    """
    old_ids, old_values = weight.ids.clone(), weight.values.detach().clone()
    evolve(
        weight, zeta=ZETA, temperature=TEMPERATURE, seed=SEED, layer=layer, step=STEP, moments=moments, impl="reference"
    )
    different = float((weight.ids != ids).double().mean())
    # Small matrices have few blocks: one of them may differ.
    gate.at_most(different, max(MOST_DIFFERENT, 1.5 / ids.numel()), "ids: share of blocks unlike the reference's")
    carry_over_([old_values], old_ids, ids, weight.n, impl="reference")
    gate.equal(values.detach(), old_values, "values")
    return different


def check_legal(mask: torch.Tensor, n: int) -> None:
    """A mask [N, K] with ``n`` ones in every row and column of every block."""
    by_block = blocks(mask)
    for axis, name in ((-1, "row"), (-2, "column")):
        wrong = int((by_block.sum(axis) != n).sum())
        gate.at_most(wrong, 0, f"mask: {name}s of blocks without exactly {n} links")


class ModelUpdateProblem:
    """Every sparse matrix of a model with Adam's two moments, all updated in one go.

    The gate knows ``update_ids`` and ``update_values``: of all matrices, flat, one after another.
    """

    def __init__(self, case: Case, device: torch.device, sets: int) -> None:
        self.case, self.device, self.sets = case, device, 1
        generator = torch.Generator(device).manual_seed(0)
        with torch.device("meta"):
            model, _ = stack(case.dims["model"], layers=None)
        shapes = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)]
        self.ids = [random_ids(*shape, seed=SEED, layer=i, device=device) for i, shape in enumerate(shapes)]
        self.tensors = [torch.randn(3, n, k // 2, generator=generator, device=device) for n, k in shapes]

    def weights(self) -> tuple[list[SparseWeight], list[list[torch.Tensor]]]:
        """A copy of all weights and moments, for a provider to change."""
        copies = [[t.clone() for t in tensors] for tensors in self.tensors]
        made = [SparseWeight(ids.clone(), c[0], 2) for ids, c in zip(self.ids, copies, strict=True)]
        return made, [c[1:] for c in copies]

    def check(self, outputs: dict[str, torch.Tensor]) -> str | None:
        if "free_mask" in outputs:
            check_legal(outputs["free_mask"], 2)
            kept = unpack(self.tensors[0][0], self.ids[0], 2) * outputs["free_mask"]
            gate.equal(outputs["free_weight"], kept, "weight")
            return f"{len(self.ids)} matrices"
        ids, values = outputs["update_ids"], outputs["update_values"]
        different, start, block = 0.0, 0, 0
        for layer, (old_ids, tensors) in enumerate(zip(self.ids, self.tensors, strict=True)):
            old = tensors[0]
            share = check_update(
                SparseWeight(old_ids.clone(), old.clone(), 2), [], ids[block : block + old_ids.numel()].view_as(old_ids),
                values[start : start + old.numel()].view_as(old), layer,
            )  # fmt: skip
            different = max(different, share)
            start, block = start + old.numel(), block + old_ids.numel()
        return f"{len(self.ids)} matrices; at most {100 * different:.3g} % of one's blocks unlike the float64 reference"
