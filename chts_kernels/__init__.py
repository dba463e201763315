"""CHTS kernels: transposable 2:4 and 1:4 sparse weights that stay compressed, their three passes and their evolution."""

from ._version import __version__
from .evolve import Evolution, evolve, evolve_many
from .format import Operands, SparseWeight, random_ids
from .moves import choose_moves
from .ops.adamw import adamw_
from .ops.carry_over import carry_over_
from .ops.masked import mask_operands_, masked_out_decay_
from .ops.pack import pack, pack_operands_, unpack
from .ops.prune import prune
from .ops.regrow import regrow
from .ops.remove import remove
from .ops.score import score
from .ops.spmm import input_grad, spmm
from .ops.weight_grad import Mvue24, weight_grad, weight_grad_mvue
from .patterns import PatternTable, pattern_table
from .target import capability_report

__all__ = [
    "Evolution",
    "Mvue24",
    "Operands",
    "PatternTable",
    "SparseWeight",
    "__version__",
    "adamw_",
    "capability_report",
    "carry_over_",
    "choose_moves",
    "evolve",
    "evolve_many",
    "input_grad",
    "mask_operands_",
    "masked_out_decay_",
    "pack",
    "pack_operands_",
    "pattern_table",
    "prune",
    "random_ids",
    "regrow",
    "remove",
    "score",
    "spmm",
    "unpack",
    "weight_grad",
    "weight_grad_mvue",
]
