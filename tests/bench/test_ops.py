"""Run every op of the suite as a pytest-benchmark, to track it over commits.

    pytest tests/bench --benchmark-only --bench-model 8b --benchmark-autosave
    pytest tests/bench --benchmark-only --bench-model 8b --benchmark-compare

Without --bench-model each case runs at tiny shapes, and only its error is checked. Only our kernels
are timed. extra_info gives their share of the limit, measured in the same rounds; that share can be
compared between machines. `python -m bench` measures ours beside the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llama_fast.bench import timing
from llama_fast.bench.cases import Case, Plan, relative_error
from llama_fast.bench.cases.linear import kept
from llama_fast.bench.cases.measured import WRONG
from llama_fast.bench.timing.events import waited
from llama_fast.bench.timing.memory import free_memory

from .conftest import spec

pytest.importorskip("pytest_benchmark")
SECONDS = 0.5  # of rounds beside the limit


@pytest.fixture(scope="module", autouse=True)
def weights_are_let_go() -> Iterator[None]:
    yield
    kept.clear()


def errors(case: Case) -> tuple[float, float]:
    """Return our error and PyTorch's against fp64."""
    exact = case.exact()
    eager = case.baselines.get("eager") or next(iter(case.baselines.values()))
    ours, theirs = (relative_error(case.value(run(0)), exact) for run in (case.ours, eager))
    return ours, theirs


def test_op(plan: Plan, benchmark: Any, timed: bool, pytestconfig: pytest.Config) -> None:
    where = spec(pytestconfig)
    if plan.memory > free_memory(where.device):
        pytest.skip(f"needs about {plan.memory / 2**30:.1f} GiB of memory")
    if "FP8 cache" in plan.shape and where.device.type == "cpu":
        pytest.skip("the CPU's kernels have no FP8 cache")
    with torch.inference_mode():
        case = plan.make()
        error, eager_error = errors(case)
        assert error <= 2 * eager_error + WRONG  # false for NaN too
        runs = {"ours": case.ours, "limit": case.limit.run}
        seconds = SECONDS if timed else 0.0
        found = timing.measure(runs, seconds, where.device, copies=case.copies)
        rate, limit = (
            work / found[name].median
            for name, work in (("ours", plan.work(case.limit)), ("limit", case.limit.work))
        )
        benchmark.group = plan.op
        benchmark.extra_info.update(
            shape=plan.shape,
            rate=rate / (1e12 if case.limit.computes else 1e9),
            unit="TFLOP/s" if case.limit.computes else "GB/s",
            of_limit=rate / limit,
            limit=case.limit.name,
            error=error,
            eager_error=eager_error,
        )
        rounds = itertools.count()  # rotates the buffers
        run = waited(lambda _: case.ours(next(rounds)), where.device)
        if not timed:
            benchmark.disabled = True  # runs once and prints no table
        benchmark(run, 0)
