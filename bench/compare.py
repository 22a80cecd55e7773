"""Two runs of the suite against each other, beyond the noise that both of them measured.

Machines differ from hour to hour, and so do seconds. What is compared is therefore what ours took
of the other implementations' time in the same rounds, with the standard error that the rounds show:
a kernel has become slower when it has against its baselines and its limit, taken together.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import read

SCHEMA = 2  # of the suite's JSON; older files hold no errors of ratios
TOLERATED = math.log(1.03)  # a change that nobody has to hear of
SIGMAS = 2.0  # of the noise, beyond what is tolerated
WANTED = math.log(1.2)  # a change that a comparison should not miss
# What no single run can see: an op that is bound by a copy takes up to 1.8 times as long in one
# process as in the next, with where the allocator finds its output (measured, eight runs of one
# commit on two cores). A standard error, in logarithms, for ops with that limit.
BETWEEN_PROCESSES = {"copy": 0.25}
# A comparison across these would not be about the code.
SAME = ("cpu", "gpu", "isa", "threads")
SAME_OPTIONS = ("model", "tp", "dtype", "backend", "device")


@dataclass(frozen=True)
class Change:
    """slowdown and noise: logarithms; noise is one standard error."""

    name: str
    slowdown: float
    noise: float

    @property
    def verdict(self) -> str:
        beyond = abs(self.slowdown) - SIGMAS * self.noise
        if beyond > TOLERATED:
            return "slower" if self.slowdown > 0 else "faster"
        return "same" if SIGMAS * self.noise + TOLERATED < WANTED else "too noisy to tell"

    def __str__(self) -> str:
        by, noise = math.expm1(abs(self.slowdown)), math.expm1(SIGMAS * self.noise)
        way = "slower" if self.slowdown > 0 else "faster"
        return f"{self.name}: {by:.1%} {way} (noise {noise:.1%}): {self.verdict}"


def load(path: Path) -> dict[str, Any]:
    """Raises ValueError for a file that is not a run of this suite."""
    found = read(path)
    if found is None:
        raise ValueError(f"{path}: no such file")
    if found.get("schema") != SCHEMA:
        got = found.get("schema")
        raise ValueError(f"{path}: got schema {got}, want {SCHEMA}: a file of `python -m bench`")
    return found


def check(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises ValueError where two runs cannot be held against each other."""
    for part, names in (("environment", SAME), ("options", SAME_OPTIONS)):
        for name in names:
            was, now = old[part].get(name), new[part].get(name)
            if was != now:
                raise ValueError(f"the older run has {name} {was!r}, this one {now!r}")


def rows(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Everything with times, by name."""
    found = [*results["ops"], *results.get("end_to_end", {}).get("rows", [])]
    return {f"{r['op']} {r['shape']}": r for r in found}


def change(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Change | None:
    """None where the two share nobody to compare with.

    Each implementation that both runs measured says by how much ours fell back against it, and the
    median counts. The limit is asked apart: on a shared machine memory slows down and arithmetic
    does not, and whoever computes then seems to gain on whoever streams. What counts is what both
    say, the smaller change of the two.
    """
    says: dict[bool, list[tuple[float, float]]] = {True: [], False: []}  # of limits, of others
    for other in new["seconds"]:
        was, now = (_ratio(r["seconds"], other) for r in (old, new))
        if was and now and other in ("limit", f"limit {new['shape']}"):
            says[True].append((was[0] - now[0], math.hypot(was[1], now[1])))
        elif was and now and not other.startswith("limit"):
            says[False].append((was[0] - now[0], math.hypot(was[1], now[1])))
    unseen = BETWEEN_PROCESSES.get(new.get("limit", ""), 0.0)
    found = []
    for group in filter(None, says.values()):
        slowdown, noise = _together(group)
        found.append(Change(name, slowdown, math.hypot(noise, unseen)))
    if len({c.slowdown > 0 for c in found}) > 1:  # they do not agree on the direction
        return Change(name, 0.0, max(c.noise for c in found))
    return min(found, key=lambda c: abs(c.slowdown), default=None)


def _together(says: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The medians of the changes and of their errors: one baseline that had a bad day has one
    voice."""
    return statistics.median(s for s, _ in says), statistics.median(e for _, e in says)


def _ratio(seconds: Mapping[str, Any], other: str) -> tuple[float, float] | None:
    found = seconds.get(other, {}).get("ratio")
    return (found["log"], found["error"]) if found else None


def compare(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    again: Callable[[str], dict[str, Any] | None],
    say: Callable[[str], None] = print,
    times: int = 2,
) -> list[Change]:
    """Every case of both runs. Who seems slower is measured up to `times` times more, on buffers
    of its own (again: name -> a new row, or None), and is slower only when it is so each time.
    """
    before, after = rows(old), rows(new)
    changes = []
    for name in after:
        found = change(name, before[name], after[name]) if name in before else None
        if found is None:
            continue
        for _ in range(times):
            if found.verdict != "slower":
                break
            say(f"{found}; measured again")
            row = again(name)
            repeated = change(name, before[name], row) if row else None
            if repeated is None:
                break
            found = min(found, repeated, key=lambda c: c.slowdown - SIGMAS * c.noise)
        changes.append(found)
    return changes


def summary(changes: list[Change], old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    commit = old["environment"].get("commit")
    lines = [f"against commit {commit}: {len(changes)} cases in both"]
    for verdict in ("slower", "faster", "too noisy to tell"):
        lines += [f"  {c}" for c in changes if c.verdict == verdict]
    same = sum(c.verdict == "same" for c in changes)
    lines.append(f"  the same within the noise: {same}")
    before, after = rows(old), rows(new)
    run = {r["op"] for r in after.values()}
    gone = [name for name, r in before.items() if r["op"] in run and name not in after]
    for what, names in (("gone", gone), ("new", after.keys() - before)):
        if names:
            lines.append(f"  {what}: {', '.join(sorted(names))}")
    return "\n".join(lines)
