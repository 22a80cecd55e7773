"""Fuzzers: `make fuzz SECONDS=600 SEED=1`, or `python -m tests.fuzz`.

Each module describes its cases by a hypothesis strategy, checks a case, and has
`run(seconds, seed, count) -> int`, which ends after that many seconds or cases and returns the
number of calls made. A case is plain data: its repr in a report can be added to the module's
FAILED, the cases that run first.
"""

MODULES = ("ops", "cache", "checkpoints")
