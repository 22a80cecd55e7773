"""By which power a cost grows with a size, and whether memory grows linearly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Points = Sequence[tuple[float, float]]  # (size, cost)

UPPER = 8  # the exponent is fitted from an eighth of the largest size on: below, overheads rule
LEAST = 3  # points; two always lie on a line

# Of memory that counts as linear in the tokens:
EXPONENT = 1.1  # at most
PER_TOKEN = 1.5  # times as many bytes a token at the far end as at FROM, at most
FLOOR = 1 << 20  # bytes: what is less counts as this much, pages and buffers come and go
FROM = 4096  # tokens: what a call needs anyway (a thread's buffers) no longer shows


def fit(points: Points) -> dict[str, Any] | None:
    """Fit cost ~ size ** exponent by least squares in logarithms, over the sizes from 1 / UPPER of
    the largest on; over all of them where those are fewer than LEAST.

    Returns the exponent, its standard error, the exponent between the last two points, the first
    size that counted and how many did; None for fewer than LEAST points with a cost.
    """
    known = sorted((x, y) for x, y in points if x > 0 and y > 0)
    if len(known) < LEAST:
        return None
    upper = [p for p in known if p[0] * UPPER >= known[-1][0]]
    used = upper if len(upper) >= LEAST else known
    xs, ys = np.log(np.array(used, dtype=float)).T
    (slope, _), covariance = np.polyfit(xs, ys, 1, cov=True)
    return {
        "exponent": float(slope),
        "error": float(max(covariance[0, 0], 0.0) ** 0.5),
        "local": float((ys[-1] - ys[-2]) / (xs[-1] - xs[-2])),
        "start": used[0][0],
        "points": len(used),
    }


def described(found: dict[str, Any]) -> str:
    exponent, error, local = (found[key] for key in ("exponent", "error", "local"))
    return f"n^{exponent:.2f} (+- {error:.2f}; at the end n^{local:.2f})"


def linear_memory(points: Points) -> dict[str, Any] | None:
    """Judge whether the bytes at the sizes are linear in them, with the figures that say so.

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
        "linear": fitted["exponent"] <= EXPONENT and growth <= PER_TOKEN,
        "to": last[0],
        "exponent": fitted["exponent"],
        "error": fitted["error"],
        "from": first[0],
        "bytes_per_token": [first[1] / first[0], last[1] / last[0]],
        "growth": growth,
    }
