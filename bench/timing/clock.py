"""Timing on the host's clock: every implementation of a case runs in turn, round after round, so
that a machine that slows down slows them all.

A busy neighbor on the same core or cache stays for seconds or minutes, and slows what computes more
than what copies: no number of rounds in one go averages that out. So a run goes through its cases
in several passes, each a share of the rounds, and keeps each pass's fast end.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping

from .figures import Part, Run, Timing, summarize

MIN_ROUNDS, MAX_ROUNDS = 9, 240
SLOW = 4  # times ours
SLOW_ROUNDS = 3  # at least, whatever it takes
# Before each turn: threads of the run before may spin for milliseconds, waiting for more work, on
# the cores that the next one needs; then one's own threads have to wake up, and caches to fill.
SETTLE = 3e-3  # seconds
WARM, SHORT = 1e-3, 2e-2  # seconds of untimed calls before a run that is shorter than SHORT


def measure(
    runs: Mapping[str, Run], budget: float, passes: int = 1, least: int = MIN_ROUNDS
) -> dict[str, Timing]:
    """Measure one pass: alternate the runs for about `budget` seconds, warm-up aside, at least
    `least` rounds; of `passes` passes in all (see joined), each has its share of both.

    A run that takes SLOW times as long as the first one spends no more than a budget of its own, or
    one slow baseline would eat the rounds of all. A call that takes a quarter of the budget counts
    as a round, though it is the first. The order turns round every other round, so that no run
    always starts on a neighbor's caches.
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
            for name in turn if i % 2 else turn[::-1]:
                start = time.perf_counter()
                seconds[name].append(_turn(runs[name], i, took[name] < SHORT))
                if rounds[name] == most:
                    spent += time.perf_counter() - start
    finally:
        if collecting:
            gc.enable()
    parts = {name: run.n if isinstance(run, Part) else 1 for name, run in runs.items()}
    return {n: summarize([t * parts[n] for t in times]) for n, times in seconds.items()}


def _warm_up(run: Run, enough: float) -> float:
    """Return the seconds of a call; of the second where the first was quick: that compiles,
    allocates and touches pages."""
    start = time.perf_counter()
    run(0)
    began = time.perf_counter()
    if began - start >= enough:
        return began - start
    run(1)
    return time.perf_counter() - began


def _nothing() -> None: ...


def _turn(run: Run, i: int, short: bool) -> float:
    """Return the seconds of one call, warmed up on another buffer, where buffers rotate."""
    getattr(run, "prepare", _nothing)()
    time.sleep(SETTLE)
    begun = time.perf_counter()
    while short:
        run(i + 1)
        short = time.perf_counter() - begun < WARM
    start = time.perf_counter()
    run(i)
    return time.perf_counter() - start
