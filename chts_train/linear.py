"""SparseLinear and the in-place conversion of models between dense and sparse layers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from chts_kernels import Mvue24, Operands, SparseWeight, pack, prune, random_ids, spmm
from chts_kernels.patterns import BLOCK, pattern_table
from chts_kernels.resident import ResidentOperands

from .baselines import STELinear, dense_linear
from .distributed import GatheredWeight, is_dtensor

logger = logging.getLogger("chts_train")

HEAD_NAMES = ("lm_head", "head", "classifier", "score", "qa_outputs", "fc_out", "output_projection")
"""Last path components that :func:`sparsify_` takes for the output head and leaves dense by default."""


class SparseLinear(nn.Module):
    """``y = x W^T + b`` with a transposable N:M weight; a drop-in for ``nn.Linear`` that stores links only.

    Parameters and buffers: ``values`` [out_features, in_features * n / 4], ``ids`` uint8 [out_features / 4,
    in_features / 4], ``bias`` [out_features] or None. Gradients, moments and checkpoints have the shape of ``values``;
    what kernels derive from them is refreshed in place and never saved.

    Args:
        in_features, out_features: positive multiples of 4.
        bias: learn a bias.
        n: links per group of four: 2 (2:4) or 1 (1:4).
        device, dtype: of the parameters; float32, bfloat16, float16 or float64.

    The attribute ``impl`` ("auto", "reference" or a kernel's name) chooses the implementation of every pass and of the
    evolution of this layer. ``keep_operands = False`` saves memory: what kernels derive from the values (2.25 bytes per
    element of W for 16-bit computing) is derived for the forward pass, again for the backward pass, and kept by neither.
    ``weight_grad`` is "exact" or "mvue24": the gradient of the values, or an unbiased random estimate of it that runs on
    sparse tensor cores (:func:`chts_kernels.weight_grad_mvue`). Drawing it costs a pass over the output gradient and saves work in
    proportion to ``in_features``: on an H100 it takes 0.7-0.8 of the exact gradient's time from 3000 of them on, and 1.2-1.5 of
    it in layers with fewer than 2000 (choose by layer: ``layer.weight_grad = ...``). Its noise follows the layer's seed
    and number and the buffer ``draws``, which counts backward passes and is saved with the layer: a resumed run draws the same
    bits, and a captured CUDA graph draws anew at every replay.

    Raises:
        ValueError: when a size is not a positive multiple of 4 or ``n`` is neither 1 nor 2.

    Initialisation is ``nn.Linear``'s, on uniformly random patterns; both follow ``torch.manual_seed``. There is no rescale
    for sparsity (ALGORITHM section 6).
    """

    ids: torch.Tensor
    impl: str = "auto"
    keep_operands: bool = True
    _is_fsdp_managed_module: bool = False  # fully_shard sets it
    _origin: tuple[int, int] = (0, 0)  # (seed, layer) of random ids, for layers built on the meta device

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        n: int = 2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.n = in_features, out_features, n
        self._origin = int(torch.randint(1 << 31, (), device="cpu")), 0
        device = torch.get_default_device() if device is None else torch.device(device)
        self.register_buffer("ids", self._random_ids("meta" if device.type == "meta" else "cpu").to(device))
        self.values = nn.Parameter(torch.empty(out_features, in_features * n // BLOCK, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self._operands = Operands()
        self.reset_parameters()

    def _random_ids(self, device: torch.device | str) -> torch.Tensor:
        seed, layer = self._origin
        return random_ids(self.out_features, self.in_features, self.n, seed=seed, layer=layer, device=device)

    def reset_parameters(self) -> None:
        """Values and bias as ``nn.Linear`` draws them: uniform in +-1/sqrt(in_features). The pattern stays."""
        bound = self.in_features**-0.5
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)
        self._refresh_resident()

    @property
    def weight(self) -> SparseWeight:
        """The weight as a :class:`chts_kernels.SparseWeight` over this layer's own tensors."""
        if self._is_fsdp_managed_module or not self.keep_operands:
            return GatheredWeight.over(self.ids, self.values, self.n)
        return SparseWeight.view(self.ids, self.values, self.n, self._operands)

    @property
    def weight_grad(self) -> str:
        """"exact" or "mvue24"; to be chosen before checkpoints are loaded and graphs captured."""
        return "mvue24" if "draws" in self._buffers else "exact"

    @weight_grad.setter
    def weight_grad(self, mode: str) -> None:
        if mode not in ("exact", "mvue24"):
            raise ValueError(f"weight_grad: must be 'exact' or 'mvue24', got {mode!r}")
        if mode == "exact":
            self._buffers.pop("draws", None)
        elif self.weight_grad == "exact":
            self.register_buffer("draws", torch.zeros((), dtype=torch.int64, device=self.ids.device))

    @property
    def resident_operands(self) -> torch.dtype | None:
        """The dtype in which this layer's operands are resident (:func:`chts_train.make_operands_resident_`), or None."""
        return self._operands.dtype if isinstance(self._operands, ResidentOperands) else None

    @resident_operands.setter
    def resident_operands(self, dtype: torch.dtype | None) -> None:
        if dtype is None:
            self._operands = Operands() if self._operands.resident else self._operands
            return
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"resident_operands: must be torch.bfloat16, torch.float16 or None, got {dtype!r}")
        if not self.keep_operands:
            raise ValueError("resident_operands: must be None for a layer with keep_operands = False, which keeps no operands")
        if self._is_fsdp_managed_module or is_dtensor(self.values):
            raise ValueError("resident_operands: must be None under FSDP, where nothing derived from gathered values is kept")
        if self.ids.is_meta or self.values.is_meta:
            raise ValueError("resident_operands: must be None on the meta device, which holds nothing to derive operands from")
        if self.resident_operands != dtype:
            self._operands = ResidentOperands(self.values, self.ids, self.n, dtype)

    def require_fresh_operands(self) -> None:
        """Check that resident operands are those of today's values and ids, as far as Python can tell.

        Raises:
            RuntimeError: something that does not follow with the operands wrote to the layer; the message says what to do.
        """
        if isinstance(self._operands, ResidentOperands) and type(self.weight) is SparseWeight:
            self._operands.refresh(self.values, self.ids, self.n, self._operands.dtype)

    def follow_with_operands(self) -> None:
        """For who just changed values and ids: bring resident operands up to date that are not so already."""
        if isinstance(self._operands, ResidentOperands) and type(self.weight) is SparseWeight:
            self._operands.follow(self.values, self.ids, self.n)

    def _refresh_resident(self) -> None:
        if isinstance(self._operands, ResidentOperands):
            if self._is_fsdp_managed_module or is_dtensor(self.values):  # sharded since then: GatheredWeight reads none
                self._operands = Operands()
            else:
                self._operands.pack(self.values, self.ids, self.n, self._operands.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        if "draws" in self._buffers:
            return spmm(x, self.weight, self.bias, weight_grad=Mvue24(*self._origin, self.draws), impl=self.impl)
        return spmm(x, self.weight, self.bias, impl=self.impl)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, n: int = 2, *, init: str = "magnitude", seed: int = 0, layer: int = 0
    ) -> SparseLinear:
        """A sparse layer with the weights of a dense one at its links, and its bias, device, dtype and flags.

        Args:
            linear: its sizes must be divisible by 4.
            n: links per group of four.
            init: "magnitude" (the exact best pattern of every block by ``|w|``) or "random" (uniform ids).
            seed, layer: what the random ids are drawn for.

        Raises:
            ValueError: when sizes, ``n`` or ``init`` do not fit; the message names the argument.

        A layer on the meta device has no magnitudes; with random ids it stays there, and gets them with its memory
        (``to_empty``). Its values are then the caller's to fill, as those of any layer.
        """
        if init not in ("magnitude", "random"):
            raise ValueError(f"init: must be 'magnitude' or 'random', got {init!r}")
        weight = linear.weight.detach()
        if weight.is_meta and init == "magnitude":
            raise ValueError("init: must be 'random' for a layer on the meta device, got 'magnitude'")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.n = linear.in_features, linear.out_features, n
        self._origin = seed, layer
        self.register_buffer("ids", prune(weight, n) if init == "magnitude" else self._random_ids(weight.device))
        links = self.out_features, self.in_features * n // BLOCK
        values = weight.new_empty(links) if weight.is_meta else pack(weight, self.ids, n)
        self.values = nn.Parameter(values, requires_grad=linear.weight.requires_grad)
        self.bias = (
            None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), linear.bias.requires_grad)
        )
        self._operands = Operands()
        return self.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """A dense ``nn.Linear`` with zeros where there are no links."""
        with torch.no_grad():
            return dense_linear(self, self.weight.to_dense(), self.values.requires_grad)

    def extra_repr(self) -> str:
        mode = "" if self.weight_grad == "exact" else f", weight_grad={self.weight_grad!r}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, n={self.n}{mode}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SparseLinear:
        on_meta = self.ids.is_meta
        super()._apply(fn, recurse)
        if isinstance(self._operands, ResidentOperands) and not self.ids.is_meta:
            self._refresh_resident()  # in place where nothing moved: captured graphs stay valid
        else:
            self._operands = Operands()  # of the old device or dtype
        if on_meta and not self.ids.is_meta:  # to_empty: values may hold anything for a while, ids must be patterns
            self.ids.copy_(self._random_ids(self.ids.device))
            if "draws" in self._buffers:
                self.draws.zero_()
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        # Ids are checked before anything of this layer is written; a layer of another n or size is left to the usual
        # size mismatch, which says more.
        errors: list[str] = args[-1]  # type: ignore[assignment]
        values, ids = state_dict.get(prefix + "values"), state_dict.get(prefix + "ids")
        if ids is None or values is None or values.shape != self.values.shape or ids.device.type == "meta":
            super()._load_from_state_dict(state_dict, prefix, *args)
            if not self.ids.is_meta and not self.values.is_meta:
                self._refresh_resident()
            return
        count = len(pattern_table(self.n))
        if ids.dtype != torch.uint8:
            errors.append(f"{prefix}ids: must have dtype uint8, got {ids.dtype}")
        elif bool((ids >= count).any()):
            errors.append(f"{prefix}ids: must be pattern ids below {count} for n = {self.n}, got {int(ids.max())}")
        else:
            super()._load_from_state_dict(state_dict, prefix, *args)
            self._refresh_resident()


@dataclass(frozen=True)
class SparsityConfig:
    """What :func:`sparsify_` makes of a linear layer.

    Args:
        n: links per group of four, 2 or 1.
        init: "random" (uniform patterns) or "magnitude" (best pattern by ``|w|``).
        seed: of the random patterns.
        kind: "sparse" (:class:`SparseLinear`) or "ste" (:class:`chts_train.baselines.STELinear`: dense weights, masked in
            every forward pass).
        srste_lambda: SR-STE's decay of masked-out weights; 0 is plain STE.
        impl: of the sparse layers: "auto", "reference" or a kernel's name.
        weight_grad: of the sparse layers: "exact" or "mvue24"; see :class:`SparseLinear`.
        keep_operands: of the sparse layers; see :class:`SparseLinear`.
    """

    n: int = 2
    init: str = "random"
    seed: int = 0
    kind: str = "sparse"
    srste_lambda: float = 0.0
    impl: str = "auto"
    keep_operands: bool = True
    weight_grad: str = "exact"

    def __post_init__(self) -> None:
        rules = {
            "n": (1, 2), "init": ("random", "magnitude"), "kind": ("sparse", "ste"),
            "weight_grad": ("exact", "mvue24") if self.kind == "sparse" else ("exact",),
        }  # fmt: skip
        for name, options in rules.items():
            if getattr(self, name) not in options:
                raise ValueError(f"{name}: must be one of {list(options)}, got {getattr(self, name)!r}")
        if self.srste_lambda < 0:
            raise ValueError(f"srste_lambda: must not be negative, got {self.srste_lambda}")


@dataclass(frozen=True)
class SparsifyRecord:
    """What happened to one linear layer: ``action`` is "sparse", "ste" or "skipped", ``reason`` says why."""

    name: str
    action: str
    reason: str


FilterFn = Callable[[str, nn.Module], bool]


def sparsify_(
    model: nn.Module, config: SparsityConfig | None = None, filter_fn: FilterFn | None = None
) -> list[SparsifyRecord]:
    """Replace the linear layers of ``model`` by sparse ones, in place. Build the optimizer afterwards.

    Left dense, and logged with the reason: output heads (by name, :data:`HEAD_NAMES`, or as the model's
    ``get_output_embeddings()``), layers whose weight is shared with another module, sizes not divisible by 4, and
    subclasses of ``nn.Linear``, whose owners may reach into their weight. Embeddings are no linear layers.

    Args:
        model: changed in place; at least one of its submodules should be an ``nn.Linear``.
        config: default :class:`SparsityConfig` (2:4, random patterns).
        filter_fn: ``(qualified name, module) -> bool``; replaces the choice by head name, keeps the other rules.

    Returns:
        One record per linear layer, in module order.

    Raises:
        ValueError: when ``model`` is itself a linear layer (it has no parent to be replaced in), or when nothing at all
            could be made sparse; the message lists the reasons.
    """
    config = config or SparsityConfig()
    if isinstance(model, nn.Linear):
        raise ValueError(
            "model: must contain the layers to replace, got a bare nn.Linear; use SparseLinear.from_linear"
        )
    output = getattr(model, "get_output_embeddings", lambda: None)()
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1

    records, replacements, layer = [], {}, 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        reason = _reason_to_skip(name, module, output, uses, filter_fn)
        if reason is not None:
            records.append(SparsifyRecord(name, "skipped", reason))
            logger.info("sparsify_: %s skipped: %s", name, reason)
            continue
        if config.kind == "ste":
            replacements[module] = STELinear.from_linear(module, config.n, srste_lambda=config.srste_lambda)
        else:
            sparse = SparseLinear.from_linear(module, config.n, init=config.init, seed=config.seed, layer=layer)
            sparse.impl, sparse.keep_operands = config.impl, config.keep_operands
            sparse.weight_grad = config.weight_grad
            replacements[module] = sparse
        layer += 1
        shape = f"{module.out_features} x {module.in_features}"
        records.append(SparsifyRecord(name, config.kind, f"{shape} to {config.n}:4"))
    if not replacements:
        reasons = "; ".join(f"{r.name}: {r.reason}" for r in records) or "it has no nn.Linear"
        raise ValueError(f"model: must have a linear layer that can be made sparse, got none ({reasons})")
    _replace(model, replacements)
    logger.info("sparsify_: %d linear layers to %s %d:4", layer, config.kind, config.n)
    return records


def densify_(model: nn.Module) -> int:
    """Replace every :class:`SparseLinear` and :class:`STELinear` of ``model`` by ``nn.Linear`` with zeros, in place.

    Returns:
        The number of replaced layers.
    """
    replacements = {m: m.to_linear() for m in model.modules() if isinstance(m, SparseLinear | STELinear)}
    _replace(model, replacements)
    return len(replacements)


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """The sparse layers of a model by qualified name, in module order: the order that numbers them in the noise."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def _reason_to_skip(
    name: str, module: nn.Linear, output: nn.Module | None, uses: dict[int, int], filter_fn: FilterFn | None
) -> str | None:
    if filter_fn is not None and not filter_fn(name, module):
        return "filter_fn said no"
    if filter_fn is None and (module is output or name.rpartition(".")[2] in HEAD_NAMES):
        return "output head"
    if isinstance(module, STELinear) or type(module) is not nn.Linear:
        return f"{type(module).__name__} is a subclass of nn.Linear"
    if uses[id(module.weight)] > 1:
        return "its weight is shared with another module"
    if module.in_features % BLOCK or module.out_features % BLOCK:
        return f"sizes {module.out_features} x {module.in_features} are not both divisible by {BLOCK}"
    return None


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children would pass over a second use
            if child in replacements:
                setattr(parent, name, replacements[child])
