"""What the project promised itself, next to what was measured: products (issue 3), topology updates (issue 4), and the
optimizer and training steps (issue 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.cases import Case, shape_text
from benchmarks.cost import ITEM
from benchmarks.view import Table, View, geomean

GIB = 2**30


@dataclass(frozen=True)
class Target:
    """``measured`` None: not in the file. ``least`` True: at least ``goal``, else at most."""

    what: str
    goal: float
    unit: str
    measured: float | None
    least: bool = True
    where: str = ""

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.goal if self.least else self.measured <= self.goal

    def cells(self) -> list[str]:
        sign = ">=" if self.least else "<="
        found = "not measured" if self.measured is None else f"{self.measured:.3g}{self.unit}"
        state = {None: "", True: "met", False: "missed"}[self.met]
        return [self.what, f"{sign} {self.goal:g}{self.unit}", found, self.where, state]


def targets(view: View) -> list[Target]:
    """All targets that speak of something this suite measures."""
    return [*_products(view), *_bytes(view), *_host(view), *_topology(view), *_optimizer(view), *_models(view)]


def table(view: View) -> Table | None:
    """The targets as a table, or None when the file has nothing to say on any."""
    found = targets(view)
    if all(t.measured is None for t in found):
        return None
    made = Table("Targets", ["what", "target", "measured", "worst shape", ""], [t.cells() for t in found])
    for row, target in enumerate(found):
        if target.met is not None:
            made.emphasis[row, 4] = made.emphasis[row, 2] = "good" if target.met else "bad"
    return made


def _products(view: View) -> list[Target]:
    large = [c for op in ("forward", "input_grad") for c in view.linear_set("L", op)]
    small = [c for op in ("forward", "input_grad") for c in view.linear_set("S", op)]
    found = []
    for regime, figure in (("sustained", "gpu_ms"), ("burst", "burst_ms")):
        for other, goal in (("cusparselt", 1.10), ("cublas", 1.50)):
            what = f"forward and dX, geomean on L against {other}, {regime}"
            found.append(_mean(view, what, goal, large, other, figure))
    found.append(_mean(view, "forward and dX, geomean on S against cublas", 1.25, small, "cublas"))
    for regime, figure in (("sustained", "gpu_ms"), ("burst", "burst_ms")):
        cases = [*large, *small] if figure == "gpu_ms" else large
        ratios = {c: view.over_best(c, ("cublas", "cusparselt"), figure) for c in cases}
        found.append(_worst(f"forward and dX, worst shape against the better of both, {regime}", 0.97, "x", ratios))
    both = [*view.linear_set("S", "weight_grad"), *view.linear_set("L", "weight_grad")]
    found.append(_mean(view, "dW exact, geomean on L and S against cublas", 1.0, both, "cublas"))
    found.append(_worst("dW exact, worst shape against cublas", 0.97, "x", {c: view.speedup(c, "cublas") for c in both}))
    for what, op, goal in (
        ("dW MVUE, geomean on L against cublas", "weight_grad_mvue", 1.25),
        ("layer with exact dW, geomean on L against cublas", "layer", 1.25),
        ("layer with MVUE dW, geomean on L against cublas", "layer_mvue", 1.35),
    ):
        found.append(_mean(view, what, goal, view.linear_set("L", op), "cublas"))
    extra = {c: _extra_memory(view, c) for c in [*large, *small, *both]}
    found.append(_worst("memory of one product, over its output's", 1.05, "x", extra, least=False))
    return found


def _bytes(view: View) -> list[Target]:
    found = []
    for suite, ops in (("pack", ("pack", "pack_operands", "pack_operands_shared")), ("prune", ("prune",))):
        for op in ops:
            shares = {c: _percent(view.share_of_copy(c)) for c in view.cases(suite, op) if _side(c) >= 4096}
            found.append(_worst(f"{op}, 4096 x 4096 and larger, of the copy rate", 75, " %", shares))
    ratios = {c: view.speedup(c, "torch24") for c in view.cases("prune", "prune_pack") if _is(c, 4096, 4096)}
    found.append(_worst("prune and pack 4096 x 4096 against torch's greedy tile", 1.0, "x", ratios))
    return found


def _host(view: View) -> list[Target]:
    ops = ("forward", "input_grad", "weight_grad", "pack_operands")
    microseconds = {c: _thousand(view.ms(c, "chts", "eager_ms")) for op in ops for c in view.cases("host", op)}
    return [_worst("host time of one eager call", 20, " µs", microseconds, least=False)]


def _topology(view: View) -> list[Target]:
    update = {shape_text(c.dims): c for c in view.cases("topology", "update")}
    found = []
    for shape in ("4096x4096", "11008x4096"):
        case = update.get(shape)
        if shape == "4096x4096":
            ms = {case: view.ms(case, "chts")} if case else {}
            found.append(_worst("update of a 4096 x 4096 layer", 0.6, " ms", ms, least=False))
        ratios = {case: view.speedup(case, "eager")} if case else {}
        found.append(_worst(f"update of {shape} against eager Algorithm 1", 40, "x", ratios))
    case = update.get("llama-60m")
    ms = {case: view.ms(case, "chts")} if case else {}
    found.append(_worst("update of all 56 matrices of Llama-60M", 2.5, " ms", ms, least=False))
    case = update.get("4096x4096")
    memory = view.ms(case, "chts", "peak_bytes") if case else None
    gib = {case: memory / GIB} if memory is not None else {}
    found.append(_worst("memory of an update at 4096 x 4096", 0.15, " GiB", gib, least=False))
    for op, what in (("regrow", "selection"), ("remove", "removal")):
        shares = {c: _percent(view.share_of_copy(c)) for c in view.cases("topology", op) if _is(c, 4096, 4096)}
        found.append(_worst(f"{what} at 4096 x 4096, of the copy rate", 75, " %", shares))
    return found


def _optimizer(view: View) -> list[Target]:
    cases = [c for c in view.cases("optimizer", "adam") if _side(c) >= 4096]
    shares = {c: _percent(view.share_of_copy(c)) for c in cases}
    times = {c: _inverse(view.speedup(c, "eager")) for c in cases}
    return [
        _worst("optimizer and operands, of the copy rate", 70, " %", shares),
        _worst("their time over torch's fused AdamW on the dense weight", 0.6, "x", times, least=False),
    ]


def _models(view: View) -> list[Target]:
    """Against the compiled dense model where that was measured, else against the eager one; ours in the same way."""
    found = []
    for op, name, goal in (
        ("step", "llama-1b", 1.15), ("step", "vit-l", 1.15), ("step_mvue", "llama-1b", 1.25), ("step_mvue", "vit-l", 1.25),
        ("step", "llama-60m", 1.0),
    ):  # fmt: skip
        case = next((c for c in view.cases("model", op) if c.dims["model"] == name), None)
        compiled = view.speedup(case, "compile", ours="chts_compile") if case else None
        ratio = compiled if compiled is not None or case is None else view.speedup(case, "cublas")
        what = f"{'training step' if op == 'step' else 'training step with MVUE dW'}, {name}, over dense"
        found.append(Target(what, goal, "x", ratio, True, "compiled" if compiled is not None else "eager" if ratio else ""))
    return found


def _mean(
    view: View, what: str, goal: float, cases: Sequence[Case], other: str, figure: str = "gpu_ms"
) -> Target:
    ratios = {c: view.speedup(c, other, figure) for c in cases}
    known = {c: r for c, r in ratios.items() if r is not None}
    worst = min(known, key=known.__getitem__) if known else None
    where = f"{worst.op} {shape_text(worst.dims)} {known[worst]:.2f}x" if worst else ""
    return Target(f"{what} ({len(known)} cases)" if known else what, goal, "x", geomean(known.values()), True, where)


def _worst(what: str, goal: float, unit: str, values: dict[Case, float | None], *, least: bool = True) -> Target:
    known = {c: v for c, v in values.items() if v is not None}
    if not known:
        return Target(what, goal, unit, None, least)
    worst = (min if least else max)(known, key=known.__getitem__)
    where = f"{worst.op} {shape_text(worst.dims)}" if len(known) > 1 else ""
    return Target(what, goal, unit, known[worst], least, where)


def _extra_memory(view: View, case: Case) -> float | None:
    """Bytes that one call added over those of its output, which the allocator rounds up to 512."""
    peak, d = view.ms(case, "chts", "peak_bytes"), case.dims
    shape = {"forward": ("tokens", "out"), "input_grad": ("tokens", "in"), "weight_grad": ("out", "in")}[case.op]
    size = d[shape[0]] * d[shape[1]] * ITEM[case.dtype] / (2 if case.op == "weight_grad" else 1)
    return None if not peak else peak / (-(-size // 512) * 512)


def _inverse(ratio: float | None) -> float | None:
    return 1 / ratio if ratio else None


def _side(case: Case) -> int:
    return min(case.dims.get("out", 0), case.dims.get("in", 0))


def _is(case: Case, rows: int, columns: int) -> bool:
    return case.dims.get("out") == rows and case.dims.get("in") == columns


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _thousand(value: float | None) -> float | None:
    return None if value is None else 1e3 * value
