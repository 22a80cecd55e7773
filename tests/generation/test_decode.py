"""Tests of the loop that runs ahead of a GPU, on CPU tensors: it returns the plain loop's tokens
and takes no more steps than needed. tests/gpu/test_model.py runs it on a GPU."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_fast import Llama, LlamaConfig
from llama_fast.generation import decode, generate

from ..support.generation import CONFIG, OPTIONS, plainly, prompts
from ..support.recorded_graph import RecordedGraph

pytestmark = pytest.mark.usefixtures("one_thread", "ahead")


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama.from_config(CONFIG, quantize="fp8")


def steps_taken() -> int:
    """Return the number of steps. A step has two graphs: the model's and the sampling's."""
    runs = sum(graph.replays + graph.warm_ups for graph in RecordedGraph.made)
    assert runs % 2 == 0
    return runs // 2


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_same_tokens_as_the_plain_loop(
    model: Llama, options: dict[str, Any], graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loop in (decode, generate):
        monkeypatch.setattr(loop, "PREFILL_CHUNK", 64)
    batch = prompts(1, 40, 127, 128, 200)  # some cross into a new block while they decode
    expected = plainly(model, batch, 12, stop_ids=(), **options)
    assert model.generate(batch, 12, stop_ids=(), graphs=graphs, **options) == expected


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("queued", [0, 1, 4])
def test_sequences_stop_on_their_own(
    model: Llama, queued: int, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop each sequence at another step: rows move, and the batch shrinks by buckets."""
    monkeypatch.setattr(decode, "AHEAD", queued)
    batch = prompts(5, 9, 30, 4, 17)
    free = plainly(model, batch, 24, temperature=1.0, top_p=1.0, seed=5, stop_ids=())
    stops = [free[0][0], free[1][3], free[2][9], free[3][10]]  # one ends with its first token
    options = {"temperature": 1.0, "top_p": 1.0, "seed": 5, "stop_ids": stops}
    expected = plainly(model, batch, 24, **options)
    assert len({len(ids) for ids in expected}) >= 4 and min(map(len, expected)) == 1
    seen: list[tuple[int, int]] = []
    got = model.generate(
        batch, 24, graphs=graphs, on_token=lambda i, token: seen.append((i, token)), **options
    )
    assert got == expected
    in_order = [
        (i, ids[step]) for step in range(24) for i, ids in enumerate(expected) if step < len(ids)
    ]
    assert seen == in_order


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_tokens(model: Llama, count: int) -> None:
    batch = prompts(4, 130)
    options = {"temperature": 0.9, "seed": 1, "stop_ids": ()}
    assert model.generate(batch, count, **options) == plainly(model, batch, count, **options)
    assert steps_taken() == count - 1


def test_f26_a_ragged_batch_equals_singles(model: Llama) -> None:
    batch = prompts(1, 40, 3, 200, 17)
    options = {"temperature": 1.0, "seed": 7}
    together = model.generate(batch, 24, **options)
    assert together == [model.generate([prompt], 24, **options)[0] for prompt in batch]
    assert model.generate(batch[::-1], 24, **options) == together[::-1]


def test_a_token_is_emitted_before_the_next_but_one_is_computed(model: Llama) -> None:
    """Stream with a delay of at most AHEAD steps, for the first tokens as well."""
    steps: list[int] = []
    spy = Llama(model.config, model.weights)
    spy.logits = lambda hidden: (steps.append(1), model.logits(hidden))[1]  # type: ignore[method-assign]
    computed: list[int] = []
    spy.generate(
        prompts(5, 9), 6, stop_ids=(), graphs=False, on_token=lambda *_: computed.append(len(steps))
    )
    # Two first tokens, then pairs, because a step computes both sequences.
    assert computed == [2, 3, *[n for step in range(4, 8) for n in (step, step)], 7, 7]


def test_no_more_steps_than_needed(model: Llama) -> None:
    """Compute at most AHEAD tokens that nothing uses after a single sequence has stopped."""
    (prompt,) = prompts(5)
    options = {"temperature": 1.0, "top_p": 1.0, "seed": 2}
    (free,) = plainly(model, [prompt], 30, stop_ids=(), **options)
    stop = next(i for i in range(5, 30) if free[i] not in free[:i])
    assert model.generate([prompt], 30, stop_ids=[free[stop]], **options) == [free[: stop + 1]]
    assert steps_taken() == stop + decode.AHEAD


def test_f44_nan_in_the_model_names_the_prompt(model: Llama) -> None:
    broken = Llama(CONFIG, dataclasses.replace(model.weights, norm=model.weights.norm * math.nan))
    for options in OPTIONS.values():
        with pytest.raises(ValueError, match="prompt 0, new token 0: logits"):
            broken.generate([[1, 2], [3]], 3, **options)


def test_f44_nan_in_one_sequence_spares_the_others(model: Llama) -> None:
    """Set one token's embedding to NaN. Its sequence fails, and the error names the token."""
    embedding = model.weights.embedding.clone()
    embedding[7] = math.nan
    broken = Llama(CONFIG, dataclasses.replace(model.weights, embedding=embedding))
    seen: list[tuple[int, int]] = []
    batch = [[9, 8], [3, 7]]
    with pytest.raises(ValueError, match="prompt 1, new token 0: logits"):
        broken.generate(batch, 3, temperature=0, on_token=lambda *at: seen.append(at))
    assert seen == [(0, plainly(model, batch, 1, temperature=0)[0][0])]
    assert len(broken.generate([[9, 8]], 3, temperature=0, stop_ids=())[0]) == 3


# ---- arguments ----


def test_graphs_need_a_gpu(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ValueError, match="graphs: got True, but the model is on cpu"):
        model.generate([[1]], 2, graphs=True)
    with pytest.raises(TypeError, match="graphs: got int"):
        model.generate([[1]], 2, graphs=1)
    assert model.generate([[1]], 2, graphs=False, temperature=0) == model.generate(
        [[1]], 2, temperature=0
    )
    assert not model.decoders


def test_f47_a_bad_id_on_a_gpu_is_nan_for_its_sequence_only() -> None:
    """Check model() where it cannot look at the ids."""
    config = LlamaConfig(320, 128, 192, 2, 8, 2, 16)
    model = Llama.from_config(config)

    class Elsewhere(Tensor):
        """Report that a CPU tensor is not on the CPU."""

        is_cpu = False

    tokens = torch.tensor([[1, 2, 3], [4, 320, 5], [6, -1, 2**62], [319, 0, 7]])
    x = model.embed(tokens.as_subclass(Elsewhere)).as_subclass(Tensor)
    assert x.isnan().all(-1).tolist() == [
        [False] * 3,
        [False, True, False],
        [False, True, True],
        [False] * 3,
    ]
    logits = model.logits(model.forward(x, torch.arange(3).repeat(4)))
    assert logits.isnan().all(-1).tolist() == [
        [False] * 3,
        [False, True, True],
        [False, True, True],
        [False] * 3,
    ]
    assert torch.equal(logits[[0, 3]], model(tokens[[0, 3]]))
