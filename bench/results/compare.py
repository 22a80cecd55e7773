"""Two runs of the suite against each other, beyond the noise that both of them measured.

Machines differ from hour to hour, and so do seconds. So what is compared is ours against the other
implementations in the same rounds, at the fast end: neighbors make a run slower and never faster,
and the tenth percentile of the best pass is what most runs reach. The limit is asked apart: on a
shared machine memory slows down and arithmetic does not, and what computes then seems to gain on
what streams. What counts is what both say, the smaller change of the two.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files

SCHEMA = 3  # of the suite's JSON; older files hold no passes
TOLERATED = math.log(1.05)
SIGMAS = 2.5  # of the noise, beyond what is tolerated
WANTED = math.log(1.2)  # a change that a comparison should not miss
# A comparison across these would not be about the code.
SAME = ("cpu", "gpu", "isa", "torch_isa", "onednn_max_isa", "threads")
SAME_OPTIONS = ("model", "tp", "dtype", "backend", "device", "allocator", "level")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """slowdown and noise: logarithms; noise is one standard error."""

    name: str
    slowdown: float
    noise: float

    @property
    def verdict(self) -> str:
        noise = SIGMAS * self.noise
        if abs(self.slowdown) - noise > TOLERATED:
            return "slower" if self.slowdown > 0 else "faster"
        return "same" if self.slowdown + noise < WANTED else "too noisy to tell"

    def __str__(self) -> str:
        by, noise = math.expm1(abs(self.slowdown)), math.expm1(SIGMAS * self.noise)
        way = "slower" if self.slowdown > 0 else "faster"
        return f"{self.name}: {by:.1%} {way} (noise {noise:.1%}): {self.verdict}"


def load(path: Path) -> dict[str, Any]:
    """Read a run. Raises ValueError for a file that is not a run of this suite."""
    found = files.read(path)
    if found is None:
        raise ValueError(f"{path}: no such file")
    if found.get("schema") != SCHEMA:
        got = found.get("schema")
        raise ValueError(f"{path}: got schema {got}, want {SCHEMA}: a file of `python -m bench`")
    return found


def check(old: Row, new: Row) -> None:
    """Raises ValueError where two runs cannot be held against each other."""
    for part, names in (("environment", SAME), ("options", SAME_OPTIONS)):
        for name in names:
            was, now = old[part].get(name), new[part].get(name)
            if was != now and name in old[part]:  # older files lack some of it
                raise ValueError(f"the older run has {name} {was!r}, this one {now!r}")


def named(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{r['op']} {r['shape']}": r for r in files.rows(results)}


def _against(row: Row, other: str) -> tuple[float, float]:
    """How many times longer the other took than ours at the fast end, and the noise of that: half
    of how far the second-best passes are from the best ones."""
    ours, theirs = (row["seconds"][name]["passes"] for name in (files.own(dict(row)), other))
    log = math.log(min(theirs) / min(ours))
    if len(ours) < 2:  # what its rounds show is all there is
        return log, row["seconds"][other].get("ratio", {}).get("error", math.inf)
    gaps = [math.log(second / best) for best, second, *_ in (sorted(ours), sorted(theirs))]
    return log, math.hypot(*gaps) / 2


def change(name: str, old: Row, new: Row) -> Change | None:
    """None where the two runs share nothing to compare ours with. Not ours with other weights: what
    slows one of the two mostly slows both."""
    limits = ("limit", f"limit {new['shape']}")
    ours = {files.own(dict(new)), *new.get("siblings", ())}
    shared = [n for n in new["seconds"] if n in old["seconds"] and n not in ours]
    groups = (
        [n for n in shared if n in limits and old["limit"] == new["limit"]],
        [n for n in shared if not n.startswith("limit")],
    )
    found = []
    for group in groups:
        says = [(*_against(old, n), *_against(new, n)) for n in group]
        if says:
            slowdown = statistics.median(was - now for was, _, now, _ in says)
            noise = statistics.median(math.hypot(before, after) for _, before, _, after in says)
            found.append(Change(name, slowdown, noise))
    if len({c.slowdown > 0 for c in found}) > 1:  # no agreement: what both leave possible
        least = min(found, key=lambda c: c.slowdown + SIGMAS * c.noise)
        return Change(name, 0.0, max(least.noise, least.slowdown / SIGMAS))
    return min(found, key=lambda c: abs(c.slowdown), default=None)


def with_passes(row: Row, more: Row) -> dict[str, Any]:
    """Put more's passes behind the row's own, of each implementation in both."""
    seconds = {
        name: {**timing, "passes": [*timing["passes"], *more["seconds"][name]["passes"]]}
        for name, timing in row["seconds"].items()
        if name in more["seconds"]
    }
    return {**row, "seconds": seconds}


def compare(
    old: dict[str, Any],
    new: dict[str, Any],
    again: Callable[[str], Row | None],
    say: Callable[[str], None] = print,
) -> list[Change]:
    """Compare every case of both runs. One that seems slower, or of which the noise leaves that
    open, is measured once more (again: name -> a row of one more pass, or None)."""
    before, changes = named(old), []
    for name, row in named(new).items():
        found = change(name, before[name], row) if name in before else None
        if found and found.verdict in ("slower", "too noisy to tell"):
            say(f"{found}; measured again")
            more = again(name)
            if more is not None:
                found = change(name, before[name], with_passes(row, more)) or found
        if found:
            changes.append(found)
    return changes


def summary(changes: list[Change], old: dict[str, Any], new: dict[str, Any]) -> str:
    commit = old["environment"].get("commit")
    lines = [f"against commit {commit}: {len(changes)} cases in both"]
    for verdict in ("slower", "faster", "too noisy to tell"):
        lines += [f"  {c}" for c in changes if c.verdict == verdict]
    same = sum(c.verdict == "same" for c in changes)
    lines.append(f"  the same within the noise: {same}")
    before, after = named(old), named(new)
    run = {r["op"] for r in after.values()}
    gone = [name for name, r in before.items() if r["op"] in run and name not in after]
    for what, names in (("gone", gone), ("new", after.keys() - before)):
        if names:
            lines.append(f"  {what}: {', '.join(sorted(names))}")
    return "\n".join(lines)
