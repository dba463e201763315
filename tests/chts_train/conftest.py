"""Micro models and data for the tests of training: a step takes milliseconds."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

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
