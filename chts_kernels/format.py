"""SparseWeight: a transposable N:M matrix as pattern ids and compressed values, and nothing else.

Pattern ids are the only topology. Masks, metadata and transposed copies are derived by table look-up; what is derived
for a kernel lives in :class:`Operands`, is refreshed in place when values or ids change, and is never saved.
"""

from __future__ import annotations

import torch

from . import check, rng
from .freshness import Freshness
from .ops.pack import PACK_OPERANDS_, empty_operands, pack, unpack
from .ops.pack.reference import transpose_values
from .ops.prune import prune
from .patterns import BLOCK, pattern_table


class SparseWeight:
    """A matrix W [N, K] whose every 4x4 block follows a legal pattern: n of 4 in each row and in each column.

    The tensors are held, not copied: ``values`` may be an ``nn.Parameter`` and both may be changed in place.

    Args:
        ids: uint8 [N/4, K/4], row-major.
        values: [N, K*n/4], float32, bfloat16, float16 or float64; row-compressed, columns ascending.
        n: links per row and column of a block: 2 (2:4) or 1 (1:4).
        operands: operands to go on using; for owners that rebuild the view around the same tensors.

    Raises:
        ValueError, TypeError: when shapes, dtypes or devices do not fit; the message names the argument. The range of the
            ids is checked by :meth:`validate`, which has to read them.
    """

    __slots__ = ("_operands", "ids", "n", "values")

    def __init__(self, ids: torch.Tensor, values: torch.Tensor, n: int = 2, operands: Operands | None = None) -> None:
        check.links_per_row(n)
        check.ids(ids)
        check.values_for_ids(values, ids, n)
        check.require(ids.is_contiguous(), "ids", "be contiguous", f"strides {ids.stride()}")
        self._hold(ids, values, n, operands)

    def _hold(self, ids: torch.Tensor, values: torch.Tensor, n: int, operands: Operands | None) -> None:
        self.ids, self.values, self.n = ids, values, n
        self._operands = Operands() if operands is None else operands

    @classmethod
    def view(cls, ids: torch.Tensor, values: torch.Tensor, n: int, operands: Operands) -> SparseWeight:
        """The unchecked constructor, for a layer that already checked its own tensors."""
        self = cls.__new__(cls)
        self._hold(ids, values, n, operands)
        return self

    @classmethod
    def from_dense(cls, dense: torch.Tensor, n: int = 2, *, score: str = "abs", impl: str = "auto") -> SparseWeight:
        """Magnitude pruning: in every block the exact best pattern by ``|w|`` ("abs") or ``w**2`` ("square").

        Args and errors: those of :func:`chts_kernels.prune`.
        """
        ids = prune(dense, n, score, impl=impl)
        return cls(ids, pack(dense, ids, n, impl=impl), n)

    @classmethod
    def random(
        cls,
        out_features: int,
        in_features: int,
        n: int = 2,
        *,
        seed: int = 0,
        layer: int = 0,
        std: float = 1.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> SparseWeight:
        """Uniform pattern ids and normal values of standard deviation ``std``; the same on every device."""
        ids = random_ids(out_features, in_features, n, seed=seed, layer=layer, device=device)
        generator = torch.Generator().manual_seed((seed << 16 ^ layer) & 0x7FFF_FFFF_FFFF_FFFF)
        values = torch.randn(out_features, in_features // BLOCK * n, generator=generator) * std
        return cls(ids, values.to(device, dtype), n)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) = (out_features, in_features)."""
        return self.ids.shape[0] * BLOCK, self.ids.shape[1] * BLOCK

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def links(self) -> int:
        """The number of active weights, N*K*n/4."""
        return self.values.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of values, ids and the operands derived so far."""
        return self.values.nbytes + self.ids.nbytes + self._operands.nbytes

    @property
    def T(self) -> SparseWeight:
        """W^T as a SparseWeight of its own tensors (a copy: the values have another order)."""
        transposed = pattern_table(self.n).tensor("transpose_id", self.device)[self.ids.long()]
        with torch.no_grad():
            return SparseWeight(transposed.t().contiguous(), transpose_values(self.values, self.ids, self.n), self.n)

    def to_dense(self) -> torch.Tensor:
        """[N, K]: the values at their links, +0 elsewhere."""
        return unpack(self.values, self.ids, self.n)

    def mask(self) -> torch.Tensor:
        """bool [N, K]: where the links are, whatever their values."""
        return unpack(torch.ones_like(self.values), self.ids, self.n).bool()

    def operands(self, dtype: torch.dtype, stamp: object | None = None) -> Operands:
        """What a sparse tensor-core kernel of this compute dtype reads, fresh.

        ``stamp``: in a backward pass, :attr:`Operands.stamp` of the forward pass: what served that one serves this one.
        """
        own = self._operands
        if stamp is None or not own.unchanged(stamp, self.values, self.ids, dtype):
            own.refresh(self.values, self.ids, self.n, dtype)
        return own

    def validate(self) -> None:
        """Check that every id is a legal pattern. Reads the ids, so it waits for the device.

        Raises:
            ValueError: naming the first block whose id is out of range.
        """
        count = len(pattern_table(self.n))
        bad = (self.ids >= count).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            raise ValueError(
                f"ids: must be pattern ids below {count} for n = {self.n}, "
                f"got {int(self.ids[row, column])} at block ({row}, {column}) and {len(bad) - 1} more"
            )

    def __repr__(self) -> str:
        return (
            f"SparseWeight(shape={self.shape}, n={self.n}, dtype={self.dtype}, device={str(self.device)!r}, "
            f"nbytes={self.nbytes})"
        )


class Operands:
    """Operands of the sparse tensor cores, derived from values and ids and kept fresh in place.

    In place, so that a captured CUDA graph goes on reading the right memory after an optimizer step or a topology update.
    What counts as a change is in :mod:`chts_kernels.freshness`: every in-place operation of torch and every optimizer
    step. Writing through ``.data`` or from a foreign kernel calls for :meth:`invalidate`.
    """

    __slots__ = ("_freshness", "_shared", "meta", "meta_t", "values", "values_t")
    resident = False
    """Whether compiled graphs may read them: whoever writes the weight keeps them up to date (:mod:`chts_kernels.resident`)."""

    def __init__(self) -> None:
        self._freshness = Freshness()
        self.values = self.meta = self.values_t = self.meta_t = None
        self._shared = False

    def invalidate(self) -> None:
        """Have the next :meth:`refresh` pack again."""
        self._freshness.invalidate()

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.values, self.meta, self.values_t, self.meta_t) if t is not None)

    def fresh(self, values: torch.Tensor, ids: torch.Tensor) -> bool:
        """Whether the operands are those of ``values`` and ``ids`` as they are now."""
        return self.meta is not None and self._freshness.holds((values, ids), self.values_t.dtype)

    @property
    def stamp(self) -> object | None:
        """Of the last packing or update; None when that counts no more."""
        return self._freshness.stamp

    def unchanged(self, stamp: object | None, values: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype) -> bool:
        """Whether ``stamp`` is still that of the operands, and they are those of ``values`` and ``ids`` in ``dtype``."""
        return self._freshness.unchanged(stamp, (values, ids), dtype)

    def mark(self, values: torch.Tensor, ids: torch.Tensor) -> None:
        """Whoever just changed ``values`` or ``ids`` brought the operands up to date, too."""
        self._freshness.mark((values, ids), self.values_t.dtype)

    def shares(self, values: torch.Tensor) -> bool:
        """Whether ``values`` are themselves the operand."""
        return self._shared and self.values.data_ptr() == values.data_ptr()

    def refresh(self, values: torch.Tensor, ids: torch.Tensor, n: int, dtype: torch.dtype) -> None:
        """Pack again if ``values``, ``ids`` or ``dtype`` are not those of the last time."""
        if not self._freshness.holds((values, ids), dtype):
            self.pack(values, ids, n, dtype)

    def pack(self, values: torch.Tensor, ids: torch.Tensor, n: int, dtype: torch.dtype) -> None:
        """Pack, in place where what is there has the right shape, dtype and device."""
        shape = ids.shape[0] * BLOCK, ids.shape[1] * BLOCK
        meta = self.meta
        fits = meta is not None and meta.device == values.device and self.values_t.dtype == dtype
        if not fits or self.values_t.shape != (shape[1], shape[0] // 2):
            self.values, self.meta, self.values_t, self.meta_t = empty_operands(*shape, dtype, values.device)
            self._shared = False
        if n == 2 and values.dtype == dtype and values.is_contiguous():
            self.values = values.detach()  # already the operand: no copy
            self._shared = True
            PACK_OPERANDS_(values, ids, n, None, self.meta, self.values_t, self.meta_t)
        else:
            if self._shared:  # the values of a former master: not ours to write to
                self.values = self.values_t.new_empty(shape[0], shape[1] // 2)
                self._shared = False
            PACK_OPERANDS_(values, ids, n, self.values, self.meta, self.values_t, self.meta_t)
        self._freshness.mark((values, ids), dtype)

    def __deepcopy__(self, memo: dict) -> Operands:
        return Operands()

    def __reduce__(self) -> tuple:
        return Operands, ()


def random_ids(
    out_features: int, in_features: int, n: int = 2, *, seed: int, layer: int = 0, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Pattern ids uint8 [out_features/4, in_features/4], uniform over the 90 (24): the initial topology of pre-training.

    The multiply-shift map of 32 random bits is uniform to 2**-25. ALGORITHM section 4.

    Raises:
        ValueError: when a size is not a positive multiple of 4, or ``n`` is neither 1 nor 2.
    """
    check.links_per_row(n)
    check.divisible_shape(out_features, in_features, "(out_features, in_features)")
    count = out_features // BLOCK * (in_features // BLOCK)
    bits = rng.random_bits(
        1, -(-count // 4) * 4, seed=seed, layer=layer, step=0, purpose=rng.Purpose.INIT, device=device
    )  # fmt: skip
    ids = (bits[0, :count] * len(pattern_table(n)) >> 32).to(torch.uint8)
    return ids.view(out_features // BLOCK, in_features // BLOCK)
