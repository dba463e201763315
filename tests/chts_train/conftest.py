"""Micro models and data for the tests of training: a step takes milliseconds."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import chts_kernels.format
from chts_kernels.layout.metadata import ids_from_metadata
from chts_kernels.ops import spmm as spmm_package
from chts_kernels.ops.pack.reference import unpack
from chts_kernels.ops.weight_grad import WEIGHT_GRAD
from chts_train.configs import DataConfig, RunConfig, preset
from chts_train.models import LlamaConfig
from chts_train.settings import Settings


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """12 documents of made-up words, of different lengths, so that batches have padding."""
    folder = tmp_path_factory.mktemp("text")
    choose = random.Random(0)
    words = ["".join(choose.choices("etaoinshrdlu", k=choose.randint(2, 7))) for _ in range(60)]
    for i in range(12):
        (folder / f"{i}.txt").write_text(" ".join(choose.choices(words, k=choose.randint(40, 400))))
    return folder


@pytest.fixture
def micro(text_folder):
    """A function: changes -> RunConfig of 12 steps on that text, with topology updates at steps 3, 6 and 9."""

    def make(**changes) -> RunConfig:
        model = LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64
        )
        config = RunConfig(
            name="micro", model=model, data=DataConfig(spec=str(text_folder), val_fraction=0.2), total_steps=12,
            batch_size=4, micro_batch=2, seq_len=24, warmup_steps=2, lr=1e-2, interval=3, lr_ramp_steps=1,
            eval_interval=6, eval_tokens=200,
        )  # fmt: skip
        return replace(config, **changes)

    return make


@pytest.fixture(scope="session")
def image_file(tmp_path_factory):
    """60 grey images of 8 x 8 pixels in 3 classes."""
    path = tmp_path_factory.mktemp("images") / "images.npz"
    labels = np.arange(60) % 3
    noise = np.random.default_rng(0).integers(0, 120, (60, 8, 8))
    np.savez(path, images=(noise + 60 * labels[:, None, None]).astype(np.uint8), labels=labels)
    return path


@pytest.fixture
def micro_image(image_file):
    """A function: changes -> RunConfig of a ViT on those images, with drop path and augmentation."""

    def make(**changes) -> RunConfig:
        tiny = preset("vit-tiny")
        model = replace(tiny.model, embed_dim=16, num_heads=2, depth=2, drop_path=0.4)
        small = {"total_steps": 12, "batch_size": 8, "micro_batch": 4, "warmup_steps": 2, "interval": 3}
        data = DataConfig(spec=str(image_file), augment=True, val_fraction=0.2)
        return replace(tiny, model=model, data=data, eval_interval=6, eval_tokens=50, **(small | changes))

    return make


@pytest.fixture
def quiet() -> Settings:
    return Settings(device="cpu", quiet=True, log_interval=2)


def operand_reader(op, transposed: bool, packed: list):
    """A kernel that sees the weight through its operands alone, as the sparse tensor cores do, and notes when it has to pack."""

    def run(x, values, ids, n, *rest):
        operand, meta = rest[-2:]
        if operand is None:
            packed.append(op.name)
            all_four = spmm_package._packed(values, ids, n, x.dtype)
            operand, meta = all_four[2:] if transposed else all_four[:2]
        weight = unpack(operand, ids_from_metadata(meta, operand.shape[0], operand.shape[1] * 2, 2).to(torch.uint8), 2)
        y = x @ weight.t()
        return y if len(rest) == 2 or rest[0] is None else (y + rest[0]).to(x.dtype)

    op.kernel("operand_reader", lambda *_: None)(run)


@pytest.fixture
def packed(monkeypatch):
    """On the CPU what runs on a GPU: products that read derived operands only; the names of those that had to pack, and "pack"
    for every packing inside of a graph."""
    names: list[str] = []
    for op in (spmm_package.SPMM, spmm_package.INPUT_GRAD, WEIGHT_GRAD):
        monkeypatch.setattr(op, "kernels", list(op.kernels))
        monkeypatch.setattr(op, "_chosen", {})
    operand_reader(spmm_package.SPMM, False, names)
    operand_reader(spmm_package.INPUT_GRAD, True, names)
    WEIGHT_GRAD.kernel("operand_reader", lambda *_: None)(WEIGHT_GRAD.reference)
    monkeypatch.setattr(spmm_package, "_reads_operands", lambda x, impl: impl == "operand_reader")
    op = spmm_package.PACK_OPERANDS_
    assert op is chts_kernels.format.PACK_OPERANDS_
    reference = op.reference
    monkeypatch.setattr(op, "reference", lambda *args: (names.append("pack"), reference(*args))[1])
    return names


@pytest.fixture
def recorder():
    """A backend of torch.compile, and the nodes of the graphs, forward and backward, that it got."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    nodes: list[torch.fx.Node] = []

    def record(module, _):
        nodes.extend(module.graph.nodes)
        return make_boxed_func(module.forward)

    return aot_autograd(fw_compiler=record, bw_compiler=record), nodes
