"""Text: reading, splitting, windows, resuming. Images are in test_images.py. No file outside tmp_path is needed."""

from __future__ import annotations

import io
import json
import lzma
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chts_train.data import TextBatches, TokenDocs, load_text
from chts_train.data.text import stdlib_files
from chts_train.data.tokens import read_array, split_documents

documents = st.lists(st.lists(st.integers(0, 40), max_size=30), min_size=1, max_size=12)


def docs_of(lists: list[list[int]]) -> TokenDocs:
    return TokenDocs.from_documents([np.array(one, dtype=np.uint16) for one in lists])


def as_lists(docs: TokenDocs) -> list[list[int]]:
    return [docs[i].tolist() for i in range(len(docs))]


def as_bytes(docs: TokenDocs) -> list[bytes]:
    """Byte-level documents; each must end with the end-of-document id."""
    assert all(docs[i][-1] == 256 for i in range(len(docs)))
    return [bytes(docs[i][:-1].tolist()) for i in range(len(docs))]


def write_tokens(path: Path, tokens: list[int] | np.ndarray) -> Path:
    path.write_bytes(np.asarray(tokens, "<u2").tobytes())
    return path


# Documents and their split


@given(documents)
def test_boundaries_invert_concatenation(lists: list[list[int]]) -> None:
    lists = [[token + 1 for token in one] + [0] for one in lists]
    flat = np.concatenate([np.array(one, np.uint16) for one in lists])
    assert as_lists(TokenDocs.from_boundaries(flat, 0)) == lists
    assert as_lists(TokenDocs.from_boundaries(np.append(flat, np.uint16(5)), 0)) == [*lists, [5]]


def test_boundaries_of_nothing() -> None:
    assert len(TokenDocs.from_boundaries(np.empty(0, np.uint16), 0)) == 0


@given(documents, st.floats(0.01, 0.99), st.integers(0, 1000))
def test_split_shares_out_whole_documents(lists: list[list[int]], fraction: float, seed: int) -> None:
    lists = [[i, *one, 7] for i, one in enumerate(lists)]
    docs = docs_of(lists)
    if docs.total < 4:
        return
    train, val = split_documents(docs, fraction, seed)
    assert train.tokens is docs.tokens
    assert val.total > 0
    assert train.total > 0
    if len(lists) == 1:
        assert as_lists(train)[0] + as_lists(val)[0] == lists[0]
        return
    assert sorted(as_lists(train) + as_lists(val)) == sorted(lists)
    assert val.total <= max(fraction * docs.total, min(len(one) for one in lists))
    again = split_documents(docs, fraction, seed)
    assert (as_lists(again[0]), as_lists(again[1])) == (as_lists(train), as_lists(val))


def test_split_depends_on_the_seed_and_shuffles() -> None:
    docs = docs_of([[i, i] for i in range(100)])
    orders = [as_lists(split_documents(docs, 0.1, seed)[0]) for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])
    assert [len(order) for order in orders] == [90, 90]


def test_split_errors() -> None:
    with pytest.raises(ValueError, match=r"val_fraction must be in \(0, 1\), got 1.0"):
        split_documents(docs_of([[1, 2], [3, 4]]), 1.0, 0)
    with pytest.raises(ValueError, match="at least 4 tokens to be split into train and val, got 3"):
        split_documents(docs_of([[1, 2], [3]]), 0.5, 0)


# Unigram


def test_unigram_perplexity_by_hand(tmp_path: Path) -> None:
    train = write_tokens(tmp_path / "x_train.bin", [1, 2, 2, 0, 1, 1, 0])
    write_tokens(tmp_path / "x_val.bin", [2, 1, 0])
    text = load_text(train, vocab=4)
    # train targets (first token of each document left out): 2 2 0 | 1 0, plus one for each of 4 ids
    probability = {0: 3 / 9, 1: 2 / 9, 2: 3 / 9, 3: 1 / 9}
    expected = math.exp(-(math.log(probability[1]) + math.log(probability[0])) / 2)
    assert text.unigram_perplexity() == pytest.approx(expected)


def test_unigram_perplexity_of_a_uniform_text(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(1, 33, size=60_000)
    tokens[::1000] = 0
    write_tokens(tmp_path / "u.u16", tokens)
    assert load_text(tmp_path / "u.u16").unigram_perplexity() == pytest.approx(32, rel=0.02)


# Sources of text


def test_stdlib_is_the_default() -> None:
    text = load_text(max_bytes=300_000)
    again = load_text("stdlib", max_bytes=300_000)
    assert text.name == "stdlib"
    assert text.vocab_size == 257
    assert as_bytes(text.train) == as_bytes(again.train)
    assert text.train.total + text.val.total == 300_000 + len(text.train) + len(text.val)
    assert b"import " in b"".join(as_bytes(text.train))
    assert load_text(max_bytes=300_000, seed=1).train[0].tolist() != text.train[0].tolist()
    assert "train" in text.describe()
    assert "vocabulary 257" in text.describe()


def test_stdlib_leaves_out_tests_and_packages() -> None:
    files = stdlib_files()
    assert files == sorted(files)
    assert {"json", "asyncio"} <= {path.parent.name for path in files}
    assert not {"site-packages", "dist-packages", "test", "tests", "encodings"} & {p for f in files for p in f.parts}


def test_stdlib_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="'stdlib' needs the library's source files, got none under"):
        load_text()


def test_text_folder(tmp_path: Path) -> None:
    contents = {"a.txt": b"first", "b.md": b"second text", "deep/c.py": b"third = 3\n", "d.txt.xz": b"packed"}
    for name, data in contents.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(lzma.compress(data) if name.endswith(".xz") else data)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "image.png").write_bytes(b"not text")
    text = load_text(tmp_path, val_fraction=0.3)
    assert sorted(as_bytes(text.train) + as_bytes(text.val)) == sorted(contents.values())
    assert text.name == tmp_path.name


def test_single_text_file_is_cut(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(bytes(range(100)))
    text = load_text(str(tmp_path / "book.txt"), val_fraction=0.1)
    assert text.train[0].tolist() == list(range(91))
    assert text.val[0].tolist() == [*range(91, 100), 256]


def test_files_named_train_and_val(tmp_path: Path) -> None:
    for name in ("wiki.train.txt", "wiki.valid.txt"):
        (tmp_path / name).write_text(name)
    for spec in (tmp_path / "wiki.train.txt", [tmp_path / "wiki.valid.txt", tmp_path / "wiki.train.txt"]):
        text = load_text(spec)
        assert as_bytes(text.train) == [b"wiki.train.txt"]
        assert as_bytes(text.val) == [b"wiki.valid.txt"]


def test_max_bytes_cuts_the_last_document(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / f"{i}.txt").write_bytes(bytes([65 + i]) * 10)
    text = load_text(tmp_path, max_bytes=25)
    assert sorted(len(one) for one in as_bytes(text.train) + as_bytes(text.val)) == [5, 10, 10]


@pytest.mark.parametrize("name", ["t.bin", "t.u16", "t.npy", "t.bin.xz", "t.npy.xz"])
def test_token_arrays(tmp_path: Path, name: str) -> None:
    tokens = np.array([5, 6, 0, 7, 8, 9, 0, 3, 0], np.uint16)
    buffer = io.BytesIO()
    if ".npy" in name:
        np.save(buffer, tokens)
    else:
        buffer.write(tokens.tobytes())
    data = buffer.getvalue()
    (tmp_path / name).write_bytes(lzma.compress(data) if name.endswith(".xz") else data)
    array = read_array(tmp_path / name)
    assert array.tolist() == tokens.tolist()
    assert isinstance(array, np.memmap) == (not name.endswith(".xz"))
    text = load_text(tmp_path / name, val_fraction=0.4)
    assert sorted(as_lists(text.train) + as_lists(text.val)) == [[3, 0], [5, 6, 0], [7, 8, 9, 0]]
    assert text.vocab_size == 10


def test_pair_of_token_arrays(tmp_path: Path) -> None:
    train, val = [1, 2, 0, 3, 0], [4, 5, 0]
    write_tokens(tmp_path / "books_train.u16", train)
    (tmp_path / "books_val.u16.xz").write_bytes(lzma.compress(np.array(val, "<u2").tobytes()))
    (tmp_path / "README.md").write_text("no tokens")
    text = load_text(tmp_path, vocab=50)
    assert as_lists(text.train) == [[1, 2, 0], [3, 0]]
    assert as_lists(text.val) == [[4, 5, 0]]
    assert text.vocab_size == 50


def test_several_arrays_and_another_end_of_text(tmp_path: Path) -> None:
    for i in range(3):
        write_tokens(tmp_path / f"shard{i}.bin", [0, i + 1, 9, 0, 9])
    text = load_text(tmp_path, end_of_text=9, val_fraction=0.2)
    assert sorted(as_lists(text.train) + as_lists(text.val)) == [[0, 1, 9], [0, 2, 9], [0, 3, 9], *[[0, 9]] * 3]


def test_max_bytes_of_arrays(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "x.bin", [1, 2, 0] * 100)
    text = load_text(path, max_bytes=60)
    assert text.train.total + text.val.total == 30


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A word-level tokenizer: words of the text, 0 is the end of text."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<|endoftext|>": 0, "[UNK]": 1, "one": 2, "two": 3, "three": 4, "spare": 5}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    model.save(str(path))
    return path


def test_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one two three")
    (folder / "b.txt").write_text("three four")
    text = load_text(folder, tokenizer=tokenizer, val_fraction=0.4)
    assert sorted(as_lists(text.train) + as_lists(text.val)) == [[2, 3, 4, 0], [4, 1, 0]]
    assert text.vocab_size == 6
    assert load_text(folder, tokenizer=tokenizer, end_of_text="spare").val[0][-1] == 5


def test_tokenizer_tells_the_vocabulary_of_arrays(tmp_path: Path, tokenizer: Path) -> None:
    path = write_tokens(tmp_path / "x.bin", [2, 3, 0, 2, 2, 0])
    assert load_text(path).vocab_size == 4
    assert load_text(path, tokenizer=tokenizer).vocab_size == 6


def fake_hub(monkeypatch: pytest.MonkeyPatch, splits: dict[str, list[dict[str, Any]]]) -> list[tuple]:
    calls: list[tuple] = []

    def load_dataset(*args: Any, **kwargs: Any) -> dict[str, list[dict[str, Any]]]:
        calls.append((args, kwargs))
        return splits

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hugging_face_name(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"train": [{"text": "ab", "id": "x"}, {"text": ""}, {"text": "cd"}], "validation": [{"text": "é"}]}
    calls = fake_hub(monkeypatch, rows)
    text = load_text("owner/books:small")
    assert calls == [(("owner/books", "small"), {"streaming": False})]
    assert as_bytes(text.train) == [b"ab", b"cd"]
    assert as_bytes(text.val) == ["é".encode()]
    assert as_bytes(load_text("hf:owner/books", max_bytes=3).train) == [b"ab", b"c"]
    assert calls[1] == (("owner/books", None), {"streaming": True})


def test_hugging_face_without_a_split_or_a_text_column(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, {"train": [{"story": f"number {i}", "i": i} for i in range(20)]})
    text = load_text("stories", val_fraction=0.1)
    assert (len(text.train), len(text.val)) == (18, 2)
    fake_hub(monkeypatch, {"train": [{"question": "a", "answer": "b"}]})
    with pytest.raises(ValueError, match=r"'qa' must have a column 'text' or a single text column, got \['answer', 'q"):
        load_text("qa")


@pytest.mark.parametrize(
    ("spec", "module", "message"),
    [
        (
            "owner/books",
            "datasets",
            r"data 'owner/books' \(no file or folder .*needs the package datasets: pip install da",
        ),
        ("stdlib", "tokenizers", r'a tokenizer file needs the package tokenizers: pip install "chts\[train\]"'),
    ],
)
def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spec: str, module: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # makes every import of it fail
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ImportError, match=message):
        load_text(spec, tokenizer=tmp_path / "t.json" if module == "tokenizers" else None)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"vocab": 0}, ValueError, "vocab must be positive or None, got 0"),
        ({"max_bytes": -1}, ValueError, "max_bytes must be positive or None, got -1"),
        ({"val_fraction": 0.0, "max_bytes": 10_000}, ValueError, r"val_fraction must be in \(0, 1\), got 0.0"),
        (
            {"vocab": 200, "max_bytes": 10_000},
            ValueError,
            "vocab must be at least 257 for the token ids of stdlib, got 200",
        ),
        ({"end_of_text": "</s>"}, ValueError, "end_of_text must be an id without a tokenizer, got '</s>'"),
        ({"tokenizer": "nowhere.json"}, FileNotFoundError, "tokenizer must be an existing file, got 'nowhere.json'"),
        ({"spec": []}, ValueError, "at least one file, folder or data set, got an empty list"),
        (
            {"spec": "missing.txt"},
            FileNotFoundError,
            "'stdlib', an existing file or folder, or a data set, got 'missing.txt'",
        ),
        ({"spec": ["a b", "c"]}, FileNotFoundError, "got 'a b'"),
    ],
)
def test_argument_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_text(**arguments)


def test_file_errors(tmp_path: Path) -> None:
    def fails(name: str, data: bytes, message: str, **arguments: Any) -> None:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            load_text(tmp_path / name, **arguments)

    def npy(array: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, array)
        return buffer.getvalue()

    fails("odd.bin", b"abc", "odd.bin is not a whole token array")
    fails("cut.u16.xz", lzma.compress(bytes(1000))[:40], "cut.u16.xz is not a whole token array")
    fails("cut.txt.xz", lzma.compress(bytes(1000))[:40], "cut.txt.xz is not a whole xz file")
    fails("not.npy", b"hello there", "not.npy is not a whole token array")
    fails("two.npy", npy(np.zeros((2, 2), np.int64)), r"two.npy must hold a 1-D array of integers, got int64 \[2, 2\]")
    fails("float.npy", npy(np.zeros(9)), r"float.npy must hold a 1-D array of integers, got float64 \[9\]")
    fails("minus.npy", npy(np.array([1, -1, 0, 4])), "minus.npy must hold token ids >= 0, got a negative one")
    fails("empty.bin", b"", "at least 4 tokens to be split into train and val, got 0")
    fails("empty.txt", b"", "empty.txt must hold text, got none")
    fails("big.bin", npy(np.zeros(0))[:16] + b"\xff\xff", "vocab must be at least 65536 .*, got 9", vocab=9)
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="void must hold text files or token arrays, got a folder without any"):
        load_text(tmp_path / "void")
    (tmp_path / "t.json").write_text("[]")
    with pytest.raises(ValueError, match="t.json' is no tokenizers JSON file"):
        load_text(max_bytes=1000, tokenizer=tmp_path / "t.json")


def test_tokenizer_without_an_end(tmp_path: Path, tokenizer: Path) -> None:
    values = json.loads(tokenizer.read_text())
    del values["model"]["vocab"]["<|endoftext|>"]
    tokenizer.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"end_of_text must be given: the tokenizer knows none of <\|endoftext\|>, "):
        load_text(max_bytes=1000, tokenizer=tokenizer)


# Batches


def take(batches: TextBatches, count: int) -> list[tuple[list, list]]:
    return [(x.tolist(), y.tolist()) for x, y in (next(batches) for _ in range(count))]


@given(documents, st.integers(1, 9), st.integers(1, 5), st.integers(0, 5))
def test_an_epoch_has_every_target_once(lists: list[list[int]], seq_len: int, batch_size: int, seed: int) -> None:
    # Unique tokens tell which place of which document a target is.
    flat = iter(range(10_000))
    lists = [[next(flat) for _ in one] for one in lists]
    if all(len(one) < 2 for one in lists):
        return
    batches = TextBatches(docs_of(lists), seq_len, batch_size, seed)
    rows = []
    for _ in range(-(-batches.items // batch_size)):
        x, y = next(batches)
        assert x.shape == y.shape == (batch_size, seq_len)
        assert x.dtype == y.dtype == torch.int64
        rows += list(zip(x.tolist(), y.tolist(), strict=True))
    pairs = [(x, y) for row in rows[: batches.items] for x, y in zip(*row, strict=True) if y != -100]
    assert sorted(pairs) == [(one[i], one[i + 1]) for one in lists for i in range(len(one) - 1)]
    for x, y in rows:  # contiguous, and padding only at the end
        counted = [value for value in y if value != -100]
        assert y == counted + [-100] * (seq_len - len(counted))
        assert x == [*range(counted[0] - 1, counted[-1]), *[0] * (seq_len - len(counted))]


def test_epochs_are_reshuffled_and_depend_on_the_seed() -> None:
    docs = docs_of([list(range(i * 5, i * 5 + 5)) for i in range(40)])
    batches = TextBatches(docs, 4, 40, seed=3)
    first, second = (next(batches)[0][:, 0].tolist() for _ in range(2))
    other = next(TextBatches(docs, 4, 40, seed=4))[0][:, 0].tolist()
    assert sorted(first) == sorted(second) == sorted(other) == list(range(0, 200, 5))
    assert len({tuple(first), tuple(second), tuple(other), tuple(sorted(first))}) == 4
    assert batches.epoch == 2.0
    assert next(TextBatches(docs, 4, 40, shuffle=False))[0][:, 0].tolist() == sorted(first)


def test_the_order_is_pinned() -> None:
    """The stream may not change between versions: a resumed run must see the same batches."""
    docs = docs_of([[i, i] for i in range(8)])
    batches = TextBatches(docs, 1, 8, seed=42)
    assert [next(batches)[0].flatten().tolist() for _ in range(2)] == [
        [3, 1, 5, 7, 4, 0, 6, 2],
        [6, 5, 0, 4, 3, 1, 7, 2],
    ]


@given(st.integers(0, 30), st.integers(1, 7), st.integers(1, 7))
def test_resuming_goes_on_with_the_same_batches(skip: int, batch_size: int, other_size: int) -> None:
    docs = docs_of([list(range(i * 7, i * 7 + 7)) for i in range(5)])
    batches = TextBatches(docs, 3, batch_size, seed=1)
    take(batches, skip)
    state = json.loads(json.dumps(batches.state_dict()))
    expected = take(batches, 5)
    resumed = TextBatches(docs, 3, batch_size, seed=1)
    take(resumed, 2)
    resumed.load_state_dict(state)
    assert take(resumed, 5) == expected
    # The same sequences in batches of another size: micro-batches do not change the data.
    split = TextBatches(docs, 3, other_size, seed=1)
    split.load_state_dict(state)
    rows = [row for x, _ in take(split, 5 * batch_size) for row in x]
    assert rows[: 5 * batch_size] == [row for x, _ in expected for row in x]


def test_state_errors() -> None:
    docs = docs_of([list(range(9))])
    state = TextBatches(docs, 4, 2).state_dict()
    with pytest.raises(ValueError, match="the state has seq_len=4, these batches have seq_len=2"):
        TextBatches(docs_of([list(range(5))]), 2, 2).load_state_dict(state)
    with pytest.raises(ValueError, match="the state has seed=0, these batches have seed=1"):
        TextBatches(docs, 4, 2, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="the state has tokens=9, these batches have tokens=8"):
        TextBatches(docs_of([list(range(8))]), 4, 2).load_state_dict(state)
    with pytest.raises(ValueError, match="the state's position must be an integer >= 0, got -3"):
        TextBatches(docs, 4, 2).load_state_dict({**state, "position": -3})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_len": 0}, "seq_len must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"docs": docs_of([[1], []])}, "docs must have a document of at least 2 tokens, got 2 documents without one"),
    ],
)
def test_batch_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextBatches(**({"docs": docs_of([[1, 2, 3]]), "seq_len": 2, "batch_size": 2} | arguments))


def test_eval_batches_are_one_ordered_pass() -> None:
    docs = docs_of([list(range(11)), list(range(100, 104)), list(range(200, 231))])
    batches = list(TextBatches.eval_batches(docs, 5, 4))
    assert [len(x) for x, _ in batches] == [4, 4, 1]
    targets = torch.cat([y[y != -100] for _, y in batches]).tolist()
    assert targets == [*range(1, 11), *range(101, 104), *range(201, 231)]


def test_eval_limit_spreads_over_the_documents() -> None:
    docs = docs_of([list(range(i * 11, i * 11 + 11)) for i in range(100)])
    (x, y), *rest = TextBatches.eval_batches(docs, 10, 64, max_tokens=95)
    assert not rest
    assert (y != -100).sum() == 100
    assert (x[:, 0] // 11).tolist() == list(range(0, 100, 10))
    with pytest.raises(ValueError, match="the evaluation limit must be at least 1 or None, got 0"):
        list(TextBatches.eval_batches(docs, 10, 64, max_tokens=0))
