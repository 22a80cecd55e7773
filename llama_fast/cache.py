"""The paged KV cache: one pool of blocks per layer, lent to sequences a block at a time, so that
ragged sequences need neither padding nor copying as they grow."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _cpu
from .config import LlamaConfig

BLOCK_SIZE = 128  # tokens: one query over 8k keys reads 23.5 GB/s, with blocks of 64 20.1


class Append(NamedTuple):
    """Where the next tokens of each sequence go, and what they may attend to."""

    positions: Tensor  # [B * S] int64
    slots: Tensor  # [B * S] int64
    block_table: Tensor  # [B, n] int32
    cache_seqlens: Tensor  # [B] int32, the new tokens included


class _Sequence:
    __slots__ = ("row", "length", "blocks")

    def __init__(self, row: int) -> None:
        self.row, self.length, self.blocks = row, 0, 0


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
    ) -> None:
        """max_tokens: of every sequence, or a list with one number for each."""
        lengths = [max_tokens] * batch_size if isinstance(max_tokens, int) else list(max_tokens)
        for name, value in (("batch_size", len(lengths)), ("block_size", block_size)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, want at least 1")
        if min(lengths) < 1:
            raise ValueError(f"max_tokens: got {min(lengths)}, want at least 1")
        need = [-(-length // block_size) for length in lengths]
        heads, dim = config.num_key_value_heads, config.head_dim
        shape = (2, config.num_hidden_layers, sum(need), block_size, heads, dim)
        pool = torch.empty(shape, dtype=dtype, device=device)
        if pool.is_cpu:
            _cpu.advise_huge_pages(pool.data_ptr(), pool.nbytes)
        self.k, self.v = pool
        self.block_size = block_size
        self._free = list(range(sum(need)))[::-1]
        self._table = torch.zeros(len(lengths), max(need), dtype=torch.int32, device=device)
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

    def append(self, count: int) -> Append:
        """Reserves room for `count` more tokens of each sequence; advance() then keeps them.

        Raises ValueError, and changes nothing, when the pool or a sequence's table is full.
        """
        needed = [-(-(s.length + count) // self.block_size) for s in self._sequences]
        if max(needed, default=0) > self._table.shape[1]:
            room = self._table.shape[1] * self.block_size
            raise ValueError(
                f"KV cache: a sequence has room for {room} tokens, not for {count} more"
            )
        missing = sum(max(n - s.blocks, 0) for n, s in zip(needed, self._sequences, strict=True))
        if missing > len(self._free):
            raise ValueError(
                f"KV cache is full: {count} more tokens a sequence need {missing} blocks of "
                f"{self.block_size}, {len(self._free)} are free"
            )
        for n, sequence in zip(needed, self._sequences, strict=True):
            while sequence.blocks < n:
                self._table[sequence.row, sequence.blocks] = self._free.pop()
                sequence.blocks += 1
        device = self._table.device
        rows = torch.tensor([s.row for s in self._sequences], dtype=torch.int64, device=device)
        table = self._table[rows, : max(needed, default=0)]
        seqlens = torch.tensor(self.seqlens, dtype=torch.int64, device=device)
        positions = seqlens[:, None] + torch.arange(count, device=device)
        block = table.gather(1, positions // self.block_size).long()
        slots = block * self.block_size + positions % self.block_size
        return Append(positions.flatten(), slots.flatten(), table, (seqlens + count).int())

    def advance(self, count: int) -> None:
        """The tokens of append() have been written, in every layer."""
        for sequence in self._sequences:
            sequence.length += count
