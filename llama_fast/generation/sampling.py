"""Sample token ids from rows of logits."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rope_scaling import shown

ROWS = 64  # sampled at a time: their weights take 66 MB with 128,256 tokens
_LARGEST = 2.0**44  # the weight of the most likely token


class Settings(NamedTuple):
    """How to draw from a row of logits, see sample."""

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0


def check(settings: Settings, repetition_penalty: Any = 1.0) -> None:
    """Raise ValueError for invalid settings."""
    temperature, top_p, top_k, min_p = settings
    if not _is_number(temperature) or not 0 <= temperature <= sys.float_info.max:
        raise ValueError(
            f"temperature: got {shown(temperature)}, want 0 (argmax) or a positive number"
        )
    for name, share in (("top_p", top_p), ("min_p", min_p)):
        if not _is_number(share) or not 0 <= share <= 1:
            raise ValueError(f"{name}: got {shown(share)}, want 0 to 1")
    if not isinstance(top_k, Integral) or isinstance(top_k, bool) or top_k < 0:
        raise ValueError(f"top_k: got {shown(top_k)}, want 0 (all) or a positive integer")
    penalty = repetition_penalty
    if not _is_number(penalty) or not 0 < penalty <= torch.finfo(torch.float32).max:
        raise ValueError(
            f"repetition_penalty: got {shown(penalty)}, want a positive number; 1 is none"
        )


class Sampler:
    """Sample the tokens of one sequence, one after another."""

    def __init__(self, settings: Settings, generator: torch.Generator) -> None:
        self._settings, self._generator = settings, generator
        self._penalty, self._seen = 1.0, torch.empty(0)

    def penalize(self, penalty: float, seen: Tensor) -> None:
        """Penalize the ids in the text, see penalized. seen: bool [vocab], extended from now on."""
        self._penalty, self._seen = penalty, seen

    def __call__(self, logits: Tensor) -> int:
        """Return the id that follows the text, from logits [vocab] fp32; see sample."""
        if self._penalty == 1:
            return sample(logits, *self._settings, self._generator)
        scores = penalized(logits, self._seen, self._penalty)
        token = sample(scores, *self._settings, self._generator)
        self._seen[token] = True
        return token

    def copy(self) -> Sampler:
        """Return a sampler that will draw the same numbers."""
        generator = torch.Generator().set_state(self._generator.get_state())
        copy = Sampler(self._settings, generator)
        copy.penalize(self._penalty, self._seen.clone())
        return copy


def seen(text: Sequence[int], vocab: int) -> Tensor:
    """Return which ids are in a text, bool [vocab] on the host."""
    out = torch.zeros(vocab, dtype=torch.bool, device="cpu")
    out[torch.tensor(text, device="cpu")] = True
    return out


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return logits [..., vocab] fp32, of the ids seen [..., vocab] divided by the penalty if
    positive and multiplied by it if negative: transformers' repetition_penalty. The divisor is a
    tensor, because a division by a number rounds differently on a GPU."""
    divisor = logits.new_full((1,), penalty)
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / divisor), logits)


def logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the ids' log probabilities, fp32 [B], for logits [B, vocab] fp32."""
    return -F.cross_entropy(logits, ids, reduction="none")


def sample(
    logits: Tensor,
    temperature: float = 0.6,
    top_p: float = 0.9,
    top_k: int = 0,
    min_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> int:
    """Sample an id from logits [vocab] fp32. temperature 0 is argmax, the lowest id of equals.

    Keeps the top_k most likely tokens (0: all), of these each token while the probabilities before
    it sum to at most top_p, and of these the ones at least min_p times as probable as the most
    likely, which always stays. Then draws in proportion, with one number from the generator.
    Raises ValueError for logits that are NaN or have no finite maximum.
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
    drawn = _draw(weights, u, top_p, total, min_p)
    return int(drawn if ids is None else ids[drawn])


def sample_rows(
    logits: Tensor,
    u: Tensor | None,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float = 0.0,
) -> Tensor:
    """Sample from each row without waiting for the device: [B, vocab] fp32 -> ids [B] int64.

    u: fp64 [B], the number in [0, 1) with which each row draws; None is enough for temperature 0.
    An id is -1 where sample would raise. top_p without top_k sorts the rows.
    """
    if len(logits) > ROWS:
        pieces = [slice(start, start + ROWS) for start in range(0, len(logits), ROWS)]
        settings = temperature, top_p, top_k, min_p
        return torch.cat(
            [sample_rows(logits[p], None if u is None else u[p], *settings) for p in pieces]
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
        ids = _draw(weights, u[:, None], top_p, weights.sum(-1, keepdim=True), min_p)
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
    """Return int64 weights in proportion to the probabilities; the largest is _LARGEST, 2^44.

    A sum of integers does not depend on the order, so neither the batch nor the device changes a
    draw. The sum of half a million fits. fp32 is too coarse: 128,256 probabilities sum to 1 only
    within 1e-5. Multiply by 1 / temperature: a division by a number rounds differently on a GPU.
    """
    sharpness = 1 / max(temperature, 1e-300)  # finite
    return (logits - best).double().mul_(sharpness).exp_().mul_(_LARGEST).round_().long()


def _draw(weights: Tensor, u: Tensor, top_p: float, total: Tensor, min_p: float) -> Tensor:
    """Draw indices [..., 1] in proportion to weights [..., n]; never one of weight zero.

    For top_p < 1 weights are in falling order, and total [..., 1] includes any weights left out
    because top_p drops them.
    """
    least = math.ceil(min_p * _LARGEST)
    if min_p and top_p == 1:
        weights = weights.masked_fill(weights < least, 0)
    cumulative = weights.cumsum(-1)
    if top_p < 1:
        kept = (cumulative - weights).double() <= top_p * total.double()
        if min_p:
            kept &= weights >= least
        total = cumulative.gather(-1, kept.sum(-1, keepdim=True) - 1)
    elif min_p:
        total = cumulative[..., -1:]
    target = torch.minimum((u * total).long(), total - 1)  # rounding may reach total
    return torch.searchsorted(cumulative, target, right=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
