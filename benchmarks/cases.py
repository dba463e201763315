"""What is measured: suites, operations, named sets of shapes, and the list of cases that a command line asks for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

OPS: dict[str, tuple[str, ...]] = {
    "linear": ("forward", "input_grad", "weight_grad", "weight_grad_mvue", "layer", "layer_mvue"),
    "prune": ("prune", "prune14", "prune_pack"),
    "pack": ("pack", "pack_operands", "pack_operands_shared"),
    "topology": ("remove", "score", "regrow", "carry_over", "update", "update14"),
    "optimizer": ("adam",),
    "model": ("step", "step_mvue"),
    "host": ("forward", "input_grad", "weight_grad", "layer", "pack_operands", "update"),
}
"""Operations of each suite; the suffix 14 means 1:4. README.md says what each one computes."""

LINEAR_SETS: dict[str, list[tuple[int, int, int]]] = {
    # (tokens, out, in). L and S are the sets that the project's targets are stated on.
    "L": [
        (2048, 4096, 4096),
        (8192, 4096, 4096),
        (8192, 14336, 4096),
        (8192, 4096, 14336),
        (8192, 8192, 8192),
        (16384, 8192, 8192),
    ],
    "S": [
        (16384, 512, 512),
        (16384, 1376, 512),
        (16384, 512, 1376),
        (12608, 768, 768),
        (12608, 3072, 768),
        (12608, 768, 3072),
    ],
    # 64 sequences of 256 tokens for the models of the paper, 8192 tokens for the larger ones.
    "llama-60m": [(16384, 512, 512), (16384, 1376, 512), (16384, 512, 1376)],
    "llama-130m": [(16384, 768, 768), (16384, 2048, 768), (16384, 768, 2048)],
    "llama-1b": [(8192, 2048, 2048), (8192, 8192, 2048), (8192, 2048, 8192)],
    "llama-8b": [(8192, 1024, 4096), (8192, 4096, 4096), (8192, 14336, 4096), (8192, 4096, 14336)],
    # 64 images of 197 tokens.
    "vit-b": [(12608, 768, 768), (12608, 2304, 768), (12608, 3072, 768), (12608, 768, 3072)],
    "vit-l": [(12608, 1024, 1024), (12608, 3072, 1024), (12608, 4096, 1024), (12608, 1024, 4096)],
    # The shapes on which torchao reported its 2:4 training speed-ups.
    "torchao": [(13008, 1024, 4096), (13008, 4096, 1024)],
    "squares": [(4096, 4096, 4096), (8192, 8192, 8192), (12288, 12288, 12288), (16384, 16384, 16384)],
    # Few tokens, token counts that divide nothing, and sizes that are 4 modulo 16.
    "odd": [(1, 4096, 4096), (17, 4096, 4096), (1000, 1096, 512), (4097, 4096, 4096), (4096, 4100, 4092)],
    "quick": [(16384, 1376, 512), (12608, 768, 3072), (8192, 4096, 4096), (8192, 8192, 8192)],
    "tiny": [(48, 32, 64), (33, 36, 20)],
}
MATRICES = [(4096, 4096), (11008, 4096), (512, 512), (2048, 2048), (1376, 512)]
"""(out, in) of the suites that work on a weight alone."""
QUICK_MATRICES = [(1376, 512), (4096, 4096)]
TINY_MATRICES = [(32, 64), (36, 20)]
MODELS = ("llama-60m", "llama-130m", "llama-1b", "llama-8b", "vit-b", "vit-l")
HOST_SHAPES = [(64, 512, 512)]
"""So small that the device always waits for the host."""
UPDATE_ALL = "llama-60m"
"""The model all of whose matrices are updated at once in suite topology."""

DEFAULT_SETS = ("L", "S", "odd")
DEFAULT_MODELS = ("llama-60m", "llama-1b", "vit-l")
"""What a run without ``--shapes`` measures: the figures of record."""
ODD_OPS = ("forward", "input_grad", "layer")
"""All that such a run does with the odd shapes."""
ALL_SETS = ("L", "S", "llama-130m", "llama-1b", "vit-l", "torchao", "squares", "odd")
COMPILED = ((16384, 1376, 512), (8192, 4096, 4096), "llama-60m")
"""Where ``torch.compile`` of a layer or model takes part unasked: it costs tens of seconds a case."""
DTYPES = ("bf16", "fp16", "fp32")
FIXED_DTYPE = {"topology": "fp32", "optimizer": "fp32", "model": "bf16", "host": "bf16"}


@dataclass(frozen=True)
class Case:
    """One table row's worth of work: every provider is measured on it, on the same tensors, interleaved."""

    suite: str
    op: str
    shape: tuple[tuple[str, Any], ...]
    dtype: str

    @property
    def dims(self) -> dict[str, Any]:
        return dict(self.shape)

    @property
    def n(self) -> int:
        """Links per group of four."""
        return 1 if self.op.endswith("14") else 2

    @property
    def id(self) -> str:
        return f"{self.suite}/{self.op}/{shape_text(self.dims)}/{self.dtype}"


def shape_text(shape: dict[str, Any]) -> str:
    """"8192x4096x4096" for tokens x out x in, "4096x4096" for out x in, otherwise the model's name."""
    if "model" in shape:
        return str(shape["model"])
    return "x".join(str(shape[key]) for key in ("tokens", "out", "in") if key in shape)


def select(
    suites: Sequence[str] = (), shapes: Sequence[str] = (), dtypes: Sequence[str] = (), *, quick: bool = False
) -> list[Case]:
    """The cases of a command line, in the order in which they are run.

    Args:
        suites: names of :data:`OPS`, each optionally with an operation, as in "linear" or "linear.forward"; none: all.
        shapes: names of :data:`LINEAR_SETS` and :data:`MODELS`, "all", or sizes: "8192x4096x4096" (tokens x out x in),
            "4096x4096" (out x in). None: the suite's own defaults.
        dtypes: of :data:`DTYPES`; none: bf16. Suites with a dtype of their own (:data:`FIXED_DTYPE`) ignore it.
        quick: a few representative shapes where ``shapes`` does not say otherwise.

    Raises:
        ValueError: naming the suite, the shape or the dtype that is unknown.
    """
    wanted: dict[str, list[str]] = {}
    for entry in suites or tuple(OPS):
        suite, _, op = entry.partition(".")
        if suite not in OPS or (op and op not in OPS[suite]):
            known = list(OPS) if suite not in OPS else [f"{suite}.{o}" for o in OPS[suite]]
            raise ValueError(f"suite: must be one of {known}, got {entry!r}")
        wanted.setdefault(suite, []).extend([op] if op else OPS[suite])
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"dtype: must be one of {list(DTYPES)}, got {dtype!r}")
    parsed = [_parse(text) for text in shapes]
    cases: dict[Case, None] = {}  # an ordered set: named sets overlap
    for suite, ops in wanted.items():
        suite_dtypes = [FIXED_DTYPE[suite]] if suite in FIXED_DTYPE else (list(dtypes) or ["bf16"])
        for shape in _shapes(suite, parsed, quick):
            for op in dict.fromkeys(ops):
                if "model" in dict(shape) and suite == "topology" and op != "update":
                    continue
                if suite == "linear" and not (shapes or quick or op in ODD_OPS) and _is_odd(dict(shape)):
                    continue
                cases.update(dict.fromkeys(Case(suite, op, shape, dtype) for dtype in suite_dtypes))
    if not cases:
        raise ValueError(f"shapes: must fit one of the suites {list(wanted)}, got {list(shapes)}")
    return list(cases) if shapes else sorted(cases, key=_turn)


def _turn(case: Case) -> int:
    """The most wanted figures first, for when time runs out; of equals the order stays."""
    d = case.dims
    if case.suite == "linear":
        turns = {"forward": 0, "input_grad": 0, "weight_grad": 0, "layer": 3, "weight_grad_mvue": 5, "layer_mvue": 5}
        return 8 if _is_odd(d) else turns[case.op]
    if case.suite == "topology":
        return 1 if case.op != "update14" and ("model" in d or (d["out"], d["in"]) in MATRICES[:2]) else 7
    if case.suite in ("prune", "pack"):
        return 2 if (d["out"], d["in"]) in MATRICES[:3] else 7
    return {"host": 4, "optimizer": 4, "model": 7 if case.op == "step_mvue" else 6}[case.suite]


@dataclass(frozen=True)
class _Shapes:
    linear: list[tuple[int, int, int]]
    matrices: list[tuple[int, int]]
    models: list[str]
    updates: list[str]


def _parse(text: str) -> _Shapes:
    if text == "all":
        every = [shape for name in ALL_SETS for shape in LINEAR_SETS[name]]
        return _Shapes(every, MATRICES, list(MODELS), [UPDATE_ALL])
    if text == "tiny":
        return _Shapes(LINEAR_SETS["tiny"], TINY_MATRICES, ["llama-tiny", "vit-tiny"], ["llama-tiny"])
    if text in LINEAR_SETS:
        linear = LINEAR_SETS[text]
        models = [text] if text in MODELS else []
        return _Shapes(linear, list(dict.fromkeys(s[1:] for s in linear)), models, [text] if text == UPDATE_ALL else [])
    try:
        sizes = tuple(int(size) for size in text.split("x"))
    except ValueError:
        sizes = ()
    if len(sizes) not in (2, 3) or min(sizes) < 1:
        raise ValueError(
            f"shapes: must be of {[*LINEAR_SETS, 'all']}, tokens x out x in like 8192x4096x4096, or out x in like "
            f"4096x4096, got {text!r}"
        )
    return _Shapes([sizes] if len(sizes) == 3 else [], [sizes[-2:]], [], [])


def _shapes(suite: str, parsed: Iterable[_Shapes], quick: bool) -> list[tuple[tuple[str, Any], ...]]:
    parsed = list(parsed)
    if suite == "host":
        # Host time does not depend on the shape: one is measured, whatever was asked for.
        return [_named(tokens=t, out=o, **{"in": i}) for t, o, i in HOST_SHAPES]
    if not parsed:
        default = LINEAR_SETS["quick"] if quick else [s for name in DEFAULT_SETS for s in LINEAR_SETS[name]]
        models = ["llama-60m", "vit-b"] if quick else list(DEFAULT_MODELS)
        parsed = [_Shapes(default, QUICK_MATRICES if quick else MATRICES, models, [UPDATE_ALL])]
    if suite == "linear":
        return [_named(tokens=t, out=o, **{"in": i}) for p in parsed for t, o, i in p.linear]
    if suite == "model":
        return [_named(model=name) for p in parsed for name in p.models]
    matrices = [_named(out=o, **{"in": i}) for p in parsed for o, i in p.matrices]
    if suite == "topology":
        matrices += [_named(model=name) for p in parsed for name in p.updates]
    return matrices


def _is_odd(dims: dict[str, Any]) -> bool:
    return (dims["tokens"], dims["out"], dims["in"]) in LINEAR_SETS["odd"]


def _named(**sizes: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(sizes.items())
