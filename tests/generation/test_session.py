"""Tests of generate's cache and of Session: the tokens are those of the whole text, of which only
what is new is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llama_fast import KVCache, Llama
from llama_fast.generation import session
from llama_fast.generation.session import Session

from ..support.generation import CONFIG, OPTIONS, prompts

pytestmark = pytest.mark.usefixtures("one_thread")


# In fp32 a token's keys and values, read in a prompt or one by one, differ by 1e-7 of the largest:
# random logits have no ties so close.
@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama.from_config(CONFIG, dtype=torch.float32)


@pytest.fixture
def read(model: Llama, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which each pass of several tokens adds their number."""
    counts: list[int] = []
    hidden = Llama.hidden

    def spy(self: Llama, tokens: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        if options.get("last"):  # a chunk of a prompt
            counts.append(tokens.shape[1])
        return hidden(self, tokens, *rest, **options)

    monkeypatch.setattr(Llama, "hidden", spy)
    return counts


def turns(model: Llama, talk: Session, count: int = 4, **options: Any) -> list[list[int]]:
    """Return the answers of a conversation whose questions have 30 tokens."""
    text, answers = list[int](), []
    for question in prompts(*[30] * count):
        text += question
        answers.append(talk.generate(text, 12, **options))
        assert answers[-1] == model.generate([text], 12, **options)[0]
        text += answers[-1]
    return answers


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("speculate", [None, "lookup"], ids=str)
def test_turns_equal_the_whole_text(
    model: Llama, options: dict[str, Any], speculate: str | None
) -> None:
    answers = turns(model, Session(model), **options, speculate=speculate, stop_ids=())
    assert [len(ids) for ids in answers] == [12] * 4


def test_only_what_is_new_is_read(model: Llama, read: list[int]) -> None:
    """The last token of an answer has not been read when the answer ends."""
    talk, text = Session(model), list[int]()
    for question in prompts(600, 30, 1):
        text += question
        text += talk.generate(text, 12, temperature=0, stop_ids=())
    assert read == [512, 88, 31, 2]
    assert talk.ids == text[:-1] and talk.kept == len(text) - 12 - 2


@pytest.mark.parametrize("same", [0, 1, 20, 39, 40, 55], ids=str)
def test_a_text_that_differs_from_the_cache(model: Llama, read: list[int], same: int) -> None:
    """Keep the tokens before the first that differs, but not all: the last gives the logits."""
    talk = Session(model)
    (first,) = prompts(40)
    held = first + talk.generate(first, 16, temperature=0, stop_ids=())
    del read[:]
    other = held[:same] + [3 if held[same] != 3 else 4, 5]
    got = talk.generate(other, 8, temperature=0)
    assert talk.kept == same and sum(read) == 2
    assert got == model.generate([other], 8, temperature=0)[0]
    assert talk.generate(other, 8, temperature=0) == got and talk.kept == len(other) - 1
    shorter = held[:20]
    assert (
        talk.generate(shorter, 8, temperature=0) == (model.generate([shorter], 8, temperature=0)[0])
    )


def test_the_cache_grows(model: Llama, monkeypatch: pytest.MonkeyPatch, read: list[int]) -> None:
    monkeypatch.setattr(session, "SHORTEST", 40)
    talk = Session(model)
    (first,) = prompts(100)
    text = first + talk.generate(first, 12, temperature=0, stop_ids=())
    for length, capacity in ((100, 224), (300, 524), (10, 534)):
        before = talk._cache.k
        text += prompts(length)[0]
        del read[:]
        new = talk.generate(text, 12, temperature=0, stop_ids=())
        assert sum(read) == length + 1
        assert new == model.generate([text], 12, temperature=0, stop_ids=())[0]
        assert talk._cache.k is not before
        assert talk._capacity >= capacity
        text += new
    assert CONFIG.max_position_embeddings >= talk._capacity


def test_a_cache_grows_with_every_sequence() -> None:
    cache = KVCache(CONFIG, 20, 2, block_size=16, dtype=torch.float8_e4m3fn)
    for row, count in ((1, 20), (0, 5)):
        cache.select([row]).append(count)
        cache.select([row]).advance(count)
    held = [cache.k.view(torch.uint8).clone(), cache.v.view(torch.uint8).clone()]
    before = cache.block_table
    cache.grow(16)
    assert cache.k.shape[1] == 4
    cache.grow(70)
    assert cache.k.shape[1] == cache.v.shape[1] == 4 + 2 * 3 and cache.free_blocks == 10 - 3
    assert cache.block_table[:, :2].tolist() == before.tolist() and cache.seqlens == [5, 20]
    used = before.tolist()[0][:1] + before.tolist()[1]
    for old, new in zip(held, (cache.k, cache.v), strict=True):
        assert torch.equal(new.view(torch.uint8)[:, used], old[:, used])
    cache.reserve([70, 70])
    assert sorted(cache.block_table.flatten().tolist()) == list(range(10))


@pytest.mark.parametrize("speculate", [None, "lookup"], ids=str)
@pytest.mark.parametrize("after", [0, 1, 7])
def test_an_interrupt_keeps_the_partial_answer(
    model: Llama, speculate: str | None, after: int
) -> None:
    talk = Session(model)
    text = prompts(20)[0] * 3
    got: list[int] = []

    def stop(_: int, token: int) -> None:
        got.append(token)
        if len(got) > after:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"temperature": 0, "stop_ids": (), "speculate": speculate}
    with pytest.raises(KeyboardInterrupt):
        talk.generate(text, 40, stop, **options)
    whole = model.generate([text], 40, **options)[0]
    assert got == whole[: after + 1]
    assert talk.ids == (text + got)[: len(talk.ids)] and len(talk.ids) >= len(text) + after
    assert talk.generate(text + got, 39 - after, **options) == whole[after + 1 :]


def test_an_interrupted_prompt(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    talk, (text,) = Session(model), prompts(1100)
    hidden, calls = Llama.hidden, []

    def stop(self: Llama, *args: Any, **options: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return hidden(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Llama, "hidden", stop)
        with pytest.raises(KeyboardInterrupt):
            talk.generate(text, 8, temperature=0)
    assert talk.ids == text[:512]
    assert talk.generate(text, 8, temperature=0) == model.generate([text], 8, temperature=0)[0]
    assert talk.kept == 512


def test_an_fp8_cache_is_measured_again_after_clear(model: Llama) -> None:
    first, second = prompts(30, 30)
    talk = Session(model, kv_cache="fp8")
    talk.generate(first, 12, temperature=0)
    talk.clear()
    got = talk.generate(second, 12, temperature=0)
    assert talk.kept == 0
    assert got == model.generate([second], 12, temperature=0, kv_cache="fp8")[0]


def test_the_loop_of_a_gpu_is_not_taken(
    model: Llama, ahead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk, (text,) = Session(model), prompts(30)
    talk.generate(text, 4, temperature=0)
    assert model.decoders == [] and len(talk.ids) == 33


def test_several_prompts_over_one_cache(model: Llama) -> None:
    texts = prompts(20, 33)
    cache = KVCache(CONFIG, 64, 2, dtype=torch.float32)
    options: dict[str, Any] = {"temperature": 0, "stop_ids": ()}
    first = model.generate(texts, 8, cache=cache, **options)
    assert first == model.generate(texts, 8, **options)
    assert cache.seqlens == [27, 40]
    longer = [text + new + [7] for text, new in zip(texts, first, strict=True)]
    assert model.generate(longer, 8, cache=cache, **options) == model.generate(longer, 8, **options)


def test_caches_that_do_not_fit(model: Llama) -> None:
    (text,) = prompts(20)
    cache = KVCache(CONFIG, 24, dtype=torch.float32)
    for options, message in (
        ({"cache": [1]}, "cache: got list, want a KVCache or None"),
        ({"cache": KVCache(CONFIG, 24, 2, dtype=torch.float32)}, "got 2 sequences, want one a"),
        ({"cache": cache, "kv_cache": "fp8"}, "kv_cache: got 'fp8', want None with a cache"),
        ({"cache": cache, "max_new_tokens": 200}, "room for 128 tokens, not for 220"),
        ({"cache": KVCache(CONFIG, 24)}, "cache: got torch.bfloat16 on cpu"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            model.generate([text], **{"max_new_tokens": 4, **options})
    model.generate([text], 4, cache=cache)
    with pytest.raises(ValueError, match="cache: holds 23 tokens of prompt 0, want fewer than its"):
        model.generate([text], 4, cache=cache)


def test_graphs_need_the_loop_of_a_gpu(model: Llama, ahead: None) -> None:
    cache = KVCache(CONFIG, 24, dtype=torch.float32)
    with pytest.raises(ValueError, match="graphs: got True, but cache launches each kernel"):
        model.generate(prompts(5), 4, graphs=True, cache=cache)
