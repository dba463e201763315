"""This package's opt-in weight gradient on sparse tensor cores: dY pruned 2:4 along tokens by an unbiased estimator."""

from __future__ import annotations

import inspect

import torch

import chts_kernels
from benchmarks.problems.linear import LinearProblem
from benchmarks.providers import Unavailable
from benchmarks.timing import Variant


def build(problem: LinearProblem, impl: str) -> Variant:
    function = getattr(chts_kernels, "weight_grad_mvue", None)
    if function is None:
        raise Unavailable("this version of chts_kernels has no weight_grad_mvue")
    raise Unavailable(f"no adapter for weight_grad_mvue{inspect.signature(function)}, {torch.__version__}")
