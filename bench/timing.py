"""Paired timing: every implementation of a case runs in turn, round after round, so that a machine
that slows down slows them all; medians and percentiles over the rounds.

What two implementations are to each other is taken within the rounds too, not between medians: the
median of the rounds' ratios, with a standard error that this run itself shows.

A busy neighbour on the same core or cache stays for seconds or minutes, and slows who computes more
than who copies: no number of rounds in one go averages that out, or even shows it. So a run goes
through its cases in several passes, each a share of the rounds, and keeps each pass's fast end.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# Called with the round's number, to rotate buffers by; see _turn for its attribute `prepare`.
Run = Callable[[int], object]

MIN_ROUNDS, MAX_ROUNDS = 9, 240
SLOW = 4  # times ours
SLOW_ROUNDS = 3  # at least, whatever it takes
STAY = 8  # rounds between two calls of `move`: every block of them is in places of its own
# Before each turn: threads of whoever ran before may spin for milliseconds, waiting for more work,
# on the cores that the next one needs; then one's own threads have to wake up, and caches to fill.
SETTLE = 3e-3  # seconds
WARM, SHORT = 1e-3, 2e-2  # seconds of untimed calls before a run that is shorter than SHORT
BLOCKS = 8  # of consecutive rounds: a slow drift shows between them


PARTS = 8  # a Part is an eighth of the work at least


@dataclass(frozen=True)
class Part:
    """A run that does an nth of the work, and whose times are therefore taken n times."""

    run: Run
    n: int

    def __call__(self, i: int) -> object:
        return self.run(i)


def part(name: str, run: Run, n: int) -> tuple[str, Run]:
    """The label of a baseline of which an nth is measured, and what is timed."""
    return (name, run) if n == 1 else (f"{name}, 1/{n} of it", Part(run, n))


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
    passes: tuple[tuple[float, ...], ...] = field(default=(), repr=False)  # of rounds, in order

    def to_json(self) -> dict[str, Any]:
        found = asdict(self) | {"passes": [_low(sorted(seconds)) for seconds in self.passes]}
        if self.mode == "clock":
            del found["mode"]
        return found


def summarise(*passes: Sequence[float], mode: str = "clock") -> Timing:
    """passes: the seconds of the rounds of each, in their order."""
    ordered = sorted(itertools.chain(*passes))
    last = len(ordered) - 1
    return Timing(
        statistics.median(ordered),
        _low(ordered),
        ordered[round(0.9 * last)],
        len(ordered),
        mode,
        tuple(map(tuple, passes)),
    )


def _low(ordered: Sequence[float]) -> float:
    """The tenth percentile: how long it takes undisturbed."""
    return ordered[round(0.1 * (len(ordered) - 1))]


def joined(passes: Sequence[Mapping[str, Timing]]) -> dict[str, Timing]:
    """Of whoever took part in every pass."""
    names = [name for name in passes[0] if all(name in p for p in passes)]
    parts = {name: [p[name] for p in passes] for name in names}
    return {
        name: summarise(*itertools.chain(*(t.passes for t in found)), mode=found[0].mode)
        for name, found in parts.items()
    }


def ratio(one: Timing, other: Timing) -> Ratio:
    """Round by round, as far as both took part.

    The error is the largest of three estimates: from the spread of single rounds, by order
    statistics; from the medians of BLOCKS blocks, which see what lasts longer than a round; and
    from those of the passes.
    """
    pairs = zip(one.passes, other.passes, strict=True)
    passes = [[math.log(b / a) for a, b in zip(x, y, strict=False)] for x, y in pairs]
    logs = list(itertools.chain(*passes))
    ordered, n = sorted(logs), len(logs)
    half = math.sqrt(n) / 2
    low, high = max(0, math.floor(n / 2 - half)), min(n - 1, math.ceil(n / 2 + half))
    errors = [(ordered[high] - ordered[low]) / 2]
    if len(passes) > 1:
        errors.append(_error_of_mean([statistics.median(p) for p in passes]))
    size = n // BLOCKS
    if size:
        medians = [statistics.median(logs[i * size : (i + 1) * size]) for i in range(BLOCKS)]
        errors.append(_error_of_mean(medians))
    return Ratio(statistics.median(logs), max(errors))


def _error_of_mean(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def figures(timings: Mapping[str, Timing], base: str) -> dict[str, dict[str, Any]]:
    """For JSON: every timing, and how many times longer than base it took in the same rounds."""
    found = {name: t.to_json() for name, t in timings.items()}
    for name, t in timings.items():
        if name != base:
            found[name]["ratio"] = asdict(ratio(timings[base], t))
    return found


def measure(
    runs: dict[str, Run],
    budget: float,
    move: Callable[[], None] = lambda: None,
    passes: int = 1,
    least: int = MIN_ROUNDS,
) -> dict[str, Timing]:
    """One pass: alternates the runs for about `budget` seconds, warm-up aside, at least `least`
    rounds; of `passes` passes in all (see joined), each has its share of both.

    Whoever takes SLOW times as long as the first of the runs spends no more than a budget of its
    own, or one slow baseline would eat the rounds of all. A call that takes a quarter of the budget
    counts as a round, though it is the first. The order turns round every other round, so that
    none always runs on a neighbor's caches. move: is called every STAY rounds, to put tensors
    elsewhere in memory. On the host's clock; gpu_timing.measure is a GPU's.
    """
    budget /= passes
    few, least, most = (math.ceil(n / passes) for n in (SLOW_ROUNDS, least, MAX_ROUNDS))
    enough = budget / 4
    took = {name: _warm_up(run, enough) for name, run in runs.items()}
    ours = next(iter(took.values()))
    if ours > budget:
        least = few
    slow = max(budget / 16, SLOW * ours)
    rounds = {
        n: most if t < slow else min(most, max(few, int(budget / t))) for n, t in took.items()
    }
    seconds = {
        name: [t] if t >= enough and not hasattr(runs[name], "prepare") else []
        for name, t in took.items()
    }
    # By those who are not slow.
    spent = sum(sum(seconds[name]) for name in runs if rounds[name] == most)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(most):
            wanted = {n: min(r, least) if spent > budget else r for n, r in rounds.items()}
            turn = [name for name in runs if len(seconds[name]) < wanted[name]]
            if not turn:
                break
            if i % STAY == 0:
                move()
            for name in turn if i % 2 else turn[::-1]:
                start = time.perf_counter()
                seconds[name].append(_turn(runs[name], i, took[name] < SHORT))
                if rounds[name] == most:
                    spent += time.perf_counter() - start
    finally:
        if collecting:
            gc.enable()
    parts = {name: run.n if isinstance(run, Part) else 1 for name, run in runs.items()}
    return {n: summarise([t * parts[n] for t in times]) for n, times in seconds.items()}


def _warm_up(run: Run, enough: float) -> float:
    """Seconds of a call; of the second where the first was quick: that compiles, allocates, touches
    pages."""
    start = time.perf_counter()
    run(0)
    began = time.perf_counter()
    if began - start >= enough:
        return began - start
    run(1)
    return time.perf_counter() - began


def _nothing() -> None: ...


def _turn(run: Run, i: int, short: bool) -> float:
    """Seconds of one call. What warms up takes another buffer, where buffers rotate. A run with a
    `prepare` has that called before, off the clock."""
    getattr(run, "prepare", _nothing)()
    time.sleep(SETTLE)
    begun = time.perf_counter()
    while short:
        run(i + 1)
        short = time.perf_counter() - begun < WARM
    start = time.perf_counter()
    run(i)
    return time.perf_counter() - start
