"""Tests of GPU timing against a simulated device: what it captures, counts and orders."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llama_fast.bench.timing import events as gpu_timing


class FakeCuda:
    """Simulate a device whose time passes only with its work. Graphs keep captured work."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, 0.0
        self.capturing: list[float] | None = None
        self.captures: list[int] = []  # calls in each graph
        self.log: list[str] = []

    def work(self, name: str, seconds: float, capturable: bool = True) -> Callable[[int], None]:
        def run(i: int) -> None:
            if self.capturing is None:
                self.now += seconds
                self.log.append(f"{name}{i}")
            elif not capturable:
                raise RuntimeError("operation not permitted when stream is capturing")
            else:
                self.capturing.append(seconds)

        return run

    @contextlib.contextmanager
    def graph(self, graph: FakeGraph, **options: Any) -> Iterator[None]:
        assert options == {"capture_error_mode": "thread_local"}
        self.capturing = []
        try:
            yield
            graph.seconds = sum(self.capturing)
            self.captures.append(len(self.capturing))
        finally:
            self.capturing = None


class FakeGraph:
    cuda: FakeCuda
    seconds = 0.0

    def replay(self) -> None:
        self.cuda.now += self.seconds


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = fake.now

        def elapsed_time(self, end: Event) -> float:
            return (end.at - self.at) * 1e3

    class Graph(FakeGraph):
        cuda = fake

    def sleep(cycles: int) -> None:
        fake.slept += cycles / gpu_timing.SPIN_HZ

    for name, value in {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": fake.graph,
        "_sleep": sleep,
        "synchronize": lambda: None,
        "current_stream": lambda: "ours",
        "set_stream": fake.log.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return fake


def test_graphs_fill_a_sample_in_whole_turns(cuda: FakeCuda) -> None:
    found = gpu_timing.measure({"a": cuda.work("a", 1e-5)}, 0.0, copies=6)
    assert found["a"].median == pytest.approx(1e-5) and found["a"].mode == "graph"
    assert found["a"].rounds == gpu_timing.MIN_ROUNDS
    (calls,) = cuda.captures
    assert calls % 6 == 0 and 1e-5 * calls >= gpu_timing.SAMPLE


def test_launch_gaps_do_not_shorten_a_sample(cuda: FakeCuda) -> None:
    """Simulate a call that takes 50 times as long when launched singly as in a graph."""

    def run(i: int) -> None:
        if cuda.capturing is None:
            cuda.now += 1e-4
        else:
            cuda.capturing.append(2e-6)

    found = gpu_timing.measure({"a": run}, 0.0)
    assert found["a"].median == pytest.approx(2e-6)
    assert cuda.captures[-1] * 2e-6 >= gpu_timing.SAMPLE / 2


def test_no_endless_graph(cuda: FakeCuda) -> None:
    gpu_timing.measure({"a": cuda.work("a", 1e-9)}, 0.0, copies=3)
    assert max(cuda.captures) <= gpu_timing.MAX_CALLS


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "discovered"])
def test_what_cannot_be_captured_is_launched(cuda: FakeCuda, declared: bool) -> None:
    runs = {"a": cuda.work("a", 1e-3, capturable=False), "b": cuda.work("b", 1e-3)}
    found = gpu_timing.measure(runs, 0.0, copies=2, waits=("a",) if declared else ())
    assert found["a"].mode == "events" and found["b"].mode == "graph"
    assert found["a"].median == pytest.approx(1e-3) == found["b"].median
    assert (cuda.log.count("ours") == 1) != declared  # back from the stream of the failed capture
    assert cuda.slept > gpu_timing.LEAD * gpu_timing.MIN_ROUNDS


def test_the_order_of_runs_rotates(cuda: FakeCuda) -> None:
    runs = {n: cuda.work(n, 3e-3, capturable=False) for n in "ab"}
    gpu_timing.measure(runs, 0.0)
    assert cuda.log[-4:] in (["b0", "a0", "a0", "b0"], ["a0", "b0", "b0", "a0"])


def test_slow_ones_take_part_in_the_first_rounds_only(cuda: FakeCuda) -> None:
    found = gpu_timing.measure({"a": cuda.work("a", 1.0), "b": cuda.work("b", 1e-3)}, 0.1)
    assert found["a"].rounds == gpu_timing.SLOW_ROUNDS
    assert found["b"].rounds >= gpu_timing.MIN_ROUNDS


def test_captured_and_waited(cuda: FakeCuda) -> None:
    device = torch.device("cuda")
    replay = gpu_timing.captured(lambda: cuda.work("a", 1e-3)(0), device)
    before = cuda.now
    gpu_timing.waited(lambda _: replay(), device)(0)
    assert cuda.now - before == pytest.approx(1e-3) and cuda.log == ["a0", "a0"]
