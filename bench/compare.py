"""Two runs of the suite against each other, beyond the noise that both of them measured.

Machines differ from hour to hour, and so do seconds. What is compared is therefore what ours took
of the other implementations' time in the same rounds: a kernel has become slower when it has
against its baselines and its limit, taken together.

Noise has one sign: neighbours make a run slower, nobody makes it faster. So the fast end counts,
the tenth percentile of the best pass, which most runs reach whatever their medians do. How well
they do is told by leaving out one pass after the other (the jackknife): where the figure hangs on a
single pass it may have missed better ones. A case alone tells that with little certainty, so all
cases with the same limit have a say in it.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .files import read

SCHEMA = 3  # of the suite's JSON; older files hold no passes
TOLERATED = math.log(1.05)  # a change that nobody has to hear of
SIGMAS = 2.5  # of the noise, beyond what is tolerated
WANTED = math.log(1.2)  # a change that a comparison should not miss
# A comparison across these would not be about the code.
SAME = ("cpu", "gpu", "isa", "torch_isa", "onednn_max_isa", "threads")
SAME_OPTIONS = ("model", "tp", "dtype", "backend", "device", "allocator", "level")


@dataclass(frozen=True)
class Change:
    """slowdown and noise: logarithms; noise is one standard error. agreed: whether the limit and
    the other implementations see it go the same way."""

    name: str
    slowdown: float
    noise: float
    agreed: bool = True

    @property
    def verdict(self) -> str:
        if self.agreed and abs(self.slowdown) - SIGMAS * self.noise > TOLERATED:
            return "slower" if self.slowdown > 0 else "faster"
        return "same" if self.most < WANTED else "too noisy to tell"

    @property
    def most(self) -> float:
        """The slowdown that the noise leaves possible."""
        return self.slowdown + SIGMAS * self.noise

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
            if was != now and name in old[part]:  # older files do not tell all of it
                raise ValueError(f"the older run has {name} {was!r}, this one {now!r}")


def rows(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Everything with times, by name."""
    found = [*results["ops"], *(results.get("end_to_end") or {}).get("rows", [])]
    return {f"{r['op']} {r['shape']}": r for r in found}


@dataclass(frozen=True)
class Voice:
    """What one other implementation says of a case: the logarithm of how many times longer it took
    than ours, and its standard error."""

    log: float
    error: float


def voice(row: Mapping[str, Any], other: str) -> Voice | None:
    """None where it was not measured."""
    seconds = row["seconds"]
    if other not in seconds:
        return None
    ours, others = (seconds[name]["passes"] for name in (row.get("ours", "ours"), other))
    log = math.log(min(others) / min(ours))
    if len(ours) == 1:  # what its rounds show is all there is
        return Voice(log, seconds[other].get("ratio", {}).get("error", math.inf))
    without = [
        math.log(min(others[:i] + others[i + 1 :]) / min(ours[:i] + ours[i + 1 :]))
        for i in range(len(ours))
    ]
    return Voice(log, math.sqrt((len(ours) - 1) * statistics.pvariance(without)))


def _others(row: Mapping[str, Any]) -> dict[str, bool]:
    """Who has a voice about a case, and whether it is the limit. Not ours with other weights: what
    slows one of the two mostly slows both."""
    ours = {row.get("ours", "ours"), *row.get("siblings", ())}
    limits = ("limit", f"limit {row['shape']}")
    return {
        name: name in limits
        for name in row["seconds"]
        if name in limits or not (name in ours or name.startswith("limit "))
    }


def noise(*runs: Mapping[str, Any]) -> dict[tuple[str, bool], float]:
    """The median standard error of all voices, by what limits the case and whether they are the
    limit's."""
    found: dict[tuple[str, bool], list[float]] = {}
    for r in itertools.chain(*(rows(run).values() for run in runs)):
        for other, is_limit in _others(r).items():
            heard = voice(r, other)
            if heard and len(r["seconds"][other]["passes"]) > 1:
                found.setdefault((r["limit"], is_limit), []).append(heard.error)
    return {group: statistics.median(errors) for group, errors in found.items()}


def change(
    name: str,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    least: Mapping[tuple[str, bool], float] = MappingProxyType({}),
) -> Change | None:
    """None where the two share nobody to compare with. least: see noise; no voice's error is
    taken for smaller.

    Each implementation that both runs measured says by how much ours fell back against it. The
    limit is asked apart: on a shared machine memory slows down and arithmetic does not, and whoever
    computes then seems to gain on whoever streams. What counts is what both say, the smaller change
    of the two; where they disagree on the direction there is none but what both leave possible.
    """
    says: dict[bool, list[tuple[float, float]]] = {True: [], False: []}  # of limits, of others
    for other, is_limit in _others(new).items():
        if is_limit and old["limit"] != new["limit"]:  # another run, of another amount of work
            continue
        was, now = voice(old, other), voice(new, other)
        if was and now:
            floor = least.get((new["limit"], is_limit), 0.0)
            errors = (max(floor, was.error), max(floor, now.error))
            says[is_limit].append((was.log - now.log, math.hypot(*errors)))
    found = [Change(name, *_together(group)) for group in says.values() if group]
    if len({c.slowdown > 0 for c in found}) > 1:
        return replace(min(found, key=lambda c: c.most), agreed=False)
    return min(found, key=lambda c: abs(c.slowdown), default=None)


def _together(says: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The weighted median of (change, error), and its own error: who is sure of it counts more, and
    one baseline that had a bad day has one voice."""
    ordered = sorted(says)
    weights = [1 / (error * error + 1e-12) for _, error in ordered]
    half = sum(weights) / 2 * (1 - 1e-9)
    low = next(i for i in range(len(says)) if sum(weights[: i + 1]) >= half)
    high = next(i for i in reversed(range(len(says))) if sum(weights[i:]) >= half)
    middle = (ordered[low], ordered[high])  # two where they are as sure as each other
    return statistics.fmean(s for s, _ in middle), statistics.fmean(e for _, e in middle)


def with_passes(row: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """row with more's passes behind its own, of whoever is in both."""
    seconds = {
        name: {**timing, "passes": [*timing["passes"], *more["seconds"][name]["passes"]]}
        for name, timing in row["seconds"].items()
        if name in more["seconds"]
    }
    return {**row, "seconds": seconds}


def compare(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    again: Callable[[str, int], dict[str, Any] | None],
    say: Callable[[str], None] = print,
    times: int = 2,
) -> list[Change]:
    """Every case of both runs. Who seems slower, or of whom the noise leaves that open, is measured
    up to `times` times more (again: name, which time -> a row of one more pass, or None).
    """
    before, after = rows(old), rows(new)
    least = noise(old, new)
    changes = []
    for name, row in after.items():
        found = change(name, before[name], row, least) if name in before else None
        if found is None:
            continue
        for time in range(times):
            if found.verdict not in ("slower", "too noisy to tell"):
                break
            say(f"{found}; measured again")
            more = again(name, time)
            if more is None:
                break
            row = with_passes(row, more)
            found = change(name, before[name], row, least) or found
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
