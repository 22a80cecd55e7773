"""Tests of Llama.logprobs against transformers, and of what it holds in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast import Llama
from llama_fast.generation import logprobs as module
from llama_fast.generation.logprobs import HEAD_ROWS, score

from ..support.checkpoints import hf_logits, hf_model, save

pytestmark = pytest.mark.usefixtures("one_thread")

# 600 does not fit a chunk of the forward pass, and 300 and 200 not one of the head.
LENGTHS = [5, 300, 1, 600, 2, 200, 5]
# fp32, of a logarithm of about 6: other orders of summation through three layers and 320 logits.
ERROR = 2e-5


@pytest.fixture(scope="module")
def hf() -> Any:
    torch.manual_seed(0)
    return hf_model()


@pytest.fixture(scope="module")
def model(hf: Any, tmp_path_factory: pytest.TempPathFactory) -> Llama:
    folder: Path = save(hf, tmp_path_factory.mktemp("checkpoint"))
    return Llama.from_pretrained(folder, torch.float32)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(320, (n,), generator=generator).tolist() for n in LENGTHS]


def expected(hf: Any, prompt: list[int]) -> torch.Tensor:
    tokens = torch.tensor([prompt])
    logarithms = hf_logits(hf, tokens)[0, :-1].log_softmax(-1)
    return logarithms.gather(1, tokens[0, 1:, None])[:, 0]


def test_ragged_prompts_against_transformers(
    hf: Any, model: Llama, prompts: list[list[int]]
) -> None:
    found = model.logprobs(prompts)
    assert len(found) == len(prompts)
    for prompt, values in zip(prompts, found, strict=True):
        assert values.dtype == torch.float32 and values.shape == (len(prompt) - 1,)
        torch.testing.assert_close(values, expected(hf, prompt), rtol=ERROR, atol=ERROR)
    assert model.logprobs([]) == []


def test_no_more_than_a_piece_of_the_logits_exists(
    model: Llama, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    logits = Llama.logits

    def counted(self: Llama, hidden: torch.Tensor) -> torch.Tensor:
        rows.append(hidden.shape[:-1].numel())
        return logits(self, hidden)

    monkeypatch.setattr(Llama, "logits", counted)
    model.logprobs(prompts)
    assert max(rows) == HEAD_ROWS and sum(rows) == sum(LENGTHS) - len(LENGTHS)


def test_short_prompts_share_a_pass(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    hidden = Llama.hidden

    def seen(self: Llama, tokens: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        shapes.append(tuple(tokens.shape))
        return hidden(self, tokens, *arguments, **options)

    monkeypatch.setattr(Llama, "hidden", seen)
    monkeypatch.setattr(module, "PREFILL_CHUNK", 32)
    model.logprobs([[1] * n for n in (9, 8, 3, 40, 9, 33, 9)])
    # The last token is not read. Four times 8 and once 32 tokens fit, five times 8 and 39 do not.
    assert shapes == [(4, 8), (1, 8), (1, 32), (1, 32), (1, 7)]


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_is_not_used(
    model: Llama, prompts: list[list[int]], default: torch.dtype
) -> None:
    wanted = model.logprobs(prompts)
    torch.set_default_dtype(default)
    try:
        found = model.logprobs(prompts)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_only_predictions_from_a_token_on(model: Llama, prompts: list[list[int]]) -> None:
    """Score continuations: the context's logits are never computed."""
    first = [3, 290, 1, 599, 1, 1, 5]
    parts: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(prompts))}
    for scored in score(model, prompts, first):
        assert scored.logits.shape == (len(scored.targets), 320)
        pieces = scored.logprobs().split([n for _, n in scored.runs])
        for (i, _), values in zip(scored.runs, pieces, strict=True):
            parts[i].append(values)
    for i, values in enumerate(model.logprobs(prompts)):
        got = torch.cat([torch.empty(0), *parts[i]])
        torch.testing.assert_close(got, values[first[i] - 1 :], rtol=ERROR, atol=ERROR)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 1: is empty"),
        ([320], "prompt 1: got id 320, want 0 to 319"),
        ([1] * 131074, "prompt 1: 131074 tokens exceed the model's 131072 positions"),
    ],
    ids=["empty", "id", "too long"],
)
def test_bad_prompts(model: Llama, prompt: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.logprobs([[1], prompt])
