"""pack: dense values at the links; unpack: its inverse; pack_operands_: what the sparse tensor cores read."""

from __future__ import annotations

from typing import Any

import torch

from ... import check
from ...layout import metadata_shape
from ...patterns import BLOCK
from .. import _triton
from .._library import TENSORS, Op, Route
from . import reference

PACK = Op(
    "pack(Tensor dense, Tensor ids, int n) -> Tensor",
    reference.pack,
    lambda dense, ids, n: dense.new_empty(dense.shape[0], dense.shape[1] // BLOCK * n),
)
UNPACK = Op(
    "unpack(Tensor values, Tensor ids, int n) -> Tensor",
    reference.unpack,
    lambda values, ids, n: values.new_empty(ids.shape[0] * BLOCK, ids.shape[1] * BLOCK),
)


def _kind(
    values: torch.Tensor, ids: torch.Tensor, n: int, operand: torch.Tensor | None, meta: torch.Tensor, operand_t: torch.Tensor,
    meta_t: torch.Tensor,
) -> tuple[Any, ...] | None:  # fmt: skip
    """What a route depends on; None for what is not on a CUDA device, or would be copied."""
    if type(n) is not int or type(values) not in TENSORS or values.get_device() < 0:
        return None
    kind, addresses = [n], 0
    for t in (values, ids, operand, meta, operand_t, meta_t):
        if t is None:
            kind.append(None)
        elif type(t) in TENSORS and t.is_contiguous():
            kind += t.shape, t.dtype, t.get_device()
            addresses |= t.data_ptr()
        else:
            return None
    return None if addresses % _triton.ALIGNMENT else tuple(kind)


def _prepare(values: torch.Tensor, *rest: Any) -> Route | None:
    from .triton_pack import Packing

    return Packing(values, *rest) if torch._C._cuda_getDevice() == values.get_device() else None


PACK_OPERANDS_ = Op(
    "pack_operands_(Tensor values, Tensor ids, int n, Tensor(a!)? operand, Tensor(b!) meta, Tensor(c!) operand_t, "
    "Tensor(d!) meta_t) -> ()",
    reference.pack_operands_,
    lambda *args: None,
    kind=_kind,
)


def _why_not_pack_operands(values, ids, n, operand, meta, operand_t, meta_t) -> str | None:
    outputs = {"operand": operand, "meta": meta, "operand_t": operand_t, "meta_t": meta_t}
    return _triton.why_not(values, **outputs) or _triton.why_not_operands(values, operand_t)


def _why_not_compress(source, ids, n) -> str | None:
    return _triton.why_not(source)


PACK.kernel("triton", _why_not_compress)(_triton.lazy(f"{__name__}.triton_compress", "pack"))
UNPACK.kernel("triton", _why_not_compress)(_triton.lazy(f"{__name__}.triton_compress", "unpack"))
PACK_OPERANDS_.kernel("triton", _why_not_pack_operands, _prepare)(_triton.lazy(f"{__name__}.triton_pack", "pack_operands_"))


def pack(dense: torch.Tensor, ids: torch.Tensor, n: int = 2, *, impl: str = "auto") -> torch.Tensor:
    """The values of ``dense`` at the links of ``ids``.

    Which element is a link is read from the pattern, never from ``value != 0``: zeros, -0.0, inf and NaN all keep their
    place and their bits.

    Args:
        dense: [N, K], float32, bfloat16, float16 or float64.
        ids: pattern ids, uint8 [N/4, K/4].
        n: links per row of a 4x4 block.

    Returns:
        [N, K*n/4], row-compressed, columns ascending, dtype of ``dense``.

    Raises:
        ValueError, TypeError: when shapes, dtypes or devices do not fit; the message names the argument.
    """
    check.links_per_row(n)
    check.dense(dense)
    check.ids(ids)
    expected = (dense.shape[0] // BLOCK, dense.shape[1] // BLOCK)
    check.require(tuple(ids.shape) == expected, "ids", f"have shape {expected} = dense.shape / 4", tuple(ids.shape))
    check.same_device(dense=dense, ids=ids)
    return PACK(dense, ids, n, impl=impl)


def unpack(values: torch.Tensor, ids: torch.Tensor, n: int = 2, *, impl: str = "auto") -> torch.Tensor:
    """The dense matrix [N, K] with ``values`` [N, K*n/4] at the links of ``ids`` [N/4, K/4] and +0 elsewhere.

    Raises:
        ValueError, TypeError: when shapes, dtypes or devices do not fit; the message names the argument.
    """
    check.links_per_row(n)
    check.ids(ids)
    check.values_for_ids(values, ids, n)
    return UNPACK(values, ids, n, impl=impl)


def empty_operands(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device, *, with_operand: bool = True
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unfilled (operand [N, K/2], meta, operand_t [K, N/2], meta_t) for a [N, K] weight; without operand, None in its place."""
    return (
        torch.empty(rows, columns // 2, dtype=dtype, device=device) if with_operand else None,
        torch.empty(metadata_shape(rows, columns), dtype=torch.int32, device=device),
        torch.empty(columns, rows // 2, dtype=dtype, device=device),
        torch.empty(metadata_shape(columns, rows), dtype=torch.int32, device=device),
    )


def pack_operands_(
    values: torch.Tensor,
    ids: torch.Tensor,
    n: int,
    operand: torch.Tensor | None,
    meta: torch.Tensor,
    operand_t: torch.Tensor,
    meta_t: torch.Tensor,
    *,
    impl: str = "auto",
) -> None:
    """Fill the operands of :func:`empty_operands` in place from ``values`` [N, K*n/4] and ``ids`` [N/4, K/4].

    ``operand`` and ``operand_t`` hold W and W^T as 2:4 rows in their own dtype (1:4 is widened by explicit zeros); None
    for ``operand`` leaves it out, for 2:4 values that already have the compute dtype and are the operand. ``meta`` and
    ``meta_t`` hold the matching metadata (:mod:`chts_kernels.layout.metadata`).

    Raises:
        ValueError, TypeError: when shapes, dtypes or devices do not fit; the message names the argument.
    """
    found = PACK_OPERANDS_.route(values, ids, n, operand, meta, operand_t, meta_t, impl=impl)
    if found is not None:
        return found(values, ids, n, operand, meta, operand_t, meta_t)
    check.links_per_row(n)
    check.ids(ids)
    check.values_for_ids(values, ids, n)
    rows, columns = ids.shape[0] * BLOCK, ids.shape[1] * BLOCK
    for name, tensor, shape in (
        ("operand", operand, (rows, columns // 2)),
        ("meta", meta, metadata_shape(rows, columns)),
        ("operand_t", operand_t, (columns, rows // 2)),
        ("meta_t", meta_t, metadata_shape(columns, rows)),
    ):
        if tensor is not None or name != "operand":
            check.floating(tensor, name, (torch.int32,) if name.startswith("meta") else check.FLOATS)
            check.require(tuple(tensor.shape) == shape, name, f"have shape {shape}", tuple(tensor.shape))
    if operand is not None:
        check.floating(operand, "operand", (operand_t.dtype,))
    check.same_device(ids=ids, operand=operand, meta=meta, operand_t=operand_t, meta_t=meta_t)
    return PACK_OPERANDS_(values, ids, n, operand, meta, operand_t, meta_t, impl=impl)
