"""Run configs: preset sizes, the round trip through JSON, errors by message."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from chts_train.configs import PRESETS, DataConfig, RunConfig, preset
from chts_train.models import Llama, LlamaConfig, ViT, ViTConfig


def sizes(config: RunConfig) -> tuple[int, int]:
    """(all parameters, those of linear layers but the head), without allocating any."""
    with torch.device("meta"):
        model = config.build_model()
    linear = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in ("lm_head", "head")]
    return sum(p.numel() for p in model.parameters()), sum(m.weight.numel() for m in linear)


@pytest.mark.parametrize(
    ("name", "total", "sparse"),
    [
        ("60m", 58.07e6, 25.30e6),  # ALGORITHM.md section 6
        ("130m", 134.1e6, 84.93e6),
        ("tiny", 0.8575e6, 0.7905e6),  # over bytes
        ("20m", 19.55e6, 3.162e6),
        ("1b", 1345e6, 1214e6),
        ("vit-tiny", 5.717e6, 5.309e6),
        ("vit-small", 22.05e6, 21.23e6),
        ("vit-base", 86.57e6, 84.93e6),
    ],
)
def test_preset_sizes(name: str, total: float, sparse: float) -> None:
    assert sizes(PRESETS[name]) == (pytest.approx(total, rel=5e-4), pytest.approx(sparse, rel=5e-4))


def test_every_linear_layer_of_every_preset_can_be_sparse() -> None:
    for config in PRESETS.values():
        with torch.device("meta"):
            model = config.build_model()
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name not in ("lm_head", "head"):
                assert module.in_features % 4 == 0, (config.name, name)
                assert module.out_features % 4 == 0, (config.name, name)


def test_paper_settings() -> None:
    config = PRESETS["60m"]
    assert (config.batch_size, config.micro_batch, config.seq_len, config.accumulation) == (256, 64, 256, 4)
    assert (config.optimizer, config.betas, config.eps, config.weight_decay) == ("adam", (0.9, 0.999), 1e-8, 0.0)
    assert (config.lr, config.min_lr_ratio, config.warmup_steps, config.total_steps) == (1e-3, 0.1, 1000, 10_000)
    assert (config.zeta, config.interval, config.stop_fraction, config.lr_ramp_steps) == (0.1, 100, 0.75, 10)
    assert (config.t_start, config.t_end) == (1.0, 9.0)
    assert PRESETS["vit-base"].t_end == 3.0
    assert PRESETS["vit-base"].model.drop_path == 0.1


def test_presets_are_frozen() -> None:
    with pytest.raises(TypeError):
        PRESETS["mine"] = PRESETS["tiny"]
    with pytest.raises(FrozenInstanceError):
        PRESETS["tiny"].lr = 1.0
    assert all(name == config.name for name, config in PRESETS.items())


@pytest.mark.parametrize("name", list(PRESETS))
def test_round_trip_through_json(name: str) -> None:
    config = PRESETS[name]
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(
    changes=st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 2**31),
            "lr": st.floats(1e-6, 1.0),
            "method": st.text(min_size=1),
            "betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
            "eval_tokens": st.none() | st.integers(1, 10**9),
            "data": st.builds(
                DataConfig,
                spec=st.text() | st.lists(st.text()).map(tuple),
                end_of_text=st.none() | st.integers(0, 9) | st.text(),
            ),
            "model": st.builds(LlamaConfig, vocab_size=st.integers(1, 10**6), rope_theta=st.floats(1, 1e6)),
        },
    )
)
def test_round_trip_of_any_config(changes: dict[str, Any]) -> None:
    config = RunConfig(**changes)
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_missing_fields_take_defaults() -> None:
    assert RunConfig.from_dict({}) == RunConfig()
    assert RunConfig.from_dict({"task": "image"}).model == ViTConfig()
    assert RunConfig.from_dict({"model": {"hidden_size": 64}}).model == LlamaConfig(hidden_size=64)


def test_preset_with_changes() -> None:
    config = preset("tiny", lr=1, method="dense", data={"spec": ["a.txt", "b.txt"]}, betas=[0.9, 0.95])
    assert (config.lr, config.method, config.data, config.betas) == (
        1, "dense", DataConfig(spec=("a.txt", "b.txt")), (0.9, 0.95),
    )  # fmt: skip
    assert config.model == PRESETS["tiny"].model
    assert preset("tiny") is PRESETS["tiny"]
    with pytest.raises(ValueError, match="preset must be one of tiny, 20m, .*, got 'huge'"):
        preset("huge")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 1.0}, "unknown field learning_rate; known: name, task, model"),
        ({"warmup_step": 5}, r"unknown field warmup_step; did you mean warmup_steps\?"),
        ({"model": {"hiden_size": 5}}, r"unknown field model.hiden_size; did you mean model.hidden_size\?"),
        ({"data": {"specs": "x"}}, r"unknown field data.specs; did you mean data.spec\?"),
        ({"task": "audio", "model": {}}, "task must be one of text, image, got 'audio'"),
        ({"micro_batch": 48}, "micro_batch must be at least 1 and a divisor of batch_size=256, got 48"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"lr": float("nan")}, "lr must be positive and finite, got nan"),
        ({"min_lr_ratio": 2.0}, r"min_lr_ratio must be in \[0, 1\], got 2.0"),
        ({"total_steps": 10, "warmup_steps": 11}, r"warmup_steps must be in \[0, total_steps=10\], got 11"),
        ({"optimizer": "lion"}, "optimizer must be one of adam, adamw, sgd, got 'lion'"),
        ({"betas": [0.9, 1.0]}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"precision": "fp8"}, "precision must be one of auto, fp32, bf16, got 'fp8'"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"zeta": 1.5}, r"zeta must be in \[0, 1\], got 1.5"),
        ({"t_end": 0.0}, "t_end must be positive and finite, got 0.0"),
        ({"eval_tokens": 0}, "eval_tokens must be at least 1 or None, got 0"),
        ({"method": ""}, "method must be a method's name, got ''"),
        ({"seq_len": 4096}, "seq_len must be at most model.max_position_embeddings=2048, got 4096"),
    ],
)
def test_value_errors(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"total_steps": 10.5}, "total_steps must be int, got 10.5"),
        ({"total_steps": True}, "total_steps must be int, got True"),
        ({"lr": "1e-3"}, "lr must be float, got '1e-3'"),
        ({"betas": [0.9]}, r"betas must be tuple\[float, float\], got \(0.9,\)"),
        ({"data": {"spec": 5}}, "data.spec must be .*str.*, got 5"),
        ({"data": {"augment": 1}}, "data.augment must be bool, got 1"),
        ({"model": {"hidden_size": "64"}}, "model.hidden_size must be int, got '64'"),
        ({"model": 3}, "model must be .*LlamaConfig.*, got 3"),
    ],
)
def test_type_errors(values: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        RunConfig.from_dict(values)


def test_the_model_must_suit_the_task() -> None:
    with pytest.raises(ValueError, match="model must be a ViTConfig for task 'image', got LlamaConfig"):
        RunConfig(task="image", model=LlamaConfig())


def test_fit_and_build(monkeypatch: pytest.MonkeyPatch) -> None:
    class Text:
        vocab_size = 99

    class Images:
        image_size, channels, num_classes = 8, 1, 10

    text = PRESETS["tiny"].fit(Text())
    model = text.build_model()
    assert isinstance(model, Llama)
    assert model.lm_head.weight.shape == (99, 128)
    images = PRESETS["vit-tiny"].fit(Images())
    assert images.model.patch_size == 2
    assert isinstance(images.build_model(), ViT)
    assert images.total_steps == PRESETS["vit-tiny"].total_steps


def test_load_data_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import chts_train.data

    calls = []
    monkeypatch.setattr(chts_train.data, "load_text", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr(chts_train.data, "load_images", lambda *args, **kwargs: calls.append((args, kwargs)))
    data = DataConfig("x.txt", "t.json", 300, 7, 1000, 16, True, 0.2, 5)
    RunConfig(data=data).load_data()
    RunConfig(task="image", model=ViTConfig(), data=data).load_data()
    assert calls[0] == (
        ("x.txt",),
        {"vocab": 300, "tokenizer": "t.json", "seed": 5, "max_bytes": 1000, "val_fraction": 0.2, "end_of_text": 7},
    )
    assert calls[1] == (("x.txt", 16, 5), {"val_fraction": 0.2})
    with pytest.raises(ValueError, match=r"data.spec must be one file, folder or name for images, got \('a', 'b'\)"):
        RunConfig(task="image", model=ViTConfig(), data=DataConfig(("a", "b"))).load_data()
