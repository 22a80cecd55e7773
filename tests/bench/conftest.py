"""Fixtures for tests of the suite, and the options of the tracked benchmarks. By default those run
once at tiny shapes and check results only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast.bench import cases, suite
from llama_fast.bench.__main__ import main
from llama_fast.bench.cases import Spec, shapes
from llama_fast.bench.timing import clock, machine

from .runs import TINY


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Any]]:
    """Return bench(*options) -> (exit status, JSON document): a few rounds of each case, and
    one call for each of the machine's rates."""
    monkeypatch.setattr(clock, "MAX_ROUNDS", clock.MIN_ROUNDS)
    monkeypatch.setattr(machine, "SECONDS", 0.0)
    monkeypatch.setattr(suite, "keep_freed", lambda: True)  # it outlasts the test

    def run(*options: str) -> tuple[int, Any]:
        path = tmp_path / "figures.json"
        status = main([*TINY, "--json", str(path), *options])
        return status, json.loads(path.read_text())

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options. pytest calls this only if tests/bench is on the command line; otherwise the
    defaults below apply."""
    group = parser.getgroup("llama_fast")
    group.addoption("--bench-model", choices=shapes.MODELS, help="time at these shapes")
    group.addoption("--bench-level", choices=shapes.LEVELS, default="default")
    group.addoption("--bench-device", choices=("cpu", "cuda"), default="cpu")


def spec(config: pytest.Config) -> Spec:
    model = config.getoption("bench_model", None) or "tiny"
    device = torch.device(config.getoption("bench_device", "cpu"))
    level = config.getoption("bench_level", "default")
    return cases.spec(model, torch.bfloat16, device, level)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "plan" in metafunc.fixturenames:
        where = spec(metafunc.config)
        every = metafunc.config.getoption("bench_model", None) is None
        plans = cases.plan(where, every=every)
        metafunc.parametrize("plan", plans, ids=[plan.name for plan in plans])


@pytest.fixture
def timed(pytestconfig: pytest.Config) -> bool:
    """Return whether the run measures times as well as results."""
    return pytestconfig.getoption("bench_model", None) is not None
