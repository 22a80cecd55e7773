"""Tests of sampling a batch: it returns the ids of single rows, in any batch and order of sums."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama_fast.generation import sampling
from llama_fast.generation.sampling import Settings

from ..support.generation import OPTIONS

pytestmark = pytest.mark.usefixtures("one_thread")


def settings_of(options: dict[str, Any]) -> Settings:
    return Settings(**{"top_p": 1.0} | {k: v for k, v in options.items() if k in Settings._fields})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("vocab", [1, 7, 320, 8193])
def test_rows_are_sampled_as_one_by_one(vocab: int, options: dict[str, Any]) -> None:
    logits = 4 * torch.randn(40, vocab)
    logits[::3] = logits[::3].round()  # ties
    logits[5, : vocab // 2] = -math.inf
    settings = settings_of(options)
    alone = [
        sampling.sample(row, *settings, generator=torch.Generator().manual_seed(i))
        for i, row in enumerate(logits)
    ]
    u = torch.stack(
        [
            torch.rand(1, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
            for i in range(40)
        ]
    )
    assert sampling.sample_rows(logits, u[:, 0], *settings).tolist() == alone


def test_f44_invalid_rows_give_minus_one() -> None:
    logits = torch.randn(6, 50)
    logits[1, 3], logits[2], logits[3, 4] = math.nan, -math.inf, math.inf
    logits[4] = math.nan
    u = torch.rand(6, dtype=torch.float64)
    for options in OPTIONS.values():
        settings = settings_of(options)
        ids = sampling.sample_rows(logits, u, *settings)
        assert ids[1:5].tolist() == [-1] * 4
        assert 0 <= int(ids[0]) < 50 and 0 <= int(ids[5]) < 50


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rows_are_sampled_the_same_in_any_batch(options: dict[str, Any]) -> None:
    logits, u = 4 * torch.randn(150, 321), torch.rand(150, dtype=torch.float64)
    settings = settings_of(options)
    together = sampling.sample_rows(logits, u, *settings)
    for rows in (slice(0, 1), slice(63, 66), slice(140, 150)):
        assert torch.equal(sampling.sample_rows(logits[rows], u[rows], *settings), together[rows])


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 8193)], ids=str)
def test_top_k_matches_a_stable_sort(shape: tuple[int, ...]) -> None:
    """Compare with a stable sort, on ties, both zeros, infinities and subnormals."""
    logits = (2 * torch.randn(shape)).round()
    logits[..., ::5] *= 0.0
    logits[..., 3::11], logits[..., 4::13], logits[..., 5::17] = -math.inf, 1e-44, -1e-44
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    for k in (1, 2, 40, 10000):
        assert torch.equal(sampling._top(logits, k), order[..., :k])


def test_top_k_sorts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbid sorting: to sort a row's 128,256 logits takes longer than the rest of sampling."""
    monkeypatch.setattr(torch.Tensor, "sort", None, raising=False)
    sampling.sample_rows(torch.randn(2, 50), torch.rand(2, dtype=torch.float64), 1.0, 0.9, 5)
    sampling.sample(torch.randn(50), 1.0, 0.9, 5)


def test_weights_have_one_sum_in_any_order() -> None:
    """Require that the order in which a device adds the weights does not matter."""
    weights = sampling._weights(6 * torch.randn(128256), torch.tensor(25.0), 0.7)
    orders = [weights.flip(0), weights.view(501, 256).t().flatten(), weights.sort().values]
    assert {int(w.cumsum(0)[-1]) for w in [weights, *orders]} == {int(weights.sum())}
    flat = sampling._weights(torch.zeros(2**19 - 1), torch.tensor(0.0), 1.0)
    assert int(flat.sum()) == (2**19 - 1) * 2**44


@pytest.mark.parametrize("top_p", [0.0, 0.5, 1.0])
def test_f45_draws_at_both_ends_of_the_unit_interval(top_p: float) -> None:
    logits = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf]]).repeat(2, 1)
    u = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    ids = sampling.sample_rows(logits, u, 1.0, top_p, 0).tolist()
    assert ids == {0.0: [2, 2], 0.5: [2, 2], 1.0: [1, 2]}[top_p]


def test_one_number_at_a_time_or_all_at_once() -> None:
    """Draw the same tokens from a seed on a GPU, which receives all the numbers at once."""
    at_once = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    one = torch.Generator().manual_seed(1)
    singly = [torch.rand(1, dtype=torch.float64, generator=one) for _ in range(100)]
    assert torch.equal(at_once, torch.cat(singly))


# ---- transformers' definitions ----


@pytest.mark.parametrize("seed", range(8))
def test_the_kept_tokens_are_those_of_transformers(seed: int) -> None:
    """Draw with a fine grid of numbers, which reaches every token that is kept."""
    torch.manual_seed(seed)
    logits, grid = 2 * torch.randn(1, 24), torch.linspace(0, 1, 20001, dtype=torch.float64)[:-1]
    for temperature, top_p, top_k, min_p in (
        (1.0, 1.0, 0, 0.05),
        (0.7, 1.0, 0, 0.3),
        (1.3, 0.9, 0, 0.02),
        (1.0, 1.0, 7, 0.04),
        (1.5, 0.95, 15, 0.06),
        (1.0, 1.0, 0, 1.0),
    ):
        scores = TemperatureLogitsWarper(float(temperature))(None, logits)
        if top_k:
            scores = TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)
        scores = MinPLogitsWarper(min_p)(None, scores)
        settings = Settings(temperature, top_p, top_k, min_p)
        drawn = sampling.sample_rows(logits.expand(len(grid), -1), grid, *settings)
        assert set(drawn.tolist()) == set(scores[0].isfinite().nonzero()[:, 0].tolist())


@pytest.mark.parametrize("penalty", [1.3, 0.7, 2.0])
def test_the_penalty_is_that_of_transformers(penalty: float) -> None:
    logits, texts = torch.randn(3, 50), torch.randint(0, 50, (3, 20))
    logits[0, :9] = -0.0
    want = RepetitionPenaltyLogitsProcessor(penalty)(texts, logits.clone())
    seen = torch.stack([sampling.seen(text, 50) for text in texts.tolist()])
    assert torch.equal(sampling.penalized(logits, seen, penalty), want)


def test_a_penalty_counts_the_prompt_and_the_answer() -> None:
    """Penalize so strongly that greedy decoding never repeats."""
    logits = torch.arange(10.0) + 1
    sampler = sampling.Sampler(Settings(0), torch.Generator())
    sampler.penalize(100.0, sampling.seen([9, 7], 10))
    ahead = sampler.copy()
    assert [sampler(logits) for _ in range(4)] == [8, 6, 5, 4]
    assert [ahead(logits) for _ in range(4)] == [8, 6, 5, 4]
