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
import torch.nn.functional as F
from torch import Tensor

from ..reference import FP8_DTYPE
from . import sampling
from .cache import BLOCK_SIZE, Append, KVCache, host, upload
from .graphs import CudaGraph, Graphs
from .protocol import Model

AHEAD = 1  # steps queued behind the one awaited, to hide the host's work on a step's tokens
PREFILL_CHUNK = 8192  # tokens: bounds activations (8B: 0.5 GB for gate and up)


class Settings(NamedTuple):
    """Sampling settings, see sampling.sample."""

    temperature: float
    top_p: float
    top_k: int


def bucket(rows: int) -> int:
    """Return the batch size for that many sequences: a power of two up to 128, then a multiple of
    64. Up to about 190 rows (800 TFLOP/s over 4.3 TB/s, in 16 bits) the bytes of the weights bound
    a step, not its rows."""
    return 1 << (rows - 1).bit_length() if rows <= 128 else -(-rows // 64) * 64


def check_kv_cache(kv_cache: Any) -> None:
    if kv_cache not in (None, "fp8"):
        raise ValueError(f"kv_cache: got {kv_cache!r}, want None or 'fp8'")


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


class Read:
    """Sampled ids, being copied to the host."""

    def __init__(self, ids: Tensor, sequences: Sequence[int]) -> None:
        """Start copying ids [B]: those of the sequences, then those of empty rows."""
        self._sequences = tuple(sequences)
        self._there: torch.cuda.Event | None = None
        # Copy on every device: the next step overwrites ids.
        self._ids = torch.empty(ids.shape, dtype=ids.dtype, device="cpu", pin_memory=ids.is_cuda)
        self._ids.copy_(ids, non_blocking=True)
        if ids.is_cuda:
            self._there = torch.cuda.Event()
            self._there.record()

    def wait(self) -> list[tuple[int, int]]:
        """Return pairs of sequence and id; the id is -1 for invalid logits."""
        if self._there is not None:
            self._there.synchronize()
        return list(zip(self._sequences, self._ids.tolist(), strict=False))


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
        self._graphs = Graphs(device)

    @torch.inference_mode()
    def begin(self, lengths: Sequence[int], settings: Settings, u: Tensor | None) -> None:
        """Start a generation. lengths: the final length of each sequence. u [n, max_new_tokens]
        fp64 on the host: the numbers with which each sequence draws its tokens."""
        if self._free is not None:
            torch.cuda.current_stream().wait_event(self._free)
        self._graphs.limit()
        self._settings = settings
        self._u = None if u is None else upload(u.t().contiguous(), self._tokens.device)
        self.cache.clear()
        # All blocks at once, so that the table is fixed and a sequence's slots are consecutive.
        self.cache.select(range(len(lengths))).reserve(lengths)
        self.rows = list(range(len(lengths)))
        self._sampled = 0  # tokens of each sequence

    @torch.inference_mode()
    def prefill(self, model: Model, index: int, prompt: Sequence[int]) -> Read:
        """Fill one sequence's part of the cache, and sample its first token."""
        cache = self.cache.select([index])
        for start in range(0, len(prompt), PREFILL_CHUNK):
            chunk = host([prompt[start : start + PREFILL_CHUNK]])
            tokens = upload(chunk, self._tokens.device)
            hidden = model.hidden(tokens, cache=cache, last=True, total=len(prompt))
        self._sampled = 1
        u = None if self._u is None else self._u[0, index : index + 1]
        ids = sampling.sample_rows(model.logits(hidden[:, -1]), u, *self._settings)
        self._tokens[index].copy_(ids.clamp(min=0))
        return Read(ids, [index])

    @torch.inference_mode()
    def arrange(self, sequences: Sequence[int]) -> None:
        """Make step() decode these sequences, a subset of the current ones, in this order."""
        device, width = self._tokens.device, self.size.width
        size = bucket(len(sequences))
        empty = size - len(sequences)
        rows = [self.rows.index(i) for i in sequences] + [0] * empty
        self._tokens[:size] = self._tokens[upload(host(rows), device)]
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
        way = size, self._settings
        ids = self._graphs.run(way, lambda: self._sample(logits), graphs)
        self._sampled += 1
        return Read(ids, self.rows)

    def _forward(self, model: Model, size: int) -> Tensor:
        """Return logits [size, vocab] after the last tokens, using only the fixed tensors."""
        positions, slots, seqlens, ahead = self._state[:, :size]
        append = Append(positions, slots, self._table[:size], seqlens)
        x = F.embedding(self._tokens[:size], model.weights.embedding)
        logits = model.logits(model.forward(x, positions, self.cache, append)[:, 0])
        self._state[:3, :size] += ahead
        return logits

    def _sample(self, logits: Tensor) -> Tensor:
        """Return the next tokens [size], which become the last ones; -1 for invalid logits."""
        size = len(logits)
        ids = sampling.sample_rows(logits, self._draws[:size], *self._settings)
        self._tokens[:size, 0] = ids.clamp(min=0)
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
    settings: Settings,
    u: Tensor | None,
    emit: Callable[[int, int], bool],
    graphs: type[CudaGraph] | None = CudaGraph,
    kv_cache: str | None = None,
) -> None:
    """Run generate.generate's loop on a GPU.

    u: see Decoder.begin; None for temperature 0. emit(i, id) receives the tokens of prompt i, an id
    of -1 for invalid logits, and returns whether the sequence continues. graphs: None launches the
    kernels of a step one by one.
    """
    going = set(range(len(prompts)))
    queue: deque[Read] = deque()

    def read(behind: int) -> None:
        """Emit the tokens of all steps but the last `behind`."""
        while len(queue) > behind and going:
            for i, token in queue.popleft().wait():
                if i in going and not emit(i, token):
                    going.remove(i)

    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    with _current(model.device), _lent(model, lengths, kv_cache) as decoder:
        decoder.begin(lengths, settings, u)
        for i, prompt in enumerate(prompts):
            queue.append(decoder.prefill(model, i, prompt))
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
