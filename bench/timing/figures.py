"""Summarize a run's seconds: median, percentiles, and ratios within rounds.

Two implementations are compared by the median of the rounds' ratios, not by the ratio of medians,
since a machine that slows down for a while slows both.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
class Ratio:
    """How many times longer one implementation takes than another, as a logarithm."""

    log: float
    error: float  # standard error of log


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    p10: float
    p90: float
    rounds: int
    mode: str = "clock"  # on a GPU "graph" or "events", see events.py
    passes: tuple[tuple[float, ...], ...] = field(default=(), repr=False)  # of rounds, in order

    def to_json(self) -> dict[str, Any]:
        found = asdict(self) | {"passes": [_low(sorted(seconds)) for seconds in self.passes]}
        if self.mode == "clock":
            del found["mode"]
        return found


def summarize(*passes: Sequence[float], mode: str = "clock") -> Timing:
    """Summarize each pass's seconds, which are in the order of its rounds."""
    ordered = sorted(itertools.chain(*passes))
    return Timing(
        statistics.median(ordered),
        _low(ordered),
        ordered[round(0.9 * (len(ordered) - 1))],
        len(ordered),
        mode,
        tuple(map(tuple, passes)),
    )


def _low(ordered: Sequence[float]) -> float:
    """Return the tenth percentile, about an undisturbed call's time."""
    return ordered[round(0.1 * (len(ordered) - 1))]


def joined(passes: Sequence[Mapping[str, Timing]]) -> dict[str, Timing]:
    """Join the passes of each implementation that is in all of them."""
    names = [name for name in passes[0] if all(name in p for p in passes)]
    parts = {name: [p[name] for p in passes] for name in names}
    return {
        name: summarize(*itertools.chain(*(t.passes for t in found)), mode=found[0].mode)
        for name, found in parts.items()
    }


def ratio(one: Timing, other: Timing) -> Ratio:
    """Compare the rounds that both took part in.

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
    return Ratio(statistics.median(ordered), error)


def figures(timings: Mapping[str, Timing], base: str) -> dict[str, dict[str, Any]]:
    """Return every timing for JSON, with its ratio to base's."""
    found = {name: t.to_json() for name, t in timings.items()}
    for name, t in timings.items():
        if name != base:
            found[name]["ratio"] = asdict(ratio(timings[base], t))
    return found
