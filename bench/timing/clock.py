"""Time runs on the host's clock. All implementations of a case take turns, round after round, so
that a machine that slows down slows them all.

A busy neighbor on the same core or cache stays for seconds or minutes, and slows computation more
than copies. Rounds in one stretch cannot average that out. So a run goes through its cases in
several passes, each with a share of the rounds, and keeps each pass's fast end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping

from .figures import Part, Run, Timing, uncollected

MIN_ROUNDS, MAX_ROUNDS = 9, 240
SLOW = 4  # a slow run takes this many times our time
SLOW_ROUNDS = 3  # the least, however long they take
# Seconds before each turn: threads of the run before may spin for milliseconds, waiting for work,
# on the cores that the next run needs.
SETTLE = 3e-3
# Seconds of untimed calls before a run shorter than SHORT: its threads wake up, and caches fill.
WARM, SHORT = 1e-3, 2e-2


def measure(
    runs: Mapping[str, Run], budget: float, passes: int = 1, least: int = MIN_ROUNDS
) -> dict[str, Timing]:
    """Measure one pass of `passes` (see joined): alternate the runs for its share of about `budget`
    seconds, warm-up aside, and of at least `least` rounds.

    A run that takes SLOW times as long as the first one gets a budget of its own, or it would use
    up the time of all others. A first call that takes a quarter of the budget counts as a round.
    The order reverses every other round, so that no run always starts on the same neighbor's
    caches.
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
    # Spent by runs that are not slow.
    spent = sum(sum(seconds[name]) for name in runs if rounds[name] == most)
    with uncollected():
        for i in range(most):
            wanted = {n: min(r, least) if spent > budget else r for n, r in rounds.items()}
            turn = [name for name in runs if len(seconds[name]) < wanted[name]]
            if not turn:
                break
            for name in turn if i % 2 else turn[::-1]:
                start = time.perf_counter()
                seconds[name].append(_turn(runs[name], i, took[name] < SHORT))
                if rounds[name] == most:
                    spent += time.perf_counter() - start
    parts = {name: run.n if isinstance(run, Part) else 1 for name, run in runs.items()}
    return {n: Timing(([t * parts[n] for t in times],)) for n, times in seconds.items()}


def _warm_up(run: Run, enough: float) -> float:
    """Return the seconds of a call. The first call compiles, allocates and touches pages; if it was
    quick, time the second."""
    for i in range(2):
        start = time.perf_counter()
        run(i)
        took = time.perf_counter() - start
        if took >= enough:
            break
    return took


def _turn(run: Run, i: int, short: bool) -> float:
    """Return the seconds of one call after a warm-up on another buffer, if buffers rotate."""
    if prepare := getattr(run, "prepare", None):
        prepare()
    time.sleep(SETTLE)
    begun = time.perf_counter()
    while short:
        run(i + 1)
        short = time.perf_counter() - begun < WARM
    start = time.perf_counter()
    run(i)
    return time.perf_counter() - start


def passes(times: int, seconds: float) -> Iterator[tuple[int, bool]]:
    """Yield the number of each pass, from 1, and whether it is the last one. Another pass begins
    only if it can end within the seconds, judged by the longest one before."""
    begun, longest, last = time.perf_counter(), 0.0, False
    for number in range(1, times + 1):
        start = time.perf_counter()
        left = seconds - (start - begun)
        if last or (number > 1 and longest > left):
            return
        last = number == times or 2 * longest > left
        yield number, last
        longest = max(longest, time.perf_counter() - start)
