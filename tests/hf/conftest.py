"""Tiny random models of transformers, and the real SmolLM2."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import llama_fast.hf  # noqa: F401  registers attn_implementation="llama_fast"

V5 = int(transformers.__version__.split(".")[0]) >= 5
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def tiny(family: str = "llama", cls: Any = None, **changes: Any) -> Any:
    """Return a model whose random weights let attention and rotation affect the logits."""
    config_class, causal_lm = CLASSES[family]
    fields = {
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 131072,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "attn_implementation": "sdpa",
    } | changes
    if family == "llama":
        theta = {"rope_theta": 500000.0}
        fields |= {"rope_parameters": LLAMA3 | theta} if V5 else {"rope_scaling": LLAMA3, **theta}
    if family == "mistral":
        fields.setdefault("sliding_window", None)
    torch.manual_seed(0)
    model = (cls or causal_lm)(config_class(**fields)).eval()
    for name, p in model.named_parameters():
        if "norm" in name or "bias" in name:  # ones and zeros hide an exchange
            p.data += torch.randn_like(p) * 0.1
    return model


def pair(family: str = "llama", quantize: str | None = None, **changes: Any) -> tuple[Any, Any]:
    """Return a model and the same one, accelerated."""
    model = tiny(family, **changes)
    return model, llama_fast.hf.accelerate(copy.deepcopy(model), quantize)


def prompt(batch: int = 2, tokens: int = 9) -> Tensor:
    return torch.randint(3, 320, (batch, tokens), generator=torch.Generator().manual_seed(1))


def close(actual: Tensor, expected: Tensor, relative: float = 5e-5) -> None:
    """5e-5 of the largest logit: fp32 sums of three layers in another order differ by 1e-5."""
    error = (actual.double() - expected.double()).abs().max() / expected.abs().max()
    assert error < relative, f"relative error {error:.2e}"


def greedy(model: Any, tokens: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None} | options
    if mask is None and options.get("past_key_values") is None:
        mask = torch.ones_like(tokens)
    out: Tensor = model.generate(tokens, attention_mask=mask, pad_token_id=0, **options)
    return out


@pytest.fixture(autouse=True)
def _quick(one_thread: None) -> None:
    """Every test of this folder uses one thread."""
