"""Tests of conversion from and to transformers models in memory, and of Llama.to and repr."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llama_fast as lf
from llama_fast import Llama, LlamaConfig

from ..support.checkpoints import LOGITS, hf_model, save

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.arange(3, 35).reshape(2, 16)


def bits(model: Llama) -> list[Tensor]:
    """Return all tensors of a model's weights as bytes."""
    w = model.weights
    held = [t for x in w.linears for t in (x.weight, x.scale, x.bias) if t is not None]
    return [t.contiguous().view(-1).view(torch.uint8) for t in (*held, *w.others)]


def equal(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def same(a: Llama, b: Llama) -> bool:
    return a.config == b.config and equal(bits(a), bits(b))


def converted_fp8(granularity: str, **changes: Any) -> Any:
    """Return a model as LlamaFastFP8Config makes it."""
    model = hf_model(**changes)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, lf.nn.FP8Linear.from_linear(module, granularity))
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_a_model_in_memory_loads_as_its_checkpoint(
    tmp_path: Path, tied: bool, quantize: str | None
) -> None:
    hf = hf_model(tie_word_embeddings=tied)
    want = Llama.from_pretrained(save(hf, tmp_path), torch.float32, quantize)
    got = Llama.from_transformers(hf, quantize=quantize)
    assert same(got, want) and got.dtype == torch.float32 and got.tokenizer is None
    if quantize is None:
        with torch.no_grad():
            logits = hf(TOKENS).logits
            assert (got(TOKENS) - logits).abs().max() < LOGITS * logits.abs().max()
            for parameter in hf.parameters():  # nothing is shared
                parameter.zero_()
        assert same(got, want)


@pytest.mark.parametrize("granularity", ["row", "tensor", "block"])
def test_fp8_linear_keeps_its_weights(granularity: str) -> None:
    hf = converted_fp8(granularity)
    got = Llama.from_transformers(hf)
    assert all(x.scale is not None for x in got.weights.linears[:-1])
    with torch.no_grad():
        logits = hf(TOKENS).logits
    assert (got(TOKENS) - logits).abs().max() < LOGITS * logits.abs().max()


@pytest.mark.parametrize("quantize", [None, "fp8", "fp8_all"])
def test_an_accelerated_model(quantize: str | None) -> None:
    hf = lf.accelerate(hf_model(), quantize=quantize)
    torch.manual_seed(0)
    want = Llama.from_transformers(hf_model(), quantize=quantize)
    assert same(Llama.from_transformers(hf), want)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("quantize", [None, "fp8", "fp8_all", "fp8_ffn"])
def test_there_and_back(quantize: str | None, tied: bool) -> None:
    model = Llama.from_transformers(hf_model(tie_word_embeddings=tied), "bfloat16", quantize)
    hf = model.to_transformers()
    back = Llama.from_transformers(hf)
    if tied and quantize == "fp8_all":
        assert not back.config.tie_word_embeddings
        model.config = dataclasses.replace(model.config, tie_word_embeddings=False)
    assert same(back, model)
    with torch.no_grad():
        logits = hf(TOKENS).logits.float()
    assert (model(TOKENS) - logits).abs().max() < 0.05 * logits.abs().max()  # bf16
    assert hf.dtype == torch.bfloat16 and not hf.training


def test_back_to_transformers_is_the_model_that_was() -> None:
    hf = hf_model()
    back = Llama.from_transformers(hf).to_transformers()
    assert equal(hf.state_dict().values(), back.state_dict().values())
    with torch.no_grad():
        torch.testing.assert_close(back(TOKENS).logits, hf(TOKENS).logits, rtol=0, atol=1e-5)


def with_blocks() -> Llama:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 16}
    return Llama.from_transformers(converted_fp8("block", num_key_value_heads=8, **sizes))


def test_weights_with_block_scales_go_back() -> None:
    model = with_blocks()
    assert same(Llama.from_transformers(model.to_transformers()), model)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("quantize", ["fp8", "fp8_all", "fp8_ffn", "block"])
def test_what_goes_back_can_be_saved(quantize: str, tied: bool, tmp_path: Path) -> None:
    if quantize == "block":
        model = with_blocks()
    else:
        deep = hf_model(tie_word_embeddings=tied, num_hidden_layers=4)
        model = Llama.from_transformers(deep, "bfloat16", quantize)
    hf = model.to_transformers()
    hf.save_pretrained(tmp_path)
    loaded = Llama.from_pretrained(tmp_path, model.dtype)
    assert equal(bits(loaded), bits(model))
    bounds = [linear.scale_ub for linear in loaded.weights.linears]
    assert bounds == [linear.scale_ub for linear in model.weights.linears]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=model.dtype)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, hf(TOKENS).logits)


def test_formats_that_no_checkpoint_has_are_not_saved(tmp_path: Path) -> None:
    hf = Llama.from_transformers(hf_model(), quantize="fp8").to_transformers()
    hf.model.layers[1].mlp.down_proj.scale_ub = 1200.0
    with pytest.raises(NotImplementedError, match=r"down_proj: has .*1200.0, .*quantize`"):
        hf.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "kind", [{"rope_type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0}]
)
def test_rope_types_go_back(kind: dict[str, Any]) -> None:
    config = {"rope_theta": 1e4, "rope_parameters": {**kind, "rope_theta": 1e4}}
    fields = hf_model().config.to_dict() | {"max_position_embeddings": 512} | config
    model = Llama.from_config(LlamaConfig.from_hf(fields), dtype="float32")
    hf = model.to_transformers()
    with torch.no_grad():
        logits = hf(TOKENS).logits
    assert (model(TOKENS) - logits).abs().max() < LOGITS * logits.abs().max()


def strange(change: str) -> Any:
    hf = hf_model()
    layer = hf.model.layers[1]
    if change == "class":
        return hf.model
    if change == "subclass":
        layer.self_attn.q_proj.__class__ = type("Linear4bit", (nn.Linear,), {})
    elif change == "bias":
        layer.mlp.down_proj.bias = nn.Parameter(torch.zeros(128))
    elif change == "adapter":
        layer.mlp.lora_A = nn.Linear(2, 2, bias=False)
    elif change == "meta":
        layer.mlp.up_proj.to("meta")
    elif change == "shape":
        layer.mlp.up_proj.weight = nn.Parameter(torch.zeros(3, 128))
    elif change == "activations":
        made = lf.nn.FP8Linear.from_linear(layer.mlp.up_proj, quantize_activation=True)
        hf = converted_fp8("row")
        hf.model.layers[1].mlp.up_proj = made
    return hf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("class", "model: got LlamaModel, want a LlamaForCausalLM"),
        ("subclass", r"layers.1.self_attn.q_proj: got .*Linear4bit, want nn.Linear or"),
        ("bias", "layers.1.mlp.down_proj: got a bias, want none"),
        ("adapter", "Llama has no model.layers.1.mlp.lora_A.weight; merge adapters first"),
        ("meta", "layers.1.mlp.up_proj.weight: is on the meta device"),
        ("shape", r"up_proj.weight: got shape \[3, 128\], the config wants \[192, 128\]"),
        ("activations", "want one scale_ub, and quantize_activation=None"),
    ],
)
def test_what_llama_cannot_compute_is_refused(change: str, message: str) -> None:
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=message):
        Llama.from_transformers(strange(change))


# ---- Llama.to, repr, tokenizer ----


@pytest.mark.parametrize("quantize", [None, "fp8_all"])
def test_to_casts_in_place(quantize: str | None) -> None:
    hf = hf_model()
    model = Llama.from_transformers(hf, quantize=quantize)
    assert model.to(torch.bfloat16) is model and model.dtype == torch.bfloat16
    assert same(model, Llama.from_transformers(hf, "bfloat16", quantize)) or quantize
    before = bits(model)
    model.to("cpu", "float32")
    model.to(device="cpu", dtype="bfloat16")
    assert equal(bits(model), before)
    assert model.generate([[1, 2]], 3)
    for target in ("float8_e4m3fn", "int32"):
        with pytest.raises(ValueError, match="dtype: got torch.* want bfloat16"):
            model.to(target)


def test_to_another_device_unpacks_and_back_packs() -> None:
    model = Llama.from_config(LlamaConfig(320, 128, 192, 2, 8, 2, 16, tie_word_embeddings=True))
    packed = [x.weight.shape for x in model.weights.linears]
    model.to("meta")
    assert model.device.type == "meta" and all(x.weight.dim() == 2 for x in model.weights.linears)
    assert model.weights.head.weight is model.weights.embedding
    assert model.rope.upto(1).is_meta and any(len(shape) == 4 for shape in packed)


def test_repr_says_what_the_model_is() -> None:
    config = LlamaConfig(320, 128, 192, 2, 8, 2, 16)
    model = Llama.from_config(config)
    count = 2 * 320 * 128 + 2 * (128 * (192 + 128 + 3 * 192) + 2 * 128) + 128
    assert (
        repr(model)
        == f"Llama(2 layers, {count:,} parameters, bfloat16, {2 * count:,} bytes on cpu)"
    )
    model = Llama.from_config(config, quantize="fp8")
    assert "bfloat16 with FP8 in 8 of 9 linear products" in repr(model)
    assert f"{count:,} parameters" in repr(model) and f"{model.weights.nbytes:,}" in repr(model)
