"""Compare two runs of the suite, beyond the noise that both of them measured.

A machine's speed changes from hour to hour. So ours is compared with the other implementations in
the same rounds, at the fast end: neighbors make a run slower and never faster, and most runs reach
the tenth percentile of the best pass. The limit is a second reference: on a shared machine memory
slows down and arithmetic does not, so a kernel that computes seems to gain on one that streams. The
result is the smaller change of the two references.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import files

SCHEMA = 3  # of the suite's JSON; older files have no passes
TOLERATED = math.log(1.05)
SIGMAS = 2.5  # of the noise, beyond what is tolerated
WANTED = math.log(1.2)  # a change that a comparison should not miss
# These must agree, or a comparison would not show the code's effect.
SAME = {
    "environment": ("cpu", "gpu", "isa", "torch_isa", "onednn_max_isa", "threads"),
    "options": ("model", "tp", "dtype", "backend", "device", "allocator", "level"),
}
NOISY = "too noisy to tell"

Row = Mapping[str, Any]


class Change(NamedTuple):
    """slowdown and noise: logarithms; noise is one standard error."""

    name: str
    slowdown: float
    noise: float

    @property
    def verdict(self) -> str:
        noise = SIGMAS * self.noise
        if abs(self.slowdown) - noise > TOLERATED:
            return "slower" if self.slowdown > 0 else "faster"
        return "same" if self.slowdown + noise < WANTED else NOISY

    def __str__(self) -> str:
        by, noise = math.expm1(abs(self.slowdown)), math.expm1(SIGMAS * self.noise)
        way = "slower" if self.slowdown > 0 else "faster"
        return f"{self.name}: {by:.1%} {way} (noise {noise:.1%}): {self.verdict}"


def load(path: Path) -> dict[str, Any]:
    """Read a run. Raises ValueError for a file that is not a run of this suite."""
    found = files.read(path)
    if found.get("schema") != SCHEMA:
        got = found.get("schema")
        raise ValueError(f"{path}: got schema {got}, want {SCHEMA}: a file of `python -m bench`")
    return found


def check(old: Row, new: Row) -> None:
    """Raise ValueError if two runs cannot be compared."""
    for part, names in SAME.items():
        for name in names:
            was, now = old[part].get(name), new[part].get(name)
            if was != now and name in old[part]:  # older files lack some
                raise ValueError(f"the older run has {name} {was!r}, this one {now!r}")


def named(results: Row) -> dict[str, dict[str, Any]]:
    return {files.name(row): row for row in files.rows(results)}


def _against(row: Row, other: str) -> tuple[float, float]:
    """Return how much longer the other took than ours at the fast end, as a logarithm, and its
    noise: half the distance from the second-best passes to the best ones."""
    ours, theirs = (row["seconds"][name]["passes"] for name in (files.own(row), other))
    log = math.log(min(theirs) / min(ours))
    if len(ours) < 2:  # one pass: its rounds' error
        return log, row["seconds"][other].get("ratio", {}).get("error", math.inf)
    gaps = [math.log(second / best) for best, second, *_ in (sorted(ours), sorted(theirs))]
    return log, math.hypot(*gaps) / 2


def change(name: str, old: Row, new: Row) -> Change | None:
    """Return the change of a case, None if the runs share no implementation to compare ours with.
    Ours with other weights does not count: a change to the code mostly affects both."""
    limits = ("limit", f"limit {new['shape']}") if old["limit"] == new["limit"] else ()
    ours = {files.own(new), *new.get("siblings", ())}
    shared = [n for n in new["seconds"] if n in old["seconds"] and n not in ours]
    found = []
    for group in (
        [n for n in shared if n in limits],
        [n for n in shared if not n.startswith("limit")],
    ):
        if says := [(*_against(old, n), *_against(new, n)) for n in group]:
            slowdown = statistics.median(was - now for was, _, now, _ in says)
            noise = statistics.median(math.hypot(before, after) for _, before, _, after in says)
            found.append(Change(name, slowdown, noise))
    if len({c.slowdown > 0 for c in found}) > 1:  # they disagree: what both leave possible
        least = min(found, key=lambda c: c.slowdown + SIGMAS * c.noise)
        return Change(name, 0.0, max(least.noise, least.slowdown / SIGMAS))
    return min(found, key=lambda c: abs(c.slowdown), default=None)


def with_passes(row: Row, more: Row) -> dict[str, Any]:
    """Append more's passes to the row's own, for each implementation in both."""
    both = [name for name in row["seconds"] if name in more["seconds"]]
    joined = {n: [p for r in (row, more) for p in r["seconds"][n]["passes"]] for n in both}
    return {**row, "seconds": {n: {**row["seconds"][n], "passes": joined[n]} for n in both}}


def compare(
    old: Row,
    new: Row,
    again: Callable[[str], Row | None],
    say: Callable[[str], None] = print,
) -> list[Change]:
    """Compare every case of both runs. A case that seems slower, or is too noisy to tell, is
    measured once more (again: name -> a row of one more pass, or None)."""
    before, changes = named(old), []
    for name, row in named(new).items():
        found = change(name, before[name], row) if name in before else None
        if found and found.verdict in ("slower", NOISY):
            say(f"{found}; measured again")
            if more := again(name):
                found = change(name, before[name], with_passes(row, more)) or found
        if found:
            changes.append(found)
    return changes


def summary(changes: list[Change], old: Row, new: Row) -> str:
    commit = old["environment"].get("commit")
    lines = [f"against commit {commit}: {len(changes)} cases in both"]
    lines += [f"  {c}" for v in ("slower", "faster", NOISY) for c in changes if c.verdict == v]
    lines.append(f"  the same within the noise: {sum(c.verdict == 'same' for c in changes)}")
    before, after = named(old), named(new)
    run = {r["op"] for r in after.values()}
    gone = [name for name, r in before.items() if r["op"] in run and name not in after]
    for what, names in (("gone", gone), ("new", after.keys() - before)):
        if names:
            lines.append(f"  {what}: {', '.join(sorted(names))}")
    return "\n".join(lines)
