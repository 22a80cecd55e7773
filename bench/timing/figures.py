"""What is known of a run's seconds: median and percentiles, and ratios taken within rounds.

How two implementations compare is the median of the rounds' ratios, not a ratio of medians: what
slows the machine for a while slows both.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# Called with the round's number, to rotate buffers by. Its attribute `prepare`, where it has one,
# is called before each timed call, off the clock.
Run = Callable[[int], object]


@dataclass(frozen=True)
class Part:
    """A run that does an nth of the work; its times are multiplied by n."""

    run: Run
    n: int

    def __call__(self, i: int) -> object:
        return self.run(i)


def part(name: str, run: Run, n: int) -> tuple[str, Run]:
    """Label a baseline of which an nth is measured, and wrap its run."""
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
    mode: str = "clock"  # or on a GPU "graph" or "events", see events.py
    passes: tuple[tuple[float, ...], ...] = field(default=(), repr=False)  # of rounds, in order

    def to_json(self) -> dict[str, Any]:
        found = asdict(self) | {"passes": [_low(sorted(seconds)) for seconds in self.passes]}
        if self.mode == "clock":
            del found["mode"]
        return found


def summarize(*passes: Sequence[float], mode: str = "clock") -> Timing:
    """Sum up the seconds of the rounds of each pass, in their order."""
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
    """Return the tenth percentile: how long an undisturbed call takes."""
    return ordered[round(0.1 * (len(ordered) - 1))]


def joined(passes: Sequence[Mapping[str, Timing]]) -> dict[str, Timing]:
    """Join the passes of each implementation that took part in all of them."""
    names = [name for name in passes[0] if all(name in p for p in passes)]
    parts = {name: [p[name] for p in passes] for name in names}
    return {
        name: summarize(*itertools.chain(*(t.passes for t in found)), mode=found[0].mode)
        for name, found in parts.items()
    }


def ratio(one: Timing, other: Timing) -> Ratio:
    """Compare round by round, as far as both took part.

    The error is the larger of two estimates: from the spread of single rounds, by order statistics,
    and from the medians of the passes, which see what lasts longer than a round.
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
    """Return every timing for JSON, with how many times longer than base it took."""
    found = {name: t.to_json() for name, t in timings.items()}
    for name, t in timings.items():
        if name != base:
            found[name]["ratio"] = asdict(ratio(timings[base], t))
    return found
