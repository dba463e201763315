"""The parts of a weight gradient whose tokens were cut, added up: out = (out +) layer 0 + layer 1 + ..., in this order, in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import _triton

BLOCK = 1024


@triton.jit
def add_layers_kernel(layers_ptr, out_ptr, elements, layers, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    total = tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32) if ACCUMULATE else tl.zeros((BLOCK,), tl.float32)
    source = layers_ptr + at
    for _ in range(layers):
        total += tl.load(source, mask=inside, other=0.0)
        source += elements
    tl.store(out_ptr + at, total, mask=inside)


KERNEL = _triton.TritonKernel(add_layers_kernel)


def add_layers(layers: torch.Tensor, out: torch.Tensor, accumulate: bool) -> None:
    """layers: float32 [L, rows, columns]; out: [rows, columns], written, or with ``accumulate`` added to. Rounds once."""
    elements = out.numel()
    arguments = (layers, out, elements, layers.shape[0])
    KERNEL.launch(-(-elements // BLOCK), arguments, (("ACCUMULATE", accumulate), ("BLOCK", BLOCK)), 4)
