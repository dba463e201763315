"""The training methods by name: CHTs24 and CHTs14, their ablations, and the baselines (ALGORITHM sections 2, 4 and 5)."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .baselines import attach_srste_decay
from .linear import SparsityConfig
from .topology import TopologyEvolver, TopologySchedule

if TYPE_CHECKING:
    from .configs import RunConfig

SRSTE_LAMBDA = 2e-4
"""Where the tuning over 6e-5, 2e-4, 6e-4 starts."""
EARLY: Mapping[str, Any] = types.MappingProxyType(
    {"interval": 25, "zeta": 0.3, "zeta_end": 0.0, "stop_fraction": 0.1, "lr_ramp_steps": 0}
)
"""Much turnover while links have nothing to lose yet: often, and over by the end of the presets' warm-up.

Chosen by small models; behind static patterns on Llama-60M (benchmarks/LOG.md, sixth session)."""
DENSE_START: Mapping[str, Any] = types.MappingProxyType({"dense_fraction": 0.25})
"""Where the large weights are after a quarter of the steps. Level with random patterns at 2:4 on Llama-60M (LOG.md, eighth session)."""
STE_WINDOW: Mapping[str, Any] = types.MappingProxyType({"ste_window": (0.15, 0.85)})
"""When masks of dense weights find better patterns than those that a run begins with (benchmarks/LOG.md, ninth and tenth sessions)."""
WINDOW_LAMBDA = 6e-5
"""SR-STE's decay in such a window: what its tuning chose."""


@dataclass(frozen=True)
class Method:
    """How a method makes a model sparse and what it does with the topology.

    ``kind`` is "dense", "sparse" (compressed weights) or "ste" (dense weights, masked in every forward pass); ``init`` the
    initial topology, "random" or "magnitude"; ``removal`` and ``regrowth`` the rule, None for a topology that stays.
    ``settings``: fields of :class:`chts_train.configs.RunConfig` that the method has other defaults for than the presets have; the
    command line applies them where nothing else is asked for.
    """

    name: str
    description: str
    kind: str = "sparse"
    n: int = 2
    init: str = "random"
    removal: str | None = None
    regrowth: str | None = None
    srste_lambda: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def evolves(self) -> bool:
        return self.removal is not None

    def sparsity_config(
        self,
        seed: int = 0,
        *,
        init: str | None = None,
        srste_lambda: float | None = None,
        impl: str = "auto",
        weight_grad: str = "exact",
        form: str | None = None,
    ) -> SparsityConfig | None:
        """The argument for :func:`chts_train.sparsify_`; None for dense weights.

        Args:
            seed: of random patterns.
            init: another initial topology; re-training passes "magnitude".
            srste_lambda: another decay, for SR-STE methods.
            impl: implementation of the sparse layers.
            weight_grad: "exact" or "mvue24", for methods with compressed weights.
            form: what is trained at the moment, from :meth:`form_of`; None: what the method trains in the end.

        Raises:
            ValueError: when the method cannot have that ``weight_grad``.
        """
        if self.kind != "sparse" and weight_grad != "exact":
            raise ValueError(f"weight_grad: must be 'exact' for the method {self.name}, got {weight_grad!r}")
        form = form or self.kind
        if form == "dense":
            return None
        decay = self.srste_lambda if srste_lambda is None or self.srste_lambda == 0 else srste_lambda
        if form == "ste" and self.kind == "sparse":
            decay, weight_grad = srste_lambda or WINDOW_LAMBDA, "exact"
        return SparsityConfig(
            n=self.n,
            init=init or self.init,
            seed=seed,
            kind=form,
            srste_lambda=decay,
            impl=impl,
            weight_grad=weight_grad,
        )

    def form_of(self, config: RunConfig, step: int) -> str:
        """What step ``step`` of a run, counted from 0, trains: "dense", "ste" (dense, masked) or "sparse" (compressed) weights."""
        return config.form_of(step) if self.kind == "sparse" else self.kind

    def form_after(self, config: RunConfig, steps: int) -> str:
        """What a checkpoint after so many steps holds: the form that the last of them trained."""
        return self.form_of(config, max(0, steps - 1))


def _methods() -> dict[str, Method]:
    both = []
    for n, tag in ((2, "24"), (1, "14")):
        other = "" if n == 2 else "14"
        soft = {"n": n, "removal": "soft", "regrowth": "soft"}
        both += [
            Method(f"chts{tag}", f"soft removal, Cannistraci-Hebb scores, soft regrowth, {n}:4", **soft),
            Method(
                f"random-regrow{other}",
                f"chts{tag} with random regrowth: the control",
                n=n,
                removal="soft",
                regrowth="random",
            ),
            Method(
                f"greedy{other}", "hard removal, greedy regrowth (ablation)", n=n, removal="hard", regrowth="greedy"
            ),
            Method(
                f"soft-regrow{other}", "hard removal, soft regrowth (ablation)", n=n, removal="hard", regrowth="soft"
            ),
            Method(
                f"rigl{tag}",
                f"moves of whole {n}:4 patterns early on, by |w| and the dense gradient (RigL under the masks)",
                n=n,
                removal="moves",
                regrowth="gradient",
                settings=EARLY,
            ),
            Method(
                f"random-moves{other}",
                f"rigl{tag} with chance in place of the gradient: its control",
                n=n,
                removal="moves",
                regrowth="random",
                settings=EARLY,
            ),
            Method(
                f"chts-moves{other}",
                f"soft moves of whole {n}:4 patterns early on, by |w| and Cannistraci-Hebb scores",
                n=n,
                removal="soft-moves",
                regrowth="soft",
                settings=EARLY,
            ),
            Method(f"static{other}", f"random {n}:4 patterns that stay", n=n),
            Method(f"ste{tag}", f"dense weights, transposable {n}:4 mask in every forward pass", n=n, kind="ste"),
            Method(
                f"srste{tag}", f"ste{tag} with decay of masked-out weights", n=n, kind="ste", srste_lambda=SRSTE_LAMBDA
            ),
            Method(f"nvidia{other}", f"prune to {n}:4 by magnitude once, keep the mask", n=n, init="magnitude"),
            Method(
                f"dense-start{tag}",
                f"dense for a quarter of the steps, then pruned to {n}:4 by magnitude; the mask stays",
                n=n,
                init="magnitude",
                settings=DENSE_START,
            ),
            Method(
                f"ste-window{tag}",
                f"random {n}:4 patterns; from 15 to 85 % of the steps dense weights and SR-STE, which learns the patterns that stay",
                n=n,
                settings=STE_WINDOW,
            ),
        ]
    return {m.name: m for m in [Method("dense", "no sparsity", kind="dense"), *both]}


METHODS: dict[str, Method] = _methods()


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: when there is none; the message lists them.
    """
    if name not in METHODS:
        raise ValueError(f"method: must be one of {list(METHODS)}, got {name!r}")
    return METHODS[name]


def attach_method(
    method: Method,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: TopologySchedule,
    seed: int = 0,
    step_count: int = 0,
    new_moments: str = "zero",
) -> TopologyEvolver | None:
    """What a method needs besides the sparse model: SR-STE's decay is hooked into the optimizer, an evolver is returned.

    ``step_count``, ``new_moments``: of :class:`TopologyEvolver`.

    Returns:
        The evolver (not attached: call its ``step`` in the loop), or None when the topology does not evolve.
    """
    if method.srste_lambda > 0:
        attach_srste_decay(model, optimizer)
    if not method.evolves:
        return None
    return TopologyEvolver(
        model, optimizer, schedule, removal=method.removal, regrowth=method.regrowth, seed=seed, step_count=step_count,
        new_moments=new_moments,
    )  # fmt: skip
