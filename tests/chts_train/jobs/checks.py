"""All the checks by name, in the order in which a job runs them."""

from __future__ import annotations

from . import dcp, ddp, fsdp, trainer

NAMES = [name for module in (ddp, fsdp, dcp, trainer) for name in vars(module) if name.startswith("check_")]
CHECKS = {name: function for module in (ddp, fsdp, dcp, trainer) for name, function in vars(module).items()}
