"""Checkpoints: round trips, every way a file can be wrong, and kill -9 at any moment."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from chts_train import checkpoint as ck
from chts_train.checkpoint import CheckpointError, find_checkpoint, read_checkpoint, restore, save_checkpoint
from chts_train.storage import join_tree, load_tensors, replacing, save_tensors, split_tree, write_json

ROOT = Path(__file__).resolve().parents[2]


class Layer(nn.Module):
    """The storage of a sparse layer, without its arithmetic."""

    def __init__(self, rows=8, columns=16, n=2):
        super().__init__()
        self.n = n
        self.values = nn.Parameter(torch.randn(rows, columns * n // 4))
        self.register_buffer("ids", torch.randint(0, 24, (rows // 4, columns // 4), dtype=torch.uint8))


class Part:
    def __init__(self, position=0):
        self.position, self.tensor = position, torch.arange(3) + position

    def state_dict(self):
        return {"position": self.position, "tensor": self.tensor}

    def load_state_dict(self, state):
        if state["position"] < 0:
            raise ValueError("position: must be at least 0")
        self.position, self.tensor = state["position"], state["tensor"]


def build(seed=0, n=2):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 16), Layer(n=n), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def save(run, step=1, seed=0, n=2, **options):
    model, optimizer = build(seed, n)
    options |= {"config": {"preset": "x"}, "parts": {"data": Part(step)}}
    return save_checkpoint(run, step=step, model=model, optimizer=optimizer, **options), model, optimizer


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def edit_header(path, **changes):
    header = json.loads((path / ck.HEADER).read_text())
    header.update(changes)
    (path / ck.HEADER).write_text(json.dumps(header))


# --- storage ---


def test_tree_round_trip():
    state = {0: {"m": torch.randn(3)}, 1: (1, torch.ones(()))}
    tree = {"a": [1, 2.5, None, True, "x"], "state": state, "$odd": {}}
    tensors = {}
    text = json.dumps(split_tree(tree, tensors, "t"))
    assert same(join_tree(json.loads(text), tensors), tree)
    assert len(tensors) == 2


def test_tree_refuses_what_it_cannot_store():
    with pytest.raises(TypeError, match=r"^t\.a\.1: must be JSON .* or a tensor, got <class 'object'>$"):
        split_tree({"a": [0, object()]}, {}, "t")


def test_tensors_that_share_memory_are_stored_once(tmp_path):
    weight = torch.randn(64, 64)
    tensors = {"a": weight, "b": weight, "view": weight[1:3], "transposed": weight.T, "empty": weight[:0]}
    aliases = save_tensors(tmp_path / "f", tensors)
    assert aliases == {"b": "a"}
    assert same(load_tensors(tmp_path / "f", aliases).keys() & tensors.keys(), tensors.keys())
    assert all(torch.equal(v, tensors[k]) for k, v in load_tensors(tmp_path / "f", aliases).items())


def test_replacing_leaves_the_old_file_on_failure(tmp_path):
    write_json(tmp_path / "f", [1])
    with pytest.raises(RuntimeError), replacing(tmp_path / "f") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads((tmp_path / "f").read_text()) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


# --- round trip ---


def test_round_trip_restores_everything(tmp_path):
    path, model, optimizer = save(tmp_path, step=7)
    expected_rng = torch.get_rng_state()
    torch.rand(5)
    other, other_optimizer = build(seed=1)
    part = Part()
    found = read_checkpoint(tmp_path)
    assert (found.path, found.step, found.config) == (path, 7, {"preset": "x"})
    assert found.layers == {"1": {"n": 2, "shape": [8, 16]}}
    restore(found, other, other_optimizer, {"data": part}, rng=True)
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert same(other_optimizer.state_dict(), optimizer.state_dict())
    assert part.position == 7 and torch.equal(part.tensor, torch.arange(3) + 7)
    assert torch.equal(torch.get_rng_state(), expected_rng)


def test_files_are_readable_by_plain_safetensors(tmp_path):
    path, model, _ = save(tmp_path)
    from safetensors.torch import load_file

    assert same(load_file(path / ck.MODEL)["1.values"], model[1].values.data)
    assert oct((path / ck.MODEL).stat().st_mode & 0o777) == oct((path / ck.HEADER).stat().st_mode & 0o777)


def test_keeps_the_last_and_points_to_it(tmp_path):
    for step in (1, 2, 3):
        path, *_ = save(tmp_path, step=step)
    names = sorted(p.name for p in (tmp_path / ck.FOLDER).iterdir())
    assert names == ["latest", "step-00000002", "step-00000003"]
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path / ck.FOLDER) == find_checkpoint(path) == path


def test_a_checkpoint_is_never_overwritten(tmp_path):
    first, *_ = save(tmp_path, step=5)
    second, *_ = save(tmp_path, step=5, seed=1)
    assert (first.name, second.name) == ("step-00000005", "step-00000005.1")
    assert find_checkpoint(tmp_path) == second and first.is_dir()


def test_an_earlier_step_saved_later_is_the_latest(tmp_path):
    save(tmp_path, step=8)
    save(tmp_path, step=9)
    third, *_ = save(tmp_path, step=3)
    assert find_checkpoint(tmp_path) == third
    assert sorted(p.name for p in (tmp_path / ck.FOLDER).glob("step*")) == ["step-00000003", "step-00000009"]


def test_without_a_pointer_the_newest_complete_one_counts(tmp_path):
    path, *_ = save(tmp_path)
    (tmp_path / ck.FOLDER / ck.LATEST).unlink()
    assert find_checkpoint(tmp_path) == path


@pytest.mark.parametrize("option, value", [("keep", 0), ("step", -1)])
def test_save_arguments(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"^{option}: must be at least [01], got {value}$"):
        save(tmp_path, **{option: value})


# --- wrong files ---


@pytest.mark.parametrize("name", [ck.MODEL, ck.TRAINING, ck.HEADER])
def test_truncated(tmp_path, name):
    save(tmp_path, step=1)
    path, *_ = save(tmp_path, step=2)
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: len(data) // 2])
    rule = "be complete JSON" if name == ck.HEADER else f"have {len(data)} bytes"
    hint = r"\(also there: .*step-00000001\)"
    with pytest.raises(CheckpointError, match=f"{path / name}: must {rule} {hint}, got "):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", [ck.MODEL, ck.TRAINING])
def test_altered(tmp_path, name):
    path, *_ = save(tmp_path)
    data = bytearray((path / name).read_bytes())
    data[-1] ^= 1
    (path / name).write_bytes(data)
    message = rf"{name}: must have SHA-256 \w+\.\.\., got \w+\.\.\. \(altered\)"
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", [ck.MODEL, ck.TRAINING])
def test_missing_file(tmp_path, name):
    path, *_ = save(tmp_path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: must exist, got no such file"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": "other"}, 'must have "format": "chts-checkpoint", got \'other\''),
        ({"schema": ck.SCHEMA + 1}, f"to {ck.SCHEMA}, got {ck.SCHEMA + 1}; a newer version of this package"),
        ({"schema": "1"}, "schema version from 1"),
        ({"step": None}, 'must have "step"'),
        ({"pattern_tables": {"2": "0" * 64}}, "pattern table for n = 2, got hash 0000000000000000..., not"),
        ({"pattern_tables": {}}, r"must have the pattern table hash of n = 2 \(layer 1\), got none"),
        ({"files": {}}, 'must list "model.safetensors"'),
        ({"layers": {"1": {}}}, "must be well formed, got KeyError"),
        ({"layers": {"9": {"n": 2, "shape": [8, 8]}}}, r"must hold 9.ids as uint8 \[2, 2\], got nothing"),
    ],
)
def test_wrong_header(tmp_path, changes, message):
    path, *_ = save(tmp_path)
    edit_header(path, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        read_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_not_even_an_object(tmp_path):
    path, *_ = save(tmp_path)
    (path / ck.HEADER).write_text("[]")
    with pytest.raises(CheckpointError, match="got 'list'"):
        read_checkpoint(path)


@pytest.mark.parametrize("n, limit", [(1, 24), (2, 90)])
def test_ids_out_of_range(tmp_path, n, limit):
    path, *_ = save(tmp_path, n=n)
    tensors = load_tensors(path / ck.MODEL)
    tensors["1.ids"][1, 2] = limit
    save_tensors(path / ck.MODEL, tensors)
    header = json.loads((path / ck.HEADER).read_text())
    header["files"][ck.MODEL]["sha256"] = ck.sha256_file(path / ck.MODEL)
    edit_header(path, files=header["files"])
    with pytest.raises(CheckpointError, match=rf"1\.ids below {limit} \(n = {n}\), got {limit} at \[1, 2\]"):
        read_checkpoint(path)


def test_paths_that_are_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="must exist"):
        find_checkpoint(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="got a file"):
        find_checkpoint(tmp_path / "file")
    with pytest.raises(CheckpointError, match="must hold checkpoint.json or checkpoints/, got neither"):
        find_checkpoint(tmp_path)
    (tmp_path / ck.FOLDER).mkdir()
    with pytest.raises(CheckpointError, match="must hold a complete checkpoint, got none"):
        find_checkpoint(tmp_path)
    (tmp_path / ck.FOLDER / ck.LATEST).write_text("../elsewhere\n")
    with pytest.raises(CheckpointError, match="must name a complete checkpoint, got '../elsewhere'"):
        find_checkpoint(tmp_path)


# --- all or nothing ---


def other_shape():
    model, _ = build(1)
    model[2] = nn.Linear(8, 3)
    return model


def other_dtype():
    return build(1)[0].to(torch.bfloat16)


def other_n():
    return build(1, n=1)[0]


def other_names():
    return nn.Sequential(*build(1)[0], nn.Linear(2, 2))


@pytest.mark.parametrize(
    "make, message",
    [
        (other_shape, r"must hold 2\.weight as torch.float32 \[3, 8\], got torch.float32 \[2, 8\]"),
        (other_dtype, "must hold 0.weight as torch.bfloat16"),
        (other_n, r"must hold 1.values as torch.float32 \[8, 4\]"),
        (other_names, "missing 3.bias, 3.weight, unexpected none"),
    ],
)
def test_a_model_that_does_not_fit_is_not_touched(tmp_path, make, message):
    save(tmp_path)
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        restore(read_checkpoint(tmp_path), model)
    assert same(before, dict(model.state_dict()))


def test_a_failing_part_leaves_everything_as_it_was(tmp_path):
    path, *_ = save(tmp_path, step=4)
    header = json.loads((path / ck.HEADER).read_text())
    header["training"]["parts"]["data"]["position"] = -1
    edit_header(path, training=header["training"])
    model, optimizer = build(1)
    part = Part(2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    message = 'hold a fitting state of "data", got position: must be at least 0'
    with pytest.raises(CheckpointError, match=message):
        restore(read_checkpoint(path), model, optimizer, {"data": part})
    assert part.position == 2 and same(before, dict(model.state_dict()))


def test_other_optimizer_or_part(tmp_path):
    save(tmp_path)
    model, _ = build(1)
    found = read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"must hold optimizer groups of \[1\] parameters, got \[5\]"):
        restore(found, model, torch.optim.SGD([nn.Parameter(torch.ones(2))]))
    with pytest.raises(CheckpointError, match=r"must hold the state of \"evolver\", got \['data'\]"):
        restore(found, model, parts={"evolver": Part()})


# --- kill -9 ---

WRITER = """
import sys, torch
from torch import nn
from chts_train.checkpoint import save_checkpoint
torch.set_num_threads(1)
model = nn.Linear(256, 256)
optimizer = torch.optim.SGD(model.parameters(), lr=1)
step = int(sys.argv[2])
while True:
    step += 1
    nn.init.constant_(model.weight, step)
    save_checkpoint(sys.argv[1], step=step, config={}, model=model, optimizer=optimizer)
    print(step, flush=True)
"""


def test_kill_9_at_any_moment_leaves_the_last_good_one(tmp_path):
    choose = random.Random(0)
    told = 0
    for _ in range(4):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(told)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        told = int(writer.stdout.readline())
        time.sleep(choose.uniform(0, 0.2))
        writer.send_signal(signal.SIGKILL)
        rest = writer.communicate()[0].split()
        told = int(rest[-1]) if rest else told
        found = read_checkpoint(tmp_path)
        assert found.step in (told, told + 1)  # the save that was running either counts or never happened
        assert bool((found.model["weight"] == found.step).all())
        told = found.step


@pytest.mark.parametrize("call", ["os.rename", "os.fsync", "os.replace", "safetensors.torch.save_file"])
def test_death_before_each_call_of_a_save(tmp_path, monkeypatch, call):
    """The same law without luck: stop at the first, second, ... call and read what is there."""
    save(tmp_path / "start", step=1)

    class Death(BaseException):
        pass

    module, name = call.rsplit(".", 1)
    original = getattr(sys.modules[module], name)
    outcomes = []
    for nth in range(1, 20):
        run = tmp_path / f"run{nth}"
        shutil.copytree(tmp_path / "start", run)
        left = [nth]

        def dying(*args, left=left, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise Death
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(call, dying)
            # A killed process does not clean up either.
            patch.setattr(shutil, "rmtree", lambda *a, **k: None)
            with contextlib.suppress(Death):
                save(run, step=2, keep=1)
        outcomes.append(read_checkpoint(run).step)
        if left[0] > 0:
            break
        save(run, step=3)
        assert read_checkpoint(run).step == 3
        assert not list((run / ck.FOLDER).glob(".tmp-*"))
    assert outcomes[-1] == 2 and 1 in outcomes
    assert outcomes == sorted(outcomes)
