"""Llama and ViT: formulas against independent ones, foreign parameter names, sizes, autocast, compile, errors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from chts_train.models import Llama, LlamaConfig, ViT, ViTConfig
from chts_train.models.llama import rotary_table, rotate
from chts_train.models.vit import DropPath

SMALL = LlamaConfig(
    vocab_size=41, hidden_size=16, intermediate_size=28, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=32,
)  # fmt: skip
SMALL_VIT = ViTConfig(image_size=8, patch_size=4, in_channels=2, num_classes=5, embed_dim=16, depth=2, num_heads=2)


@pytest.fixture
def llama() -> Llama:
    return Llama(SMALL)


def llama_by_hand(state: dict[str, torch.Tensor], tokens: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    """Logits from the state dict alone, in float64, position by position: complex rotation, explicit softmax."""
    state = {name: tensor.double() for name, tensor in state.items()}

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) * weight

    def turn(x: torch.Tensor) -> torch.Tensor:  # [T, D], channel i paired with channel i + D / 2
        half = config.head_dim // 2
        angle = torch.tensor(
            [[p * config.rope_theta ** (-2 * i / config.head_dim) for i in range(half)] for p in range(len(x))]
        ).double()
        z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag], dim=-1)

    out = []
    for row in tokens:
        x = state["model.embed_tokens.weight"][row]
        for layer in range(config.num_hidden_layers):
            w = {
                name.removeprefix(f"model.layers.{layer}."): tensor
                for name, tensor in state.items()
                if name.startswith(f"model.layers.{layer}.")
            }
            h = norm(x, w["input_layernorm.weight"])
            heads = []
            for head in range(config.num_attention_heads):
                part = slice(head * config.head_dim, (head + 1) * config.head_dim)
                q, k, v = (h @ w[f"self_attn.{name}_proj.weight"][part].T for name in "qkv")
                scores = turn(q) @ turn(k).T / math.sqrt(config.head_dim)
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
                heads.append(scores.softmax(-1) @ v)
            x = x + torch.cat(heads, dim=-1) @ w["self_attn.o_proj.weight"].T
            h = norm(x, w["post_attention_layernorm.weight"])
            gate = h @ w["mlp.gate_proj.weight"].T
            x = x + (gate * gate.sigmoid() * (h @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
        out.append(norm(x, state["model.norm.weight"]) @ state["lm_head.weight"].T)
    return torch.stack(out)


def test_llama_matches_the_formula(llama: Llama) -> None:
    with torch.no_grad():
        for parameter in llama.parameters():  # large enough that every part shows in the logits
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
    tokens = torch.randint(0, 41, (2, 13))
    expected = llama_by_hand(llama.state_dict(), tokens, SMALL)
    torch.testing.assert_close(llama(tokens).double(), expected, rtol=1e-4, atol=1e-4)


def test_llama_has_the_names_of_hugging_face(llama: Llama) -> None:
    layer = [f"self_attn.{p}_proj.weight" for p in "qkvo"] + [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
    layer += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    expected |= {f"model.layers.{i}.{name}" for i in range(2) for name in layer}
    assert set(llama.state_dict()) == expected


def test_llama_loads_into_transformers(llama: Llama) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL.to_hf())).eval()
    theirs.load_state_dict(llama.state_dict())
    tokens = torch.randint(0, 41, (2, 13))
    with torch.no_grad():
        torch.testing.assert_close(llama(tokens), theirs(tokens).logits)


def test_hf_config_says_what_the_defaults_there_do_not() -> None:
    config = SMALL.to_hf()
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] == 2
    assert config["tie_word_embeddings"] is False
    assert config["rms_norm_eps"] == 1e-6


def test_llama_loss_ignores_padding(llama: Llama) -> None:
    tokens, targets = torch.randint(0, 41, (2, 9)), torch.randint(0, 41, (2, 9))
    targets[0, 5:] = -100
    logits = llama(tokens)
    counted = targets != -100
    expected = F.cross_entropy(logits[counted], targets[counted])
    torch.testing.assert_close(llama(tokens, targets), expected)
    torch.testing.assert_close(llama(tokens, targets).item(), math.log(41), rtol=0.05, atol=0)  # at the start: uniform


def test_llama_is_causal(llama: Llama) -> None:
    tokens = torch.randint(0, 41, (1, 12))
    changed = tokens.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 41
    before, after = llama(tokens), llama(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


def test_rotation_keeps_relative_positions() -> None:
    cos, sin = rotary_table(20, 8, 10000.0)
    q, k = torch.randn(8), torch.randn(8)
    turned_q, turned_k = rotate(q.expand(20, 8), cos, sin), rotate(k.expand(20, 8), cos, sin)
    scores = turned_q @ turned_k.T
    for distance in (0, 3, 7):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)


def test_llama_starts_unscaled() -> None:
    model = Llama(replace(SMALL, vocab_size=500, hidden_size=64, intermediate_size=172))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.06), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be positive, got 0"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be positive, got -1.0"),
        ({"hidden_size": 20, "num_attention_heads": 4}, r"multiple of 2 \* num_attention_heads .*=20, .*=4"),
    ],
)
def test_llama_config_errors(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_llama_input_errors(llama: Llama) -> None:
    with pytest.raises(ValueError, match=r"length <= max_position_embeddings=32, got shape \(1, 33\)"):
        llama(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(ValueError, match=r"targets must have the shape of tokens \(1, 4\), got \(1, 3\)"):
        llama(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long))


def test_vit_has_the_names_of_timm() -> None:
    state = ViT(SMALL_VIT).state_dict()
    block = [
        f"{m}.{p}"
        for m in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for p in ("weight", "bias")
    ]
    expected = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    expected |= {f"{m}.{p}" for m in ("norm", "head") for p in ("weight", "bias")}
    expected |= {f"blocks.{i}.{name}" for i in range(2) for name in block}
    assert set(state) == expected
    assert state["pos_embed"].shape == (1, 5, 16)
    assert ViT(SMALL_VIT).no_weight_decay() <= set(state)


def test_vit_matches_the_formula() -> None:
    model = ViT(SMALL_VIT).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    state, images = model.state_dict(), torch.randn(3, 2, 8, 8).double()

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / torch.sqrt(x.var(-1, correction=0, keepdim=True) + 1e-6) * state[f"{name}.weight"]
            + state[f"{name}.bias"]
        )

    patches = [
        images[:, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].reshape(3, -1)
        @ state["patch_embed.proj.weight"].flatten(1).T
        + state["patch_embed.proj.bias"]
        for r in range(2)
        for c in range(2)
    ]
    x = torch.stack([state["cls_token"][0].expand(3, -1), *patches], dim=1) + state["pos_embed"]
    for i in range(2):
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, dim=-1)
        heads = [
            (q[..., h] @ k[..., h].transpose(1, 2) / math.sqrt(8)).softmax(-1) @ v[..., h]
            for h in (slice(0, 8), slice(8, 16))
        ]
        x = x + linear(torch.cat(heads, dim=-1), f"blocks.{i}.attn.proj")
        hidden = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(hidden, f"blocks.{i}.mlp.fc2")
    torch.testing.assert_close(model(images), linear(norm(x, "norm")[:, 0], "head"))


def test_vit_smooths_labels_in_training_only() -> None:
    model = ViT(replace(SMALL_VIT, label_smoothing=0.2))
    images, targets = torch.randn(4, 2, 8, 8), torch.tensor([0, 1, 2, 4])
    logits = model(images)
    torch.testing.assert_close(model(images, targets), F.cross_entropy(logits, targets, label_smoothing=0.2))
    torch.testing.assert_close(model.eval()(images, targets), F.cross_entropy(logits, targets))


def test_drop_path_drops_whole_samples() -> None:
    layer, x = DropPath(0.25), torch.ones(4000, 3, 2)
    out = layer(x)
    per_sample = out.flatten(1)
    assert torch.equal(per_sample, per_sample[:, :1].expand_as(per_sample))
    assert per_sample.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert out.mean().item() == pytest.approx(1, abs=5 * math.sqrt(0.25 / 0.75 / 4000))
    assert torch.equal(layer.eval()(x), x)


def test_drop_path_rises_with_depth() -> None:
    model = ViT(replace(SMALL_VIT, depth=3, drop_path=0.4))
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx([0, 0.2, 0.4])


@pytest.mark.parametrize(("size", "patch"), [(224, 16), (96, 12), (64, 8), (32, 4), (28, 4), (8, 2), (7, 1), (1, 1)])
def test_vit_fit_chooses_the_patch(size: int, patch: int) -> None:
    config = ViTConfig().fit(image_size=size, in_channels=1, num_classes=7)
    assert (config.image_size, config.patch_size, config.in_channels, config.num_classes) == (size, patch, 1, 7)
    assert config.embed_dim == ViTConfig().embed_dim


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth must be positive, got 0"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\), got 1.0"),
        ({"patch_size": 3}, "patch_size must divide image_size, got patch_size=3, image_size=8"),
        ({"num_heads": 3}, "num_heads must divide embed_dim, got num_heads=3, embed_dim=16"),
    ],
)
def test_vit_config_errors(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL_VIT, **changes)


def test_vit_input_errors() -> None:
    with pytest.raises(ValueError, match=r"images must be \[batch, 2, 8, 8\], got shape \(1, 3, 8, 8\)"):
        ViT(SMALL_VIT)(torch.zeros(1, 3, 8, 8))


def model_and_inputs(kind: str) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    if kind == "llama":
        return Llama(SMALL), torch.randint(0, 41, (2, 9)), torch.randint(0, 41, (2, 9))
    return ViT(SMALL_VIT), torch.randn(2, 2, 8, 8), torch.randint(0, 5, (2,))


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_autocast_keeps_masters_and_loss_in_float32(kind: str) -> None:
    model, x, y = model_and_inputs(kind)
    full = model(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, y)
        assert model(x).dtype == torch.bfloat16
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(full.item(), rel=0.02)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_compiles_without_a_break(kind: str) -> None:
    model, x, y = model_and_inputs(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), model(x, y))
    compiled(x, y).backward()
    assert all(p.grad is not None for p in model.parameters())
