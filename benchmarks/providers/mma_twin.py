"""The dense twin of the Ampere-class kernels (competitors_mma_twin.py) on the masked weight: what the sparse instruction is worth."""

from __future__ import annotations

import importlib.util

import torch

from benchmarks.problems.linear import LinearInputs, LinearProblem
from benchmarks.providers import Unavailable, cuda_only
from benchmarks.providers.cublas import no_grad
from benchmarks.timing import Variant

CONFIGS = [(256, 128, 4, 2, 3, 8, 64), (128, 128, 2, 2, 4, 8, 32)]
"""Tile, warps, stages, band, depth of a stage: the two large tiles of the sparse kernels, each at the depth that was faster on an H100;
the fastest one counts."""


def build(problem: LinearProblem, impl: str) -> list[Variant]:
    cuda_only(problem, "the dense twin")
    if importlib.util.find_spec("triton") is None:
        raise Unavailable("the dense twin needs the package triton")
    if problem.dtype not in (torch.bfloat16, torch.float16) or any(s % 8 for s in (problem.tokens, problem.rows, problem.columns)):
        raise Unavailable("the dense twin computes in 16 bits, with sizes divisible by 8")
    shared = torch.cuda.get_device_properties(problem.device).shared_memory_per_block_optin
    name = {"forward": "y", "input_grad": "dx", "weight_grad": "dw_dense"}[problem.case.op]
    return [
        Variant([no_grad(_call(s, problem.case.op, config)) for s in problem.inputs], lambda out: {name: out}, label=_label(config))
        for config in CONFIGS
        if config[4] * config[6] * 2 * (config[0] + config[1]) <= shared
    ]


def _label(config: tuple[int, ...]) -> str:
    return f"{config[0]}x{config[1]}, {config[2] * config[3]} warps"


def _call(s: LinearInputs, op: str, config: tuple[int, ...]):
    from benchmarks.competitors_mma_twin import product

    if op == "weight_grad":
        return lambda: product(s.dy, s.x, config, columns=True, turn=False)
    left = s.dense if op == "forward" else s.dense.t().contiguous()
    right = s.x if op == "forward" else s.dy
    return lambda: product(left, right, config, columns=False, turn=True)
