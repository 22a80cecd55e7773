"""Tests of Llama's relatives, one layer deep, and of rope types and head sizes that Llama 3.1 does
not have. Logits against transformers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import llama_fast as lf
from llama_fast import Llama, LlamaConfig
from llama_fast.generation.cache import KVCache

from ..support.checkpoints import (
    LLAMA3_ROPE,
    LOGITS,
    hf_logits,
    hf_model,
    relative_error,
    save,
)

LLAMA_3_2 = {
    "head_dim": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "rope_parameters": LLAMA3_ROPE | {"factor": 32.0},
    "max_position_embeddings": 131072,
}


def sizes(hidden: int, inner: int, layers: int, heads: int, **rest: Any) -> dict[str, Any]:
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(fields, (hidden, inner, layers, heads), strict=True)) | rest


def plain(theta: float, positions: int, vocab: int, **rest: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": theta}
    return {
        "rope_parameters": rope,
        "max_position_embeddings": positions,
        "vocab_size": vocab,
        **rest,
    }


# As published in each model's config.json; and its parameters, embeddings counted once if tied.
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-3.2-1B": (sizes(2048, 8192, 16, 32, **LLAMA_3_2 | {"head_dim": 64}), 1_235_814_400),
    "Llama-3.2-3B": (sizes(3072, 8192, 28, 24, **LLAMA_3_2), 3_212_749_824),
    "Llama-3.3-70B": (
        sizes(8192, 28672, 80, 64, **LLAMA_3_2 | {"tie_word_embeddings": False})
        | {"rope_parameters": LLAMA3_ROPE},
        70_553_706_496,
    ),
    "CodeLlama-7B": (
        sizes(4096, 11008, 32, 32, num_key_value_heads=32, **plain(1e6, 16384, 32016)),
        6_738_546_688,
    ),
    "TinyLlama-1.1B": (
        sizes(2048, 5632, 22, 32, num_key_value_heads=4, **plain(1e4, 2048, 32000)),
        1_100_048_384,
    ),
    "SmolLM2-135M": (
        sizes(576, 1536, 30, 9, num_key_value_heads=3)
        | plain(1e5, 8192, 49152, tie_word_embeddings=True),
        134_515_008,
    ),
    "SmolLM2-360M": (
        sizes(960, 2560, 32, 15, num_key_value_heads=5)
        | plain(1e5, 8192, 49152, tie_word_embeddings=True),
        361_821_120,
    ),
    "SmolLM2-1.7B": (
        sizes(2048, 8192, 24, 32, num_key_value_heads=32)
        | plain(1.3e5, 8192, 49152, tie_word_embeddings=True),
        1_711_376_384,
    ),
}


def parameters(c: LlamaConfig) -> int:
    attention = 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim * c.hidden_size
    layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    tables = (1 if c.tie_word_embeddings else 2) * c.vocab_size * c.hidden_size
    return c.num_hidden_layers * layer + tables + c.hidden_size


@pytest.mark.parametrize("name", FAMILIES)
def test_configs_have_the_published_parameter_count(name: str, tmp_path: Path) -> None:
    fields, count = FAMILIES[name]
    transformers.LlamaConfig(**fields).save_pretrained(tmp_path)
    assert parameters(LlamaConfig.from_pretrained(tmp_path)) == count


@pytest.mark.parametrize("name", [n for n in FAMILIES if "70B" not in n])  # Llama 3.1's sizes
def test_a_layer_of_true_width(name: str, tmp_path: Path) -> None:
    """Cut only the vocabulary and the FFN, whose widths matter to no other layer."""
    cut = {"num_hidden_layers": 1, "vocab_size": 256, "intermediate_size": 1024}
    with torch.device("meta"):
        hf = hf_model(**{"head_dim": None, **FAMILIES[name][0], **cut})
    hf.to_empty(device="cpu")
    rotary = hf.model.rotary_emb
    rotary.inv_freq = type(rotary)(hf.config).inv_freq
    noise = torch.randn(1 << 20)
    with torch.no_grad():
        for p in hf.parameters():  # 100 million normals would take a second
            flat = noise.repeat(-(-p.numel() // len(noise)))[: p.numel()].view(p.shape)
            p.copy_(flat * 0.02 if p.dim() == 2 else 1 + flat * 0.1)
    hf.tie_weights()
    tokens = torch.randint(256, (1, 33))
    model = Llama.from_pretrained(save(hf, tmp_path), torch.float32)
    assert relative_error(model(tokens), hf_logits(hf, tokens)) <= LOGITS


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-all": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 0.8,
        "beta_fast": 16,
        "beta_slow": 2,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_rope_types(kind: str, tmp_path: Path) -> None:
    rope = {"rope_theta": 10000.0, **ROPES[kind]}
    hf = hf_model(rope_parameters=rope, max_position_embeddings=400)
    model = Llama.from_pretrained(save(hf, tmp_path), torch.float32)
    tokens = torch.randint(320, (1, 300))
    assert relative_error(model(tokens), hf_logits(hf, tokens)) <= LOGITS
    plain = Llama(dataclasses.replace(model.config, rope_scaling=None), model.weights)
    differs = relative_error(plain(tokens), hf_logits(hf, tokens)) > 100 * LOGITS
    assert differs == (kind != "dynamic")  # up to max_position_embeddings
    old = json.loads((tmp_path / "config.json").read_text())
    del old["rope_parameters"]
    for named in ("rope_type", "type"):  # transformers 4
        scaling = {named: rope["rope_type"], **rope}
        if named == "type":
            del scaling["rope_type"]
        del scaling["rope_theta"]
        read = LlamaConfig.from_hf(old | {"rope_theta": 10000.0, "rope_scaling": scaling})
        assert read == model.config


def test_dynamic_frequencies_are_those_of_a_text_as_long_as_the_table(tmp_path: Path) -> None:
    rope = {"rope_theta": 10000.0, **ROPES["dynamic"]}
    hf = hf_model(rope_parameters=rope, max_position_embeddings=64)
    config = LlamaConfig.from_pretrained(save(hf, tmp_path))
    for length in (64, 65, 200):
        cos, sin = hf.model.rotary_emb(torch.zeros(1, 1), torch.arange(length)[None])
        table = lf.rope_table(config, length)
        assert torch.equal(table, torch.cat((cos[0, :, :8], sin[0, :, :8]), dim=-1))
    longer = dataclasses.replace(config, max_position_embeddings=200)
    tokens = torch.randint(320, (1, 200))
    ours = Llama(longer, Llama.from_pretrained(tmp_path, torch.float32).weights)(tokens)
    assert relative_error(ours, hf_logits(hf, tokens)) <= LOGITS


def test_llama_3_1_needs_no_transformers(run_python: Any) -> None:
    run_python(
        "import sys; sys.modules['transformers'] = None\n"
        "import llama_fast as lf\n"
        "lf.rope_table(lf.LlamaConfig.llama_3_1_8b(), 16)\n"
    )


@pytest.mark.parametrize(
    ("backend", "head_dim"),
    [*(("cpu", d) for d in (8, 12, 20, 100, 252)), ("triton", 100)],  # the interpreter is slow
)
def test_head_dims_that_are_multiples_of_four(backend: str, head_dim: int, tmp_path: Path) -> None:
    hf = hf_model(head_dim=head_dim, num_attention_heads=4, num_hidden_layers=1)
    tokens = torch.randint(320, (1, 21))
    folder = save(hf, tmp_path)
    for dtype, tolerance in ((torch.float32, LOGITS), (torch.bfloat16, 0.03)):
        model = Llama.from_pretrained(folder, dtype)
        want = hf_logits(hf, tokens)
        ops = ("apply_rope", "apply_rope_and_append", "attention", "attention_with_kvcache")
        with contextlib.ExitStack() as stack:
            for op in ops:
                stack.enter_context(lf.use_backend(backend, op))
            assert relative_error(model(tokens), want) <= tolerance
            cache = KVCache(model.config, 21, dtype=dtype)
            steps = [
                model(tokens[:, i : i + n], cache=cache) for i, n in ((0, 19), (19, 1), (20, 1))
            ]
            assert relative_error(torch.cat(steps, dim=1), want) <= tolerance
