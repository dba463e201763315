"""One operation, several implementations: registration in ``torch.ops.chts``, selection, explanation.

Each op has a *reference* in plain torch, which is its specification and the backend of every device without a kernel, and
any number of kernels of the same signature. ``impl="auto"`` takes the first registered kernel that supports the
arguments, else the reference; naming an implementation that cannot run raises and says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import profiler

from .. import check

LIBRARY = torch.library.Library("chts", "DEF")
REGISTRY: dict[str, Op] = {}


@dataclass(frozen=True)
class Implementation:
    """``run`` has the reference's signature; ``why_not`` takes the same arguments and returns None if it can run them."""

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None]


class Op:
    """A ``chts::`` operator. Calling it in eager mode goes straight to the implementation; under ``torch.compile``, a
    profiler, fake tensors or any other dispatch mode it goes through ``torch.ops.chts``.

    Args:
        schema: the operator's schema without the trailing ``impl`` argument, as in ``"unpack(Tensor values, ...) -> Tensor"``.
        reference: the specification in torch operations; not differentiated through.
        fake: output metadata from input metadata.
        selects_by: what of the arguments decides whether a kernel can run them (device, dtype, ...), when that is cheap to
            say: the choice is then remembered.
    """

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        selects_by: Callable[..., tuple[Any, ...]] | None = None,
    ) -> None:
        arguments, _, returns = schema.partition(") -> ")
        self.name = schema.partition("(")[0]
        self.reference = reference
        self.kernels: list[Implementation] = []
        self.selects_by = selects_by
        self._chosen: dict[tuple[Any, ...], Callable[..., Any]] = {}
        # Keyword-only: the dispatcher hands positional arguments over without their names.
        LIBRARY.define(f'{arguments}, *, str impl="auto") -> {returns}', tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"chts::{self.name}", lambda *args, impl="auto": fake(*args), lib=LIBRARY)
        self.overload = getattr(torch.ops.chts, self.name).default
        REGISTRY[self.name] = self

    def kernel(
        self, name: str, why_not: Callable[..., str | None]
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: register an implementation; earlier registrations are preferred by ``impl="auto"``."""

        def register(run: Callable[..., Any]) -> Callable[..., Any]:
            self.kernels.append(Implementation(name, run, why_not))
            self._chosen.clear()
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

    def __call__(self, *args: Any, impl: str = "auto") -> Any:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return self.overload(*args, impl=impl)
        if profiler._is_profiler_enabled:  # through the dispatcher every op has its name there, and its NVTX range
            with torch.no_grad():
                return self.overload(*args, impl=impl)
        return self._run(*args, impl=impl)

    def _run(self, *args: Any, impl: str = "auto") -> Any:
        if not torch.is_grad_enabled():
            return self._select_cached(impl, *args)(*args)
        with torch.no_grad():
            return self._select_cached(impl, *args)(*args)
