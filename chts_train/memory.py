"""Memory of training a linear layer, in bytes, counted from its size: sparse, and dense under mixed precision."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass

import torch
from torch import nn

from chts_kernels import check
from chts_kernels.layout import metadata_shape
from chts_kernels.patterns import BLOCK

from .configs import preset
from .linear import SparseLinear, SparsityConfig, sparsify_


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that stay from step to step, activations not counted.

    ``operands``: what the products read besides the parameters: values and metadata of W and of W^T in the compute dtype,
    or autocast's copy of a dense weight, which lives from the forward to the backward pass. ``ids``: the topology.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    operands: int = 0
    ids: int = 0

    @property
    def total(self) -> int:
        return sum(astuple(self))

    def __add__(self, other: TrainingMemory) -> TrainingMemory:
        return TrainingMemory(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def weight_memory(
    out_features: int,
    in_features: int,
    n: int | None = 2,
    *,
    dtype: torch.dtype = torch.float32,
    compute: torch.dtype = torch.bfloat16,
    moment_dtype: torch.dtype | None = None,
    keep_operands: bool = True,
) -> TrainingMemory:
    """What a weight [out_features, in_features] and Adam's two moments need.

    Args:
        n: links per group of four, or None for a dense weight.
        dtype: of parameter and gradient; ``compute``: of the products; ``moment_dtype``: of the moments, None for ``dtype``.
        keep_operands: of :class:`SparseLinear`.

    Raises:
        ValueError: when a sparse size is not a positive multiple of 4, or ``n`` is none of 1, 2 and None.
    """
    if n is not None:
        check.links_per_row(n)
        check.divisible_shape(out_features, in_features, "(out_features, in_features)")
    elements = out_features * in_features
    stored = elements if n is None else elements * n // BLOCK
    moments = 2 * stored * (moment_dtype or dtype).itemsize
    operands = ids = 0
    if n is None:
        operands = elements * compute.itemsize if compute != dtype else 0
    else:
        ids = elements // BLOCK**2
        if keep_operands:
            of_row = 0 if n == 2 and dtype == compute else elements // 2 * compute.itemsize  # the values are the operand
            both = metadata_shape(out_features, in_features), metadata_shape(in_features, out_features)
            metadata = sum(4 * math.prod(shape) for shape in both)
            operands = of_row + elements // 2 * compute.itemsize + metadata
    return TrainingMemory(stored * dtype.itemsize, stored * dtype.itemsize, moments, operands, ids)


def sparse_memory(
    model: nn.Module | Iterable[SparseLinear],
    *,
    compute: torch.dtype = torch.bfloat16,
    moment_dtype: torch.dtype | None = None,
) -> tuple[TrainingMemory, TrainingMemory]:
    """What the weights of a model's sparse layers need, and what dense weights of their sizes would.

    Args:
        model: its sparse layers may be on the meta device; nothing is allocated.
        compute, moment_dtype: those of :func:`weight_memory`; the dense layers keep their moments in the dtype of the values.

    Raises:
        ValueError: when there is no sparse layer.
    """
    layers = [m for m in (model.modules() if isinstance(model, nn.Module) else model) if isinstance(m, SparseLinear)]
    check.require(bool(layers), "model", "have at least one SparseLinear", "none")
    sparse = dense = TrainingMemory()
    for layer in layers:
        shape, dtype = (layer.out_features, layer.in_features), layer.values.dtype
        options = {"dtype": dtype, "compute": compute}
        sparse += weight_memory(*shape, layer.n, moment_dtype=moment_dtype, keep_operands=layer.keep_operands, **options)
        dense += weight_memory(*shape, None, **options)
    return sparse, dense


def preset_memory(name: str) -> str:
    """A table: what training the linear layers of a preset needs, dense under mixed precision and sparse in its variants."""
    columns: dict[str, TrainingMemory] = {}
    for label, config, moments in (
        ("2:4", SparsityConfig(), None),
        ("2:4, bf16 moments", SparsityConfig(), torch.bfloat16),
        ("... operands not kept", SparsityConfig(keep_operands=False), torch.bfloat16),
        ("1:4", SparsityConfig(n=1), None),
    ):
        with torch.device("meta"):
            model = preset(name).build_model()
        sparsify_(model, config)
        columns[label], dense = sparse_memory(model, moment_dtype=moments)
        columns.setdefault("dense", dense)
    rows = {label: asdict(m) | {"total": m.total} for label, m in sorted(columns.items(), key=lambda c: c[0] != "dense")}
    lines = [f"training the sparse-able weights of {name}, MiB (float32 parameters, bfloat16 computing, Adam):"]
    for i, (label, row) in enumerate(rows.items()):
        if not i:
            lines.append(" " * 24 + "".join(f"{key:>12}" for key in row) + "  of dense")
        share = row["total"] / columns["dense"].total
        lines.append(f"  {label:22}" + "".join(f"{size / 2**20:12,.1f}" for size in row.values()) + f"  {share:8.3f}")
    return "\n".join(lines)
