"""Run cases from a hypothesis strategy, and notice crashes, hangs and leaks."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, strategies

# What bad input may raise; the message names the argument, the key or the file.
REFUSALS = (TypeError, ValueError, OSError, NotImplementedError)
BATCH = 100  # cases of one seed: few enough to run again quickly
HANG = float(os.environ.get("LLAMA_FAST_FUZZ_HANG", "5"))  # seconds
GROWTH = 256 << 20  # bytes that two thirds of a run may add: late imports of torch take 100 MB


def resident() -> int:
    """Return this process's resident memory in bytes."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def drive(
    check: Callable[[Any], int | None],
    cases: strategies.SearchStrategy[Any],
    failed: Sequence[Any],
    seconds: float,
    seed: int,
    count: int | None = None,
) -> int:
    """Check the cases of `failed`, then new ones until `seconds` are over or `count` are checked.

    check(case) raises what is wrong and returns the number of calls it made (None: 1). Batches have
    the seeds seed, seed + 1, ...; a failure names its batch's. Returns the number of calls.
    """
    calls = cases_done = warm = 0
    start = time.monotonic()
    note = os.environ.get("LLAMA_FAST_FUZZ_CASE")  # where the parent reads the case that crashed
    file = os.open(note, os.O_RDWR | os.O_CREAT) if note else None

    def watched(case: Any) -> None:
        nonlocal calls
        if file is not None:
            os.ftruncate(file, os.pwrite(file, f"seed {seed}: {case!r}".encode(), 0))
        signal.setitimer(signal.ITIMER_REAL, HANG)
        try:
            made = check(case)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        calls += 1 if made is None else made

    # At the alarm: the stacks, then the signal's default, which ends the process.
    faulthandler.register(signal.SIGALRM, chain=True)
    for case in failed:
        watched(case)
    while (now := time.monotonic()) < start + seconds and (count is None or cases_done < count):
        if not warm and (now - start > seconds / 3 or cases_done > (count or math.inf) / 3):
            warm = resident()  # with what is imported late
        size = BATCH if count is None else min(BATCH, count - cases_done)
        batch = hypothesis.given(case=cases)(lambda case: watched(case))
        settings = hypothesis.settings(
            max_examples=size,
            database=None,
            deadline=None,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
        )
        try:
            settings(hypothesis.seed(seed)(batch))()
        except BaseException:
            print(
                f"failed: --seed {seed} --count {size} runs it again", file=sys.stderr, flush=True
            )
            raise
        cases_done, seed = cases_done + size, seed + 1
    if warm and (growth := resident() - warm) > GROWTH:
        raise AssertionError(f"{check.__module__}: memory grew by {growth >> 20} MB")
    return calls
