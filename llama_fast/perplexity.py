"""Measure how well a model predicts a text, and its distance from another model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from .generation.logprobs import score
from .generation.protocol import Model

CONTEXT = 2048  # tokens: the window in which GPTQ's and most later papers measure


class Distance(NamedTuple):
    """How far a model is from another, token by token."""

    perplexity: float  # the other model's
    mean_kl: float  # Kullback-Leibler divergence of the model from the other, in nats a token
    same_top: float  # share of the tokens for which both have the same most probable token


class Perplexity(NamedTuple):
    perplexity: float
    standard_error: float  # of perplexity, over the text's tokens
    tokens: int  # predicted
    against: Distance | None


def perplexity(
    model: Model,
    tokens: Sequence[int],
    against: Model | None = None,
    *,
    context: int = CONTEXT,
    kv_cache: str | None = None,
    on_tokens: Callable[[int], None] = lambda done: None,
) -> Perplexity:
    """Return exp(-mean log probability) of tokens in windows of context tokens that do not overlap.
    The first token of a window only serves as context.

    against: a model of the same vocabulary to compare the predictions with. kv_cache: as for
    Llama.generate; "fp8" passes keys and values through an e4m3 cache. on_tokens(done) is called
    after every few predictions. Raises ValueError for fewer than two tokens, a context out of
    range, another kv_cache, and a model with another vocabulary.
    """
    longest = model.config.max_position_embeddings
    if not 2 <= context <= longest:
        raise ValueError(f"context: got {context}, want 2 to the model's {longest} positions")
    if len(tokens) < 2:
        raise ValueError(f"tokens: got {len(tokens)}, want at least 2")
    if against is not None and against.config.vocab_size != model.config.vocab_size:
        got, want = against.config.vocab_size, model.config.vocab_size
        raise ValueError(f"against: got a vocabulary of {got}, want the model's, {want}")
    windows = [tokens[i : i + context] for i in range(0, len(tokens), context)]
    windows = [window for window in windows if len(window) > 1]
    ours, theirs, divergences = [], [], []
    same = done = 0
    others = repeat(None) if against is None else score(against, windows)
    mine = score(model, windows, kv_cache=kv_cache)
    for scored, other in zip(mine, others, strict=False):  # the other's may be endless
        ours.append(scored.logprobs().double().cpu())
        if other is not None:
            theirs.append(other.logprobs().double().cpu())
            logits = other.logits.to(scored.logits.device)
            divergences.append(divergence(scored.logits, logits).cpu())
            same += int((scored.logits.argmax(-1) == logits.argmax(-1)).sum())
        done += len(scored.targets)
        on_tokens(done)
    losses = -torch.cat(ours)
    value = losses.mean().exp().item()
    error = value * losses.std(correction=0).item() / math.sqrt(done)
    if against is None:
        return Perplexity(value, error, done, None)
    distance = Distance(
        (-torch.cat(theirs)).mean().exp().item(), torch.cat(divergences).mean().item(), same / done
    )
    return Perplexity(value, error, done, distance)


def divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """Return sum(p * (log p - log q)), fp64 [rows], for the distributions q and p that belong to
    logits and reference, fp32 [rows, vocab]."""
    log_q, log_p = logits.log_softmax(-1), reference.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64)
