"""Paired timing: every implementation of a case runs in turn, round after round, so that a machine
that slows down slows them all; medians and percentiles over the rounds.

What two implementations are to each other is taken within the rounds too, not between medians: the
median of the rounds' ratios, with a standard error that this run itself shows.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Run = Callable[[int], object]  # called with the round's number, to rotate buffers by

MIN_ROUNDS, MAX_ROUNDS = 5, 240
SLOW_ROUNDS = 3  # for who takes more than the budget each time
# Before each turn: threads of whoever ran before may spin for milliseconds, waiting for more work,
# on the cores that the next one needs; then one's own threads have to wake up, and caches to fill.
SETTLE = 3e-3  # seconds
WARM, SHORT = 1e-3, 2e-2  # seconds of untimed calls before a run that is shorter than SHORT
BLOCKS = 8  # of consecutive rounds: a slow drift shows between them


@dataclass(frozen=True)
class Ratio:
    """How many times longer one implementation takes than another, in logarithms: steps up and
    down count alike, and errors add."""

    log: float
    error: float  # standard error of log


@dataclass(frozen=True)
class Timing:
    """Seconds."""

    median: float
    p10: float
    p90: float
    rounds: int
    mode: str = "clock"  # the host's; or on a GPU "graph" or "events", see gpu_timing.py
    samples: tuple[float, ...] = field(default=(), repr=False)  # in the order of the rounds

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        del found["samples"]
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
        tuple(seconds),
    )


def ratio(one: Sequence[float], other: Sequence[float]) -> Ratio:
    """Round by round, as far as both took part.

    The error is the larger of two estimates: from the spread of single rounds, by order statistics,
    and from the spread of the medians of BLOCKS blocks, which sees what lasts longer than a round.
    """
    logs = [math.log(b / a) for a, b in zip(one, other, strict=False)]
    ordered, n = sorted(logs), len(logs)
    half = math.sqrt(n) / 2
    low, high = max(0, math.floor(n / 2 - half)), min(n - 1, math.ceil(n / 2 + half))
    errors = [(ordered[high] - ordered[low]) / 2]
    size = n // BLOCKS
    if size:
        medians = [statistics.median(logs[i * size : (i + 1) * size]) for i in range(BLOCKS)]
        errors.append(statistics.stdev(medians) / math.sqrt(BLOCKS))
    return Ratio(statistics.median(logs), max(errors))


def figures(timings: Mapping[str, Timing], base: str) -> dict[str, dict[str, Any]]:
    """For JSON: every timing, and how many times longer than base it took in the same rounds."""
    found = {name: t.to_json() for name, t in timings.items()}
    for name, t in timings.items():
        if name != base:
            found[name]["ratio"] = asdict(ratio(timings[base].samples, t.samples))
    return found


def measure(runs: dict[str, Run], budget: float) -> dict[str, Timing]:
    """Alternates the runs for about `budget` seconds, warm-up aside, at least MIN_ROUNDS rounds.

    Whoever is slow takes part in the first SLOW_ROUNDS only, or one slow baseline would eat the
    rounds of all. The order turns round every other round, so that nobody always runs on a
    neighbour's caches. On the host's clock; gpu_timing.measure is a GPU's.
    """
    slow, short = set(), set()
    for name, run in runs.items():
        start = time.perf_counter()
        run(0)
        began = time.perf_counter()
        if began - start < budget / 4:  # the first call compiles, allocates, touches pages
            run(1)
            start, began = began, time.perf_counter()
        took = began - start
        if took > budget:
            slow.add(name)
        if took < SHORT:
            short.add(name)
    rounds = SLOW_ROUNDS if next(iter(runs)) in slow else MIN_ROUNDS
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    collecting = gc.isenabled()
    gc.disable()
    try:
        began = time.perf_counter()
        for i in range(MAX_ROUNDS):
            names = list(runs) if i % 2 else list(runs)[::-1]
            for name in names:
                if i >= SLOW_ROUNDS and name in slow:
                    continue
                seconds[name].append(_turn(runs[name], i, name in short))
            if i + 1 >= rounds and time.perf_counter() - began > budget:
                break
    finally:
        if collecting:
            gc.enable()
    return {name: summarise(times) for name, times in seconds.items()}


def _turn(run: Run, i: int, short: bool) -> float:
    """Seconds of one call. What warms up takes another buffer, where buffers rotate."""
    time.sleep(SETTLE)
    begun = time.perf_counter()
    while short:
        run(i + 1)
        short = time.perf_counter() - begun < WARM
    start = time.perf_counter()
    run(i)
    return time.perf_counter() - start
