"""Products of a linear layer: random normal x, dY and links; the weight is sparse for us and masked dense for the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks import gate
from benchmarks.cases import Case
from chts_kernels import SparseWeight, pack, random_ids

TORCH_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MVUE_DRAWS = 8


@dataclass
class LinearInputs:
    """x [T, K], dy [T, N], the weight as a SparseWeight and as a dense matrix [N, K] with zeros; all of one dtype."""

    x: torch.Tensor
    dy: torch.Tensor
    weight: SparseWeight
    dense: torch.Tensor


class LinearProblem:
    """Exact results: ``y = x W^T``, ``dx = dY W``, ``dw = dY^T x`` at the links, in float64.

    The gate knows outputs y, dx, dw (compressed [N, K/2]), dw_dense ([N, K]: looked at in its links), and the pair
    dw_mvue, dw_mvue_mean: one unbiased random estimate and the mean of :data:`MVUE_DRAWS` independent ones. An unbiased
    estimate's error falls with the square root of the number of draws; a biased one's stays.
    """

    def __init__(self, case: Case, device: torch.device, sets: int) -> None:
        self.case, self.device, self.sets = case, device, sets
        d = case.dims
        self.tokens, self.rows, self.columns = d["tokens"], d["out"], d["in"]
        self.dtype = TORCH_DTYPE[case.dtype]
        self.inputs = [self._draw(seed) for seed in range(sets)]
        self._exact: dict[str, gate.Reference] = {}

    def _draw(self, seed: int) -> LinearInputs:
        generator = torch.Generator(self.device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=self.device, dtype=self.dtype)

        ids = random_ids(self.rows, self.columns, 2, seed=seed, device=self.device)
        weight = SparseWeight(ids, normal(self.rows, self.columns // 2) * self.columns**-0.5, 2)
        return LinearInputs(
            normal(self.tokens, self.columns), normal(self.tokens, self.rows), weight, weight.to_dense()
        )

    def check(self, outputs: dict[str, torch.Tensor]) -> str | None:
        remark = self._check_mvue(outputs) if "dw_mvue" in outputs else None
        for name, actual in outputs.items():
            if name.startswith("dw_mvue"):
                continue
            if name == "dw_dense":
                actual = pack(actual, self.inputs[0].weight.ids)
            gate.no_worse_than(actual, self.exact(name), name)
        return remark

    def _check_mvue(self, outputs: dict[str, torch.Tensor]) -> str:
        exact = self.exact("dw").exact
        one = gate.relative_error(outputs["dw_mvue"], exact)
        mean = gate.relative_error(outputs["dw_mvue_mean"], exact)
        gate.at_most(one, 1.0, "dw_mvue: the relative error of one estimate")
        # 1 / sqrt(8) = 0.354; many elements, so the ratio hardly fluctuates.
        gate.at_most(mean, 0.45 * one, f"dw_mvue: the relative error of the mean of {MVUE_DRAWS} estimates")
        return f"unbiased: relative error {one:.2f}, of the mean of {MVUE_DRAWS} {mean:.2f}"

    def exact(self, name: str) -> gate.Reference:
        """The float64 result and plain torch's in the case's dtype, of set 0; computed once."""
        name = "dw" if name == "dw_dense" else name
        if name not in self._exact:
            s = self.inputs[0]
            with torch.no_grad():
                if name == "y":
                    found = s.x.double() @ s.dense.double().t(), F.linear(s.x, s.dense)
                elif name == "dx":
                    found = s.dy.double() @ s.dense.double(), s.dy @ s.dense
                elif name == "dw":
                    exact = pack(s.dy.double().t() @ s.x.double(), s.weight.ids)
                    found = exact, pack(s.dy.t() @ s.x, s.weight.ids)
                else:
                    raise KeyError(f"no gate for an output named {name!r}")
            self._exact[name] = gate.Reference(*found)
        return self._exact[name]
