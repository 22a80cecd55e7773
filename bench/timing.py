"""Paired timing: every implementation of a case runs in turn, round after round, so that a machine
that slows down slows them all; medians and percentiles over the rounds."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

Run = Callable[[int], object]  # called with the round's number, to rotate buffers by

MIN_ROUNDS, MAX_ROUNDS = 5, 60


@dataclass(frozen=True)
class Timing:
    """Seconds."""

    median: float
    p10: float
    p90: float
    rounds: int
    mode: str = "clock"  # the host's; or on a GPU "graph" or "events", see gpu_timing.py

    def to_json(self) -> dict[str, float | int | str]:
        found = asdict(self)
        if self.mode == "clock":
            del found["mode"]
        return found


def summarise(seconds: list[float], mode: str = "clock") -> Timing:
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return Timing(
        statistics.median(ordered),
        ordered[round(0.1 * last)],
        ordered[round(0.9 * last)],
        len(ordered),
        mode,
    )


def measure(runs: dict[str, Run], budget: float) -> dict[str, Timing]:
    """Alternates the runs for about `budget` seconds, warm-up aside, at least MIN_ROUNDS rounds.

    The order turns round every other round, so that nobody always runs on a neighbour's caches.
    On the host's clock; gpu_timing.measure is a GPU's.
    """
    for i in range(2):
        for run in runs.values():
            run(i)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    collecting = gc.isenabled()
    gc.disable()
    try:
        began = time.perf_counter()
        for i in range(MAX_ROUNDS):
            names = list(runs) if i % 2 else list(runs)[::-1]
            for name in names:
                start = time.perf_counter()
                runs[name](i)
                seconds[name].append(time.perf_counter() - start)
            if i + 1 >= MIN_ROUNDS and time.perf_counter() - began > budget:
                break
    finally:
        if collecting:
            gc.enable()
    return {name: summarise(times) for name, times in seconds.items()}
