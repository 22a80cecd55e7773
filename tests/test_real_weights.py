"""Tests on SmolLM2-135M-Instruct, trained weights of Llama's architecture, where random ones would
forgive too much. Few tokens: the whole file takes a minute on 2 cores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

from llama_fast import Llama
from llama_fast.checkpoint.quantize import quantize_checkpoint
from llama_fast.cli import main
from llama_fast.perplexity import perplexity

from .support.checkpoints import hf_logits, relative_error
from .support.smollm2 import prose

TOKENS = 192  # of the prose, for perplexities
# fp32, of the largest logit: orders of summation through 30 layers. 1e-6 was measured.
LOGITS = 1e-5


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def hf(smollm2: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Llama:
    return Llama.from_pretrained(smollm2, torch.float32)


@pytest.fixture(scope="module")
def text(tokenizer: Any) -> list[int]:
    return tokenizer(prose()[:4000])["input_ids"][:TOKENS]


def test_logits_and_logprobs(hf: Any, model: Llama, text: list[int]) -> None:
    tokens = torch.tensor([text])
    expected = hf_logits(hf, tokens)
    assert relative_error(model(tokens), expected) < LOGITS
    (values,) = model.logprobs([text])
    wanted = expected[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    torch.testing.assert_close(values, wanted, rtol=0, atol=1e-3)


def test_greedy_text_of_ragged_prompts(hf: Any, model: Llama, tokenizer: Any) -> None:
    """Generate for prompts of 5 to 40 tokens together: each token is the most probable one after
    those before it, in transformers."""
    prompts = [
        tokenizer(text)["input_ids"]
        for text in ("The capital of France is", "def fibonacci(n):", prose()[:200])
    ]
    ours = model.generate(prompts, 12, temperature=0)
    for prompt, new in zip(prompts, ours, strict=True):
        logits = hf_logits(hf, torch.tensor([prompt + new[:-1]]))
        assert new == logits[0, len(prompt) - 1 :].argmax(-1).tolist()
    for prompt, values in zip(prompts, model.logprobs(prompts), strict=True):
        torch.testing.assert_close(values, model.logprobs([prompt])[0], rtol=0, atol=1e-3)


# Perplexity in 16 or 8 bits against fp32 on the same tokens: how far it may move, and how far the
# predictions, in nats a token. Measured: 0.2 % and 0.0010, 2.7 % and 0.0202 (with the head in FP8
# 0.0441, which the bound excludes), 0.4 % and 0.0081. With bf16 weights and the
# cache in FP8: 0.6 % and 0.0069.
BOUNDS: dict[tuple[str | None, str | None], tuple[float, float]] = {
    (None, None): (0.01, 0.003),
    ("fp8", None): (0.05, 0.04),
    ("fp8_ffn", None): (0.02, 0.016),
    (None, "fp8"): (0.02, 0.016),
}


@pytest.mark.parametrize("quantize, kv_cache", BOUNDS)
def test_perplexity(
    quantize: str | None, kv_cache: str | None, smollm2: Path, model: Llama, text: list[int]
) -> None:
    quantized = Llama.from_pretrained(smollm2, quantize=quantize)
    found = perplexity(quantized, text, model, kv_cache=kv_cache)
    assert found.against is not None
    moved, kl = BOUNDS[quantize, kv_cache]
    assert abs(found.perplexity / found.against.perplexity - 1) < moved
    assert found.against.mean_kl < kl


@pytest.mark.parametrize("quantize", [None, "fp8"], ids=str)
def test_chat_answers(
    quantize: str | None, smollm2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = "What is the capital of France?"
    argv = ["generate", "--model", str(smollm2), "--chat", "--prompt", question]
    options = ["--temperature", "0", "--max-new-tokens", "12"]
    assert main([*argv, *options, *(["--quantize", quantize] if quantize else [])]) == 0
    assert "Paris" in capsys.readouterr().out


def test_quantized_checkpoint_in_transformers(
    smollm2: Path, tmp_path: Path, text: list[int]
) -> None:
    """Write FP8, read it in both, and load with the recipe: three times the same logits."""
    quantize_checkpoint(smollm2, tmp_path / "fp8")
    tokens = torch.tensor([text[:64]])
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8",
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    ours = Llama.from_pretrained(tmp_path / "fp8", torch.float32)(tokens)
    assert relative_error(ours, hf_logits(theirs, tokens)) < LOGITS
    loaded = Llama.from_pretrained(smollm2, torch.float32, "fp8")(tokens)
    assert torch.equal(ours, loaded)
