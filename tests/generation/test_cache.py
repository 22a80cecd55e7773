"""Tests of KVCache's blocks: reserved, refused, and read as one run where they are consecutive."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from llama_fast import KVCache, Llama
from llama_fast.ops.checks import shown

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


HUGE = 2**63
ARGUMENTS: list[tuple[str, dict[str, Any]]] = [
    *(("max_tokens", {"max_tokens": v}) for v in (1.5, True, None, 0, -1, HUGE, {3}, 1j)),
    *(("max_tokens[0]", {"max_tokens": v}) for v in ("12", [0], [HUGE], [1.0], ["1"], [[1]])),
    *(("batch_size", {"batch_size": v}) for v in (1.5, True, None, 0, -1, "1", HUGE)),
    ("batch_size", {"max_tokens": []}),
    *(("block_size", {"block_size": v}) for v in (1.5, True, None, 0, -1, "1", HUGE)),
    *(("num_blocks", {"num_blocks": v}) for v in (1.5, True, 0, -1, "1", HUGE, 10**5000)),
    *(("dtype", {"dtype": v}) for v in (torch.int8, torch.float64, torch.float8_e5m2, "fp8", None)),
    ("config", {"config": "llama"}),
    ("k_scale", {"dtype": torch.float8_e4m3fn, "k_scale": "1"}),
    ("v_scale", {"dtype": torch.float8_e4m3fn, "v_scale": 1e39}),
]


@pytest.mark.parametrize(("name", "wrong"), ARGUMENTS, ids=shown)
def test_wrong_arguments(name: str, wrong: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        KVCache(**{"config": CONFIG, "max_tokens": 4, **wrong})
    assert str(caught.value).startswith(f"{name}: got ") and "want" in str(caught.value)


CALLS: list[tuple[str, str, Any]] = [
    *(("append", "count", v) for v in (-1, 1.5, "1", True, None, HUGE, [1], [1, 1, 1], {1: 2})),
    *(("append", "count[1]", [1, v]) for v in (-1, 1.5, "1", True, None, HUGE)),
    *(("advance", "count", v) for v in (-1, 1.5, None, 17, [1], [1, 17])),
    *(("reserve", "tokens", v) for v in (3, None, [1])),
    *(("reserve", "tokens[0]", [v, 1]) for v in (-1, 1.5, HUGE)),
    *(("truncate", "tokens", v) for v in (3, None, [1])),
    *(("truncate", "tokens[1]", [0, v]) for v in (-1, 1.5, 9, HUGE)),
    *(("release", "index", v) for v in (-1, 2, 1.5, "0", None)),
    *(("select", "indices[0]", [v]) for v in (-1, 2, 1.5, "0", None)),
    ("select", "indices", 0),
]


@pytest.mark.parametrize(("method", "name", "value"), CALLS, ids=shown)
def test_wrong_calls_change_nothing(method: str, name: str, value: Any) -> None:
    cache = KVCache(CONFIG, 64, 2, block_size=16)
    cache.append(3)
    cache.advance(3)
    before = cache.seqlens, cache.free_blocks, cache.block_table.tolist()
    with pytest.raises((TypeError, ValueError)) as caught:
        getattr(cache, method)(value)
    assert str(caught.value).startswith(f"{name}: got ") and "want" in str(caught.value)
    assert before == (cache.seqlens, cache.free_blocks, cache.block_table.tolist())


def test_integers_of_numpy() -> None:
    cache = KVCache(CONFIG, np.array([20, 30]), block_size=np.int64(16), num_blocks=np.int32(5))
    cache.append(np.array([1, 2]))
    cache.advance(np.array([1, 2]))
    assert cache.seqlens == [1, 2] and cache.free_blocks == 3
    assert len(KVCache(CONFIG, np.int64(20), np.int64(3))) == 3
