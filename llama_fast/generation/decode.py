"""Generation on a GPU: each decoding step replays a CUDA graph, and the host runs ahead.

A step launches some hundreds of short kernels, so it is captured once for each bucket of batch
sizes and replayed as one launch. The graph uses tensors at fixed addresses: the last tokens, their
positions, the block table and the cache. One small kernel in the graph advances the positions.

The host does not wait for the step that it has just launched. Tokens are sampled on the device,
used there by the next step, and copied to pinned memory. The host reads a step's tokens when AHEAD
more steps are in the queue. So a sequence computes up to AHEAD tokens past its end, into its own
memory; they are discarded.

The same loop runs without graphs, and in tests on CPU tensors.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import FP8_DTYPE
from ..rope_scaling import shown
from . import sampling
from .cache import BLOCK_SIZE, Append, KVCache, host, upload
from .graphs import CudaGraph, Graphs
from .protocol import Model
from .read import Read
from .sampling import Settings

AHEAD = 1  # steps queued behind the one awaited, to hide the host's work on a step's tokens
PREFILL_CHUNK = 8192  # tokens: bounds activations (8B: 0.5 GB for gate and up)


class Way(NamedTuple):
    """How to sample: what the graph of a step's sampling depends on, besides the batch size."""

    settings: Settings
    repetition_penalty: float = 1.0
    logprobs: bool = False


def bucket(rows: int) -> int:
    """Return the batch size for that many sequences: a power of two up to 128, then a multiple of
    64. Up to about 190 rows (800 TFLOP/s over 4.3 TB/s, in 16 bits) the bytes of the weights bound
    a step, not its rows."""
    return 1 << (rows - 1).bit_length() if rows <= 128 else -(-rows // 64) * 64


def check_kv_cache(kv_cache: Any) -> None:
    if kv_cache is not None and not (isinstance(kv_cache, str) and kv_cache == "fp8"):
        raise ValueError(f"kv_cache: got {shown(kv_cache)}, want None or 'fp8'")


def new_cache(
    model: Model,
    max_tokens: int | Sequence[int],
    kv_cache: str | None,
    batch_size: int = 1,
    num_blocks: int | None = None,
) -> KVCache:
    """Return a KVCache of the model's dtype, or for "fp8" of e4m3 with the checkpoint's scales, or
    measured ones."""
    fp8 = kv_cache == "fp8"
    return KVCache(
        model.config,
        max_tokens,
        batch_size,
        dtype=FP8_DTYPE if fp8 else model.dtype,
        device=model.device,
        num_blocks=num_blocks,
        k_scale=model.weights.k_scale if fp8 else None,
        v_scale=model.weights.v_scale if fp8 else None,
    )


# ---- a decoder ----


class Size(NamedTuple):
    """A decoder's capacity."""

    rows: int  # sequences: a bucket
    blocks: int  # of the whole cache
    width: int  # blocks of the longest sequence

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Size:
        blocks = [-(-length // BLOCK_SIZE) for length in lengths]
        return cls(bucket(len(blocks)), sum(blocks), max(blocks))

    def joined(self, other: Size) -> Size:
        return Size(*(max(pair) for pair in zip(self, other, strict=True)))

    def rounded(self) -> Size:
        """Return a size with up to a quarter more blocks, so that a conversation that grows with
        each call seldom needs a new decoder and new graphs."""
        steps = [(n, 1 << max(n.bit_length() - 3, 0)) for n in self[1:]]
        return Size(self.rows, *(-(-n // step) * step for n, step in steps))


class Decoder:
    """A KV cache, the other fixed tensors, and the graphs captured over them.

    One generation uses it at a time. The model keeps it between calls; it holds no model.
    """

    def __init__(self, model: Model, size: Size, kv_cache: str | None = None) -> None:
        self._free: torch.cuda.Event | None = None  # the end of the last generation's work
        self.size, self.kv_cache, device = size, kv_cache, model.device
        width = size.width * BLOCK_SIZE
        self.cache = new_cache(model, width, kv_cache, size.rows, size.blocks)
        self._tokens = torch.zeros(size.rows, 1, dtype=torch.int64, device=device)
        self._draws = torch.zeros(size.rows, dtype=torch.float64, device=device)
        # Each row's position, slot and length, and what a step adds to them. An empty row has 0,
        # -1, 0 and 0: it writes nothing and attends to nothing.
        self._state = torch.zeros(4, size.rows, dtype=torch.int32, device=device)
        self._table = torch.zeros(size.rows, size.width, dtype=torch.int32, device=device)
        self._logprobs = torch.zeros(size.rows, dtype=torch.float32, device=device)
        self._seen: Tensor | None = None  # bool [rows, vocab]: the ids in a text, for the penalty
        self._vocab = model.config.vocab_size
        self._graphs = Graphs(device)

    @torch.inference_mode()
    def begin(self, lengths: Sequence[int], way: Way, u: Tensor | None) -> None:
        """Start a generation. lengths: the final length of each sequence. u [n, max_new_tokens]
        fp64 on the host: the numbers with which each sequence draws its tokens."""
        if self._free is not None:
            torch.cuda.current_stream().wait_event(self._free)
        self._graphs.limit()
        self._way = way
        if way.repetition_penalty != 1 and self._seen is None:
            shape = self.size.rows, self._vocab
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self._tokens.device)
        self._u = None if u is None else upload(u.t().contiguous(), self._tokens.device)
        self.cache.clear()
        # All blocks at once, so that the table is fixed and a sequence's slots are consecutive.
        self.cache.select(range(len(lengths))).reserve(lengths)
        self.rows = list(range(len(lengths)))
        self._sampled = 0  # tokens of each sequence

    @torch.inference_mode()
    def prefill(
        self,
        model: Model,
        index: int,
        prompt: Sequence[int],
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Read:
        """Fill one sequence's part of the cache, and sample its first token."""
        cache, device = self.cache.select([index]), self._tokens.device
        for start in range(0, len(prompt), PREFILL_CHUNK):
            chunk = host([prompt[start : start + PREFILL_CHUNK]])
            tokens = upload(chunk, device)
            hidden = model.hidden(tokens, cache=cache, last=True, total=len(prompt))
            if on_prefill is not None:
                on_prefill(index, start + chunk.shape[1])
        self._sampled = 1
        u = None if self._u is None else self._u[0, index : index + 1]
        if self._way.repetition_penalty != 1 and self._seen is not None:
            self._seen[index] = upload(sampling.seen(prompt, self._vocab), device)
        ids = self._draw(model.logits(hidden[:, -1]), u, slice(index, index + 1))
        return self._read(ids, slice(index, index + 1), [index])

    @torch.inference_mode()
    def arrange(self, sequences: Sequence[int]) -> None:
        """Make step() decode these sequences, a subset of the current ones, in this order."""
        device, width = self._tokens.device, self.size.width
        size = bucket(len(sequences))
        empty = size - len(sequences)
        rows = [self.rows.index(i) for i in sequences] + [0] * empty
        order = upload(host(rows), device)
        self._tokens[:size] = self._tokens[order]
        if self._seen is not None:
            self._seen[:size] = self._seen[order]
        cache = self.cache.select(sequences)
        positions = [length + self._sampled - 1 for length in cache.seqlens]
        table = torch.zeros(size, width, dtype=torch.int32, device="cpu")
        table[: len(sequences)] = cache.block_table
        state = host([[0], [-1], [0], [0]]).int().repeat(1, size)
        for row, position in enumerate(positions):
            block = int(table[row, position // BLOCK_SIZE])
            slot = block * BLOCK_SIZE + position % BLOCK_SIZE
            state[:, row] = host([position, slot, position + 1, 1])
        self._state[:, :size] = upload(state, device)
        self._table[:size] = upload(table, device)
        self._order = upload(host([*sequences, *[0] * empty]), device)
        self.rows = list(sequences)

    @torch.inference_mode()
    def step(self, model: Model, graphs: type[CudaGraph] | None) -> Read:
        """Decode one more token of each sequence."""
        size = bucket(len(self.rows))
        if self._u is not None:
            torch.index_select(self._u[self._sampled], 0, self._order, out=self._draws[:size])
        logits = self._graphs.run(size, lambda: self._forward(model, size), graphs)
        rows, draws = slice(size), self._draws[:size]
        what = size, self._way
        ids = self._graphs.run(what, lambda: self._draw(logits, draws, rows), graphs)
        self._sampled += 1
        return self._read(ids, rows, self.rows)

    def _read(self, ids: Tensor, rows: slice, sequences: Sequence[int]) -> Read:
        return Read(ids, self._logprobs[rows] if self._way.logprobs else None, sequences)

    def _forward(self, model: Model, size: int) -> Tensor:
        """Return logits [size, vocab] after the last tokens, using only the fixed tensors."""
        positions, slots, seqlens, ahead = self._state[:, :size]
        append = Append(positions, slots, self._table[:size], seqlens)
        x = model.lookup(self._tokens[:size])
        logits = model.logits(model.forward(x, positions, self.cache, append)[:, 0])
        self._state[:3, :size] += ahead
        return logits

    def _draw(self, logits: Tensor, u: Tensor | None, rows: slice) -> Tensor:
        """Return the next tokens [size], which become the last ones of rows; -1 for invalid
        logits. Note their log probabilities, if wanted."""
        settings, penalty, wanted = self._way
        scores, seen = logits, self._seen
        if penalty != 1 and seen is not None:
            scores = sampling.penalized(logits, seen[rows], penalty)
        ids = sampling.sample_rows(scores, u, *settings)
        tokens = ids.clamp(min=0)
        self._tokens[rows, 0] = tokens
        if penalty != 1 and seen is not None:
            seen[rows].scatter_(1, tokens[:, None], True)
        if wanted:
            self._logprobs[rows] = sampling.logprobs(logits, tokens)
        return ids

    def end(self) -> None:
        """Record the end of the last step, for which a generation on another stream waits."""
        if self._tokens.is_cuda:
            self._free = torch.cuda.Event()
            self._free.record()

    def __del__(self) -> None:
        """Wait for the last step, which may run on another stream than the one that the memory
        returns to."""
        if self._free is not None:
            self._free.synchronize()


@contextlib.contextmanager
def _lent(model: Model, lengths: Sequence[int], kv_cache: str | None) -> Iterator[Decoder]:
    """Yield one of the model's idle decoders, or a new one. A larger one replaces one too small,
    and one with another kind of cache."""
    need = Size.of(lengths)
    while (decoder := _idle(model)) is not None:
        if decoder.size.joined(need) == decoder.size and decoder.kv_cache == kv_cache:
            break
        need = need.joined(decoder.size)
    if decoder is None:
        try:
            decoder = Decoder(model, need.rounded(), kv_cache)
        except torch.OutOfMemoryError:
            decoder = Decoder(model, Size.of(lengths), kv_cache)
    try:
        yield decoder
    finally:
        decoder.end()
        model.decoders.append(decoder)


def _idle(model: Model) -> Decoder | None:
    try:
        return model.decoders.pop()
    except IndexError:
        return None


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make the model's device current, since streams and events belong to the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# ---- the loop ----


def run(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    way: Way,
    u: Tensor | None,
    emit: Callable[[int, int, float], bool],
    graphs: type[CudaGraph] | None = CudaGraph,
    kv_cache: str | None = None,
    on_prefill: Callable[[int, int], None] | None = None,
) -> None:
    """Run generate.generate's loop on a GPU.

    u: see Decoder.begin; None for temperature 0. emit(i, id, log probability) receives
    the tokens of prompt i, an id of -1 for invalid logits, and returns whether the sequence
    continues. graphs: None launches the
    kernels of a step one by one.
    """
    going = set(range(len(prompts)))
    queue: deque[Read] = deque()

    def read(behind: int) -> None:
        """Emit the tokens of all steps but the last `behind`."""
        while len(queue) > behind and going:
            for i, token, logprob in queue.popleft().wait():
                if i in going and not emit(i, token, logprob):
                    going.remove(i)

    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    with _current(model.device), _lent(model, lengths, kv_cache) as decoder:
        decoder.begin(lengths, way, u)
        for i, prompt in enumerate(prompts):
            queue.append(decoder.prefill(model, i, prompt, on_prefill))
            read(AHEAD)
        arranged = False
        for _ in range(max_new_tokens - 1):
            sequences = [i for i in decoder.rows if i in going]
            if not sequences:
                break
            if not arranged or sequences != decoder.rows:
                decoder.arrange(sequences)
                arranged = True
            queue.append(decoder.step(model, graphs))
            read(AHEAD)
        read(0)
