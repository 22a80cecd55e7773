"""By which power a cost grows with a size, and whether memory grows linearly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

Points = Sequence[tuple[float, float]]  # (size, cost)

UPPER = 8  # the exponent is fitted from an eighth of the largest size on: below, overheads rule
LEAST = 3  # points; two always lie on a line

# Of memory that counts as linear in the tokens:
EXPONENT = 1.1  # at most
PER_TOKEN = 1.5  # times as many bytes a token at the far end as at FROM, at most
FLOOR = 1 << 20  # bytes: what is less counts as this much, pages and buffers come and go
FROM = 4096  # tokens: what a call needs anyway (a thread's buffers) no longer shows


@dataclass(frozen=True)
class Fit:
    """cost ~ size ** exponent."""

    exponent: float
    error: float  # one standard error of the exponent, from how far the points lie off the line
    local: float  # between the last two points alone
    start: float  # the first size that counted
    points: int  # how many did

    def __str__(self) -> str:
        return f"n^{self.exponent:.2f} (+- {self.error:.2f}; at the end n^{self.local:.2f})"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def fit(points: Points) -> Fit | None:
    """Least squares in logarithms, over the sizes from 1 / UPPER of the largest on; over all of
    them where those are fewer than LEAST. None for fewer points than that, or without any cost."""
    known = sorted((x, y) for x, y in points if x > 0 and y > 0)
    if len(known) < LEAST:
        return None
    upper = [p for p in known if p[0] * UPPER >= known[-1][0]]
    used = upper if len(upper) >= LEAST else known
    xs, ys = ([math.log(p[i]) for p in used] for i in range(2))
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mx) ** 2 for x in xs)
    if not spread or xs[-1] == xs[-2]:
        return None
    slope = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / spread
    rest = sum((y - my - slope * (x - mx)) ** 2 for x, y in zip(xs, ys, strict=True))
    error = math.sqrt(rest / (len(xs) - 2) / spread)
    local = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
    return Fit(slope, error, local, used[0][0], len(used))


def linear_memory(points: Points) -> dict[str, Any] | None:
    """Whether the bytes at the sizes are linear in them, with the figures that say so.

    Both have to hold: the fitted exponent is at most EXPONENT, and a token costs at most PER_TOKEN
    times as many bytes at the far end as at FROM tokens (or the middle size of a shorter curve).
    None where there are too few points to say.
    """
    known = sorted((size, max(cost, FLOOR)) for size, cost in points)
    fitted = fit(known)
    if fitted is None:
        return None
    first = next((p for p in known if p[0] >= FROM), known[-1])
    if first[0] * 4 > known[-1][0]:
        first = known[len(known) // 2]
    last = known[-1]
    growth = last[1] / last[0] / (first[1] / first[0])
    return {
        "linear": fitted.exponent <= EXPONENT and growth <= PER_TOKEN,
        "to": last[0],
        "exponent": fitted.exponent,
        "error": fitted.error,
        "from": first[0],
        "bytes_per_token": [first[1] / first[0], last[1] / last[0]],
        "growth": growth,
    }
