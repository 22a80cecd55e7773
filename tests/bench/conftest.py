"""What the tracked benchmarks are run on; by default tiny shapes, once, for the results alone."""

from __future__ import annotations

import pytest
import torch

from llama_fast.bench import cases, shapes
from llama_fast.bench.case import Spec


def pytest_addoption(parser: pytest.Parser) -> None:
    """There only when tests/bench is named on the command line; see the defaults below."""
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
        plans = cases.plan(spec(metafunc.config))
        metafunc.parametrize("plan", plans, ids=[plan.name for plan in plans])


@pytest.fixture
def timed(pytestconfig: pytest.Config) -> bool:
    """Whether somebody asked for times, and not for right results only."""
    return pytestconfig.getoption("bench_model", None) is not None
