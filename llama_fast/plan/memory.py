"""What one GPU holds of a Llama, without any GPU.

Weights are counted by the loader's own code on tensors without memory, so that recipes and shapes
have one description.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..checkpoint.formats import Format
from ..checkpoint.weights import Linear, Weights, assemble
from ..config import LlamaConfig
from ..generation.cache import BLOCK_SIZE
from ..generation.decode import PREFILL_CHUNK, bucket
from ..generation.sampling import ROWS
from ..parallel import Share, Span, vocab_sizes
from ..reference import FP8_BLOCK, FP8_DTYPE

GIB = 2**30
# Assumed, not measured: the CUDA context with all kernels, libraries' workspaces, CUDA graphs and
# the allocator's gaps; and the buffers of NCCL where there are several GPUs.
RESERVE, COMMUNICATION = 1.0 * GIB, 1.0 * GIB
# Bytes for each of up to ROWS * vocab logits at the peak of sample_rows, with top_p below 1.
SAMPLING = 44


class _NoMemory:
    """A weights.Source of tensors that have shapes and dtypes only. stored: the format of a
    checkpoint that is in FP8 already."""

    def __init__(self, stored: Format | None) -> None:
        self._stored = stored

    def tensor(self, name: str, *dims: Span) -> Tensor:
        return torch.empty([*map(len, dims)], dtype=torch.bfloat16, device="meta")

    def linear(self, parts: dict[str, Span], k: Span, *, fp8: bool, bound: float | None) -> Linear:
        n, stored = sum(map(len, parts.values())), all(map(self._is_stored, parts))
        if not (fp8 or stored):
            return Linear(torch.empty(n, len(k), dtype=torch.bfloat16, device="meta"))
        scales = (n, 1)
        if stored and self._stored is not None and self._stored.block:
            # Scales are spread over the rows where a part begins within a block, as in load.py.
            *before, _ = map(len, parts.values())
            starts = [*before, *(rows.start for rows in parts.values())]
            down = n if any(at % FP8_BLOCK for at in starts) else -(-n // FP8_BLOCK)
            scales = (down, -(-len(k) // FP8_BLOCK))
        scale = torch.empty(scales, dtype=torch.float32, device="meta")
        return Linear(torch.empty(n, len(k), dtype=FP8_DTYPE, device="meta"), scale)

    def _is_stored(self, module: str) -> bool:
        """Return whether the checkpoint has a module in FP8. transformers never converts the head
        for fbgemm_fp8 and fp8, and they need not list it."""
        form = self._stored
        if form is None or form.excludes(module):
            return False
        listed = len(form.scale_names) == 1 and form.activation_bound is None and not form.block
        return listed or module != "lm_head"


@dataclass(frozen=True)
class Rank:
    """One of `gpus` that hold a model in `stages` of consecutive layers, each split by tensor
    parallelism: of the first stage the rank with the largest part of the vocabulary, which holds
    the most. Weights, keys and values have 16 bits where nothing says otherwise."""

    whole: LlamaConfig
    gpus: int = 1
    quantize: str | None = None
    kv_cache: str | None = None
    stages: int = 1
    stored: Format | None = None

    @property
    def size(self) -> int:
        """Return the number of ranks of a stage."""
        return self.gpus // self.stages

    @cached_property
    def config(self) -> LlamaConfig:
        """Return the whole model's config with this rank's heads and inner width."""
        return self._share.config(self.whole)

    @cached_property
    def _share(self) -> Share:
        rows = vocab_sizes(self.whole.vocab_size, self.size)
        return Share.of(self.whole, rows.index(max(rows)), self.size)

    @cached_property
    def weights(self) -> Weights:
        """Return this rank's part of all layers, of every stage."""
        return assemble(self.whole, _NoMemory(self.stored), self.quantize, share=self._share)

    @property
    def layers(self) -> int:
        """Return the number of layers of a stage."""
        return -(-self.whole.num_hidden_layers // self.stages)

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of the first stage's weights. Only the last one has the head, which is
        no larger than the embedding."""
        w = self.weights
        if self.stages == 1:
            return w.nbytes
        head = 0 if w.head.weight is w.embedding else w.head.nbytes
        return replace(w, layers=w.layers[: self.layers]).nbytes - head

    def token_bytes(self, layers: int) -> int:
        """Return the bytes of a token's keys and values."""
        c = self.config
        return 2 * layers * c.num_key_value_heads * c.head_dim * (1 if self.kv_cache else 2)

    def cache_bytes(self, context: int, batch: int) -> int:
        """Return the size of a KVCache. Sequences take whole blocks; one in FP8 has scales."""
        tokens = batch * -(-context // BLOCK_SIZE) * BLOCK_SIZE
        scales = 2 * 4 * self.layers * self.config.num_key_value_heads * bool(self.kv_cache)
        return tokens * self.token_bytes(self.layers) + scales

    @property
    def activation_bytes(self) -> int:
        """Return the most bytes of a token's activations in Llama.forward, in 16 bits; those in FP8
        take fewer."""
        c = self.config
        hidden, inner = c.hidden_size, c.intermediate_size
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        elements = max(
            3 * hidden + (q + 2 * kv) + 2 * q,  # attention: its input, rotated queries and output
            3 * hidden + 3 * inner,  # silu_and_mul: gate and up, and their product
            4 * hidden + inner,  # down: the product, and the output
        )
        return 2 * elements

    def memory(self, context: int, batch: int) -> dict[str, int]:
        """Return the bytes of each kind on the GPU, with a batch whose sequences are all full."""
        c, rows = self.whole, bucket(batch)
        chunk = min(PREFILL_CHUNK, context)
        logits = rows * (2 + 4) + min(rows, ROWS) * SAMPLING  # in 16 bits, then in fp32
        return {
            "weights": self.weight_bytes,
            "KV cache": self.cache_bytes(context, batch),
            # A graph's memory is not shared with prefill, which runs without one.
            "activations": (chunk + rows) * self.activation_bytes,
            "logits": logits * c.vocab_size,
            "rope table": c.max_position_embeddings * c.head_dim * 4,
            "reserve": int(RESERVE + COMMUNICATION * (self.gpus > 1)),
        }
