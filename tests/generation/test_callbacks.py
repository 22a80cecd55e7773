"""Tests of what generate calls while it runs, and of stop texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_fast import Llama, TextStreamer

from ..support.generation import CONFIG, prompts
from .test_generate import ByteTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama.from_config(CONFIG, dtype=torch.float32)


@pytest.fixture(params=["host", "device"])
def loop(request: pytest.FixtureRequest) -> str:
    """Run the loop for CPUs, or the one that runs ahead of a GPU."""
    if request.param == "device":
        request.getfixturevalue("ahead")
    return request.param


@pytest.mark.parametrize("speculate", [None, "lookup"])
def test_a_sequence_ends_where_on_token_says(
    model: Llama, loop: str, speculate: str | None
) -> None:
    batch = prompts(6, 50, 3)
    free = model.generate(batch, 20, 0, stop_ids=(), speculate=speculate)
    counts = [0, 0, 0]

    def on_token(i: int, _: int) -> Any:
        counts[i] += 1
        return counts[i] == (5, 20, 1)[i] or "go on"  # only True ends it

    got = model.generate(batch, 20, 0, stop_ids=(), speculate=speculate, on_token=on_token)
    assert got == [free[0][:5], free[1], free[2][:1]] and counts == [5, 20, 1]


@pytest.mark.parametrize("speculate", [None, "lookup"])
def test_on_logprob_gives_the_models_own_probabilities(
    model: Llama, loop: str, speculate: str | None
) -> None:
    """Compare with logprobs(), which computes the tokens together: other orders of sums."""
    batch = prompts(6, 50)
    got: list[list[float]] = [[], []]
    new = model.generate(
        batch,
        12,
        repetition_penalty=1.2,
        seed=1,
        stop_ids=(),
        speculate=speculate,
        on_logprob=lambda i, value: got[i].append(value),
    )
    want = model.logprobs([p + n for p, n in zip(batch, new, strict=True)])
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(torch.tensor(mine), theirs[-12:], atol=1e-4, rtol=0)


def test_on_prefill_counts_the_prompt(model: Llama, loop: str) -> None:
    seen: list[tuple[int, int]] = []
    model.generate(prompts(1100, 3), 1, on_prefill=lambda *counts: seen.append(counts))
    chunks = [(0, 512), (0, 1024)] if loop == "host" else []
    assert seen == [*chunks, (0, 1100), (1, 3)]


# ---- stop texts ----


@given(
    st.text("ab \né", max_size=30), st.lists(st.text("ab é", min_size=1, max_size=4), max_size=3)
)
@settings(max_examples=200, deadline=None)
def test_text_ends_before_the_first_stop_text(text: str, stops: list[str]) -> None:
    """Stop at the first byte with which a stop text is complete, and not before."""
    pieces: list[str] = []
    streamer = TextStreamer(ByteTokenizer(), pieces.append, stop=stops)
    stopped = [streamer.put(token) for token in text.encode()]
    streamer.end()
    starts = [at for stop in stops if (at := text.find(stop)) >= 0]
    complete = [len(text[: text.find(s) + len(s)].encode()) for s in stops if s in text]
    assert stopped.count(False) == min(complete, default=len(text.encode()) + 1) - 1
    first = min(complete, default=0)
    seen = text.encode()[:first].decode() if complete else text
    found = [at for stop in stops if (at := seen.find(stop)) >= 0]
    assert "".join(pieces) == seen[: min(found, default=len(seen))]
    assert bool(starts) == streamer.stopped


def test_text_that_may_begin_a_stop_text_is_held_back() -> None:
    pieces: list[str] = []
    streamer = TextStreamer(ByteTokenizer(), pieces.append, stop=["###"])
    assert not any(streamer.put(token) for token in b"a##b##")
    assert pieces == ["a", "##b"]
    streamer.end()
    assert pieces == ["a", "##b", "##"]
    with pytest.raises(ValueError, match="stop: got 'END', want a list of texts"):
        TextStreamer(ByteTokenizer(), pieces.append, stop="END")
