"""Text as tokens, split into train and validation by document.

``load_text(spec)`` reads

- ``"stdlib"``: the source files of the running interpreter's standard library (nothing to download; another
  Python version is another text);
- text files and folders of them (``.txt .md .py`` ..., optionally ``.xz``); one file is one document;
- token arrays (``.npy .bin .u16``, optionally ``.xz``), documents ended by an end-of-text id. Files whose names
  hold ``train`` and ``val`` (or ``valid``, ``validation``, ``test``) in the same place are the split. One file is
  memory-mapped where it is not compressed; several of one part are joined in memory;
- the name of a Hugging Face data set (``owner/name`` or ``owner/name:config``, prefix ``hf:`` allowed), with the
  package `datasets`.

Text becomes bytes (ids 0..255, end of document 256) or, with ``tokenizer``, the ids of a `tokenizers` JSON file.
"""

from __future__ import annotations

import lzma
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import require
from .optional import require_package
from .tokens import TokenDocs, is_array, read_array, split_documents

BYTE_VOCAB = 257  # the 256 bytes and the end of a document
_END_OF_BYTES = 256
_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
_TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".html"),
    *(
        ".py",
        ".pyi",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".hpp",
        ".cu",
        ".java",
        ".js",
        ".ts",
        ".go",
        ".rs",
        ".rb",
        ".sh",
        ".sql",
    ),
    *(".toml", ".yaml", ".yml"),
)
# Not prose or code in the usual sense: tests would be 60 % of everything, encodings are tables of characters.
_STDLIB_SKIP = frozenset(("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"))
_TRAIN = re.compile(r"(?<![a-z])train(?:ing)?(?![a-z])", re.IGNORECASE)
_VAL = re.compile(r"(?<![a-z])(?:val|valid|validation|test)(?![a-z])", re.IGNORECASE)
_HUB_NAME = re.compile(r"(?:hf:)?([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?")

Spec = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class TextData:
    """Tokens of a text, held-out documents apart. All ids are below ``vocab_size``."""

    name: str
    vocab_size: int
    train: TokenDocs
    val: TokenDocs

    def unigram_perplexity(self) -> float:
        """exp of the mean loss in nats, on val, of the model that knows only how often each token occurs in train.

        Add-one smoothing; over the same targets that a model is evaluated on (all tokens but the first of each
        document).
        """
        train = self.train.target_counts(self.vocab_size).astype(np.float64) + 1
        val = self.val.target_counts(self.vocab_size).astype(np.float64)
        return float(np.exp(-(val @ np.log(train / train.sum())) / val.sum()))

    def describe(self) -> str:
        """One line: name, documents and tokens of both parts, vocabulary."""
        parts = (
            f"{name} {len(p):,} documents, {p.total:,} tokens" for name, p in (("train", self.train), ("val", self.val))
        )
        return f"{self.name}: {'; '.join(parts)}; vocabulary {self.vocab_size:,}"


def load_text(
    spec: Spec = "stdlib",
    *,
    vocab: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    seed: int = 42,
    max_bytes: int | None = None,
    val_fraction: float = 0.05,
    end_of_text: int | str | None = None,
) -> TextData:
    """Read, tokenize and split a text (see the module's docstring for ``spec``).

    vocab: vocabulary size, at least the largest id + 1; by default the tokenizer's, 257 for bytes, or the
        largest id + 1 of token arrays.
    tokenizer: path of a `tokenizers` JSON file. For token arrays it only tells the vocabulary size.
    seed: order of the documents and the choice of held-out ones.
    max_bytes: read at most this much of the documents (in their shuffled order; the last one is cut); for
        token arrays of each file.
    val_fraction: share of tokens held out, by whole documents, where the data brings no split of its own.
    end_of_text: the id that ends a document in token arrays (default 0); with a tokenizer the id or token put after
        each document (default: the first of <|endoftext|>, </s>, ... that it knows).

    Raises ValueError for a broken file, no text, ids that exceed ``vocab`` or an argument out of range,
    FileNotFoundError for a path that does not exist, ImportError naming the package that the data needs.
    """
    for name, value in (("vocab", vocab), ("max_bytes", max_bytes)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive or None, got {value!r}")
    encoder = _Encoder(tokenizer, end_of_text)
    arrays, documents, name = _resolve(spec, seed, max_bytes)
    if arrays is not None:
        train, val = _read_arrays(arrays, encoder, seed, max_bytes, val_fraction)
    else:
        parts = [encoder.encode(part) for part in documents]
        if not parts[0].total:
            raise ValueError(f"data {name} must hold text, got none")
        train, val = parts if len(parts) == 2 else split_documents(parts[0], val_fraction, seed)
    if not val.total:
        raise ValueError(f"data {name} must hold validation text, got none")
    needed = max(part.max_id() for part in {id(p.tokens): p for p in (train, val)}.values()) + 1  # shared memory once
    if vocab is None:
        vocab = encoder.vocab if arrays is None or tokenizer is not None else needed
    if needed > vocab:
        raise ValueError(f"vocab must be at least {needed} for the token ids of {name}, got {vocab}")
    return TextData(name, vocab, train, val)


class _Encoder:
    """Bytes of documents -> TokenDocs; the tokenizer is imported and read only when there is one."""

    def __init__(self, path: str | os.PathLike[str] | None, end_of_text: int | str | None) -> None:
        self.tokenizer: Any = None
        self.vocab, self.end = BYTE_VOCAB, _END_OF_BYTES
        self.end_of_text = end_of_text
        if path is None:
            if isinstance(end_of_text, str):
                raise ValueError(f"end_of_text must be an id without a tokenizer, got {end_of_text!r}")
            return
        if not Path(path).is_file():
            raise FileNotFoundError(f"tokenizer must be an existing file, got {os.fspath(path)!r}")
        tokenizers = require("tokenizers", "a tokenizer file")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(os.fspath(path))
        except Exception as error:  # the Rust reader raises bare Exception for every malformed file
            raise ValueError(f"tokenizer {os.fspath(path)!r} is no tokenizers JSON file: {error}") from error
        self.vocab = self.tokenizer.get_vocab_size()
        self.end = self._find_end()

    def _find_end(self) -> int:
        if isinstance(self.end_of_text, int):
            return self.end_of_text
        names = _END_NAMES if self.end_of_text is None else (self.end_of_text,)
        for name in names:
            found = self.tokenizer.token_to_id(name)
            if found is not None:
                return int(found)
        raise ValueError(f"end_of_text must be given: the tokenizer knows none of {', '.join(names)}")

    @property
    def array_end(self) -> int:
        """The id that ends a document in token arrays."""
        if isinstance(self.end_of_text, int):
            return self.end_of_text
        return 0 if self.tokenizer is None else self.end

    def encode(self, documents: Iterable[bytes]) -> TokenDocs:
        dtype = np.uint16 if self.vocab <= 1 << 16 else np.uint32
        if self.tokenizer is None:
            end = np.array([_END_OF_BYTES], dtype)
            return TokenDocs.from_documents(
                [np.concatenate([np.frombuffer(data, np.uint8).astype(dtype), end]) for data in documents]
            )
        encoded = []
        for batch in _batches(documents, 256):
            texts = [data.decode("utf-8", errors="replace") for data in batch]
            for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False):
                encoded.append(np.array([*encoding.ids, self.end], dtype))
        return TokenDocs.from_documents(encoded)


def _batches(documents: Iterable[bytes], size: int) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    for document in documents:
        batch.append(document)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _resolve(spec: Spec, seed: int, max_bytes: int | None) -> tuple[list[Path] | None, list[Iterable[bytes]], str]:
    """(token arrays or None, documents of [all] or of [train, val], name)."""
    if spec == "stdlib":
        return None, [_read_texts(stdlib_files(), seed, max_bytes)], "stdlib"
    given = [spec] if isinstance(spec, str | os.PathLike) else list(spec)
    if not given:
        raise ValueError("data must name at least one file, folder or data set, got an empty list")
    if len(given) == 1 and isinstance(given[0], str) and not Path(given[0]).expanduser().exists():
        match = _HUB_NAME.fullmatch(given[0])
        if match and not is_array(Path(given[0])) and not _is_text(Path(given[0])):
            return None, _read_hub(match[1], match[2], given[0], max_bytes), given[0]
    files, in_folder = [], False
    for item in given:
        path = Path(item).expanduser()
        if path.is_dir():
            in_folder = True
            files += sorted(p for p in path.rglob("*") if p.is_file() and (is_array(p) or _is_text(p)))
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"data must be 'stdlib', an existing file or folder, or a data set, got {item!r}")
    name = ",".join(Path(item).name for item in given)
    if not files:
        raise ValueError(f"data {name} must hold text files or token arrays, got a folder without any")
    arrays = [path for path in files if is_array(path)]
    if arrays:
        return arrays, [], name
    train, val = ([], []) if in_folder else _by_split(files)
    return None, [_read_texts(part, seed, max_bytes) for part in ((train, val) if val else (files,))], name


def _is_text(path: Path) -> bool:
    return Path(path.name.removesuffix(".xz")).suffix.lower() in _TEXT_SUFFIXES


def _by_split(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Files by the names' train/val marks; a lone train file brings the val file beside it. No split: (files, [])."""
    if len(files) == 1 and _TRAIN.search(files[0].name):
        for mark in ("val", "valid", "validation", "test"):
            beside = files[0].with_name(_TRAIN.sub(mark, files[0].name))
            if beside.is_file():
                return files, [beside]
    val = [path for path in files if _VAL.search(path.name) and not _TRAIN.search(path.name)]
    train = [path for path in files if path not in val]
    return (train, val) if train and val else (files, [])


def _read_arrays(
    files: list[Path], encoder: _Encoder, seed: int, max_bytes: int | None, val_fraction: float
) -> tuple[TokenDocs, TokenDocs]:
    def read(part: list[Path]) -> TokenDocs:
        arrays = [read_array(path) for path in part]
        if max_bytes is not None:
            arrays = [array[: max(1, max_bytes // array.itemsize)] for array in arrays]
        if len(arrays) == 1:
            return TokenDocs.from_boundaries(arrays[0], encoder.array_end)
        bounds = [TokenDocs.from_boundaries(array, encoder.array_end) for array in arrays]
        return TokenDocs.from_documents([docs[i] for docs in bounds for i in range(len(docs))])

    train, val = _by_split(files)
    return (read(train), read(val)) if val else split_documents(read(train), val_fraction, seed)


def stdlib_files() -> list[Path]:
    """Python sources of the running interpreter's standard library, sorted; without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _STDLIB_SKIP)
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise ValueError(
            f"data 'stdlib' needs the library's source files, got none under {root}; give files of your own"
        )
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _read_texts(files: Sequence[Path], seed: int, max_bytes: int | None) -> Iterator[bytes]:
    """Contents in an order shuffled from ``seed``, up to ``max_bytes`` in all; empty files give nothing."""
    order = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed))).permutation(len(files))
    left = max_bytes
    for index in order:
        path = files[index]
        try:
            with lzma.open(path) if path.suffix == ".xz" else open(path, "rb") as file:
                data = file.read(-1 if left is None else left)
        except (EOFError, lzma.LZMAError) as error:
            raise ValueError(f"{path} is not a whole xz file: {error}") from error
        if data:
            yield data
        if left is not None:
            left -= len(data)
            if left <= 0:
                return


def _read_hub(name: str, config: str | None, given: str, max_bytes: int | None) -> list[Iterable[bytes]]:
    """Documents of [all] or of [train, val] of a Hugging Face data set."""
    datasets = require_package(
        "datasets", "datasets", f"data {given!r} (no file or folder of that name, so taken as a Hugging Face data set)"
    )
    splits = datasets.load_dataset(name, config, streaming=max_bytes is not None)
    train = "train" if "train" in splits else next(iter(splits))
    val = next((key for key in ("validation", "val", "valid", "test") if key in splits and key != train), None)
    return [_hub_texts(splits[key], given, max_bytes) for key in (train, val) if key]


def _hub_texts(rows: Any, given: str, max_bytes: int | None) -> Iterator[bytes]:
    left = max_bytes
    for row in rows:
        texts = [key for key, value in row.items() if isinstance(value, str)]
        column = "text" if "text" in texts else texts[0] if len(texts) == 1 else None
        if column is None:
            raise ValueError(f"data {given!r} must have a column 'text' or a single text column, got {sorted(row)}")
        data = row[column].encode()[:left]
        if data:
            yield data
        if left is not None:
            left -= len(data)
            if left <= 0:
                return
