"""generate() of an accelerated model: the tokens of the untouched one, in fp32."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from llama_fast.hf import accelerate, attention

from .conftest import CLASSES, close, greedy, pair, prompt, tiny

CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "none": {"use_cache": False},
}


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return pair()


def padded(side: str, tokens: Tensor) -> Tensor:
    """Return a mask of different paddings: of none, of some tokens and of all but one."""
    mask = torch.ones_like(tokens)
    for row, padding in zip(mask, (0, 4, tokens.shape[1] - 1, 4), strict=False):
        row[slice(0, padding) if side == "left" else slice(tokens.shape[1] - padding, None)] = 0
    return mask


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("cache", CACHES)
def test_greedy(models: tuple[Any, Any], cache: str, side: str | None) -> None:
    tokens = prompt(4)
    mask = torch.ones_like(tokens) if side is None else padded(side, tokens)
    plain, fast = (greedy(m, tokens, mask, **CACHES[cache]) for m in models)
    assert len(set(plain.flatten().tolist())) > 10
    assert torch.equal(fast, plain)


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beams(models: tuple[Any, Any], cache: str, side: str | None) -> None:
    tokens = prompt(2)
    mask = None if side is None else padded(side, tokens)
    plain, fast = (greedy(m, tokens, mask, num_beams=3, **CACHES[cache]) for m in models)
    assert torch.equal(fast, plain)


def test_sampling(models: tuple[Any, Any]) -> None:
    outs = []
    for model in models:
        torch.manual_seed(3)
        outs.append(greedy(model, prompt(), do_sample=True, temperature=0.8, top_p=0.9))
    assert torch.equal(*outs)


def test_assisted(models: tuple[Any, Any]) -> None:
    plain, fast = models
    draft = accelerate(tiny(num_hidden_layers=1))
    options = {"max_new_tokens": 16, "eos_token_id": 2}  # transformers 4.57 needs one
    want = greedy(plain, prompt(1), **options)
    assert torch.equal(greedy(fast, prompt(1), assistant_model=draft, **options), want)
    lookup = greedy(fast, prompt(1), prompt_lookup_num_tokens=3, **options)
    assert torch.equal(lookup, want)


def test_continues_from_past(models: tuple[Any, Any]) -> None:
    """A second turn: several new tokens behind a cache."""
    outs = []
    for model in models:
        past = DynamicCache(config=model.config)
        first = greedy(model, prompt(), past_key_values=past, mask=torch.ones(2, 9))
        longer = torch.cat((first, prompt(2, 5)), 1)
        mask = torch.ones_like(longer)
        outs.append(greedy(model, longer, mask, past_key_values=past))
    assert torch.equal(*outs)


def test_quantized_cache(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache whose update returns other tensors than it holds."""
    from transformers.cache_utils import Cache, QuantizedLayer

    class Halved(QuantizedLayer):
        def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
            return tensor.half()

        def _dequantize(self, q_tensor: Tensor) -> Tensor:
            return q_tensor.float()

    outs = []
    for model in models:
        layers = [Halved(axis_key=0, axis_value=0, residual_length=4) for _ in range(3)]
        outs.append(greedy(model, prompt(), past_key_values=Cache(layers=layers)))
    assert torch.equal(*outs)


def test_positions_beyond_8192(models: tuple[Any, Any]) -> None:
    """Llama 3.1's frequencies differ there from those of Llama 3."""
    tokens, positions = prompt(1, 12), torch.arange(9000, 9012)[None]
    with torch.no_grad():
        plain, fast = (m(tokens, position_ids=positions).logits for m in models)
    close(fast, plain)
    scattered = torch.tensor([[0, 5, 17, 131071, 40000, 3, 9, 2, 1, 8, 8192, 8191]])
    mask = torch.ones(1, 12)
    with torch.no_grad():
        plain, fast = (m(tokens, position_ids=scattered, attention_mask=mask) for m in models)
    close(fast.logits, plain.logits)


@pytest.mark.parametrize("tokens", [1, 5, 20, 40])
def test_chunks(models: tuple[Any, Any], tokens: int) -> None:
    """Chunked prefill: few and many queries behind a cache."""
    name = "past_key_values" if "past_key_values" in _outputs(models[0]) else "cache"
    logits = []
    for model in models:
        with torch.no_grad():
            past = getattr(model(prompt(2, 11), use_cache=True), name)
            logits.append(model(prompt(2, tokens), **{name: past}).logits)
    close(logits[1], logits[0])


def _outputs(model: Any) -> set[str]:
    with torch.no_grad():
        return set(model(prompt(1, 2), use_cache=True).keys())


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_relatives(family: str, cache: str) -> None:
    plain, fast = pair(family)
    tokens = prompt()
    with torch.no_grad():
        close(fast(tokens).logits, plain(tokens).logits)
    mask = padded("left", tokens)
    want = greedy(plain, tokens, mask, **CACHES[cache])
    assert torch.equal(greedy(fast, tokens, mask, **CACHES[cache]), want)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_sliding_window(cache: str) -> None:
    """Mistral's: shorter than the window on the kernels, longer correctly."""
    attention._warn.cache_clear()
    plain, fast = pair("mistral", sliding_window=24)
    tokens = prompt(2, 12)
    with warnings.catch_warnings():
        if cache == "dynamic":
            warnings.simplefilter("error", UserWarning)
        few, many = (greedy(m, tokens, max_new_tokens=8, **CACHES[cache]) for m in (plain, fast))
    assert torch.equal(few, many)
    longer = [greedy(m, prompt(2, 40), max_new_tokens=8, **CACHES[cache]) for m in (plain, fast)]
    assert torch.equal(*longer)


def test_bf16_is_as_near_to_fp32() -> None:
    """The kernels round less often than transformers."""
    plain = tiny()
    with torch.no_grad():
        exact = plain(prompt()).logits
        half = copy.deepcopy(plain).bfloat16()
        theirs = half(prompt()).logits.float()
        ours = accelerate(half)(prompt()).logits.float()
    assert (ours - exact).norm() < 1.1 * (theirs - exact).norm()


def test_sequence_classification() -> None:
    """It pools the last token that is no padding, on either side."""
    plain = tiny(cls=transformers.LlamaForSequenceClassification, num_labels=3)
    fast = accelerate(copy.deepcopy(plain))
    for side in ("left", "right"):
        tokens = prompt(4)
        mask = padded(side, tokens)
        tokens = tokens * mask
        with torch.no_grad():
            close(fast(tokens, mask).logits, plain(tokens, mask).logits)


def test_pipeline(models: tuple[Any, Any]) -> None:
    from ..support.llama3 import byte_tokenizer

    outs = [
        transformers.pipeline("text-generation", model=m, tokenizer=byte_tokenizer())(
            "Once", max_new_tokens=6, do_sample=False
        )
        for m in models
    ]
    assert outs[0] == outs[1]
