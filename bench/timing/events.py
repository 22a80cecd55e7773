"""Time runs on a GPU, paired as in clock.py.

A sample is a CUDA graph of several calls, replayed between two events, so that it has no launch
gaps. A run that cannot be captured (it waits for the device, or allocates in its own way) is
launched behind a kernel that spins until the host has launched it; its mode is "events". Both favor
the baselines, which launch more kernels than ours. The calls of a sample rotate through the case's
buffers, and a sample lasts at least SAMPLE seconds, so that the last-level cache holds nothing of
the next one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch

from .figures import Run, Timing, uncollected

MIN_ROUNDS, MAX_ROUNDS = 7, 40
SLOW_ROUNDS = 3  # of a run that takes more than a quarter of the budget each time
SAMPLE = 2e-3  # seconds; a graph's launch takes at most about 10 us of it
MAX_CALLS = 2000  # in one graph
SPIN_HZ = 2e9  # at least the clock that _sleep counts: a longer spin is harmless
LEAD = 3e-4  # seconds by which the host has to be ahead when a round starts


class _Sampler(NamedTuple):
    enqueue: Callable[[], object]
    calls: int  # in one enqueue
    seconds: float  # of one enqueue, estimated
    mode: str
    lead: float  # seconds that the host takes to enqueue


def measure(
    runs: Mapping[str, Run], budget: float, *, copies: int = 1, waits: Collection[str] = ()
) -> dict[str, Timing]:
    """Return the seconds of one call of each run, from about `budget` seconds of rounds, whose
    order reverses every other time.

    copies: how many buffers a run rotates through. waits: names of runs that wait for the device,
    which are not captured; an attempt would fail and leave the allocator in disorder.
    """
    samplers = {name: _sampler(r, copies, name not in waits) for name, r in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with uncollected():
        began = time.perf_counter()
        for i in range(MAX_ROUNDS):
            few = i < SLOW_ROUNDS
            turn = [
                n for n, s in samplers.items() if few or s.seconds <= max(budget / 4, 4 * SAMPLE)
            ]
            torch.cuda._sleep(int(LEAD * SPIN_HZ))
            pending = {name: _sample(samplers[name]) for name in (turn if i % 2 else turn[::-1])}
            torch.cuda.synchronize()
            for name, (start, end) in pending.items():
                seconds[name].append(start.elapsed_time(end) / 1e3 / samplers[name].calls)
            if i + 1 >= MIN_ROUNDS and time.perf_counter() - began > budget:
                break
    return {name: Timing((s,), samplers[name].mode) for name, s in seconds.items()}


def _sample(sampler: _Sampler) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    if sampler.lead:
        torch.cuda._sleep(int(sampler.lead * SPIN_HZ))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    sampler.enqueue()
    end.record()
    return start, end


def _sampler(run: Run, copies: int, capturable: bool) -> _Sampler:
    _calls(run, 2)
    host, took = _seconds(lambda: _calls(run, copies))
    count = _count(took / copies, copies)
    if capturable and (graph := _capture(run, count)):
        _, took = _seconds(graph.replay)
        if took < SAMPLE / 2:  # the estimate was of launches, not of work
            count = _count(took / count, copies)
            graph = _capture(run, count) or graph
            _, took = _seconds(graph.replay)
        return _Sampler(graph.replay, count, took, "graph", 0.0)
    count = min(count, 20)  # so that the spin stays short
    lead = min(host / copies * count * 1.5, 0.05)
    return _Sampler(lambda: _calls(run, count), count, took / copies * count, "events", lead)


def _count(seconds: float, copies: int) -> int:
    """Return how many calls last SAMPLE, as whole rotations through the buffers."""
    turns = math.ceil(SAMPLE / max(seconds, 1e-7) / copies)
    return max(1, min(turns, MAX_CALLS // copies)) * copies


def _calls(run: Run, count: int) -> None:
    for i in range(count):
        run(i)


def _seconds(f: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds that one call takes on the host and on the device."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    start, end = _sample(_Sampler(f, 1, 0.0, "", 0.0))
    host = time.perf_counter() - began
    torch.cuda.synchronize()
    return host, start.elapsed_time(end) / 1e3


def _capture(run: Run, count: int) -> torch.cuda.CUDAGraph | None:
    """Capture calls of run; return None if it cannot be captured. The capture is thread-local,
    since torch.compile's helper threads may call CUDA meanwhile."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            _calls(run, count)
    except RuntimeError:
        torch.cuda.set_stream(stream)  # a failed capture stays on its own
        torch.cuda.synchronize()  # raises if more than the capture is broken
        return None
    return graph


def captured(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Capture run as a graph and return its replay; on a CPU return run itself."""
    if device.type != "cuda":
        return run
    for _ in range(2):
        run()
    graph = _capture(lambda _: run(), 1)
    return run if graph is None else graph.replay


def waited(run: Run, device: torch.device) -> Run:
    """Make run wait for the device, so that the host's clock includes launch gaps."""
    if device.type != "cuda":
        return run

    def wait(i: int) -> object:
        result = run(i)
        torch.cuda.synchronize()
        return result

    if hasattr(run, "prepare"):
        wait.prepare = run.prepare  # type: ignore[attr-defined]
    return wait
