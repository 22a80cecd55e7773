"""The paged KV cache: one pool of blocks per layer, lent to sequences a block at a time, so that
ragged sequences need neither padding nor copying as they grow."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _cpu
from ..config import LlamaConfig

BLOCK_SIZE = 128  # tokens: one query over 8k keys reads 23.5 GB/s, with blocks of 64 20.1


class Append(NamedTuple):
    """Where the next tokens of each sequence go, and what they may attend to."""

    positions: Tensor  # [B * S] int32 or int64
    slots: Tensor  # [B * S] int32 or int64
    block_table: Tensor  # [B, n] int32
    cache_seqlens: Tensor  # [B] int32, the new tokens included
    run: slice | None = None  # all slots of the only sequence, where they lie one after another


class _Sequence:
    __slots__ = ("row", "length", "blocks")

    def __init__(self, row: int) -> None:
        self.row, self.length, self.blocks = row, 0, 0


def upload(t: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device, without waiting for what the device is doing."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


def _scales(name: str, scale: float | Tensor | None, pool: Tensor) -> Tensor | None:
    """fp32 [layers, 1 or Hkv] for a pool [layers, blocks, block_size, Hkv, D] of e4m3."""
    layers, heads = pool.shape[0], pool.shape[3]
    if (scale is None) != (pool.dtype != torch.float8_e4m3fn):
        got = "None" if scale is None else "a scale"
        want = "None" if scale is not None else f"a number or fp32 [{layers}, 1 or {heads}]"
        raise ValueError(f"{name}: got {got}, want {want} with dtype {pool.dtype}")
    if scale is None:
        return None
    if isinstance(scale, Tensor):
        if scale.dtype != torch.float32 or tuple(scale.shape) not in ((layers, 1), (layers, heads)):
            raise ValueError(
                f"{name}: got {scale.dtype} {list(scale.shape)}, want float32 [{layers}, 1] or "
                f"[{layers}, {heads}]"
            )
        return scale.to(pool.device)
    if not 0.0 < scale < float("inf"):
        raise ValueError(f"{name}: got {scale}, want a finite number above 0")
    return torch.full((layers, 1), scale, dtype=torch.float32, device=pool.device)


class KVCache:
    """Keys and values of `batch_size` sequences that share room for `max_tokens` tokens.

    k[layer] and v[layer] are [num_blocks, block_size, Hkv, D], token-major: decode walks all heads
    of a token together (23.5 GB/s; 19.6 head-major). On a CPU memory is only committed as blocks
    are first written, in huge pages where the system grants them (decode over 8k keys: 1.3x).
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
        """max_tokens: of every sequence, or a list with one number for each. num_blocks: in the
        pool; None: as many as all the sequences need at once. dtype float8_e4m3fn holds k / k_scale
        and v / v_scale: both are then required, as numbers or as fp32 tensors [layers, 1] or
        [layers, Hkv]."""
        lengths = [max_tokens] * batch_size if isinstance(max_tokens, int) else list(max_tokens)
        for name, value in (("batch_size", len(lengths)), ("block_size", block_size)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, want at least 1")
        if min(lengths) < 1:
            raise ValueError(f"max_tokens: got {min(lengths)}, want at least 1")
        need = [-(-length // block_size) for length in lengths]
        blocks = sum(need) if num_blocks is None else num_blocks
        if blocks < 1:
            raise ValueError(f"num_blocks: got {blocks}, want at least 1")
        heads, dim = config.num_key_value_heads, config.head_dim
        shape = (2, config.num_hidden_layers, blocks, block_size, heads, dim)
        pool = torch.empty(shape, dtype=dtype, device=device)
        if pool.is_cpu:
            _cpu.advise_huge_pages(pool)
        self.k, self.v = pool
        self.block_size = block_size
        # A CPU's cache attention gathers blocks at no cost; FP8 entries want their scales.
        self.finds_runs = not self.k.is_cpu and self.k.itemsize > 1
        self.k_scale = _scales("k_scale", k_scale, self.k)
        self.v_scale = _scales("v_scale", v_scale, self.v)
        self._free = list(range(blocks))[::-1]
        # On the host, like all the bookkeeping: reading it never waits for a GPU.
        self._table = torch.zeros(len(lengths), max(need), dtype=torch.int32)
        self._sequences = [_Sequence(row) for row in range(len(lengths))]

    def __len__(self) -> int:
        """How many sequences there are, the batch size of model(tokens, cache=self)."""
        return len(self._sequences)

    @property
    def seqlens(self) -> list[int]:
        return [sequence.length for sequence in self._sequences]

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def block_table(self) -> Tensor:
        """[B, n] int32, on the host; a row counts as far as its sequence has blocks."""
        return self._table[[sequence.row for sequence in self._sequences]]

    def scales(self, layer: int) -> dict[str, Any]:
        """The keyword arguments k_scale and v_scale of the ops that use the layer's pools."""
        pairs = (("k_scale", self.k_scale), ("v_scale", self.v_scale))
        return {name: None if scale is None else scale[layer] for name, scale in pairs}

    def select(self, indices: Sequence[int]) -> KVCache:
        """The same cache seen through some of its sequences, in the order given."""
        view = copy.copy(self)
        view._sequences = [self._sequences[i] for i in indices]
        return view

    def release(self, index: int) -> None:
        """Empties a sequence; its blocks go back to the pool."""
        sequence = self._sequences[index]
        self._free += self._table[sequence.row, : sequence.blocks].tolist()[::-1]
        sequence.length = sequence.blocks = 0

    def clear(self) -> None:
        """Empties every sequence; reserve() then lends blocks that follow each other."""
        for index in range(len(self)):
            self.release(index)
        self._free.sort(reverse=True)

    def truncate(self, tokens: Sequence[int]) -> None:
        """Forgets what each sequence holds past its first so many tokens; its blocks stay lent to
        it. Raises ValueError, and changes nothing, where a sequence has fewer tokens than that.
        """
        for i, (count, sequence) in enumerate(zip(tokens, self._sequences, strict=True)):
            if not 0 <= count <= sequence.length:
                raise ValueError(
                    f"tokens[{i}]: got {count}, want 0 to the sequence's {sequence.length}"
                )
        for count, sequence in zip(tokens, self._sequences, strict=True):
            sequence.length = count

    def reserve(self, tokens: Sequence[int]) -> None:
        """Lends the blocks for so many tokens of each sequence now, those that it holds included:
        the block table then stays as it is until they are there.

        Raises ValueError, and changes nothing, when the pool or a sequence's table is full.
        """
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

    def append(self, count: int | Sequence[int]) -> Append:
        """Reserves room for `count` more tokens of each sequence; advance() then keeps them. A list
        has a number for each sequence; every token is then a row of its own, with one query.

        Raises ValueError, and changes nothing, when the pool or a sequence's table is full.
        """
        counts = [count] * len(self) if isinstance(count, int) else list(count)
        totals = [s.length + n for s, n in zip(self._sequences, counts, strict=True)]
        self.reserve(totals)
        table = self.block_table[:, : -(-max(totals, default=0) // self.block_size)]
        rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
        pieces = [torch.arange(t - n, t) for t, n in zip(totals, counts, strict=True)]
        positions = torch.cat(pieces) if pieces else rows
        block = table[rows, positions // self.block_size].long()
        slots = block * self.block_size + positions % self.block_size
        uniform = isinstance(count, int)
        return Append(
            upload(positions, self.k.device),
            upload(slots, self.k.device),
            upload(table if uniform else table[rows], self.k.device),
            upload(torch.tensor(totals).int() if uniform else (positions + 1).int(), self.k.device),
            self._run(table, totals) if uniform else None,
        )

    def _run(self, table: Tensor, totals: list[int]) -> slice | None:
        """A single sequence's tokens as a slice of the pool's slots, if its blocks follow each
        other. Attention over it needs no block table."""
        if not self.finds_runs or len(totals) != 1 or table.shape[1] == 0:
            return None
        first = int(table[0, 0])
        if table[0].tolist() != list(range(first, first + table.shape[1])):
            return None
        return slice(first * self.block_size, first * self.block_size + totals[0])

    def advance(self, count: int | Sequence[int]) -> None:
        """The tokens of append() have been written, in every layer."""
        counts = [count] * len(self) if isinstance(count, int) else count
        for sequence, n in zip(self._sequences, counts, strict=True):
            sequence.length += n
