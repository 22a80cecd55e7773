"""The least time of a pass on GPUs, by data sheets: no kernel is faster."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..checkpoint.weights import Linear
from ..generation.decode import PREFILL_CHUNK
from .gpus import Gpu
from .memory import Rank


class Time(NamedTuple):
    """The least seconds of a pass. Arithmetic and memory overlap; all-reduces wait for both, and so
    does what one stage sends to the next, which counts as one of them."""

    compute: float
    memory: float
    all_reduce: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory) + self.all_reduce

    @property
    def bound(self) -> str:
        return max(zip(self, ("compute", "memory", "all-reduce"), strict=True))[1]


def prefill(rank: Rank, gpu: Gpu, tokens: int) -> Time:
    """Return the least time of a prompt, in chunks, up to its last token's logits, for which the
    last layer's output projection and FFN skip all other tokens. Stages work on chunks in turn."""
    layers, last = _layers(rank), rank.weights.layers[-1]
    chunks = [min(PREFILL_CHUNK, tokens - t) for t in range(0, tokens, PREFILL_CHUNK)]
    compute = tokens * _products(gpu, layers) + _attention(rank, gpu, tokens * (tokens + 1) / 2)
    compute -= (tokens - 1) * _products(gpu, (last.output, last.gate_up, last.down))
    compute += _products(gpu, [rank.weights.head])
    # Each chunk reads the weights, and the keys and values before its end.
    keys = sum(min(PREFILL_CHUNK * (i + 1), tokens) for i in range(len(chunks)))
    moved = len(chunks) * _read(rank) + (keys + tokens) * _cache(rank)
    waits = sum(_waits(rank, gpu, rows, 0) for rows in chunks) + _waits(rank, gpu, 0, 1)
    turns = (len(chunks) + rank.stages - 1) / (len(chunks) * rank.stages)
    return Time(compute * turns, moved / gpu.bandwidth / 1e12 * turns, waits * turns)


def decode(rank: Rank, gpu: Gpu, context: int, batch: int) -> Time:
    """Return the least time of a step: one token for each sequence, with that many before. It goes
    through the stages one after another; other batches may follow it."""
    row = _products(gpu, [*_layers(rank), rank.weights.head])
    compute = batch * row + _attention(rank, gpu, batch * context)
    moved = _read(rank) + batch * context * _cache(rank)
    return Time(compute, moved / gpu.bandwidth / 1e12, _waits(rank, gpu, batch, batch))


def _products(gpu: Gpu, linears: Iterable[Linear]) -> float:
    """Return the seconds of multiplying one row with each of the linears."""

    def rate(w: Linear) -> float:
        return (gpu.fp8 if w.scale is not None else 0) or gpu.bf16

    return sum(2 * w.weight.numel() / rate(w) / 1e12 for w in linears)


def _layers(rank: Rank) -> list[Linear]:
    return [w for x in rank.weights.layers for w in (x.qkv, x.output, x.gate_up, x.down)]


def _attention(rank: Rank, gpu: Gpu, pairs: float) -> float:
    """Return the seconds of scores and sums for so many pairs of a query and a key."""
    c = rank.config
    per_pair = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim
    return per_pair * pairs / gpu.bf16 / 1e12


def _read(rank: Rank) -> int:
    """Return the bytes of weights that a pass reads: all but the embedding, of which it reads a row
    a token, unless it is the head too."""
    w = rank.weights
    return w.nbytes - (0 if w.head.weight is w.embedding else w.embedding.nbytes)


def _cache(rank: Rank) -> int:
    return rank.token_bytes(rank.whole.num_hidden_layers)


def _waits(rank: Rank, gpu: Gpu, rows: int, logits: int) -> float:
    """Return the seconds for so many rows of 16-bit activations: an all-reduce after each output
    projection, each down and the embedding, whose rows are spread over the ranks; and what goes
    from stage to stage. And those of gathering rows of 16-bit logits, half an all-reduce."""
    c, size = rank.whole, 2.0 * rows * rank.whole.hidden_size
    seconds = 0.0
    if rows:
        seconds += (2 * c.num_hidden_layers + 1) * gpu.all_reduce(size, rank.size)
        seconds += (rank.stages - 1) * gpu.send(size, rank.gpus)
    return seconds + (gpu.all_reduce(1.0 * logits * c.vocab_size, rank.size) if logits else 0.0)
