"""Sample token ids from rows of logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

ROWS = 64  # sampled at a time: their weights take 66 MB with 128,256 tokens


def check(temperature: Any, top_p: Any, top_k: Any) -> None:
    """Raise ValueError for invalid settings."""
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
    """Sample an id from logits [vocab] fp32. temperature 0 is argmax, the lowest id of equals.

    Keeps the top_k most likely tokens (0: all), and of these each token while the probabilities
    before it sum to at most top_p, so the most likely always stays. Then draws in proportion, with
    one number from the generator. Raises ValueError for logits that are NaN or have no finite
    maximum.
    """
    best, index = logits.max(dim=-1)
    if not math.isfinite(best):
        raise ValueError(f"logits: the largest is {float(best)}, want a finite number")
    if temperature == 0:
        return int(index)
    weights, ids = _weights(logits, best, temperature), None
    total = weights.sum()
    if top_k:
        ids = _top(logits, top_k)
    elif top_p < 1:
        # Tokens with less weight than this sum to less than 1 - top_p, so top_p drops them all. Few
        # others remain to sort (all 128,256 take 12 ms). 0.999 is for rounding.
        ids = (weights >= 0.999 * (1 - top_p) * total / len(weights)).nonzero()[:, 0]
        ids = ids[logits[ids].sort(descending=True, stable=True).indices]
    if ids is not None:
        weights = weights[ids]
    if top_k:
        total = weights.sum()
    on = logits.device if generator is None else generator.device
    u = torch.rand(1, dtype=torch.float64, device=on, generator=generator).to(logits.device)
    drawn = _draw(weights, u, top_p, total)
    return int(drawn if ids is None else ids[drawn])


def sample_rows(
    logits: Tensor, u: Tensor | None, temperature: float, top_p: float, top_k: int
) -> Tensor:
    """Sample from each row without waiting for the device: [B, vocab] fp32 -> ids [B] int64.

    u: fp64 [B], the number in [0, 1) with which each row draws; None is enough for temperature 0.
    An id is -1 where sample would raise. top_p without top_k sorts the rows.
    """
    if len(logits) > ROWS:
        pieces = [slice(start, start + ROWS) for start in range(0, len(logits), ROWS)]
        return torch.cat(
            [
                sample_rows(logits[p], None if u is None else u[p], temperature, top_p, top_k)
                for p in pieces
            ]
        )
    best, ids = logits.max(dim=-1, keepdim=True)
    fine = best.isfinite()
    if temperature:
        assert u is not None
        logits, best, order = logits.where(fine, 0.0), best.where(fine, 0.0), None
        if top_k:
            order = _top(logits, top_k)
            logits = logits.gather(1, order)
        elif top_p < 1:
            logits, order = logits.sort(descending=True, stable=True)
        weights = _weights(logits, best, temperature)
        ids = _draw(weights, u[:, None], top_p, weights.sum(-1, keepdim=True))
        ids = ids if order is None else order.gather(1, ids)
    return ids.masked_fill(~fine, -1)[:, 0]


def _top(logits: Tensor, top_k: int) -> Tensor:
    """Return ids [..., top_k] of the largest logits [..., vocab], not NaN, in falling order, the
    lowest id of equals first. torch.topk specifies neither the order of equals nor which it keeps,
    so its keys all differ: the logit in the upper 32 bits, the id in the lower."""
    last = logits.shape[-1] - 1
    bits = (logits + 0.0).view(torch.int32)  # -0 becomes 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    keys = (ordered.long() << 32) + torch.arange(last, -1, -1, device=logits.device)
    return last - (keys.topk(min(top_k, last + 1)).values & 0xFFFFFFFF)


def _weights(logits: Tensor, best: Tensor, temperature: float) -> Tensor:
    """Return int64 weights in proportion to the probabilities; the largest is 2^44.

    A sum of integers does not depend on the order, so neither the batch nor the device changes a
    draw. The sum of half a million fits. fp32 is too coarse: 128,256 probabilities sum to 1 only
    within 1e-5. Multiply by 1 / temperature: a division by a number rounds differently on a GPU.
    """
    sharpness = 1 / max(temperature, 1e-300)  # finite
    return (logits - best).double().mul_(sharpness).exp_().mul_(2.0**44).round_().long()


def _draw(weights: Tensor, u: Tensor, top_p: float, total: Tensor) -> Tensor:
    """Draw indices [..., 1] in proportion to weights [..., n]; never one of weight zero.

    For top_p < 1 weights are in falling order, and total [..., 1] includes any weights left out
    because top_p drops them.
    """
    cumulative = weights.cumsum(-1)
    if top_p < 1:
        kept = ((cumulative - weights).double() <= top_p * total.double()).sum(-1, keepdim=True)
        total = cumulative.gather(-1, kept - 1)
    target = torch.minimum((u * total).long(), total - 1)  # rounding may reach total
    return torch.searchsorted(cumulative, target, right=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
