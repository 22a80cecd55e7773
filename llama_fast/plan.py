"""Plan a Llama's memory and least time on GPUs, one tensor-parallel rank each, without any of them.

Weights are counted by the loader's own code on tensors without memory, so that recipes and shapes
have one description. Times are a roofline by data sheets: no kernel is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checkpoint.weights import RECIPES, Linear, Weights, assemble
from .config import LlamaConfig
from .generation.cache import BLOCK_SIZE
from .generation.decode import PREFILL_CHUNK, bucket, check_kv_cache
from .generation.sampling import ROWS
from .gpus import NODE, Gpu
from .parallel import Share, Span, fitting, vocab_sizes
from .reference import FP8_DTYPE

GIB = 2**30
# Assumed, not measured: the CUDA context with all kernels, libraries' workspaces, CUDA graphs and
# the allocator's gaps; and the buffers of NCCL where there are several GPUs.
RESERVE, COMMUNICATION = 1.0 * GIB, 1.0 * GIB
# Bytes for each of up to ROWS * vocab logits at the peak of sample_rows, with top_p below 1.
SAMPLING = 44
MOST = 1 << 20  # sequences in a batch


def sizes(config: LlamaConfig) -> list[int]:
    """Return the numbers of GPUs that a model can be split by, on up to two nodes."""
    return [n for n in fitting(config) if n <= 2 * NODE]


class Time(NamedTuple):
    """The least seconds of a pass. Arithmetic and memory overlap; all-reduces wait for both."""

    compute: float
    memory: float
    all_reduce: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory) + self.all_reduce

    @property
    def bound(self) -> str:
        return max(zip(self, ("compute", "memory", "all-reduce"), strict=True))[1]


class _NoMemory:
    """A weights.Source of tensors that have shapes and dtypes only."""

    def tensor(self, name: str, *dims: Span) -> Tensor:
        return torch.empty([*map(len, dims)], dtype=torch.bfloat16, device="meta")

    def linear(self, parts: dict[str, Span], k: Span, *, fp8: bool, bound: float | None) -> Linear:
        n = sum(map(len, parts.values()))
        if not fp8:
            return Linear(torch.empty(n, len(k), dtype=torch.bfloat16, device="meta"))
        scale = torch.empty(n, 1, dtype=torch.float32, device="meta")
        return Linear(torch.empty(n, len(k), dtype=FP8_DTYPE, device="meta"), scale)


@dataclass(frozen=True)
class Rank:
    """The one of `gpus` ranks with the largest part of the vocabulary: the bytes that it holds and
    moves. Weights, keys and values have 16 bits where no recipe says otherwise."""

    whole: LlamaConfig
    gpus: int = 1
    quantize: str | None = None
    kv_cache: str | None = None

    @cached_property
    def share(self) -> Share:
        rows = vocab_sizes(self.whole.vocab_size, self.gpus)
        return Share.of(self.whole, rows.index(max(rows)), self.gpus)

    @property
    def config(self) -> LlamaConfig:
        return self.share.config(self.whole)

    @cached_property
    def weights(self) -> Weights:
        return assemble(self.whole, _NoMemory(), self.quantize, share=self.share)

    # ---- memory, in bytes ----

    def cache_bytes(self, context: int, batch: int) -> int:
        """Return the size of a KVCache, whose sequences take whole blocks."""
        c, fp8 = self.config, self.kv_cache == "fp8"
        tokens = batch * -(-context // BLOCK_SIZE) * BLOCK_SIZE
        scales = 2 * 4 * c.num_hidden_layers * c.num_key_value_heads * fp8
        return tokens * self._token_bytes + scales

    @property
    def _token_bytes(self) -> int:
        """Return the bytes of a token's keys and values."""
        c = self.config
        size = 1 if self.kv_cache == "fp8" else 2
        return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * size

    @property
    def activation_bytes(self) -> int:
        """Return the most bytes of a token's activations in Llama.forward, in 16 bits; those in FP8
        take fewer."""
        c = self.config
        hidden, inner = c.hidden_size, c.intermediate_size
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        elements = max(
            3 * hidden + (q + 2 * kv) + 2 * q,  # attention: its input, rotated queries and output
            4 * hidden,  # add_rms_norm: two inputs and two outputs
            3 * hidden + 3 * inner,  # silu_and_mul: gate and up, and their product
            4 * hidden + inner,  # down: the product, and the output
        )
        return 2 * elements

    def memory(self, context: int, batch: int) -> dict[str, int]:
        """Return the bytes of each kind on a GPU, with a batch whose sequences are all full."""
        c, rows = self.whole, bucket(batch)
        chunk = min(PREFILL_CHUNK, context)
        logits = rows * (2 + 4) + min(rows, ROWS) * SAMPLING  # in 16 bits, then in fp32
        return {
            "weights": self.weights.nbytes,
            "KV cache": self.cache_bytes(context, batch),
            # A graph's memory is not shared with prefill, which runs without one.
            "activations": (chunk + rows) * self.activation_bytes,
            "logits": logits * c.vocab_size,
            "rope table": c.max_position_embeddings * c.head_dim * 4,
            "reserve": int(RESERVE + COMMUNICATION * (self.gpus > 1)),
        }

    # ---- the least time, in seconds ----

    def _seconds(self, gpu: Gpu, linears: Iterable[Linear]) -> float:
        """Return the seconds of multiplying one row with each of the linears."""

        def rate(w: Linear) -> float:
            return (gpu.fp8 if w.scale is not None else 0) or gpu.bf16

        return sum(2 * w.weight.numel() / rate(w) / 1e12 for w in linears)

    def _layers(self) -> list[Linear]:
        layers = self.weights.layers
        return [w for x in layers for w in (x.qkv, x.output, x.gate_up, x.down)]

    def _attention(self, gpu: Gpu, pairs: float) -> float:
        c = self.config
        per_pair = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim
        return per_pair * pairs / gpu.bf16 / 1e12

    @property
    def _read(self) -> int:
        """Return the bytes of weights that every pass reads: all but the embedding, of which it
        reads a row a token, unless it is the head too."""
        w = self.weights
        return w.nbytes - (0 if w.head.weight is w.embedding else w.embedding.nbytes)

    def _all_reduces(self, gpu: Gpu, rows: int) -> float:
        """Return the seconds of those after a layer's output projection and down, and after the
        embedding, whose rows are spread over the ranks."""
        one = gpu.all_reduce(2.0 * rows * self.whole.hidden_size, self.gpus)
        return (2 * self.whole.num_hidden_layers + 1) * one

    def _gathered(self, gpu: Gpu, rows: int) -> float:
        """Return the seconds of gathering 16-bit logits: half of an all-reduce's traffic."""
        return gpu.all_reduce(1.0 * rows * self.whole.vocab_size, self.gpus)

    def prefill(self, gpu: Gpu, tokens: int) -> Time:
        """Return the least time of a prompt of so many tokens, in chunks, up to the last one's
        logits, for which the last layer's output projection and FFN skip all other tokens."""
        layers, last = self._layers(), self.weights.layers[-1]
        chunks = [min(PREFILL_CHUNK, tokens - t) for t in range(0, tokens, PREFILL_CHUNK)]
        attention = self._attention(gpu, tokens * (tokens + 1) / 2)
        # Each chunk reads the weights, and the keys and values before its end.
        keys = sum(min(PREFILL_CHUNK * (i + 1), tokens) for i in range(len(chunks)))
        moved = len(chunks) * self._read + (keys + tokens) * self._token_bytes
        waits = sum(self._all_reduces(gpu, rows) for rows in chunks) + self._gathered(gpu, 1)
        compute = tokens * self._seconds(gpu, layers) + attention
        compute -= (tokens - 1) * self._seconds(gpu, (last.output, last.gate_up, last.down))
        compute += self._seconds(gpu, [self.weights.head])
        return Time(compute, moved / gpu.bandwidth / 1e12, waits)

    def decode(self, gpu: Gpu, context: int, batch: int) -> Time:
        """Return the least time of a step: one token for each sequence, with that many before."""
        row = self._seconds(gpu, [*self._layers(), self.weights.head])
        compute = batch * row + self._attention(gpu, batch * context)
        moved = self._read + batch * context * self._token_bytes
        waits = self._all_reduces(gpu, batch) + self._gathered(gpu, batch)
        return Time(compute, moved / gpu.bandwidth / 1e12, waits)


@dataclass(frozen=True)
class Plan:
    rank: Rank
    gpu: Gpu
    context: int
    batch: int

    @property
    def capacity(self) -> int:
        return int(self.gpu.memory * GIB)

    @cached_property
    def memory(self) -> dict[str, int]:
        return self.rank.memory(self.context, self.batch)

    @property
    def free(self) -> int:
        """Return the bytes that are left of a GPU's memory; below 0: those that are missing."""
        return self.capacity - sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.free >= 0

    @cached_property
    def max_context(self) -> int:
        """Return the most tokens a sequence that fit with this batch; 0 if one does not."""
        most = self.rank.whole.max_position_embeddings
        return _most(lambda context: replace(self, context=context).fits, most)

    @cached_property
    def max_batch(self) -> int:
        """Return the most sequences that fit with this context; 0 if one does not."""
        return _most(lambda batch: replace(self, batch=batch).fits, MOST)

    @cached_property
    def fewest_gpus(self) -> int | None:
        """Return the smallest number of GPUs that works, or None."""
        return next((n for n in sizes(self.rank.whole) if self.with_(gpus=n).fits), None)

    def with_(self, **changes: Any) -> Plan:
        """Return the plan with other fields of its rank."""
        return replace(self, rank=replace(self.rank, **changes))

    def others(self) -> list[str]:
        """Return what would fit, as options of the command line: single changes, or, if there are
        none, those of more GPUs with FP8 weights and an FP8 cache."""
        found = [f"--gpus {self.fewest_gpus}"] if self.fewest_gpus else []
        found += [f"--context {self.max_context}"] * (self.max_context > 0)
        found += [f"--batch {self.max_batch}"] * (self.max_batch > 0)
        recipes = () if self.rank.quantize else RECIPES
        options = [f"--quantize {recipe}" for recipe in recipes if self.with_(quantize=recipe).fits]
        if not self.rank.kv_cache and self.with_(kv_cache="fp8").fits:
            options.append("--kv-cache fp8")
        if found or options:
            return options + found
        recipe = self.rank.quantize or "fp8"
        least = self.with_(quantize=recipe, kv_cache="fp8")
        if least.fewest_gpus:
            return [f"--quantize {recipe} --kv-cache fp8 --gpus {least.fewest_gpus}"]
        least = least.with_(gpus=sizes(self.rank.whole)[-1])
        if not least.max_context:
            return []
        return [
            f"--quantize {recipe} --kv-cache fp8 --gpus {least.rank.gpus} "
            f"--context {least.max_context}"
        ]

    @cached_property
    def prefill(self) -> Time:
        return self.rank.prefill(self.gpu, self.context)

    @cached_property
    def decode(self) -> Time:
        return self.rank.decode(self.gpu, self.context, self.batch)


def plan(
    config: LlamaConfig,
    gpu: Gpu,
    gpus: int | None = None,
    *,
    context: int = 8192,
    batch: int = 1,
    quantize: str | None = None,
    kv_cache: str | None = None,
) -> Plan:
    """Plan `batch` sequences of `context` tokens on so many GPUs; None: the fewest that hold them,
    or the most that the model can use. quantize, kv_cache: as for Llama.from_pretrained and
    generate. Raises ValueError for a number of GPUs that does not divide the model, and for more
    tokens than it has positions."""
    check_kv_cache(kv_cache)
    for name, value in (("context", context), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, want at least 1")
    if context > config.max_position_embeddings:
        raise ValueError(
            f"context: got {context}, want at most the model's {config.max_position_embeddings} "
            "positions"
        )
    if gpus is not None and gpus not in fitting(config):
        known = ", ".join(map(str, fitting(config)))
        raise ValueError(f"gpus: got {gpus}, want one that divides the model: {known}")
    found = Plan(Rank(config, gpus or 1, quantize, kv_cache), gpu, context, batch)
    if gpus is None:
        return found.with_(gpus=found.fewest_gpus or sizes(config)[-1])
    return found


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest size up to limit that fits, where all below it do; 0: none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
