"""torch.compile and torch.export of an accelerated model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounter

import llama_fast as lf

from .conftest import V5, close, greedy, prompt, tiny

NEXT = tuple(int(n) for n in transformers.__version__.split(".")[:2]) >= (5, 24)
CACHE = "cache" if NEXT else "past_key_values"


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    plain = tiny(num_hidden_layers=2)
    return plain, lf.accelerate(copy.deepcopy(plain))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_whole_graph_for_every_length(models: tuple[Any, Any]) -> None:
    plain, fast = models
    counter = CompileCounter()
    compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for batch, tokens in ((2, 5), (2, 9), (3, 17)):
            given = prompt(batch, tokens)
            close(compiled(given, use_cache=False).logits, plain(given).logits)
    assert counter.frame_count == 1


@pytest.mark.parametrize("padding", [False, True])
def test_static_cache_compiles_once(models: tuple[Any, Any], padding: bool) -> None:
    """generate() prepares a static cache's masks outside the graph."""
    plain, fast = models
    tokens, mask = prompt(), torch.ones(2, 9, dtype=torch.long)
    if padding:
        mask[0, :4] = 0
    counter = CompileCounter()
    compiled = copy.copy(fast)
    compiled.forward = torch.compile(fast.forward, fullgraph=True, backend=counter)
    caches = [_static(model) for model in models]
    want = greedy(plain, tokens, mask, max_new_tokens=9, past_key_values=caches[0])
    with torch.no_grad():
        _prefill(fast, tokens, mask, caches[1])
        for at in range(9, 17):
            given = _prepared(fast, want[:, : at + 1], mask, at, caches[1])
            logits = compiled.forward(**given).logits
            assert torch.equal(logits[:, -1].argmax(-1), want[:, at + 1]), at
    assert counter.frame_count == 1


def _static(model: Any) -> Any:
    sizes = {} if V5 else {"max_batch_size": 2}
    return transformers.StaticCache(config=model.config, max_cache_len=24, **sizes)


def _prefill(model: Any, tokens: Any, mask: Any, cache: Any) -> None:
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    extra = {} if V5 else {"cache_position": torch.arange(tokens.shape[1])}
    model(tokens, attention_mask=mask, position_ids=positions, **{CACHE: cache}, **extra)


def _prepared(model: Any, tokens: Any, mask: Any, at: int, cache: Any) -> dict[str, Any]:
    """Return the forward's arguments for the token at `at`, as generate() makes them."""
    from transformers.masking_utils import create_masks_for_generate

    longer = torch.nn.functional.pad(mask, (0, at + 1 - mask.shape[1]), value=1)
    position = longer.sum(-1, keepdim=True) - 1
    arguments = {"config": model.config, "attention_mask": longer, CACHE: cache}
    if V5:
        arguments["inputs_embeds"] = torch.empty(2, 1, 0)
    else:
        arguments |= {"input_embeds": torch.empty(2, 1), "cache_position": torch.tensor([at])}
    made = create_masks_for_generate(position_ids=position, **arguments)
    given = {"input_ids": tokens[:, at : at + 1], "attention_mask": made, CACHE: cache}
    extra = {} if V5 else {"cache_position": torch.tensor([at])}
    return {**given, "position_ids": position, **extra}


def test_inductor(models: tuple[Any, Any]) -> None:
    """FP8 too. The real compiler, once."""
    plain, _ = models
    fast = lf.accelerate(tiny(num_hidden_layers=1), quantize="fp8")
    given = prompt()
    with torch.no_grad():
        want = fast(given, use_cache=False).logits
        close(torch.compile(fast, fullgraph=True)(given, use_cache=False).logits, want)


def test_export(models: tuple[Any, Any]) -> None:
    plain, fast = models
    with torch.no_grad():
        exported = torch.export.export(
            fast,
            (prompt(),),
            {"use_cache": False},
            strict=False,
        )
        out = exported.module()(prompt(), use_cache=False)
        close(out.logits, plain(prompt()).logits)
