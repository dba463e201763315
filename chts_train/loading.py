"""Models out of run folders and files: for evaluation, export and re-training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import FOLDER, HEADER, Checkpoint, read_checkpoint, restore
from .checkpoint_rules import CheckpointError, check_fit
from .configs import RunConfig
from .linear import sparsify_
from .methods import get_method
from .storage import load_tensors


def run_config(checkpoint: Checkpoint) -> RunConfig:
    """The config of the run that wrote a checkpoint.

    Raises:
        CheckpointError: another program wrote it, or its config is not one of this version.
    """
    values = checkpoint.config.get("run")
    if not isinstance(values, dict):
        raise CheckpointError(checkpoint.path / HEADER, "be a checkpoint of a training run", "another program's")
    try:
        return RunConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(checkpoint.path / HEADER, "hold a usable config", error) from None


def load_run(path: str | Path) -> tuple[nn.Module, RunConfig, Checkpoint]:
    """The model of a run folder's latest checkpoint, or of a checkpoint folder: on the CPU, as it was trained.

    Raises:
        CheckpointError: nothing usable there.
    """
    checkpoint = read_checkpoint(path, training=False)
    config = run_config(checkpoint)
    model = config.build_model()
    method = get_method(config.method)
    sparsity = method.sparsity_config(
        config.seed, srste_lambda=config.srste_lambda, impl=config.impl, weight_grad=config.weight_grad,
        form=method.form_after(config, checkpoint.step),
    )  # fmt: skip
    if sparsity is not None:
        sparsify_(model, sparsity)
    restore(checkpoint, model)
    return model.eval(), config, checkpoint


def load_dense(
    source: str | Path, base: RunConfig | None = None
) -> tuple[dict[str, Tensor], RunConfig, dict[str, Any]]:
    """Dense weights to re-train from.

    Args:
        source: a run folder or checkpoint whose weights are dense, or a safetensors file.
        base: the preset that fits a safetensors file (its vocabulary is taken from the weights). A run brings its own
            config, which ``base`` replaces when it is given.

    Returns:
        The plain model's state_dict, the config to start from, and where the weights are from.

    Raises:
        CheckpointError: nothing usable, sparse weights, or weights that are not those of the config's model.
        ValueError: a file without ``base``.
    """
    source = Path(source)
    if source.is_dir() and not (source / HEADER).is_file() and not (source / FOLDER).is_dir():
        if not (source / "model.safetensors").is_file():
            raise CheckpointError(source, f"be a run folder, or hold {HEADER} or model.safetensors", "none of them")
        source = source / "model.safetensors"  # an exported model
    if source.is_dir():
        checkpoint = read_checkpoint(source, training=False)
        config = run_config(checkpoint)
        if checkpoint.layers:
            rule = "have dense weights to prune; to continue a sparse run use chts pretrain --resume"
            raise CheckpointError(checkpoint.path, rule, f"a {config.method} run")
        weights, config = checkpoint.model, base or config
        origin = {"dense": str(checkpoint.path.resolve()), "step": checkpoint.step}
        file = checkpoint.path / "model.safetensors"
    else:
        file = source
        if not file.is_file():
            raise CheckpointError(file, "exist (a dense run folder, or a safetensors file)", "no such path")
        if base is None:
            raise ValueError(f"--preset: must be given with {file}, whose sizes it has")
        weights, config = _read(file), base
        origin = {"dense": str(file.resolve())}
    vocabulary = weights.get("lm_head.weight")
    if config.task == "text" and vocabulary is not None:
        config = _with_vocabulary(config, len(vocabulary))
    with torch.device("meta"):
        model = config.build_model()
    check_fit(file, {}, weights, model)
    return weights, config, origin


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return {name: tensor.float() for name, tensor in load_tensors(file).items()}
    except ImportError:
        raise
    except Exception as error:  # safetensors' own type, not exported in all versions
        raise CheckpointError(file, "be a safetensors file", error) from None


def _with_vocabulary(config: RunConfig, size: int) -> RunConfig:
    """The config for weights of ``size`` rows: also data with fewer token ids then gets a model of that size."""
    values = config.to_dict()
    values["model"]["vocab_size"] = values["data"]["vocab"] = size
    return RunConfig.from_dict(values)
