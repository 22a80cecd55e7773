"""Tests of generation: transformers' tokens, ragged batches, sampling at its limits, and text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama_fast import Llama, TextStreamer
from llama_fast.checkpoint.weights import Linear, packed
from llama_fast.generation.generate import PREFILL_CHUNK
from llama_fast.generation.sampling import sample

from ..support.checkpoints import hf_model, save
from ..support.generation import CONFIG, prompts

pytestmark = pytest.mark.usefixtures("one_thread")

NEG = -math.inf


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama.from_config(CONFIG, quantize="fp8")


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0, "seed": 7}])
def test_f26_a_ragged_batch_equals_singles(model: Llama, options: dict[str, Any]) -> None:
    batch = prompts(1, 40, 3, 200, 17)
    together = model.generate(batch, 24, **options)
    assert together == [model.generate([prompt], 24, **options)[0] for prompt in batch]
    reordered = model.generate(batch[::-1], 24, **options)
    assert reordered == together[::-1]


def test_prompts_longer_than_a_chunk_equal_transformers(tmp_path: Path) -> None:
    hf = hf_model(eos_token_id=None)
    model = Llama.from_pretrained(save(hf, tmp_path), torch.float32)
    for prompt in prompts(
        PREFILL_CHUNK - 1, PREFILL_CHUNK, PREFILL_CHUNK + 1, 2 * PREFILL_CHUNK + 5
    ):
        expected = hf.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)
        assert model.generate([prompt], 4, temperature=0) == expected[:, len(prompt) :].tolist()


def test_prefill_never_computes_logits_for_the_prompt(model: Llama) -> None:
    rows = []
    spy = Llama(model.config, model.weights)
    spy.logits = lambda hidden: (rows.append(hidden[..., 0].numel()), model.logits(hidden))[1]
    spy.generate(prompts(1300), 1, stop_ids=())
    assert rows == [1]


def test_seeds(model: Llama) -> None:
    one, other = prompts(9, 9)
    first, repeated, different = model.generate([one, one, other], 30, 1.0, seed=1, stop_ids=())
    assert first != repeated and first != different
    assert [first, repeated] == model.generate([one, one], 30, 1.0, seed=1, stop_ids=())
    assert first != model.generate([one], 30, 1.0, seed=2, stop_ids=())[0]
    torch.manual_seed(3)
    unseeded = model.generate([one], 30, 1.0, stop_ids=())
    assert unseeded != model.generate([one], 30, 1.0, stop_ids=())
    torch.manual_seed(3)
    assert unseeded == model.generate([one], 30, 1.0, stop_ids=())


@pytest.mark.parametrize("which", [0, 1, 2])
def test_f49_each_stop_id_stops(model: Llama, which: int) -> None:
    """Return the stop id as the last token. Sequences stop independently."""
    batch = prompts(8, 30)
    free = model.generate(batch, 40, 1.0, seed=5, stop_ids=())
    assert [len(ids) for ids in free] == [40, 40]
    unused = [i for i in range(320) if i not in free[0] and i not in free[1]]
    stops = unused[:3]
    stops[which] = free[0][11]
    expected = []
    for ids in free:
        end = ids.index(stops[which]) + 1 if stops[which] in ids else 40
        expected.append(ids[:end])
    assert model.generate(batch, 40, 1.0, seed=5, stop_ids=stops) == expected
    eos = Llama(dataclasses.replace(CONFIG, eos_token_id=tuple(stops)), model.weights)
    assert eos.generate(batch, 40, 1.0, seed=5) == expected


def test_on_token_sees_every_token_in_order(model: Llama) -> None:
    seen: list[list[int]] = [[], []]
    batch = prompts(5, 12)
    result = model.generate(batch, 10, seed=1, on_token=lambda i, token: seen[i].append(token))
    assert seen == result


def test_nothing_to_do(model: Llama) -> None:
    assert model.generate([], 5) == []
    assert model.generate(prompts(3, 4), 0) == [[], []]


def test_fills_the_last_position(model: Llama) -> None:
    assert len(model.generate(prompts(4090), 6, stop_ids=())[0]) == 6


@pytest.mark.parametrize("bad", [-1, 320, 2**63 - 1, 2**64])
def test_f47_bad_token_id_is_refused(model: Llama, bad: int) -> None:
    with pytest.raises(ValueError, match=f"prompt 1: got id {bad}, want 0 to 319"):
        model.generate([[1, 2], [1, bad, 2]], 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": [[1], []]}, ValueError, "prompt 1: is empty"),
        ({"prompts": [[1] * 4096]}, ValueError, "exceed the model's 4096 positions"),
        ({"prompts": ["text"]}, TypeError, "prompt 0: got str"),
        ({"prompts": [[1.5]]}, TypeError, "prompt 0: got 1.5"),
        ({"prompts": [[True]]}, TypeError, "prompt 0: got True"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens: got -1"),
        ({"max_new_tokens": 10**5000}, ValueError, "max_new_tokens=<int of 16610 bits>"),
        ({"temperature": 10**5000}, ValueError, "temperature: got <int of 16610 bits>"),
        ({"prompts": None}, TypeError, "prompts: got NoneType"),
        ({"temperature": -0.1}, ValueError, "temperature: got -0.1"),
        ({"temperature": math.nan}, ValueError, "temperature: got nan"),
        ({"top_p": 1.1}, ValueError, "top_p: got 1.1"),
        ({"top_p": math.nan}, ValueError, "top_p: got nan"),
        ({"top_k": -1}, ValueError, "top_k: got -1"),
        ({"top_k": 2.0}, ValueError, "top_k: got 2.0"),
        ({"seed": -1}, ValueError, "seed: got -1"),
        ({"stop_ids": 2}, TypeError, "stop_ids: got int"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(model: Llama, arguments: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        model.generate(**{"prompts": [[1]], "max_new_tokens": 2} | arguments)


# ---- sampling ----


def draws(logits: Tensor, n: int = 200, **options: Any) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    return {sample(logits, **{"temperature": 1.0} | options, generator=generator) for _ in range(n)}


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 0.6, 1e300])
def test_f44_invalid_logits_are_an_error(temperature: float) -> None:
    for row in ([math.nan] * 9, [0.0] * 8 + [math.nan], [NEG] * 9, [0.0, math.inf]):
        with pytest.raises(ValueError, match="want a finite number"):
            sample(torch.tensor(row), temperature)
    assert draws(torch.tensor([NEG, NEG, 3.0, NEG]), temperature=temperature, top_p=1.0) == {2}


def test_f44_nan_in_the_model_names_the_prompt(model: Llama) -> None:
    broken = Llama(CONFIG, dataclasses.replace(model.weights, norm=model.weights.norm * math.nan))
    with pytest.raises(ValueError, match="prompt 0, new token 0: logits"):
        broken.generate([[1, 2]], 3)


@pytest.mark.parametrize("top_k", [0, 3, 100])
def test_f45_top_p_at_its_ends(top_k: int) -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, NEG])
    assert draws(logits, top_p=0.0, top_k=top_k) == {1}
    assert draws(logits, top_p=1 - 1e-7, top_k=top_k) == {0, 1, 2}
    assert draws(logits, top_p=1.0, top_k=top_k) == {0, 1, 2}


@pytest.mark.parametrize("top_p", [0.0, 0.5, 1 - 1e-7, 1.0])
def test_f45_nearly_flat_logits_keep_their_share(top_p: float) -> None:
    """Keep the first top_p of 20,000 tokens in falling order that are all about as likely."""
    drawn = draws(torch.linspace(0, -1e-3, 20_000), 100, top_p=top_p)
    assert 0.8 * top_p * 20_000 <= max(drawn) <= top_p * 20_001
    assert max(draws(torch.zeros(20_000), 100, top_p=1.0)) < 20_000


@pytest.mark.parametrize("vocab", [8193, 128256])
@pytest.mark.parametrize("top_p", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_f46_the_last_token_wins_where_it_should(
    vocab: int, top_p: float, temperature: float
) -> None:
    """Choose the largest of negative logits, also in the tail. Zeros of a tail tile would win."""
    logits = torch.full((vocab,), -40.0)
    for best in (vocab - 1, 0, 4096):
        row = logits.clone()
        row[best] = -1.0
        assert sample(row, temperature, top_p) == best


@pytest.mark.parametrize("vocab", [8193, 128256])
def test_f46_the_head_has_no_tail(vocab: int) -> None:
    """Compute negative logits only: a tile that reaches past the vocabulary shows as zeros."""
    config = dataclasses.replace(CONFIG, vocab_size=vocab, num_hidden_layers=1)
    model = Llama.from_config(config, dtype=torch.float32)
    weight = -torch.rand(vocab, 128)
    head = Linear(packed(weight))
    logits = Llama(config, dataclasses.replace(model.weights, head=head)).logits(torch.ones(3, 128))
    assert logits.shape == (3, vocab) and logits.max() < 0
    assert logits.argmax(-1).tolist() == [int(weight.sum(-1).argmax())] * 3


def test_top_p_keeps_its_share() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for top_p, kept in ((0.49, {0}), (0.55, {0, 1}), (0.85, {0, 1, 2}), (0.96, {0, 1, 2, 3})):
        assert draws(logits, 500, top_p=top_p) == kept
    assert draws(logits, 500, top_p=1.0, top_k=2) == {0, 1}
    assert draws(logits, 500, top_p=0.6, top_k=2) == {0}  # 0.625 and 0.375 are left


def test_draws_in_proportion() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[sample(p.log(), 1.0, 1.0, 0, generator=generator)] += 1
    chi2 = ((counts - 4000 * p) ** 2 / (4000 * p)).sum()
    assert chi2 < 16.3  # 0.1 % of correct samplers exceed it (3 degrees of freedom)


@given(
    st.lists(st.floats(-50, 50) | st.just(NEG), min_size=1, max_size=40),
    st.floats(0.01, 10),
    st.floats(0, 1),
    st.integers(0, 50),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_samples_only_what_is_kept(
    row: list[float], temperature: float, top_p: float, top_k: int, seed: int
) -> None:
    """Compare with top-k, then top-p, written out over the sorted list."""
    if max(row) == NEG:
        return
    logits = torch.tensor(row)
    weights = ((logits - logits.max()).double() / temperature).exp().tolist()
    order = sorted(range(len(row)), key=lambda i: -weights[i])[: top_k or None]
    total, before, allowed = sum(weights[i] for i in order), 0.0, set()
    for i in order:
        if before <= top_p * total * (1 + 1e-12) and weights[i] > 0:
            allowed |= {j for j in range(len(row)) if weights[j] == weights[i]}  # ties
        before += weights[i]
    got = sample(logits, temperature, top_p, top_k, generator=torch.Generator().manual_seed(seed))
    assert got in allowed


# ---- arguments ----


def test_numpy_ids_are_ids() -> None:
    model = Llama.from_config(CONFIG, dtype="float32")  # a name is a dtype
    (prompt,) = prompts(6)
    want = model.generate([prompt], 5, 0, stop_ids=[7], seed=3)
    array = np.array(prompt)
    for batch in ([array], array[None], [list(array)], [tuple(array.astype(np.int32))]):
        got = model.generate(batch, np.int64(5), 0, stop_ids=np.array([7]), seed=np.int64(3))
        assert got == want and type(got[0][0]) is int
    assert torch.equal(model.logprobs([array])[0], model.logprobs([prompt])[0])
    with pytest.raises(TypeError, match="prompt 0: got .*\\.0, want a list of token ids"):
        model.generate([array.astype(float)], 5)


@pytest.mark.parametrize(
    ("option", "value"),
    [("min_p", 1.5), ("min_p", "x"), ("repetition_penalty", 0), ("repetition_penalty", math.inf)],
)
def test_settings_out_of_range(option: str, value: Any) -> None:
    model = Llama.from_config(CONFIG)
    with pytest.raises(ValueError, match=f"{option}: got "):
        model.generate([[1]], 1, **{option: value})


# ---- text ----


class ByteTokenizer:
    """Make a token of each byte, as byte-level BPE does for characters that it never merged."""

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def stream(data: bytes) -> list[str]:
    pieces: list[str] = []
    streamer = TextStreamer(ByteTokenizer(), pieces.append)
    for token in data:
        streamer.put(token)
    streamer.end()
    return pieces


@pytest.mark.parametrize(
    "text",
    ["a 👩‍👩‍👧‍👦 family 🇹🇭", "สวัสดีชาวโลก", "नमस्ते दुनिया", "plain", "", "é\u0301 \ufffd."],
    ids=["emoji", "thai", "hindi", "ascii", "empty", "marks"],
)
def test_f53_streamed_text_never_breaks_a_character(text: str) -> None:
    pieces = stream(text.encode())
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    if "\ufffd" not in text:
        assert len(pieces) == len(text)  # each character as soon as it is complete


def test_f53_bytes_that_are_no_character_come_out_at_the_end() -> None:
    assert "".join(stream(b"ok \xff\xfe then \xf0\x9f")) == "ok \ufffd\ufffd then \ufffd"


def test_streamed_words_keep_the_spaces_between_them() -> None:
    """Decode as sentencepiece does, without the space before the first token of a text."""

    class Words:
        def decode(self, ids: list[int]) -> str:
            return " ".join(map(str, ids))

    pieces: list[str] = []
    streamer = TextStreamer(Words(), pieces.append)
    for token in (7, 42, 7, 1):
        streamer.put(token)
    streamer.end()
    assert pieces == ["7", " 42", " 7", " 1"]


@given(st.text(max_size=30))
@settings(max_examples=50, deadline=None)
def test_streamed_text_is_the_text(text: str) -> None:
    assert "".join(stream(text.encode())) == text
