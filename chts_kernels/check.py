"""Argument checks: every error names the argument, the rule and the value."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .patterns import BLOCK, pattern_table

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require(condition: bool, argument: str, rule: str, value: object, error: type[Exception] = ValueError) -> None:
    """Raise ``error`` saying "argument: must rule, got value" unless ``condition`` holds."""
    if not condition:
        raise error(f"{argument}: must {rule}, got {value}")


def links_per_row(n: int) -> None:
    """``n`` is 1 or 2."""
    is_int = isinstance(n, int) and not isinstance(n, bool)
    require(is_int and n in (1, 2), "n", "be 1 (1:4) or 2 (2:4)", repr(n))


def tensor(value: object, argument: str) -> None:
    require(isinstance(value, torch.Tensor), argument, "be a torch.Tensor", type(value).__name__, TypeError)


def floating(value: torch.Tensor, argument: str, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    tensor(value, argument)
    if value.dtype not in dtypes:  # the message costs more than the check, and this stands in every call
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        require(False, argument, f"have dtype {names}", value.dtype, TypeError)


def same_device(**named: torch.Tensor | None) -> None:
    """All tensors on one device; the error names the first that differs."""
    present = [(k, v) for k, v in named.items() if v is not None]
    first_name, first = present[0]
    for name, value in present[1:]:
        if value.device != first.device:
            require(False, name, f"be on the device of {first_name} ({first.device})", value.device)


def divisible_shape(rows: int, columns: int, argument: str) -> None:
    """Both sizes of a dense [N, K] matrix are positive multiples of 4."""
    require(
        rows > 0 and columns > 0 and rows % BLOCK == 0 and columns % BLOCK == 0,
        argument,
        f"have both sizes positive and divisible by {BLOCK}",
        (rows, columns),
    )


def dense(value: torch.Tensor, argument: str = "dense") -> None:
    """A floating [N, K] matrix, N % 4 == K % 4 == 0."""
    floating(value, argument)
    require(value.dim() == 2, argument, "have 2 dimensions [out_features, in_features]", tuple(value.shape))
    divisible_shape(*value.shape, argument)


def ids(value: torch.Tensor, argument: str = "ids") -> None:
    """uint8 [N/4, K/4]. The range of the ids is data, checked by ``SparseWeight.validate``, not here (it would synchronise)."""
    tensor(value, argument)
    require(value.dtype == torch.uint8, argument, "have dtype uint8", value.dtype, TypeError)
    require(value.dim() == 2, argument, "have 2 dimensions [out_features/4, in_features/4]", tuple(value.shape))
    require(value.numel() > 0, argument, "not be empty", tuple(value.shape))


def values_for_ids(value: torch.Tensor, id_tensor: torch.Tensor, n: int, argument: str = "values") -> None:
    """Values [N, K*n/4] that belong to ids [N/4, K/4]."""
    floating(value, argument)
    expected = (id_tensor.shape[0] * BLOCK, id_tensor.shape[1] * n)
    require(
        tuple(value.shape) == expected,
        argument,
        f"have shape {expected} = [4 * ids.shape[0], {n} * ids.shape[1]] for n = {n}",
        tuple(value.shape),
    )
    same_device(**{argument: value, "ids": id_tensor})


def link_data(value: torch.Tensor, id_tensor: torch.Tensor, n: int, argument: str) -> None:
    """A tensor of any dtype with one element per link, in the order of the values."""
    tensor(value, argument)
    expected = (id_tensor.shape[0] * BLOCK, id_tensor.shape[1] * n)
    require(tuple(value.shape) == expected, argument, f"have shape {expected}", tuple(value.shape))
    same_device(**{argument: value, "ids": id_tensor})


def choice(value: object, argument: str, options: Sequence[object]) -> None:
    require(value in options, argument, f"be one of {list(options)}", repr(value))


def unsigned(value: int, argument: str, bits: int) -> None:
    """An integer that fits the Philox counter or key word it is put in."""
    require(
        isinstance(value, int) and 0 <= value < 1 << bits, argument, f"be an integer in [0, 2**{bits})", repr(value)
    )


def table(n: int):
    """The pattern table after checking ``n``."""
    links_per_row(n)
    return pattern_table(n)
