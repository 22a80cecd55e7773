"""Tests of LlamaConfig: presets, both of Hugging Face's styles, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from llama_fast import LlamaConfig, RopeScaling

from ..support.checkpoints import LLAMA3_ROPE

HF = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "rope_parameters": LLAMA3_ROPE,
}
YARN = {"rope_type": "yarn", "factor": 4.0}


def parameters(c: LlamaConfig) -> int:
    attention = 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim * c.hidden_size
    layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    return c.num_hidden_layers * layer + 2 * c.vocab_size * c.hidden_size + c.hidden_size


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        (LlamaConfig.llama_3_1_8b, 8_030_261_248),
        (LlamaConfig.llama_3_1_70b, 70_553_706_496),
        (LlamaConfig.llama_3_1_405b, 405_853_388_800),
    ],
    ids=["8b", "70b", "405b"],
)
def test_presets_have_the_published_parameter_count(preset: Any, count: int) -> None:
    assert parameters(preset()) == count


def test_both_styles_and_transformers_objects_agree() -> None:
    scaling = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}
    old = {name: value for name, value in HF.items() if name != "rope_parameters"}
    old |= {"rope_theta": 500000.0, "rope_scaling": scaling}
    older = old | {"rope_scaling": scaling | {"type": "llama3"}}
    del older["rope_scaling"]["rope_type"]
    hf_object = transformers.LlamaConfig(**HF)
    wanted = LlamaConfig.llama_3_1_8b()
    for source in (HF, old, older, hf_object):
        assert LlamaConfig.from_hf(source) == wanted


def test_absent_fields_mean_what_they_mean_in_transformers() -> None:
    given = {"vocab_size": 10, "hidden_size": 64, "num_attention_heads": 4}
    config, theirs = LlamaConfig.from_hf({"model_type": "llama", **given}), transformers.LlamaConfig
    meant = {**theirs(**given).to_dict(), "rope_scaling": None, "eos_token_id": ()}
    meant |= {"rope_theta": meant["rope_parameters"]["rope_theta"], "bos_token_id": None}
    assert dataclasses.asdict(config) == {n: meant[n] for n in dataclasses.asdict(config)}


def test_stop_ids_come_from_the_generation_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF | {"eos_token_id": 7}))
    assert LlamaConfig.from_pretrained(tmp_path).eos_token_id == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert LlamaConfig.from_pretrained(tmp_path).eos_token_id == (8, 9)


def test_replace_validates_again() -> None:
    config = LlamaConfig.llama_3_1_8b()
    assert dataclasses.replace(config, num_hidden_layers=2).num_hidden_layers == 2
    with pytest.raises(ValueError, match="num_hidden_layers: got 0"):
        dataclasses.replace(config, num_hidden_layers=0)
    with pytest.raises(ValueError, match="rope_scaling"):
        dataclasses.replace(config, rope_scaling={"factor": 8.0})
    with pytest.raises(ValueError, match="high_freq_factor"):
        RopeScaling(high_freq_factor=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type: got 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
        ({"attention_bias": True}, "attention_bias: got True"),
        ({"mlp_bias": True}, "mlp_bias: got True"),
        ({"num_key_value_heads": 5}, "num_key_value_heads: got 5"),
        ({"num_attention_heads": 0}, "num_attention_heads: got 0"),
        ({"hidden_size": "4096"}, "hidden_size: got '4096'"),
        ({"vocab_size": None}, "vocab_size: got None"),
        ({"head_dim": 9}, "head_dim: got 9"),
        ({"head_dim": 4}, "head_dim: got 4"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: got nan"),
        ({"eos_token_id": [1, -2]}, "eos_token_id: got -2"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type: got 'longrope'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor: got None"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.factor: missing"),
        ({"rope_parameters": [1]}, "rope_parameters: got list"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: got 0.5"),
        ({"hidden_size": 4096.0}, "hidden_size: got 4096.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers: got True"),
        ({"num_attention_heads": 2**63}, "num_attention_heads: got 9223372036854775808"),
        ({"vocab_size": 10**4000}, "vocab_size: got 1000"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps: got 1000"),
        ({"rms_norm_eps": 1e-300}, "rms_norm_eps: got 1e-300"),
        ({"rms_norm_eps": True}, "rms_norm_eps: got True"),
        ({"attention_bias": 0}, "attention_bias: got 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: got 'false'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: got 1"),
        ({"bos_token_id": 1.0}, "bos_token_id: got 1.0"),
        ({"eos_token_id": [2, None]}, "eos_token_id: got None"),
        ({"eos_token_id": 2**31}, "eos_token_id: got 2147483648"),
        ({"eos_token_id": "</s>"}, "eos_token_id: got '</s>'"),
        ({"rope_parameters": 0}, "rope_parameters: got int"),
        ({"rope_parameters": {"rope_theta": 1}}, "rope_theta: got 1, want more than 1"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "rope_theta: got 1000"),
        ({"rope_parameters": LLAMA3_ROPE | {"factor": 1e-308}}, "factor: got 1e-308"),
        ({"rope_parameters": LLAMA3_ROPE | {"factor": 0.5}}, "factor: got 0.5, want at least 1"),
        ({"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 10**400}}, "low_freq_factor"),
        ({"rope_parameters": YARN | {"factor": 1e-308}}, "factor: got 1e-308"),
        ({"rope_parameters": YARN | {"beta_fast": "x"}}, "beta_fast: got 'x'"),
        ({"rope_parameters": YARN | {"attention_factor": -1}}, "attention_factor: got -1"),
        ({"rope_parameters": YARN | {"truncate": 1}}, "truncate: got 1"),
        (
            {"rope_parameters": YARN | {"original_max_position_embeddings": 0.5}},
            "original_max_position_embeddings: got 0.5",
        ),
        ({"rope_parameters": LLAMA3_ROPE | {"rope_theta": "x"}}, "rope_theta: got 'x'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses_what_it_would_compute_wrongly(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_hf(HF | change)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_attention_heads"])
def test_names_a_missing_field(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: missing"):
        LlamaConfig.from_hf({key: value for key, value in HF.items() if key != name})


def test_names_a_missing_or_broken_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="config.json"):
        LlamaConfig.from_pretrained(tmp_path)
    for content, message in (("{", "not valid JSON"), ("[1]", "JSON list"), ("[" * 99999, "JSON")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=f"config.json: .*{message}"):
            LlamaConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="config.json"):
        LlamaConfig.from_pretrained(tmp_path)


def test_an_object_that_is_no_config() -> None:
    with pytest.raises(TypeError, match="config: got int"):
        LlamaConfig.from_hf(5)
