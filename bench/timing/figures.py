"""Summarize a run's seconds: median, percentiles, and ratios within rounds.

Two implementations are compared by the median of the rounds' ratios, not by the ratio of medians,
since a machine that slows down for a while slows both.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Takes the round's number, by which it rotates buffers. If it has an attribute `prepare`, that is
# called before each call, untimed.
Run = Callable[[int], object]


@dataclass(frozen=True)
class Part:
    """A run that does an nth of the work; its times are multiplied by n."""

    run: Run
    n: int

    def __call__(self, i: int) -> object:
        return self.run(i)


def part(name: str, run: Run, n: int) -> tuple[str, Run]:
    """Return the label and the run of a baseline that does an nth of the work."""
    return (name, run) if n == 1 else (f"{name}, 1/{n} of it", Part(run, n))


@dataclass(frozen=True)
class Timing:
    """Seconds of one call in each pass's rounds, in order."""

    passes: tuple[Sequence[float], ...]
    mode: str = "clock"  # on a GPU "graph" or "events", see events.py

    @property
    def median(self) -> float:
        return statistics.median(itertools.chain(*self.passes))

    @property
    def rounds(self) -> int:
        return sum(map(len, self.passes))

    @property
    def p10(self) -> float:
        """Return about an undisturbed call's time."""
        return percentile(itertools.chain(*self.passes), 0.1)

    def to_json(self) -> dict[str, Any]:
        return {
            "median": self.median,
            "p10": self.p10,
            "p90": percentile(itertools.chain(*self.passes), 0.9),
            "rounds": self.rounds,
            **({"mode": self.mode} if self.mode != "clock" else {}),
            "passes": [percentile(seconds, 0.1) for seconds in self.passes],
        }


def percentile(values: Iterator[float] | Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


def joined(passes: Sequence[Mapping[str, Timing]]) -> dict[str, Timing]:
    """Join the passes of each implementation that is in all of them."""
    return {
        name: Timing(tuple(itertools.chain(*(p[name].passes for p in passes))), first.mode)
        for name, first in passes[0].items()
        if all(name in p for p in passes)
    }


def ratio(one: Timing, other: Timing) -> dict[str, float]:
    """Return how many times longer the other takes in the rounds that both took part in, as a
    logarithm, and its standard error.

    The error is the larger of two estimates: one from the spread of rounds, by order statistics,
    and one from the passes' medians, which show changes that last longer than a round.
    """
    pairs = zip(one.passes, other.passes, strict=True)
    passes = [[math.log(b / a) for a, b in zip(x, y, strict=False)] for x, y in pairs]
    ordered = sorted(itertools.chain(*passes))
    n = len(ordered)
    half = math.sqrt(n) / 2
    low, high = max(0, math.floor(n / 2 - half)), min(n - 1, math.ceil(n / 2 + half))
    error = (ordered[high] - ordered[low]) / 2
    if len(passes) > 1:
        medians = [statistics.median(p) for p in passes]
        error = max(error, statistics.stdev(medians) / math.sqrt(len(medians)))
    return {"log": statistics.median(ordered), "error": error}


def figures(timings: Mapping[str, Timing], base: str) -> dict[str, dict[str, Any]]:
    """Return every timing for JSON, with its ratio to base's."""
    found = {name: t.to_json() for name, t in timings.items()}
    for name, t in timings.items():
        if name != base:
            found[name]["ratio"] = ratio(timings[base], t)
    return found


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Keep Python's garbage collector from running within the block."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
