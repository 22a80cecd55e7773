"""An accelerated model with real weights: the untouched model's tokens and logits, in fp32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import llama_fast as lf

from .conftest import close, greedy

QUESTIONS = ("Name the capital of France.", "Write a haiku about rain on a tin roof, please.")


@pytest.fixture(scope="module")
def models(smollm2: Path) -> tuple[Any, Any]:
    plain = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    return plain, lf.accelerate(copy.deepcopy(plain))


@pytest.fixture(scope="module")
def batch(smollm2: Path) -> tuple[Tensor, Tensor]:
    """Return chat prompts of different lengths, padded on the left, and their mask."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [
        tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats
    ]
    out = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    return out["input_ids"], out["attention_mask"]


def test_logits(models: tuple[Any, Any], batch: tuple[Tensor, Tensor]) -> None:
    tokens, mask = batch
    with torch.no_grad():
        plain, fast = (m(tokens, attention_mask=mask).logits[mask.bool()] for m in models)
    close(fast, plain)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}])
def test_greedy(
    models: tuple[Any, Any], batch: tuple[Tensor, Tensor], options: dict[str, Any]
) -> None:
    if "cache_implementation" in options:
        options = options | {"disable_compile": True}
    plain, fast = (greedy(m, *batch, max_new_tokens=12, **options) for m in models)
    assert torch.equal(fast, plain)


def test_fp8_answers_alike(models: tuple[Any, Any], batch: tuple[Tensor, Tensor]) -> None:
    """The divergence from the untouched model, in nats, is that of e4m3 with a scale per row."""
    tokens, mask = batch
    fp8 = lf.accelerate(copy.deepcopy(models[0]), quantize="fp8")
    with torch.no_grad():
        plain, fast = (
            m(tokens, attention_mask=mask).logits[mask.bool()].log_softmax(-1)
            for m in (models[0], fp8)
        )
    divergence = (plain.exp() * (plain - fast)).sum(-1)
    assert divergence.mean() < 0.1


def test_restored(models: tuple[Any, Any]) -> None:
    """FP8, from the folder that the model was loaded from."""
    model = copy.deepcopy(models[0])
    want = models[0].state_dict()
    lf.restore(lf.accelerate(model, "fp8"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, want[name]), name
