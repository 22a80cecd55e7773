"""From one row of logits to one token id."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def check(temperature: Any, top_p: Any, top_k: Any) -> None:
    """Raises ValueError for settings that choose nothing."""
    if not _is_number(temperature) or not math.isfinite(temperature) or temperature < 0:
        raise ValueError(f"temperature: got {temperature!r}, want 0 (argmax) or a positive number")
    if not _is_number(top_p) or not 0 <= top_p <= 1:
        raise ValueError(f"top_p: got {top_p!r}, want 0 to 1")
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 0:
        raise ValueError(f"top_k: got {top_k!r}, want 0 (all) or a positive integer")


def sample(
    logits: Tensor,
    temperature: float = 0.6,
    top_p: float = 0.9,
    top_k: int = 0,
    generator: torch.Generator | None = None,
) -> int:
    """logits [vocab] fp32 -> an id. temperature 0 is argmax, the lowest id of equals.

    Keeps the top_k most likely (0: all), of these token i while the probabilities before it sum to
    at most top_p, so the most likely always stays; then draws in proportion. Raises ValueError for
    logits that are NaN or have no finite maximum: no id would mean anything.
    """
    best, index = logits.max(dim=-1)
    if not math.isfinite(best):
        raise ValueError(f"logits: the largest is {float(best)}, want a finite number")
    if temperature == 0:
        return int(index)
    # In fp64 from here on: the tail of 128,256 fp32 probabilities sums to 1 within 1e-5 only.
    weights = ((logits - best).double() / temperature).exp()
    if top_k == 0 and top_p == 1:
        return _draw(weights, generator)
    if top_k:
        values, ids = weights.topk(min(top_k, len(weights)))
        total = values.sum()
    else:
        # Tokens below this sum to less than 1 - top_p, so what lies before them exceeds top_p:
        # none is kept, and the rest is seldom many to sort (all 128,256 take 12 ms). 0.999 is for
        # rounding.
        total = weights.sum()
        ids = (weights >= 0.999 * (1 - top_p) * total / len(weights)).nonzero()[:, 0]
        values, order = weights[ids].sort(descending=True)
        ids = ids[order]
    before = values.cumsum(0) - values
    kept = int((before <= top_p * total).sum())
    return int(ids[_draw(values[:kept], generator)])


def _draw(weights: Tensor, generator: torch.Generator | None) -> int:
    """An index in proportion to fp64 weights; never one of weight zero."""
    cumulative = weights.cumsum(0)
    u = torch.rand(1, dtype=torch.float64, device=weights.device, generator=generator)
    index = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))
    if index < len(weights):
        return index
    return int(weights.nonzero()[-1])  # u * total was rounded up to the total


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
