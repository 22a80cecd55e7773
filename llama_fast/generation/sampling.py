"""From rows of logits to token ids."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_ROWS = 64  # sampled at a time: their fp64 weights take 66 MB with 128,256 tokens


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
    at most top_p, so the most likely always stays; then draws in proportion, with one number of the
    generator's. Raises ValueError for logits that are NaN or have no finite maximum: no id would
    mean anything.
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
        # Tokens below this sum to less than 1 - top_p, so what lies before them exceeds top_p:
        # none is kept, and the rest is seldom many to sort (all 128,256 take 12 ms). 0.999 is for
        # rounding.
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
    """As sample, for each row and without waiting for the device: [B, vocab] fp32 -> ids [B] int64.

    u: the number in [0, 1) that each row draws with, fp64 [B]; None will do for temperature 0. An
    id is -1 where sample would raise. top_p alone costs a sort of the rows.
    """
    if len(logits) > _ROWS:
        pieces = [slice(start, start + _ROWS) for start in range(0, len(logits), _ROWS)]
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
    """Ids [..., top_k] of the largest logits [..., vocab], which are not NaN: in falling order, the
    lowest id of equals first. torch.topk promises no order of equals, nor which of them it keeps,
    so it is given keys that differ: the logit, and below its 32 bits the id."""
    last = logits.shape[-1] - 1
    bits = (logits + 0.0).view(torch.int32)  # -0 becomes 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers, in the order of the floats
    keys = (ordered.long() << 32) + torch.arange(last, -1, -1, device=logits.device)
    return last - (keys.topk(min(top_k, last + 1)).values & 0xFFFFFFFF)


def _weights(logits: Tensor, best: Tensor, temperature: float) -> Tensor:
    """In proportion to the probabilities, the largest being 2^44, as int64.

    Whole numbers have one sum, in whatever order a device adds them, so that neither the batch nor
    the device can tip a draw. The sum of half a million still fits. fp32 would not do: the tail of
    128,256 probabilities sums to 1 within 1e-5 only. A product, since a division by a number rounds
    otherwise on a GPU.
    """
    sharpness = 1 / max(temperature, 1e-300)  # finite
    return (logits - best).double().mul_(sharpness).exp_().mul_(2.0**44).round_().long()


def _draw(weights: Tensor, u: Tensor, top_p: float, total: Tensor) -> Tensor:
    """Indices [..., 1] in proportion to weights [..., n]; never one of weight zero.

    top_p < 1 takes them in falling order, and total [..., 1] is then the sum of those as well that
    top_p cuts off anyway.
    """
    cumulative = weights.cumsum(-1)
    if top_p < 1:
        kept = ((cumulative - weights).double() <= top_p * total.double()).sum(-1, keepdim=True)
        total = cumulative.gather(-1, kept - 1)
    target = torch.minimum((u * total).long(), total - 1)  # whatever rounding did
    return torch.searchsorted(cumulative, target, right=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
