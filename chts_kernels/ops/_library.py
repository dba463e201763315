"""One operation, several implementations: registration in ``torch.ops.chts``, selection, explanation.

Each op has a *reference* in plain torch, which is its specification and the backend of every device without a kernel, and
any number of kernels of the same signature. ``impl="auto"`` takes the first registered kernel that supports the
arguments, else the reference; naming an implementation that cannot run raises and says why.

Eager calls are short of host time, and it is Python's. What shapes, dtypes, strides and devices decide (checks, choice of the
implementation, grid, kernel) is decided once: a call that went that long way leaves a :class:`Route`, and the next of its kind
takes it: look-up, output, launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.autograd import forward_ad, profiler

from .. import check

LIBRARY = torch.library.Library("chts", "DEF")
REGISTRY: dict[str, Op] = {}
TENSORS = (torch.Tensor, torch.nn.Parameter)
"""What a route serves: not their subclasses, which may keep their data elsewhere."""
ROUTES_LIMIT = 4096
_is_compiling = torch.compiler.is_compiling
_dispatch_modes, _transforms = torch._C._len_torch_dispatch_stack, torch._C._are_functorch_transforms_active
# The allocation of torch's own compiler: on the current device, without the dispatcher, half the time of `torch.empty`.
_empty_strided_cuda = getattr(getattr(torch._C._dynamo, "guards", None), "_empty_strided_cuda", None)


def unwatched() -> bool:
    """Whether calls of this thread are run as they come: not compiled, transformed, intercepted, recorded under their names or
    followed by forward-mode differentiation."""
    return not (
        _is_compiling() or _dispatch_modes() or _transforms() or profiler._is_profiler_enabled or forward_ad._current_level >= 0
    )


def empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor on the current CUDA device; ``strides`` must be those of ``shape``."""
    if _empty_strided_cuda is None or torch.are_deterministic_algorithms_enabled():
        return torch.empty(shape, dtype=dtype, device="cuda")
    return _empty_strided_cuda(shape, strides, dtype)


class Route(Protocol):
    """A prepared launch on CUDA device ``device``, to be called with the op's arguments when that device is current."""

    device: int

    def __call__(self, *args: Any) -> Any: ...


@dataclass(frozen=True)
class Implementation:
    """``run`` has the reference's signature; ``why_not`` takes the same arguments and returns None if it can run them; ``prepare``
    takes them after they were run and returns the route of calls of their kind, or None."""

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None]
    prepare: Callable[..., Route | None] | None = None


class Op:
    """A ``chts::`` operator. Calling it in eager mode goes straight to the implementation; under ``torch.compile``, a
    profiler, fake tensors or any other dispatch mode it goes through ``torch.ops.chts``.

    Args:
        schema: the operator's schema without the trailing ``impl`` argument, as in ``"unpack(Tensor values, ...) -> Tensor"``.
        reference: the specification in torch operations; not differentiated through.
        fake: output metadata from input metadata.
        selects_by: what of the arguments decides whether a kernel can run them (device, dtype, ...), when that is cheap to
            say: the choice is then remembered.
        kind: for an op with routes: all that a route may depend on and all that the checks of its callers look at, hashable; None
            for arguments that a kernel would have to copy, and for anything but CUDA tensors. Must take whatever callers pass.
        any_rows: its kernels take matrices with rows at any distance. Inductor pads the rows of what it computes, and copies them
            back for every op that does not say so.
    """

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        selects_by: Callable[..., tuple[Any, ...]] | None = None,
        kind: Callable[..., tuple[Any, ...] | None] | None = None,
        any_rows: bool = False,
    ) -> None:
        arguments, _, returns = schema.partition(") -> ")
        self.name = schema.partition("(")[0]
        self.reference = reference
        self.kernels: list[Implementation] = []
        self.selects_by = selects_by
        self.kind = kind
        self._chosen: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._routes: dict[tuple[Any, ...], Route] = {}
        # Keyword-only: the dispatcher hands positional arguments over without their names.
        tags = (torch.Tag.pt2_compliant_tag, *([torch.Tag.needs_fixed_stride_order] if any_rows else []))
        LIBRARY.define(f'{arguments}, *, str impl="auto") -> {returns}', tags=tags)
        LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"chts::{self.name}", lambda *args, impl="auto": fake(*args), lib=LIBRARY)
        self.overload = getattr(torch.ops.chts, self.name).default
        REGISTRY[self.name] = self

    def kernel(
        self,
        name: str,
        why_not: Callable[..., str | None],
        prepare: Callable[..., Route | None] | None = None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: register an implementation; earlier registrations are preferred by ``impl="auto"``."""

        def register(run: Callable[..., Any]) -> Callable[..., Any]:
            self.kernels.append(Implementation(name, run, why_not, prepare))
            self._chosen.clear()
            self._routes.clear()
            return run

        return register

    @property
    def names(self) -> list[str]:
        return ["auto", "reference", *(k.name for k in self.kernels)]

    def select(self, impl: str, *args: Any) -> Callable[..., Any]:
        """The function that ``impl`` names for these arguments.

        Raises:
            ValueError: when ``impl`` is unknown.
            RuntimeError: when the named implementation cannot run here; the message says why.
        """
        if impl == "reference":
            return self._run_reference
        for kernel in self.kernels:
            if impl in (kernel.name, "auto"):
                reason = kernel.why_not(*args)
                if reason is None:
                    return kernel.run
                if impl == kernel.name:
                    raise RuntimeError(f"impl: {impl!r} cannot run chts.{self.name} here: {reason}")
        check.choice(impl, "impl", self.names)
        return self._run_reference

    def _run_reference(self, *args: Any) -> Any:
        device = next((a.device.type for a in args if isinstance(a, torch.Tensor)), "cpu")
        if not torch.is_autocast_enabled(device):
            return self.reference(*args)
        with torch.autocast(device, enabled=False):  # the caller chose the dtypes; autocast must not choose again
            return self.reference(*args)

    def _select_cached(self, impl: str, *args: Any) -> Callable[..., Any]:
        if self.selects_by is None:
            return self.select(impl, *args)
        key = (impl, *self.selects_by(*args))
        run = self._chosen.get(key)
        if run is None:
            run = self._chosen[key] = self.select(impl, *args)
        return run

    def route(self, *args: Any, impl: str = "auto") -> Route | None:
        """What an earlier call of this kind left, when nothing about this one forbids it; None sends it the long way. Arguments: any,
        not checked yet."""
        if self.kind is None or not unwatched():
            return None
        kind = self.kind(*args)
        if kind is None:
            return None
        try:
            found = self._routes.get((impl, kind))
        except TypeError:  # not hashable: an argument that the checks are going to name
            return None
        return found if found is not None and torch._C._cuda_getDevice() == found.device else None

    def __call__(self, *args: Any, impl: str = "auto") -> Any:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return self.overload(*args, impl=impl)
        if profiler._is_profiler_enabled:  # through the dispatcher every op has its name there, and its NVTX range
            with torch.no_grad():
                return self.overload(*args, impl=impl)
        found = self.route(*args, impl=impl)
        return self._run(*args, impl=impl) if found is None else found(*args)

    def _run(self, *args: Any, impl: str = "auto") -> Any:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._run(*args, impl=impl)
        run = self._select_cached(impl, *args)
        result = run(*args)
        if self.kind is not None:
            self._leave_route(run, impl, args)
        return result

    def _leave_route(self, run: Callable[..., Any], impl: str, args: tuple[Any, ...]) -> None:
        prepare = next((kernel.prepare for kernel in self.kernels if kernel.run is run), None)
        if prepare is None:
            return
        key = impl, self.kind(*args)
        if key[1] is None or key in self._routes:
            return
        route = prepare(*args)
        if route is not None:
            if len(self._routes) >= ROUTES_LIMIT:
                self._routes.clear()
            self._routes[key] = route
