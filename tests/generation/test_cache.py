"""Tests of KVCache's blocks: reserved, refused, and read as one run where they are consecutive."""

from __future__ import annotations

import math

import pytest
import torch

from llama_fast import KVCache, Llama

from ..support.generation import CONFIG

pytestmark = pytest.mark.usefixtures("one_thread")


def test_reserved_blocks_follow_each_other_after_any_history() -> None:
    cache = KVCache(CONFIG, 64, 3, block_size=16, num_blocks=9)
    cache.select([1]).append(40), cache.select([0]).append(20), cache.select([2]).append(10)
    cache.release(1)
    cache.select([0]).append(50)
    cache.clear()
    cache.select([0, 2]).reserve([33, 64])
    first, second = cache.select([0, 2]).block_table.tolist()
    assert (first[:3], second) == ([0, 1, 2], [3, 4, 5, 6])
    assert cache.free_blocks == 2 and cache.seqlens == [0, 0, 0]


def test_f22_a_pool_smaller_than_all_sequences_need() -> None:
    cache = KVCache(CONFIG, 64, 3, block_size=16, num_blocks=5)
    with pytest.raises(ValueError, match="KV cache is full"):
        cache.reserve([32, 32, 32])
    with pytest.raises(ValueError, match="room for 64 tokens"):
        cache.select([0]).reserve([65])
    assert cache.free_blocks == 5
    cache.reserve([32, 32, 16])
    with pytest.raises(ValueError, match="num_blocks: got 0"):
        KVCache(CONFIG, 64, num_blocks=0)


def test_prefill_over_a_run_of_slots_equals_prefill_over_blocks() -> None:
    """Read consecutive blocks as one piece of memory by attention(), as a GPU does."""
    model = Llama.from_config(CONFIG, dtype=torch.float32)
    tokens = torch.randint(320, (1, 300))
    caches = [KVCache(CONFIG, 300, dtype=torch.float32, block_size=32) for _ in range(2)]
    caches[1].finds_runs = True
    runs = []
    for cache in caches:
        cache.k.fill_(math.nan), cache.v.fill_(math.nan)
        chunks = [model(chunk, cache=cache) for chunk in tokens.split([64, 1, 100, 135], dim=1)]
        runs.append(torch.cat(chunks, dim=1))
    assert float((runs[0] - runs[1]).abs().max()) <= 2e-5 * float(runs[0].abs().max())
    assert caches[1].append(0).run == slice(0, 300)


def test_blocks_that_are_not_consecutive_are_no_run() -> None:
    cache = KVCache(CONFIG, 64, 2, block_size=16)
    cache.finds_runs = True
    cache.select([0]).append(16), cache.select([1]).append(16)
    cache.select([0]).advance(16)
    assert cache.select([0]).append(16).run is None
    assert cache.select([1]).append(10).run == slice(16, 26)
    assert cache.append(1).run is None
