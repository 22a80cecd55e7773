"""Call KVCache's methods and Llama.generate with valid and broken arguments.

A refusal names the argument and changes nothing. Lengths follow the calls, no block has two owners,
and generate gives each prompt at most the tokens asked for, those it gives the prompt alone."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from llama_fast import KVCache, Llama

from ..support.generation import CONFIG
from .drive import REFUSALS, drive

FP8 = torch.float8_e4m3fn
MODEL = functools.cache(lambda: Llama.from_config(CONFIG, dtype=torch.float32))


@dataclasses.dataclass(frozen=True)
class Cache:
    """A cache's arguments, and calls of its methods."""

    options: dict[str, Any]
    calls: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Generate:
    prompts: Any
    options: dict[str, Any]


def check_refusal(error: BaseException, *names: str) -> None:
    text = str(error)
    named = text.startswith(("KV cache", *(f"{n}{mark}" for n in names for mark in ":[ ")))
    if not named or len(text) > 500:
        raise AssertionError("a refusal without the argument's name") from error


def state(cache: KVCache) -> tuple[Any, ...]:
    rows = [(s.length, s.blocks) for s in cache._sequences]
    return rows, cache.free_blocks, cache.block_table.tolist()


def check_cache(case: Cache) -> int:
    try:
        cache = KVCache(**{"config": CONFIG, "block_size": 4, **case.options})
    except REFUSALS as error:
        check_refusal(error, "config", "batch_size", *case.options)
        return 1
    blocks = cache.free_blocks
    for name, value in case.calls:
        before = state(cache)
        try:
            getattr(cache, name)(*(() if name == "clear" else (value,)))
        except REFUSALS as error:
            check_refusal(error, "count", "tokens", "index", "indices")
            assert state(cache) == before, f"{name} was refused, and changed the cache"
        owned = [cache._table[s.row, i].item() for s in cache._sequences for i in range(s.blocks)]
        assert len({*owned, *cache._free}) == len(owned) + cache.free_blocks == blocks
        assert all(0 <= s.length <= s.blocks * cache.block_size for s in cache._sequences)
    return 1 + len(case.calls)


def check_generate(case: Generate) -> int:
    options = {"max_new_tokens": 3, "temperature": 0, "seed": 0, **case.options}
    try:
        new = MODEL().generate(case.prompts, **options)
    except REFUSALS as error:
        check_refusal(error, "prompts", "prompt", "logits", *options)
        return 1
    assert len(new) == len(case.prompts)
    assert all(len(ids) <= options["max_new_tokens"] for ids in new)
    assert all(0 <= i < CONFIG.vocab_size for ids in new for i in ids)
    repeats = options["seed"] is not None and options.get("kv_cache") is None
    if repeats and options.get("speculate") is None and new:
        assert MODEL().generate(case.prompts[:1], **options)[0] == new[0]
        return 2
    return 1


def check(case: Cache | Generate) -> int:
    return check_cache(case) if isinstance(case, Cache) else check_generate(case)


HUGE = 10**400
STRANGE = st.sampled_from(
    (None, True, -1, 1.5, 2**31, 2**63, HUGE, math.nan, math.inf, "12", b"1", [], {},
     [1.5], ["1"], [2**63], np.int64(2), np.array([1, 2]), torch.tensor(1), torch.int8, 1j)
)  # fmt: skip
counts = st.one_of(st.integers(0, 9), st.lists(st.integers(0, 9), min_size=1, max_size=3), STRANGE)
indices = st.one_of(st.integers(0, 2), st.lists(st.integers(0, 2), max_size=3), STRANGE)
tokens = st.one_of(st.lists(st.integers(0, 30), min_size=1, max_size=3), STRANGE)
METHODS = {
    "append": counts,
    "advance": counts,
    "reserve": tokens,
    "truncate": tokens,
    "select": indices,
    "release": indices,
    "clear": st.none(),
}
CALLS = st.one_of(*(st.tuples(st.just(name), value) for name, value in METHODS.items()))
CACHES = st.builds(
    Cache,
    st.fixed_dictionaries(
        {"max_tokens": st.one_of(counts, st.integers(1, 40))},
        optional={
            "batch_size": st.one_of(st.integers(1, 3), STRANGE),
            "block_size": st.one_of(st.integers(1, 20), STRANGE),
            "num_blocks": st.one_of(st.integers(1, 9), STRANGE),
            "dtype": st.one_of(st.sampled_from((torch.float32, FP8)), STRANGE),
            "k_scale": st.one_of(st.floats(), STRANGE),
        },
    ),
    st.lists(CALLS, max_size=8).map(tuple),
)
ids = st.integers(0, CONFIG.vocab_size - 1)
GENERATES = st.builds(
    Generate,
    st.lists(st.one_of(st.lists(st.one_of(ids, ids, STRANGE), max_size=5), STRANGE), max_size=3),
    st.fixed_dictionaries(
        {},
        optional={
            "max_new_tokens": st.one_of(st.integers(0, 4), STRANGE),
            "temperature": st.one_of(st.floats(), STRANGE),
            "top_p": st.one_of(st.floats(0, 1), STRANGE),
            "top_k": st.one_of(st.integers(0, 400), STRANGE),
            "min_p": st.one_of(st.floats(0, 1), STRANGE),
            "repetition_penalty": st.one_of(st.floats(0.5, 2), STRANGE),
            "seed": st.one_of(st.integers(-(2**65), 2**65), STRANGE),
            "stop_ids": st.one_of(st.lists(ids), STRANGE),
            "graphs": st.sampled_from((False, None, True, 1)),
            "speculate": st.one_of(st.none(), st.just("lookup"), STRANGE),
            "draft_tokens": st.one_of(st.integers(1, 17), STRANGE),
            "kv_cache": st.one_of(st.none(), st.just("fp8"), STRANGE),
        },
    ),
)
FAILED: tuple[Cache | Generate, ...] = (
    Generate(None, {}),
    Generate([], {"kv_cache": np.array([1, 2])}),
    Generate([[1]], {"temperature": HUGE}),
    Generate([[1]], {"repetition_penalty": HUGE}),
    Generate([[1]], {"max_new_tokens": 10**4000}),
    Generate([[10**4000]], {}),
)


def run(seconds: float, seed: int, count: int | None = None) -> int:
    """Check calls for that many seconds, or `count` cases; return the number of calls."""
    torch.set_num_threads(1)
    return drive(check, st.one_of(CACHES, CACHES, GENERATES), FAILED, seconds, seed, count)
