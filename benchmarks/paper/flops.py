"""Appendix J: floating-point operations per token of a training step, the paper's terms beside the corrected ones.

Counted as the paper does: 2 per multiply-add, linear layers only (embeddings, norms and attention's own products are left
out; the last are stated apart). A pass of a sparse layer through sparse tensor cores counts half of the dense one. The
paper counts the weight gradient at half as well, which no 2:4 hardware gives, since there the result is sparse and no
operand; the unbiased 2:4 estimate (``weight_grad="mvue24"``) is the way to have it. Of a topology update the two products
with W_row and W_col and the two for P_row and P_col count (ALGORITHM sections 2 and 7).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from benchmarks.view import Table
from chts_train.configs import RunConfig, preset
from chts_train.linear import HEAD_NAMES

PAPER_MFLOP = {"dense": 243.0, "SR-STE": 194.8, "CHTs24": 170.9}
"""What the paper states for Llama-60M, to compare with."""
_PAPER_MODEL = {"intermediate_size": 1280, "vocab_size": 32_000}


@dataclass(frozen=True)
class Cost:
    """Per token of one training step: multiply-adds of sparse-able layers and of dense ones; FLOP of updates; attention."""

    sparse_able: int
    dense: int
    update_paper: float
    update: float
    attention: float

    def step(self, forward: float, input_grad: float, weight_grad: float) -> float:
        """FLOP per token, updates not included; the arguments are shares of the dense cost in sparse-able layers."""
        return 2 * self.sparse_able * (forward + input_grad + weight_grad) + 6 * self.dense


def cost(config: RunConfig) -> Cost:
    """The cost of a text config, counted from the layers of its model."""
    with torch.device("meta"):
        model = config.build_model()
    shapes, dense = [], 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if name.rpartition(".")[2] in HEAD_NAMES:
                dense += module.weight.numel()
            else:
                shapes.append(tuple(module.weight.shape))
    tokens = config.batch_size * config.seq_len  # D, of one step
    # An update every ``interval`` steps up to ``stop_fraction`` of the run, shared out over all tokens of the run.
    updates = int(config.stop_fraction * config.total_steps) // config.interval / config.total_steps
    # 2 N^2 K and 2 N K^2 for P_row and P_col, the same again for W_row M and M W_col; the paper counts one pair.
    pair = sum(2 * n * k * (n + k) for n, k in shapes) * updates / tokens
    layers, hidden = config.model.num_hidden_layers, config.model.hidden_size
    # Q K^T and P V, causal half, forward and twice that backward.
    attention = 3 * layers * 2 * 2 * config.seq_len * hidden / 2
    return Cost(sum(n * k for n, k in shapes), dense, pair, 2 * pair, attention)


def tables() -> list[Table]:
    """The paper's count, recomputed, beside the corrected one; for the paper's model and for ours."""
    ours = preset("60m")
    paper = replace(ours, model=replace(ours.model, **_PAPER_MODEL))
    rows = []
    for title, config in (("the paper's (1280 wide)", paper), ("60m preset (1376 wide)", ours)):
        c = cost(config)
        for name, theirs, right in (
            ("dense", c.step(1, 1, 1), c.step(1, 1, 1)),
            ("SR-STE", c.step(0.5, 0.5, 1), c.step(0.5, 0.5, 1)),
            ("CHTs24", c.step(0.5, 0.5, 0.5) + c.update_paper, c.step(0.5, 0.5, 1) + c.update),
            ("CHTs24, MVUE dW", None, c.step(0.5, 0.5, 0.5) + c.update),
        ):
            stated = PAPER_MFLOP.get(name) if config is paper else None
            share = right / c.step(1, 1, 1)
            cells = [title, name, "" if stated is None else f"{stated:.1f}", "" if theirs is None else f"{theirs / 1e6:.1f}"]
            rows.append([*cells, f"{right / 1e6:.1f}", f"{100 * share:.1f} %"])
    c = cost(paper)
    remarks = [
        f"updates, amortised: {c.update_paper / 1e6:.3f} MFLOP per token with the paper's 2(M+N)/D of a forward pass of the sparse "
        f"layer, {c.update / 1e6:.3f} with the 4(M+N)/D that the four products take; D = {paper.batch_size * paper.seq_len:,} "
        f"tokens a step, an update every {paper.interval} steps up to {100 * paper.stop_fraction:.0f} % of the run",
        f"attention's own products, counted nowhere above: {c.attention / 1e6:.1f} MFLOP per token at {paper.seq_len} tokens",
        "SR-STE needs the gradient of all weights, and new masks and operands in every step; making those is not counted",
    ]
    columns = ["model", "method", "paper states", "paper's terms", "corrected", "of dense"]
    return [Table("Appendix J: MFLOP per token of a training step", columns, rows, remarks=remarks)]
