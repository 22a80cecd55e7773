"""Tests of Llama and KVCache against transformers, on checkpoints that transformers saved."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast import KVCache, Llama, LlamaConfig

from ..support.checkpoints import hf_logits, hf_model, relative_error, save

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES: dict[str, dict[str, Any]] = {
    "group4": {},
    "group5": {"hidden_size": 160, "num_attention_heads": 10, "num_key_value_heads": 2},
    "group7": {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1},
    "group16": {"hidden_size": 256, "num_attention_heads": 16, "num_key_value_heads": 1},
    "mha": {"num_key_value_heads": 8},
    "tied": {"tie_word_embeddings": True},
    "no-scaling": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "odd-vocab": {"vocab_size": 321, "intermediate_size": 200},
}
LOGITS = 2e-5  # of the largest logit, fp32: other orders of summation through three layers
TINY = LlamaConfig(320, 128, 192, 3, 8, 2, 16, max_position_embeddings=4096)


@pytest.fixture(params=SHAPES, scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    hf = hf_model(**SHAPES[request.param])
    folder = save(hf, tmp_path_factory.mktemp(request.param), max_shard_size="150KB")
    return hf, folder


@pytest.mark.parametrize("start", [0, 20_000, 100_000])
def test_f25_logits_equal_transformers(pair: Any, start: int) -> None:
    """Use positions past 8192, where a loader that drops the rope scaling is far off."""
    hf, folder = pair
    model = Llama.from_pretrained(folder, torch.float32)
    tokens = torch.randint(hf.config.vocab_size, (2, 37))
    positions = torch.arange(start, start + 37)
    expected = hf_logits(hf, tokens, positions)
    logits = model(tokens, positions)
    assert logits.dtype == torch.float32
    assert relative_error(logits, expected) <= LOGITS
    if model.config.rope_scaling is not None and start:
        unscaled = Llama(dataclasses.replace(model.config, rope_scaling=None), model.weights)
        assert relative_error(unscaled(tokens, positions), expected) > 100 * LOGITS


def test_greedy_tokens_equal_transformers(pair: Any) -> None:
    hf, folder = pair
    model = Llama.from_pretrained(folder, torch.float32)
    prompt = torch.randint(3, hf.config.vocab_size, (1, 21))
    expected = hf.generate(prompt, max_new_tokens=24, do_sample=False)[0, 21:].tolist()
    assert model.generate(prompt.tolist(), 24, temperature=0) == [expected]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_as_good_as_eager(tmp_path: Path, dtype: torch.dtype) -> None:
    hf = hf_model(initializer_range=0.08)
    folder = save(hf, tmp_path)
    tokens = torch.randint(320, (4, 48))
    exact = hf_logits(hf.double(), tokens)
    ours = Llama.from_pretrained(folder, dtype)(tokens)
    eager = hf_logits(hf.to(dtype), tokens)
    rms = [float((x.double() - exact).pow(2).mean().sqrt()) for x in (ours, eager)]
    assert rms[0] <= 2 * rms[1]


def test_cache_gives_what_no_cache_gives() -> None:
    model = Llama.from_config(TINY, dtype=torch.float32)
    tokens = torch.randint(320, (2, 300))
    expected = model(tokens)
    cache = KVCache(TINY, 300, batch_size=2, dtype=torch.float32, block_size=32)
    cache.k.fill_(math.nan)
    cache.v.fill_(math.nan)
    chunks = [model(chunk, cache=cache) for chunk in tokens.split([64, 1, 100, 7, 127, 1], dim=1)]
    assert relative_error(torch.cat(chunks, dim=1), expected) <= LOGITS
    assert cache.seqlens == [300, 300]


def test_batch_does_not_change_a_sequence() -> None:
    """Decode ragged sequences together. Each must give the bits that it gives alone."""
    model = Llama.from_config(TINY)
    lengths = [5, 130, 64]
    prompts = [torch.randint(320, (1, n)) for n in lengths]
    step = torch.randint(320, (3, 1))
    together = KVCache(TINY, [140] * 3)
    for i, prompt in enumerate(prompts):
        model(prompt, cache=together.select([i]))
    batched = model(step, cache=together)
    for i, prompt in enumerate(prompts):
        alone = KVCache(TINY, 140)
        model(prompt, cache=alone)
        assert torch.equal(model(step[i : i + 1], cache=alone)[0], batched[i])


@pytest.mark.parametrize("quantize", [None, "fp8"])
@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "cache"])
def test_last_hidden_states_are_those_of_all(
    cached: bool, quantize: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal bits, an equal cache, and one row of the last layer's FFN for each sequence."""
    model = Llama.from_config(TINY, seed=3, quantize=quantize)
    tokens = torch.randint(320, (2, 37))
    caches = [KVCache(TINY, 64, 2) if cached else None for _ in range(2)]
    rows: list[int] = []
    swiglu = Llama._swiglu

    def counted(self: Llama, gate_up: torch.Tensor, into: Any) -> Any:
        rows.append(gate_up.shape[:-1].numel())
        return swiglu(self, gate_up, into)

    monkeypatch.setattr(Llama, "_swiglu", counted)
    for chunk in tokens.split(20, dim=1):
        whole, last = (
            model.hidden(chunk, cache=cache, last=only)
            for cache, only in zip(caches, (False, True), strict=True)
        )
        assert torch.equal(last, whole[:, -1:])
    assert rows == [40, 40, 40, 40, 40, 2, 34, 34, 34, 34, 34, 2]
    if cached:
        for layer in range(3):
            assert torch.equal(*(cache.k[layer][:, :37] for cache in caches))
            assert torch.equal(*(cache.v[layer][:, :37] for cache in caches))


def test_f22_full_cache_is_an_error_and_changes_nothing() -> None:
    model = Llama.from_config(TINY)
    cache = KVCache(TINY, 64, block_size=32)
    model(torch.zeros(1, 63, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="KV cache"):
        model(torch.zeros(1, 2, dtype=torch.int64), cache=cache)
    assert cache.seqlens == [63]
    model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
    assert cache.seqlens == [64]


def test_released_blocks_serve_others() -> None:
    cache = KVCache(TINY, [64, 64], block_size=32)
    cache.select([0]).append(64)
    assert cache.free_blocks == 2
    with pytest.raises(ValueError, match="room for 64 tokens"):
        cache.select([1]).append(65)
    cache.release(0)
    assert cache.free_blocks == 4
    slots = cache.append(64).slots
    assert sorted(slots.tolist()) == list(range(128))


def test_zero_tokens() -> None:
    model = Llama.from_config(TINY)
    assert model(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 320)


@pytest.mark.parametrize("bad", [-1, 320, 2**63 - 1])
def test_f47_bad_token_is_refused(bad: int) -> None:
    with pytest.raises(ValueError, match="tokens: got id"):
        Llama.from_config(TINY)(torch.tensor([[1, bad]]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tokens": torch.zeros(1, 2)}, TypeError, "tokens: got torch.float32"),
        ({"tokens": [[1, 2]]}, TypeError, "tokens: got list"),
        ({"tokens": torch.zeros(2, dtype=torch.int64)}, ValueError, "tokens: got shape"),
        ({"positions": torch.arange(3)}, ValueError, "positions: got shape"),
        ({"positions": torch.tensor([0, 4096])}, ValueError, "positions: got"),
        ({"cache": KVCache(TINY, 8, batch_size=2)}, ValueError, "tokens: got 1 rows"),
        ({"cache": KVCache(TINY, 8, dtype=torch.float32)}, ValueError, "cache: got torch.float32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments: dict[str, Any], error: Any, message: str) -> None:
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(error, match=message):
        Llama.from_config(TINY)(**{"tokens": tokens} | arguments)


@pytest.mark.parametrize("quantize", [None, "fp8", "fp8_all", "fp8_ffn"])
def test_random_weights_are_repeatable_and_keep_the_variance(quantize: str | None) -> None:
    config = dataclasses.replace(TINY, hidden_size=256, num_attention_heads=16)
    models = [Llama.from_config(config, seed, quantize=quantize) for seed in (0, 0, 1)]
    tokens = torch.randint(320, (1, 64))
    first, again, other = (model(tokens) for model in models)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert 0.5 < float(first.std()) < 2
    layers = models[0].weights.layers
    quantized = [layer.down.scale is not None for layer in layers]
    assert quantized == {None: [False] * 3, "fp8_ffn": [False, True, False]}.get(
        quantize, [True] * 3
    )
    assert (layers[1].qkv.scale is not None) == (quantize in ("fp8", "fp8_all"))
    assert (models[0].weights.head.scale is not None) == (quantize == "fp8_all")
    assert (layers[1].gate_up.scale_ub == 1200.0) == (quantize == "fp8_ffn")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"quantize": "int4"}, "quantize: got 'int4'"), ({"dtype": torch.int8}, "dtype: got")],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Llama.from_config(TINY, **options)


@pytest.mark.big
def test_8b_layers_take_a_byte_a_parameter() -> None:
    config = dataclasses.replace(LlamaConfig.llama_3_1_8b(), num_hidden_layers=1)
    model = Llama.from_config(config, quantize="fp8_all")
    head, embedding = 128256 * 4096, 2 * 128256 * 4096
    assert model.weights.nbytes < 1.01 * (head + embedding + 218_103_808)


def test_truncated_cache_forgets_the_rest() -> None:
    cache = KVCache(TINY, 64, batch_size=2, block_size=32)
    cache.append(40)
    cache.advance(40)
    free = cache.free_blocks
    cache.truncate([40, 3])
    assert cache.seqlens == [40, 3] and cache.free_blocks == free
    for tokens in ([2, 4], [-1, 3]):
        with pytest.raises(ValueError, match="want 0 to the sequence's"):
            cache.truncate(tokens)
        assert cache.seqlens == [40, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cached", [False, True])
def test_outputs_are_ordinary_tensors(dtype: torch.dtype, cached: bool) -> None:
    """Edit logits in place and train a head on hidden states, which inference tensors refuse."""
    model = Llama.from_config(TINY, dtype=dtype)
    tokens = torch.tensor([[3, 1, 4]])
    cache = KVCache(TINY, 8, dtype=dtype) if cached else None
    model(tokens, cache=cache)[..., 0] += 1.0
    hidden = model.hidden(tokens, cache=cache)
    head = torch.nn.Linear(TINY.hidden_size, 2, dtype=dtype)
    head(hidden).sum().backward()
    assert head.weight.grad is not None and not hidden.requires_grad
    model.logits(hidden).add_(1.0)
