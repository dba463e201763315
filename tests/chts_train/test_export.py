"""Exports and imports: dense for transformers, packed bit for bit, torch's semi-structured tensors, Hugging Face checkpoints."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from chts_kernels import prune, unpack
from chts_kernels.patterns import pattern_table
from chts_train import SparseLinear, SparsityConfig, sparse_layers, sparsify_
from chts_train.checkpoint_rules import CheckpointError
from chts_train.configs import preset
from chts_train.export import dense_state_dict, export_dense, to_semi_structured_
from chts_train.models import Llama, LlamaConfig, ViT
from chts_train.packed import PACKED, export_packed, load_packed
from chts_train.pretrained import from_pretrained
from chts_train.runs import RunError
from chts_train.storage import load_tensors

os.environ.setdefault("HF_HUB_OFFLINE", "1")
LLAMA = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=48, rope_theta=500.0, rms_norm_eps=1e-5,
)  # fmt: skip
TOKENS = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))


def llama(n: int = 2, **changes) -> Llama:
    torch.manual_seed(2)
    model = Llama(replace(LLAMA, **changes))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)  # logits far apart
    sparsify_(model, SparsityConfig(n=n))
    return model.eval()


def vit() -> ViT:
    torch.manual_seed(2)
    model = ViT(replace(preset("vit-tiny").model, embed_dim=16, num_heads=2, depth=2))
    sparsify_(model)
    return model.eval()


@torch.no_grad()
def assert_same_logits(ours: nn.Module, theirs: nn.Module, tokens=TOKENS) -> None:
    logits = theirs.eval()(tokens)
    logits = logits if isinstance(logits, torch.Tensor) else logits.logits
    torch.testing.assert_close(ours.eval()(tokens), logits, rtol=1e-4, atol=1e-5)
    assert logits.std() > 0.01


# --- dense ---


@pytest.mark.parametrize("n", [2, 1])
def test_transformers_loads_a_dense_export_as_it_is(tmp_path, n):
    transformers = pytest.importorskip("transformers")
    model = llama(n)
    done = export_dense(model, tmp_path, facts={"n": n})
    assert done.zeros > 0.39 * done.parameters and {f.name for f in done.files} == {"model.safetensors", "config.json"}
    assert isinstance(model.model.layers[0].mlp.up_proj, SparseLinear)  # the model stays as it was
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs) is transformers.LlamaForCausalLM and not any(info.values())
    assert_same_logits(model, theirs)
    weight = theirs.model.layers[1].mlp.down_proj.weight
    assert torch.equal(weight, model.model.layers[1].mlp.down_proj.weight.to_dense())


def test_transformers_own_model_is_exported_under_its_own_config(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                                      num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    sparsify_(model)
    export_dense(model, tmp_path, dtype="bfloat16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.num_key_value_heads == 2 and json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert "lm_head.weight" not in load_tensors(tmp_path / "model.safetensors")
    for name, tensor in dense_state_dict(model).items():
        assert torch.equal(theirs.state_dict()[name].bfloat16(), tensor.bfloat16()), name
    with pytest.raises(RunError, match="must not have a model.safetensors yet"):
        export_dense(model, tmp_path)
    with pytest.raises(ValueError, match="must be one of float32, bfloat16, float16, got 'fp8'"):
        export_dense(model, tmp_path / "other", dtype="fp8")


# --- packed ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [2, 1])
def test_packed_models_come_back_bit_by_bit(tmp_path, n, dtype):
    model = llama(n).to(dtype)
    with torch.no_grad():
        odd = model.model.layers[0].mlp.up_proj.values
        odd[0, :4] = torch.tensor([0.0, -0.0, float("inf"), float("nan")])
    export_packed(model, tmp_path)
    fresh = load_packed(tmp_path)
    into_plain = load_packed(tmp_path / PACKED, Llama(LLAMA).to(dtype))
    into_sparse = load_packed(tmp_path, llama(n).to(dtype))
    into_other = load_packed(tmp_path, llama(3 - n).to(dtype))
    for other in (fresh, into_plain, into_sparse, into_other, from_pretrained(tmp_path)):
        assert list(sparse_layers(other)) == list(sparse_layers(model))
        for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
            assert a.dtype == b.dtype and a.device == b.device
            assert torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)), name
    assert all(p.requires_grad for p in fresh.parameters())
    with torch.no_grad():
        odd[0, :4] = fresh.model.layers[0].mlp.up_proj.values[0, :4] = 0
        assert torch.equal(model(TOKENS), fresh.eval()(TOKENS))


def test_the_documented_schema_is_what_is_written(tmp_path):
    """Reads the file as the README says, without this package's reader."""
    model = llama()
    export_packed(model, tmp_path)
    with safe_open(tmp_path / PACKED, "pt") as file:
        header = json.loads(file.metadata()["chts"])
        assert header["schema"] == 1 and set(header) == {"schema", "layers", "pattern_tables", "aliases"}
        assert header["pattern_tables"] == {"2": pattern_table(2).hash} and header["aliases"] == {}
        for name, layer in header["layers"].items():
            ids, values = file.get_tensor(f"{name}.ids"), file.get_tensor(f"{name}.values")
            rows, columns = layer["shape"]
            assert ids.dtype == torch.uint8 and list(ids.shape) == [rows // 4, columns // 4]
            assert list(values.shape) == [rows, columns * layer["n"] // 4]
            dense = torch.zeros(rows, columns)
            patterns = [p for p in range(1 << 16) if _legal(p)]  # lexicographic, row-major, first element most significant
            for r in range(rows):
                links = [c for c in range(columns) if patterns[ids[r // 4, c // 4]] >> (15 - (4 * (r % 4) + c % 4)) & 1]
                dense[r, links] = values[r]
            assert torch.equal(dense, unpack(values, ids, layer["n"]))
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert all(f"`{key}`" in readme for key in ("schema", "layers", "pattern_tables", "aliases"))


def _legal(pattern: int) -> bool:
    rows = [pattern >> shift & 15 for shift in (12, 8, 4, 0)]
    return all(r.bit_count() == 2 for r in rows) and all(sum(r >> c & 1 for r in rows) == 2 for c in range(4))


def test_a_packed_vit_and_tied_weights(tmp_path):
    model = vit()
    export_packed(model, tmp_path / "vit")
    loaded = from_pretrained(tmp_path / "vit")
    assert_same_logits(model, loaded, torch.randn(2, *_image(model)))
    tied = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 16)})
    tied["b"].weight = tied["a"].weight
    sparsify_(tied)
    done = export_packed(tied, tmp_path / "tied")
    assert [f.name for f in done.files] == [PACKED]
    other = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 16)})
    other["b"].weight = other["a"].weight
    load_packed(tmp_path / "tied", other)
    assert torch.equal(other["a"].weight, tied["a"].weight) and other["b"].weight is other["a"].weight
    with pytest.raises(RunError, match="must not have a packed.safetensors yet"):
        export_packed(tied, tmp_path / "tied")
    export_packed(tied, tmp_path / "tied", force=True)
    with pytest.raises(CheckpointError, match="config.json: must exist, got no such file"):
        load_packed(tmp_path / "tied")


def _image(model: ViT) -> tuple[int, int, int]:
    return model.config.in_channels, model.config.image_size, model.config.image_size


def test_a_layer_that_is_used_twice_stays_one(tmp_path):
    def twice() -> nn.Sequential:
        layer = nn.Linear(8, 8)
        return nn.Sequential(layer, nn.ReLU(), layer)

    model = twice()
    sparsify_(model)
    export_packed(model, tmp_path)
    loaded = load_packed(tmp_path, twice())
    assert loaded[0] is loaded[2] and torch.equal(loaded[0].values, model[0].values)
    dense = dense_state_dict(model)
    assert dense["2.weight"] is dense["0.weight"] and dense["0.weight"].shape == (8, 8)


def test_what_cannot_be_packed(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="model: must have sparse layers .* got none; a dense export has everything"):
        export_packed(model, tmp_path)
    sparsify_(model, SparsityConfig(kind="ste"))
    with pytest.raises(ValueError, match="model: must have sparse layers .* got 0 with dense weights that are masked"):
        export_packed(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_is_exported_packed_from_the_command_line(tmp_path, micro, quiet, capsys):
    from chts_train.cli import main
    from chts_train.loading import load_run
    from chts_train.trainer import Trainer

    (tmp_path / "run").mkdir()
    Trainer(micro(total_steps=4), tmp_path / "run", quiet).train()
    assert main(["export", str(tmp_path / "run"), "--packed", "--out", str(tmp_path / "out")]) == 0
    assert "packed.safetensors" in capsys.readouterr().out
    trained, packed = load_run(tmp_path / "run")[0], from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, packed.state_dict()[k]) for k, a in trained.state_dict().items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["chts"]["step"] == 4
    assert main(["export", str(tmp_path / "run"), "--packed", "--out", str(tmp_path / "out")]) == 2
    assert "must not have a packed.safetensors yet; --force replaces it" in capsys.readouterr().err


def test_what_is_no_packed_model_of_this_kind_is_refused(tmp_path):
    model = llama()
    export_packed(model, tmp_path)
    tensors = load_tensors(tmp_path / PACKED)
    with safe_open(tmp_path / PACKED, "pt") as file:
        header = json.loads(file.metadata()["chts"])

    def write(changes=(), **fields):
        save_file(tensors | dict(changes), tmp_path / PACKED, {"chts": json.dumps(header | fields)})

    write(schema=2)
    with pytest.raises(CheckpointError, match="must have schema 1, the one this version reads, got 2"):
        load_packed(tmp_path)
    write(pattern_tables={"2": "0" * 64})
    with pytest.raises(CheckpointError, match="be written with this package's pattern table for n = 2"):
        load_packed(tmp_path)
    name = "model.layers.0.mlp.up_proj"
    write({f"{name}.ids": torch.full_like(tensors[f"{name}.ids"], 90)})
    with pytest.raises(CheckpointError, match=r"must have .*up_proj.ids below 90 \(n = 2\), got 90"):
        load_packed(tmp_path)
    write()
    plain = Llama(replace(LLAMA, num_hidden_layers=1))
    with pytest.raises(CheckpointError, match="fit the model: model.layers.1.self_attn.q_proj a linear layer of .* got nothing"):
        load_packed(tmp_path, plain)
    plain = Llama(LLAMA).half()
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    with pytest.raises(CheckpointError, match="must hold .* as torch.float16 .* got torch.float32"):
        load_packed(tmp_path, plain)
    assert all(torch.equal(before[k], v) for k, v in plain.state_dict().items()) and not sparse_layers(plain)
    save_file(tensors, tmp_path / PACKED)
    with pytest.raises(CheckpointError, match="must have metadata under 'chts'"):
        load_packed(tmp_path)
    (tmp_path / PACKED).write_bytes(b"12345678901")
    with pytest.raises(CheckpointError, match="must be a safetensors file"):
        load_packed(tmp_path)
    with pytest.raises(CheckpointError, match="must exist, got no such file"):
        load_packed(tmp_path / "none.safetensors")


# --- Hugging Face checkpoints ---


def _assert_magnitude(model: nn.Module, dense: dict[str, torch.Tensor], n: int) -> None:
    for name, layer in sparse_layers(model).items():
        assert layer.n == n and torch.equal(layer.ids, prune(dense[f"{name}.weight"], n)), name
        assert torch.equal(layer.weight.to_dense(), dense[f"{name}.weight"] * layer.weight.mask())


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_a_hugging_face_llama_becomes_ours(tmp_path, shards):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    old = int(transformers.__version__.partition(".")[0]) < 5
    rope = {"rope_theta": 777.0} if old else {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                      initializer_range=0.2, **rope)  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config)
    theirs.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors").is_file() == (shards == "1GB")
    ours = from_pretrained(tmp_path, SparsityConfig(n=1, init="magnitude"))
    assert isinstance(ours, Llama) and len(sparse_layers(ours)) == 14 and ours.config.rope_theta == 777.0
    _assert_magnitude(ours, theirs.state_dict(), 1)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in ours.parameters())
    untouched = from_pretrained(tmp_path, filter_fn=lambda name, _: name.endswith("0.mlp.up_proj"))
    untouched.model.layers[0].mlp.up_proj = theirs.model.layers[0].mlp.up_proj
    assert_same_logits(untouched, theirs)
    same = from_pretrained(theirs, SparsityConfig(n=1, init="magnitude"))
    assert same is theirs
    assert_same_logits(ours, theirs)


def test_a_hugging_face_vit_becomes_ours(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16,
                                    patch_size=8, num_labels=5, initializer_range=0.2)  # fmt: skip
    theirs = transformers.ViTForImageClassification(config)
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path, filter_fn=lambda name, _: name.endswith("0.mlp.fc1"))
    assert isinstance(ours, ViT)
    ours.blocks[0].mlp.fc1 = nn.Linear(16, 32)
    ours.blocks[0].mlp.fc1.load_state_dict(dict(zip(("weight", "bias"), _fc1(theirs), strict=True)))
    assert_same_logits(ours, theirs, torch.randn(3, 3, 16, 16))
    sparse = from_pretrained(tmp_path)
    assert len(sparse_layers(sparse)) == 8 and type(sparse.head) is nn.Linear
    # a model object of theirs is made sparse as it is, separate query, key and value included
    assert len(sparse_layers(from_pretrained(theirs))) == 12
    assert theirs(torch.randn(3, 3, 16, 16)).logits.shape == (3, 5)


def _fc1(model: nn.Module) -> tuple[torch.Tensor, ...]:
    found = {name: p for name, p in model.named_parameters() if ".0." in name and p.shape[0] == 32}
    return tuple(sorted(found.values(), key=lambda p: -p.dim()))


def test_a_dense_export_is_a_checkpoint_too(tmp_path):
    model = llama()
    export_dense(model, tmp_path / "llama")
    loaded = from_pretrained(tmp_path / "llama", dtype=torch.float64)
    assert_same_logits(model.double(), loaded)
    for name, layer in sparse_layers(model).items():
        assert torch.equal(layer.weight.to_dense(), loaded.get_submodule(name).weight.to_dense())
    image_model = vit()
    export_dense(image_model, tmp_path / "vit")
    assert_same_logits(image_model, from_pretrained(tmp_path / "vit"), torch.randn(2, *_image(image_model)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads must be 4 .*, got 2; load it with transformers and pass the model"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be False"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_type must be 'default' .* got 'llama3'"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"model_type": "mamba"}, "model_type must be 'llama' or 'vit', got 'mamba'"),
    ],
)
def test_models_that_we_do_not_have_are_named(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA.to_hf() | changes))
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)


def test_folders_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="config.json: must exist"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json: must be JSON"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA.to_hf()))
    with pytest.raises(CheckpointError, match="must hold model.safetensors or model.safetensors.index.json, got neither"):
        from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')
    with pytest.raises(CheckpointError, match="one.safetensors: must exist, as model.safetensors.index.json says"):
        from_pretrained(tmp_path)
    save_file({"lm_head.weight": torch.zeros(64, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="must hold exactly the model's tensors, got missing model.embed_tokens.weight"):
        from_pretrained(tmp_path)
    export_packed(llama(), tmp_path / "packed")
    with pytest.raises(ValueError, match="config: must be None for .*packed.safetensors"):
        from_pretrained(tmp_path / "packed", SparsityConfig())


# --- torch's semi-structured tensors ---


def stack(rows: int = 128, columns: int = 256, n: int = 2) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(columns, rows), nn.ReLU(), nn.Linear(rows, columns), nn.LayerNorm(columns))
    sparsify_(model, SparsityConfig(n=n))
    return model


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (lambda: stack(), ("cusparse",), r"backend: must be one of \['cutlass', 'cusparselt'\], got 'cusparse'"),
        (lambda: nn.Sequential(nn.Linear(8, 8)), ("cutlass",), "model: must have at least one SparseLinear"),
        (lambda: stack().double(), ("cutlass",), "dtype: must be one of .*bfloat16.* for the cutlass backend, got torch.float64 for 0"),
        (lambda: stack(16, 64).bfloat16(), ("cutlass",), r"divisible by \(32, 64\) for the cutlass .*, got \(16, 64\) for 0"),
        (lambda: stack(64, 72).bfloat16(), ("cusparselt",), r"divisible by \(16, 16\) for the cusparselt backend .* got \(64, 72\) for 0"),
        (lambda: stack().bfloat16(), ("cusparselt",), "model: must be on a CUDA device for the cusparselt backend, got 0 on cpu"),
    ],
)
def test_limits_of_semi_structured_tensors_are_checked_first(model, arguments, message):
    model = model()
    layers = sparse_layers(model)
    with pytest.raises(ValueError, match=message):
        to_semi_structured_(model, *arguments)
    assert sparse_layers(model) == layers


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
@pytest.mark.parametrize(("n", "dtype"), [(2, torch.bfloat16), (1, torch.float16)])
@pytest.mark.parametrize("backend", ["cutlass", "cusparselt"])
def test_semi_structured_tensors_compute_what_the_layers_do(backend, dtype, n):
    from torch.sparse import SparseSemiStructuredTensor

    if backend == "cusparselt" and not torch.backends.cusparselt.is_available():
        pytest.skip("this torch has no cuSPARSELt")
    model = stack(n=n).cuda().to(dtype).eval()
    x = torch.randn(192, 256, device="cuda", dtype=dtype)
    layers = sparse_layers(model)
    dense = [layer.weight.to_dense().detach() for layer in layers.values()]
    with torch.no_grad():
        expected = model(x)
        try:
            assert to_semi_structured_(model, backend) == 2
        except RuntimeError as error:
            assert backend == "cutlass" and torch.cuda.get_device_capability()[0] != 8
            assert "backend: 'cutlass' cannot run on" in str(error) and sparse_layers(model) == layers
            pytest.skip(str(error)[:200])
        assert all(isinstance(model[i].weight, SparseSemiStructuredTensor) for i in (0, 2))
        torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
        for i, weight in zip((0, 2), dense, strict=True):
            assert torch.equal(model[i].weight.to_dense(), weight)
