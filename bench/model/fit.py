"""Fit the power by which a cost grows with a size, and judge whether memory grows linearly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Points = Sequence[tuple[float, float]]  # (size, cost)

UPPER = 8  # the exponent is fitted from an eighth of the largest size on: overheads rule below
LEAST = 3  # points; two always lie on a line

# Limits of linear memory:
EXPONENT = 1.1
PER_TOKEN = 1.5  # ratio of the bytes per token at the largest size to those at FROM
FLOOR = 1 << 20  # bytes: less counts as this much, since pages and buffers come and go
FROM = 4096  # tokens, from which a call's fixed buffers no longer matter


def fit(points: Points) -> dict[str, Any] | None:
    """Fit cost ~ size ** exponent by least squares in logarithms, over the sizes from 1 / UPPER of
    the largest on, or over all sizes if those are fewer than LEAST.

    Returns the exponent, its standard error, the exponent between the last two points, the first
    size used and how many were used; None for fewer than LEAST points with a cost.
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
    """Judge whether bytes are linear in the sizes; return the verdict and its figures.

    Memory is linear if the fitted exponent is at most EXPONENT, and a token takes at most PER_TOKEN
    times as many bytes at the largest size as at FROM tokens (or the middle size of a shorter
    curve). Returns None for too few points.
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
