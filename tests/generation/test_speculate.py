"""Tests of speculative decoding: the tokens of plain decoding for any proposals, and its pauses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from llama_fast import KVCache, Llama
from llama_fast.generation import decode, sampling, speculate
from llama_fast.generation.speculate import Draft, Lookup, Pace, Proposer, extend

from ..support.generation import CONFIG, OPTIONS, prompts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama.from_config(CONFIG, quantize="fp8")


@pytest.fixture(scope="module")
def draft() -> Llama:
    """Return a draft model: narrower, with other weights and attention heads."""
    config = dataclasses.replace(
        CONFIG, hidden_size=64, num_attention_heads=4, num_key_value_heads=1
    )
    return Llama.from_config(config, seed=1)


class Always(Pace):
    """Never pause: pauses depend on the machine's load."""

    def propose(self, active: Sequence[int], room: Sequence[int]) -> list[list[int]]:
        most = self._sequences[0].most
        wanted = {i: min(most, n) for i, n in zip(active, room, strict=True) if n}
        proposals = self._proposer(wanted) if self._proposer else {}
        return [proposals.get(i, []) for i in active]

    def passed(self, *_: Any) -> None: ...


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculate, "Pace", Always)


def repetitive(*lengths: int) -> list[list[int]]:
    return [[*(torch.randint(3, 320, (9,)).tolist() * 40)][:n] for n in lengths]


class Oracle:
    """Propose the tokens of plain decoding, or always others."""

    def __init__(self, expected: list[list[int]], texts: list[list[int]], right: bool) -> None:
        self.expected, self.texts, self.right = expected, texts, right
        self.starts = [len(text) for text in texts]

    def __call__(self, wanted: dict[int, int]) -> dict[int, list[int]]:
        out = {}
        for i, count in wanted.items():
            done = len(self.texts[i]) - self.starts[i]
            ids = self.expected[i][done : done + count]
            out[i] = ids if self.right else [(token + 1) % 320 for token in ids]
        return out


def proposes(monkeypatch: pytest.MonkeyPatch, expected: list[list[int]], right: bool) -> None:
    def proposer(_: Any, texts: list[list[int]], *rest: Any) -> Proposer:
        return Oracle(expected, texts, right)

    monkeypatch.setattr(speculate, "proposer", proposer)


def counted(model: Llama, *args: Any, **options: Any) -> tuple[list[list[int]], int, int, int]:
    """Return the tokens and the numbers of passes, proposed tokens and accepted tokens."""
    passes: list[tuple[int, int]] = []
    ids = model.generate(*args, **options, on_pass=lambda *counts: passes.append(counts))
    return ids, len(passes), sum(p for p, _ in passes), sum(a for _, a in passes)


# ---- the tokens ----


@pytest.mark.parametrize("kind", ["lookup", "draft", "itself"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tokens_of_plain_decoding(
    model: Llama, draft: Llama, options: dict[str, Any], kind: str
) -> None:
    """Decode ragged prompts, some repetitive, across blocks of the cache, with each kind of
    sampling. A model that drafts for itself is always right: it samples with the same numbers."""
    batch = [*repetitive(40, 126), *prompts(1, 17)]
    by = {"lookup": "lookup", "draft": draft, "itself": model}[kind]
    expected = model.generate(batch, 24, stop_ids=(), **options)
    for count in (1, 5, 16):
        ids, passes, proposed, accepted = counted(
            model, batch, 24, stop_ids=(), speculate=by, draft_tokens=count, **options
        )
        assert ids == expected
        assert proposed > 0 or kind == "lookup"
        if kind == "itself":
            assert accepted == proposed and passes == math.ceil(23 / (1 + count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_instruction_set(dtype: torch.dtype, isa: str, monkeypatch: Any) -> None:
    model = Llama.from_config(CONFIG, dtype=dtype)
    batch = prompts(30, 500)  # 512 keys: a second chunk in the attention kernel
    for options in (OPTIONS["greedy"], OPTIONS["all"]):
        expected = model.generate(batch, 24, stop_ids=(), **options)
        proposes(monkeypatch, expected, True)
        for count in (3, 16):
            assert expected == model.generate(
                batch, 24, stop_ids=(), speculate="lookup", draft_tokens=count, **options
            )
        monkeypatch.undo()


@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
@pytest.mark.parametrize("options", [OPTIONS["greedy"], OPTIONS["both"]], ids=["greedy", "sampled"])
def test_a_proposer_that_is_always(
    model: Llama, options: dict[str, Any], right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = prompts(5, 130)
    expected = model.generate(batch, 33, stop_ids=(), **options)
    proposes(monkeypatch, expected, right)
    ids, passes, proposed, accepted = counted(
        model, batch, 33, stop_ids=(), speculate="lookup", draft_tokens=7, **options
    )
    assert ids == expected
    assert passes == (4 if right else 32)  # 32 tokens after the first, 8 per pass
    assert accepted == (proposed if right else 0) and proposed == 2 * (28 if right else 25 * 7 + 21)


def test_logits_of_rows_are_those_of_single_steps(model: Llama, isa: str) -> None:
    batch = prompts(127, 40, 510)
    caches = [KVCache(CONFIG, 600, 3, dtype=model.dtype) for _ in range(2)]
    for cache in caches:
        for i, prompt in enumerate(batch):
            model.hidden(torch.tensor([prompt]), cache=cache.select([i]))
    runs = prompts(3, 1, 17)
    rows = extend(model, caches[0], runs).split([3, 1, 17])
    for i, run in enumerate(runs):
        one = caches[1].select([i])
        steps = torch.cat([model(torch.tensor([[token]]), cache=one)[0] for token in run])
        assert torch.equal(rows[i], steps)
    assert caches[0].seqlens == caches[1].seqlens == [130, 41, 527]


# ---- ends ----


@pytest.mark.parametrize("place", range(9, 18))
def test_a_stop_id_inside_an_accepted_run(
    model: Llama, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"temperature": 1.0, "top_p": 1.0, "seed": 11}
    batch = prompts(6, 50)
    free = model.generate(batch, 30, stop_ids=(), **options)
    stop = free[0][place]
    expected = model.generate(batch, 30, stop_ids=[stop], **options)
    proposes(monkeypatch, free, True)
    draws: list[int] = []
    real = sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda *args: (draws.append(1), real(*args))[1])
    assert expected == model.generate(batch, 30, stop_ids=[stop], speculate="lookup", **options)
    assert len(draws) == sum(map(len, expected))  # nothing after the stop id


@pytest.mark.parametrize("count", range(1, 10))
def test_max_new_tokens_cuts_a_run(
    model: Llama, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = prompts(4096 - count, 3)  # to the model's last position
    free = model.generate(batch, count, 0, stop_ids=())
    proposes(monkeypatch, [ids * 9 for ids in free], True)
    assert free == model.generate(batch, count, 0, stop_ids=(), speculate="lookup")


def test_one_random_number_a_token(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[int] = []
    real = sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda *args: (draws.append(1), real(*args))[1])
    batch = prompts(6, 50)
    options = {"temperature": 1.0, "seed": 11, "stop_ids": ()}
    expected = model.generate(batch, 20, **options)
    for right in (True, False):
        draws.clear()
        proposes(monkeypatch, expected, right)
        assert expected == model.generate(batch, 20, speculate="lookup", **options)
        assert len(draws) == 40


@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_cache_holds_what_plain_decoding_left(
    model: Llama, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare the cache after the last pass, which ends one sequence before the other's end."""
    made: list[KVCache] = []

    class Kept(KVCache):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

        def release(self, index: int) -> None:
            lengths.append(self.seqlens[index])
            for pool in (self.k, self.v):
                table = self.block_table[index]
                held.append(pool[:, table].flatten(1, 2)[:, : self.seqlens[index]].clone())

    monkeypatch.setattr(decode, "KVCache", Kept)
    batch, options = prompts(120, 9), {"temperature": 1.0, "seed": 1, "stop_ids": ()}
    lengths: list[int] = []
    held: list[torch.Tensor] = []
    expected = model.generate(batch, 18, **options)
    plain, plain_lengths = held[:], lengths[:]
    held.clear(), lengths.clear()
    proposes(monkeypatch, expected, right)
    assert model.generate(batch, 18, speculate="lookup", **options) == expected
    assert len(plain) == len(held) == 4 and plain_lengths == lengths == [137, 26]
    assert all(torch.equal(a, b) for a, b in zip(plain, held, strict=True))
    assert made[0].free_blocks == made[1].free_blocks


@pytest.mark.parametrize("options", [OPTIONS["greedy"], OPTIONS["all"]], ids=["greedy", "sampled"])
def test_on_token_follows_plain_decodings_order(
    model: Llama, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Make one sequence's proposals right and the other's wrong."""
    batch = prompts(5, 12, 3)
    orders: list[list[tuple[int, int]]] = [[], []]
    free = model.generate(batch, 25, stop_ids=(), **options)
    stops = [free[0][14]]
    expected = model.generate(
        batch, 25, stop_ids=stops, on_token=lambda *at: orders[0].append(at), **options
    )
    proposes(monkeypatch, [free[0], [0] * 25, free[2]], True)
    got = model.generate(
        batch,
        25,
        stop_ids=stops,
        speculate="lookup",
        on_token=lambda *at: orders[1].append(at),
        **options,
    )
    assert got == expected and orders[0] == orders[1]


def test_f44_nan_says_the_same_after_the_same_tokens(
    model: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sample a token whose embedding is NaN in the middle of an accepted run."""
    batch, options = prompts(5, 9), {"temperature": 1.0, "top_p": 1.0, "seed": 3, "stop_ids": ()}
    free = model.generate(batch, 20, **options)
    bad = next(
        t
        for at, t in enumerate(free[1])
        if at > 8 and t not in (*free[0], *free[1][:at], *batch[0], *batch[1])
    )
    embedding = model.weights.embedding.clone()
    embedding[bad] = math.nan
    broken = Llama(CONFIG, dataclasses.replace(model.weights, embedding=embedding))
    said: list[Any] = []
    for by in (None, "lookup"):
        seen: list[tuple[int, int]] = []
        with pytest.raises(ValueError, match="prompt 1, new token .*: logits") as error:
            broken.generate(
                batch, 20, speculate=by, on_token=lambda *at, to=seen: to.append(at), **options
            )
        said.append((str(error.value), seen))
        proposes(monkeypatch, free, True)
    assert said[0] == said[1] and len(said[0][1]) > 16


# ---- proposals ----


def test_lookup() -> None:
    texts = [
        [1, 2, 3, 4, 5, 9, 2, 3],
        [7, 8],
        [5, 6, 5, 6, 5, 6],
        [1, 2, 3, 9, 4, 2, 3, 8, 1, 2, 3],
    ]
    lookup = Lookup(texts)
    assert lookup({0: 3, 1: 4, 2: 5, 3: 2}) == {
        0: [4, 5, 9],
        1: [],
        2: [5, 6, 5, 6, 5],  # continues past the end of the text
        3: [9, 4],  # three tokens match here; two match later
    }
    texts[0] += [4, 7, 2, 3]
    assert lookup({0: 2}) == {0: [4, 7]}  # the last match


def test_a_draft_model_sees_the_whole_text(model: Llama) -> None:
    """Propose after refused proposals, and after a pause longer than a chunk."""
    texts = prompts(600, 4)
    samplers = [sampling.Sampler(sampling.Settings(0), torch.Generator()) for _ in texts]
    draft = Draft(model, texts, [1300, 1300], samplers)

    def continued() -> dict[int, list[int]]:
        return {i: model.generate([t], 3, 0, stop_ids=())[0] for i, t in enumerate(texts)}

    assert draft({0: 3, 1: 3}) == continued()
    for text in texts:
        text += [5, 6]
    assert draft({0: 3, 1: 3}) == continued()
    texts[1] += prompts(600)[0]
    assert draft({1: 3}) == {1: continued()[1]}
    assert draft({0: 1, 1: 3}) == {0: continued()[0][:1], 1: continued()[1]}


def test_a_draft_of_nan_proposes_nothing(model: Llama) -> None:
    broken = Llama(CONFIG, dataclasses.replace(model.weights, norm=model.weights.norm * math.nan))
    batch = prompts(5)
    ids, _, proposed, _ = counted(model, batch, 9, 0, stop_ids=(), speculate=broken)
    assert ids == model.generate(batch, 9, 0, stop_ids=()) and proposed == 0


def test_tokens_with_pauses(model: Llama, draft: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculate, "Pace", Pace)
    batch = [*repetitive(40), *prompts(9)]
    for by in ("lookup", draft):
        for options in OPTIONS.values():
            expected = model.generate(batch, 60, stop_ids=(), **options)
            assert expected == model.generate(batch, 60, stop_ids=(), speculate=by, **options)


# ---- arguments ----


@pytest.mark.parametrize("count", [0, 17, -1, 2.0, True, None])
def test_draft_tokens_out_of_range(model: Llama, count: Any) -> None:
    with pytest.raises(ValueError, match=r"draft_tokens: got .*, want 1 to 16"):
        model.generate([[1]], 2, speculate="lookup", draft_tokens=count)


@pytest.mark.parametrize("by", [1, True, ["lookup"], CONFIG], ids=str)
def test_speculate_of_a_wrong_type(model: Llama, by: Any) -> None:
    with pytest.raises(TypeError, match="speculate: got "):
        model.generate([[1]], 2, speculate=by)
    with pytest.raises(ValueError, match="speculate: got 'ngram', want 'lookup'"):
        model.generate([[1]], 2, speculate="ngram")


def test_a_draft_model_that_does_not_fit(model: Llama) -> None:
    def like(dtype: torch.dtype = torch.bfloat16, **other: Any) -> Llama:
        config = dataclasses.replace(CONFIG, num_hidden_layers=1, **other)
        return Llama.from_config(config, dtype=dtype)

    elsewhere = like()
    elsewhere.device = torch.device("cuda", 1)
    for draft, message in (
        (like(vocab_size=321), "vocab_size 321, want the model's, 320"),
        (like(torch.float16), "dtype torch.float16, want the model's, torch.bfloat16"),
        (elsewhere, "device cuda:1, want the model's, cpu"),
    ):
        with pytest.raises(ValueError, match=f"speculate: got a draft model of {message}"):
            model.generate([[1]], 2, speculate=draft)
    with pytest.raises(ValueError, match="speculate: the draft model has 16 positions, want 17"):
        model.generate([[1] * 15], 2, speculate=like(max_position_embeddings=16))


@pytest.mark.usefixtures("ahead")
def test_on_a_gpu_it_takes_the_plain_loop(model: Llama) -> None:
    batch = repetitive(30)
    expected = model.generate(batch, 20, 0, stop_ids=(), graphs=False)
    assert model.generate(batch, 20, 0, stop_ids=(), speculate="lookup") == expected
    with pytest.raises(ValueError, match="graphs: got True, but speculate"):
        model.generate([[1]], 2, graphs=True, speculate="lookup")
