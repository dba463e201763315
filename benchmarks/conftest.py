"""Options of ``pytest benchmarks --benchmark-only``: those of the command line that choose cases."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("chts benchmarks")
    group.addoption("--suite", default="", help="as of python -m benchmarks")
    group.addoption("--shapes", default="", help="as of python -m benchmarks; default: the quick ones (tiny on the CPU)")
    group.addoption("--dtype", default="", help="as of python -m benchmarks")
    group.addoption("--impl", default="auto", help="as of python -m benchmarks")
