"""The paged KV cache: one pool of blocks per layer, allocated to sequences by the block, so that
ragged sequences need neither padding nor copying as they grow."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _cpu
from ..config import LlamaConfig
from ..ops import checks

# A measured scale leaves this much room for larger tokens, at no cost in e4m3's precision.
HEADROOM = 2.0
BLOCK_SIZE = 128  # tokens: one query over 8k keys reads 23.5 GB/s; 20.1 with blocks of 64


class Append(NamedTuple):
    """Where the next tokens of each sequence are written, and the keys they attend to."""

    positions: Tensor  # [B * S] int32 or int64
    slots: Tensor  # [B * S] int32 or int64
    block_table: Tensor  # [B, n] int32
    cache_seqlens: Tensor  # [B] int32, the new tokens included
    run: slice | None = None  # all slots of a single sequence, if they are consecutive


class _Sequence:
    __slots__ = ("row", "length", "blocks")

    def __init__(self, row: int) -> None:
        self.row, self.length, self.blocks = row, 0, 0


def host(integers: Any) -> Tensor:
    """Return int64 on the host, whatever torch's default device is."""
    return torch.tensor(integers, dtype=torch.int64, device="cpu")


def upload(t: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to the device without waiting for the device."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


def _integer(name: str, value: Any, low: int = 0, high: int = checks.LARGEST_INT) -> int:
    """Return an int from low to high, given as one or as NumPy's."""
    try:
        whole = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        whole = None
    if whole is None:
        raise TypeError(f"{name}: got {checks.shown(value)}, want an int")
    checks.integer(name, whole, low, high)
    return whole


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) or getattr(value, "ndim", 0) > 0


def _integers(name: str, values: Any, length: int | None, low: int = 0) -> list[int]:
    """Return ints of at least low, one for each of `length` sequences, if that is given."""
    try:
        listed = list(values)
    except TypeError:
        raise TypeError(f"{name}: got {checks.shown(values)}, want ints") from None
    if length not in (None, len(listed)):
        raise ValueError(f"{name}: got {len(listed)} numbers, want {length}, one for each sequence")
    return [_integer(f"{name}[{i}]", value, low) for i, value in enumerate(listed)]


def _scales(name: str, scale: float | Tensor | None, pool: Tensor) -> Tensor | None:
    """Return fp32 [layers, 1 or Hkv] for an e4m3 pool [layers, blocks, block_size, Hkv, D]."""
    layers, heads = pool.shape[0], pool.shape[3]
    if pool.dtype != torch.float8_e4m3fn:
        if scale is not None:
            raise ValueError(f"{name}: got a scale, want None with dtype {pool.dtype}")
        return None
    if scale is None:  # measure() changes it
        return torch.ones(layers, heads, dtype=torch.float32, device=pool.device)
    if isinstance(scale, Tensor):
        if scale.dtype != torch.float32 or tuple(scale.shape) not in ((layers, 1), (layers, heads)):
            raise ValueError(
                f"{name}: got {scale.dtype} {list(scale.shape)}, want float32 [{layers}, 1] or "
                f"[{layers}, {heads}]"
            )
        return scale.to(pool.device)
    checks.number(name, scale, 0.0, inclusive=False)
    return torch.full((layers, 1), scale, dtype=torch.float32, device=pool.device)


def _pool(shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> Tensor:
    pool = torch.empty(shape, dtype=dtype, device=device)
    if pool.is_cpu:
        _cpu.advise_huge_pages(pool)
    return pool


class KVCache:
    """Keys and values of `batch_size` sequences of up to `max_tokens` tokens, in a pool of blocks.

    k[layer] and v[layer] are [num_blocks, block_size, Hkv, D], token-major: decode reads all heads
    of a token together (23.5 GB/s; 19.6 head-major). On a CPU, memory is committed when a block is
    first written, in huge pages if the system provides them (decode over 8k keys: 1.3x).
    """

    def __init__(
        self,
        config: LlamaConfig,
        max_tokens: int | Sequence[int],
        batch_size: int = 1,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        block_size: int = BLOCK_SIZE,
        num_blocks: int | None = None,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
    ) -> None:
        """Allocate the pools. max_tokens: of every sequence, or a list with a number per sequence.
        num_blocks: in the pool; None: enough for all sequences at once. A cache of dtype
        float8_e4m3fn holds k / k_scale and v / v_scale. The scales are numbers, or fp32 tensors
        [layers, 1] or [layers, Hkv]; None: measure() computes them for each head from the first
        tokens that a model appends."""
        if not isinstance(config, LlamaConfig):
            raise TypeError(f"config: got {type(config).__name__}, want a LlamaConfig")
        dtypes = (*checks.ACTIVATIONS, *checks.FP8)
        if not isinstance(dtype, torch.dtype) or dtype not in dtypes:
            raise TypeError(
                f"dtype: got {checks.shown(dtype)}, want torch.bfloat16, float16, float32 or "
                f"float8_e4m3fn"
            )
        if _is_list(max_tokens):
            lengths = _integers("max_tokens", max_tokens, None, 1)
            _integer("batch_size", len(lengths), 1)
        else:
            batch_size = _integer("batch_size", batch_size, 1)
            lengths = [_integer("max_tokens", max_tokens, 1)] * batch_size
        block_size = _integer("block_size", block_size, 1)
        need = [-(-length // block_size) for length in lengths]
        blocks = sum(need) if num_blocks is None else _integer("num_blocks", num_blocks, 1)
        heads, dim = config.num_key_value_heads, config.head_dim
        shape = (2, config.num_hidden_layers, blocks, block_size, heads, dim)
        self.k, self.v = _pool(shape, dtype, device)
        self.block_size = block_size
        # CPU kernels gather blocks at no cost; FP8 entries need their scales.
        self.finds_runs = not self.k.is_cpu and self.k.itemsize > 1
        self.k_scale = _scales("k_scale", k_scale, self.k)
        self.v_scale = _scales("v_scale", v_scale, self.v)
        fp8 = dtype == torch.float8_e4m3fn
        self._measured = [n for n, s in (("k", k_scale), ("v", v_scale)) if fp8 and s is None]
        self._unmeasured = set(range(len(self.k)) if self._measured else ())  # shared by all views
        self._free = list(range(blocks))[::-1]
        # On the host, so that reading it never waits for a GPU.
        self._table = torch.zeros(len(lengths), max(need), dtype=torch.int32, device="cpu")
        self._sequences = [_Sequence(row) for row in range(len(lengths))]

    def __len__(self) -> int:
        """Return the number of sequences, the batch size of model(tokens, cache=self)."""
        return len(self._sequences)

    @property
    def seqlens(self) -> list[int]:
        return [sequence.length for sequence in self._sequences]

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def block_table(self) -> Tensor:
        """Return [B, n] int32 on the host. A row is valid up to its sequence's number of blocks."""
        return self._table[[sequence.row for sequence in self._sequences]]

    def scales(self, layer: int) -> dict[str, Any]:
        """Return k_scale and v_scale of a layer, as keyword arguments for the ops."""
        pairs = (("k_scale", self.k_scale), ("v_scale", self.v_scale))
        return {name: None if scale is None else scale[layer] for name, scale in pairs}

    def measures(self, layer: int) -> bool:
        """Return whether a layer's scales are still to be measured."""
        return layer in self._unmeasured

    def measure(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Set those of a layer's scales that were not given to HEADROOM * amax / 448 of each head
        of k and v [T, Hkv, D], the first tokens to be appended, k rotated. A head without a finite
        amax above 0 keeps 1."""
        self._unmeasured.discard(layer)
        for name, scale, x in (("k", self.k_scale, k), ("v", self.v_scale, v)):
            if name in self._measured and scale is not None:
                amax = x.abs().amax(dim=(0, 2)).float()
                usable = amax.isfinite() & (amax > 0)
                found = (amax * (HEADROOM / 448)).clamp(min=torch.finfo(torch.float32).tiny)
                scale[layer] = found.where(usable, 1.0)

    def select(self, indices: Sequence[int]) -> KVCache:
        """Return a view of this cache with some of its sequences, in the given order."""
        view = copy.copy(self)
        chosen = [
            _integer(f"indices[{n}]", i, 0, len(self) - 1)
            for n, i in enumerate(_integers("indices", indices, None))
        ]
        view._sequences = [self._sequences[i] for i in chosen]
        return view

    def release(self, index: int) -> None:
        """Empty a sequence and return its blocks to the pool."""
        sequence = self._sequences[_integer("index", index, 0, len(self) - 1)]
        self._free += self._table[sequence.row, : sequence.blocks].tolist()[::-1]
        sequence.length = sequence.blocks = 0

    def clear(self) -> None:
        """Empty every sequence; reserve() then allocates consecutive blocks. Scales that were not
        given are measured again."""
        self._unmeasured.update(range(len(self.k)) if self._measured else ())
        for index in range(len(self)):
            self.release(index)
        self._free.sort(reverse=True)

    def truncate(self, tokens: Sequence[int]) -> None:
        """Cut each sequence to its given number of tokens; it keeps its blocks. Raises ValueError,
        and changes nothing, if a sequence has fewer tokens.
        """
        tokens = _integers("tokens", tokens, len(self))
        for i, (count, sequence) in enumerate(zip(tokens, self._sequences, strict=True)):
            if count > sequence.length:
                raise ValueError(
                    f"tokens[{i}]: got {count}, want 0 to the sequence's {sequence.length}"
                )
        for count, sequence in zip(tokens, self._sequences, strict=True):
            sequence.length = count

    def reserve(self, tokens: Sequence[int]) -> None:
        """Allocate blocks for the given number of tokens of each sequence, current ones included.
        The block table then does not change until they are written.

        Raises ValueError, and changes nothing, if the pool or a sequence's table is full.
        """
        tokens = _integers("tokens", tokens, len(self))
        needed = [-(-count // self.block_size) for count in tokens]
        if max(needed, default=0) > self._table.shape[1]:
            room = self._table.shape[1] * self.block_size
            raise ValueError(
                f"KV cache: a sequence has room for {room} tokens, not for {max(tokens)}"
            )
        missing = sum(max(n - s.blocks, 0) for n, s in zip(needed, self._sequences, strict=True))
        if missing > len(self._free):
            raise ValueError(
                f"KV cache is full: {missing} more blocks of {self.block_size} tokens are needed, "
                f"{len(self._free)} are free"
            )
        for n, sequence in zip(needed, self._sequences, strict=True):
            for column in range(sequence.blocks, n):
                self._table[sequence.row, column] = self._free.pop()
            sequence.blocks = max(sequence.blocks, n)

    def grow(self, max_tokens: int) -> None:
        """Make room for max_tokens tokens of every sequence, by a copy of the blocks in use to a
        larger pool. Views that select() returned before keep the old pool."""
        width = self._table.shape[1]
        more = -(-max_tokens // self.block_size) - width
        if more <= 0:
            return
        layers, blocks, *rest = self.k.shape
        added = more * len(self._table)
        pool = _pool((2, layers, blocks + added, *rest), self.k.dtype, self.k.device)
        for block in set(range(blocks)) - set(self._free):  # others are not touched: no memory yet
            for old, new in zip((self.k, self.v), pool, strict=True):
                new[:, block] = old[:, block]
        self.k, self.v = pool
        self._free = [*range(blocks, blocks + added)][::-1] + self._free
        self._table = torch.nn.functional.pad(self._table, (0, more))

    def append(self, count: int | Sequence[int]) -> Append:
        """Reserve room for `count` more tokens of each sequence; advance() then keeps them. With a
        list, one number per sequence, every token is a row of its own with one query.

        Raises ValueError, and changes nothing, if the pool or a sequence's table is full.
        """
        uniform = not _is_list(count)
        counts = self._counts(count)
        totals = [s.length + n for s, n in zip(self._sequences, counts, strict=True)]
        self.reserve(totals)
        table = self.block_table[:, : -(-max(totals, default=0) // self.block_size)]
        rows = host(range(len(counts))).repeat_interleave(host(counts))
        pieces = [host(range(t - n, t)) for t, n in zip(totals, counts, strict=True)]
        positions = torch.cat(pieces) if pieces else rows
        block = table[rows, positions // self.block_size].long()
        slots = block * self.block_size + positions % self.block_size
        return Append(
            upload(positions, self.k.device),
            upload(slots, self.k.device),
            upload(table if uniform else table[rows], self.k.device),
            upload(host(totals).int() if uniform else (positions + 1).int(), self.k.device),
            self._run(table, totals) if uniform else None,
        )

    def _run(self, table: Tensor, totals: list[int]) -> slice | None:
        """Return a single sequence's tokens as a slice of the pool's slots, if its blocks are
        consecutive. Attention over the slice needs no block table."""
        if not self.finds_runs or len(totals) != 1 or table.shape[1] == 0:
            return None
        first = int(table[0, 0])
        if table[0].tolist() != list(range(first, first + table.shape[1])):
            return None
        return slice(first * self.block_size, first * self.block_size + totals[0])

    def advance(self, count: int | Sequence[int]) -> None:
        """Count the tokens of append() as written in every layer."""
        counts = self._counts(count)
        for i, (sequence, n) in enumerate(zip(self._sequences, counts, strict=True)):
            room = sequence.blocks * self.block_size - sequence.length
            if n > room:
                raise ValueError(
                    f"count: got {n} for sequence {i}, want at most the {room} reserved"
                )
        for sequence, n in zip(self._sequences, counts, strict=True):
            sequence.length += n

    def _counts(self, count: int | Sequence[int]) -> list[int]:
        """Return the number of tokens of each sequence."""
        if _is_list(count):
            return _integers("count", count, len(self))
        return [_integer("count", count)] * len(self)
