"""The suite's cases under pytest-benchmark: ``pytest benchmarks --benchmark-only``.

One group a case, one test a provider. A round is one CUDA-graph replay of the same number of calls for every provider of
the group, waited for; ``extra_info`` holds that number and the milliseconds per call. A provider that cannot run is skipped
with its reason, one whose result is wrong fails. The figures of record are those of ``python -m benchmarks``: only that
interleaves competitors and tells bursts from sustained load.
"""

from __future__ import annotations

import functools

import pytest

from benchmarks import environment, providers
from benchmarks.cases import Case, select
from benchmarks.runner import Options, prepare

pytest.importorskip("pytest_benchmark")

ROUNDS = 30
_CALLS: dict[Case, int] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    def chosen(name: str) -> list[str]:
        return [part for part in metafunc.config.getoption(name).split(",") if part]

    shapes = chosen("--shapes") or ([] if environment.device().type == "cuda" else ["tiny"])
    cases = select(chosen("--suite"), shapes, chosen("--dtype"), quick=True)
    pairs = [(case, provider) for case in cases for provider in Options().providers(case)]
    metafunc.parametrize(("case", "provider"), pairs, ids=[f"{case.id}-{provider}" for case, provider in pairs])


@functools.lru_cache(maxsize=1)
def _problem(case: Case):
    from benchmarks.problems import make

    return make(case, environment.device())


def test_case(benchmark, request: pytest.FixtureRequest, case: Case, provider: str) -> None:
    from benchmarks.timing import timer

    benchmark.group = case.id
    clock = timer(environment.device())
    try:
        found = prepare(_problem(case), provider, clock, request.config.getoption("--impl"))
    except providers.Unavailable as reason:
        pytest.skip(str(reason))
    if isinstance(found, str):
        pytest.fail(found)
    prepared = clock.prepare(found.variant, _CALLS.get(case))
    _CALLS.setdefault(case, prepared.calls)

    def one() -> None:
        prepared.run()
        clock.synchronize()

    rounds = ROUNDS if environment.device().type == "cuda" else 3
    benchmark.pedantic(one, rounds=rounds, warmup_rounds=1)
    benchmark.extra_info.update(calls=prepared.calls, impl=found.variant.impl, notes=found.notes)
    benchmark.extra_info["ms_per_call"] = 1e3 * benchmark.stats.stats.median / prepared.calls
