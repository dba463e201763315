"""Which weight gradient a layer computes: the exact one, or the MVUE estimate and what its noise is drawn for."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ... import check

MODES = ("exact", "mvue24")


class Mvue24(NamedTuple):
    """The unbiased estimate of :func:`chts_kernels.weight_grad_mvue`, drawn for (seed, layer, counter).

    seed, layer: 63 and 32 bits. counter: int64 with one element on the device of the gradient. Every backward pass reads it and
    then advances it, on the device: so passes draw afresh, replays of a captured CUDA graph too, a forward pass that activation
    checkpointing repeats changes nothing, and who saves the counter resumes with the same bits. Without a counter every pass
    draws the same.
    """

    seed: int = 0
    layer: int = 0
    counter: torch.Tensor | None = None


def estimator(weight_grad: str | Mvue24) -> Mvue24 | None:
    """None for "exact"; for "mvue24" a seed from torch's generator of the CPU, as dropout does it.

    Raises:
        ValueError, TypeError: for anything else, or a Mvue24 that does not fit.
        RuntimeError: for "mvue24" in a captured or compiled graph, which would repeat one draw for ever.
    """
    if isinstance(weight_grad, Mvue24):
        seed, layer, counter = weight_grad
        check.unsigned(seed, "weight_grad.seed", 63)
        check.unsigned(layer, "weight_grad.layer", 32)
        check_counter(counter, "weight_grad.counter")
        return weight_grad
    check.choice(weight_grad, "weight_grad", MODES)
    if weight_grad == "exact":
        return None
    if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        raise RuntimeError("weight_grad: 'mvue24' draws a seed on the host, which a graph would repeat; pass Mvue24 with a counter")
    return Mvue24(int(torch.randint(1 << 62, (), device="cpu")))


def check_counter(counter: torch.Tensor | None, argument: str = "counter") -> None:
    """An int64 tensor with one element, or None."""
    if counter is not None:
        check.tensor(counter, argument)
        check.require(counter.dtype == torch.int64, argument, "have dtype int64", counter.dtype, TypeError)
        check.require(counter.numel() == 1, argument, "have one element", tuple(counter.shape))
