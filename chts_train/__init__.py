"""CHTS training: sparse linear layers, their evolution, and the methods they are compared with."""

from chts_kernels import __version__

from .adamw import FusedAdamW
from .baselines import STELinear, attach_srste_decay
from .forms import dense_states, load_dense_states_
from .linear import SparseLinear, SparsifyRecord, SparsityConfig, densify_, sparse_layers, sparsify_
from .masked import make_masks_resident_, refresh_masks_
from .methods import METHODS, Method, attach_method, get_method
from .resident import make_operands_resident_, refresh_operands_
from .topology import TopologyEvolver, TopologySchedule

__all__ = [
    "FusedAdamW",
    "METHODS",
    "Method",
    "STELinear",
    "SparseLinear",
    "SparsifyRecord",
    "SparsityConfig",
    "TopologyEvolver",
    "TopologySchedule",
    "__version__",
    "attach_method",
    "attach_srste_decay",
    "dense_states",
    "densify_",
    "get_method",
    "load_dense_states_",
    "make_masks_resident_",
    "make_operands_resident_",
    "refresh_masks_",
    "refresh_operands_",
    "sparse_layers",
    "sparsify_",
]
