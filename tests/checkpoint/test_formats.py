"""Tests of the FP8 formats that people download, in files made by the library that defines each, or
by hand where it cannot be installed for CPUs (AutoFP8, ModelOpt). Logits against transformers on
the dequantized weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors import compress_module, decompress_module
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from torch import Tensor

from llama_fast import LlamaConfig, reference
from llama_fast.checkpoint.formats import Format, parse
from llama_fast.checkpoint.weights import Linear
from llama_fast.generation.cache import KVCache

from ..support.checkpoints import check_logits, edit_json, hf_model, quantized, save, tensors, write

pytestmark = pytest.mark.usefixtures("one_thread")

# Blocks of 128 rows fit q, k and v, and gate and up; with hf_model's own sizes they do not.
LAYOUTS = {
    "fits": {"num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 256},
    "straddles": {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 192},
}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> dict[str, int]:
    return {"hidden_size": 256, **LAYOUTS[request.param]}


@pytest.fixture
def folder(layout: dict[str, int], tmp_path: Path) -> Path:
    return save(hf_model(**layout), tmp_path)


def plain(linear: Linear) -> Tensor:
    assert linear.scale is not None
    return reference.dequantize_fp8(reference.unpack_weight(linear.weight), linear.scale)


def fused(hf: transformers.LlamaForCausalLM, layer: int = 0) -> Tensor:
    attention = hf.model.layers[layer].self_attn
    return torch.cat([getattr(attention, f"{x}_proj").weight for x in "qkv"]).detach()


# ---- compressed-tensors, by its library ----

GRANULARITY = {"tensor": "tensor", "channel": "row", "block": "block_2d", "group": "block"}


def compress(layout: dict[str, int], folder: Path, form: str, **weights: Any) -> Any:
    """Save a model in FP8, and return one with the weights that the library decompresses."""
    fixed: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    per_tensor = QuantizationArgs(**fixed, strategy="tensor")
    config = QuantizationConfig(
        config_groups={
            "group_0": QuantizationScheme(
                targets=["Linear"],
                weights=QuantizationArgs(**fixed, **weights),
                input_activations=per_tensor,
            )
        },
        ignore=["lm_head"],
        kv_cache_scheme=per_tensor,
        format=form,
        quantization_status="frozen",
    )
    hf = hf_model(**layout)
    apply_quantization_config(hf, config)
    linears = {n: m for n, m in hf.named_modules() if n.endswith("_proj")}
    with torch.no_grad():
        for module in linears.values():
            _, scale = reference.quantize_fp8(module.weight, GRANULARITY[weights["strategy"]])
            module.weight_scale.copy_(scale)
            module.input_scale.fill_(1.0)
            compress_module(module, form)
        for i, layer in enumerate(hf.model.layers):
            layer.self_attn.k_scale.fill_(0.5 + i)
            layer.self_attn.v_scale.fill_(0.25 + i)
    hf.config.save_pretrained(folder)
    write(folder, dict(hf.state_dict()))
    edit_json(folder / "config.json", quantization_config=json.loads(config.model_dump_json()))
    for module in linears.values():
        decompress_module(module)
    out = hf_model(**layout)
    held = {n: t for n, t in hf.state_dict().items() if n.endswith("weight")}
    out.load_state_dict(held)
    return out


@pytest.mark.parametrize("form", ["float-quantized", "naive-quantized"])
@pytest.mark.parametrize(
    "weights",
    [
        {"strategy": "tensor"},
        {"strategy": "channel"},
        {"strategy": "block", "block_structure": [128, 128]},
        {"strategy": "group", "group_size": 128},
    ],
    ids=lambda weights: weights["strategy"],
)
def test_reads_compressed_tensors(
    tmp_path: Path, layout: dict[str, int], weights: dict[str, Any], form: str
) -> None:
    if weights["strategy"] == "group":  # it takes only whole groups
        layout = layout | {"intermediate_size": 256}
    hf = compress(layout, tmp_path, form, **weights)
    held = check_logits(tmp_path, hf).weights
    assert tensors(tmp_path)["model.layers.0.mlp.up_proj.weight"].itemsize == 1
    assert torch.equal(plain(held.layers[0].qkv), fused(hf))  # without loss
    assert held.head.scale is None
    assert held.k_scale is not None and held.k_scale.tolist() == [[0.5], [1.5], [2.5]]
    assert held.v_scale is not None and held.v_scale.tolist() == [[0.25], [1.25], [2.25]]


# ---- the others ----

FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128]}
AUTO_FP8 = {"quant_method": "fp8", "ignored_layers": ["lm_head"]}
MODELOPT = {
    "producer": {"name": "modelopt", "version": "0.29.0"},
    "quantization": {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": "FP8",
        "exclude_modules": ["lm_head", "*norm*"],
    },
}


def test_reads_fbgemm_fp8(folder: Path) -> None:
    ffn, skipped = ("gate_proj", "up_proj", "down_proj"), ["model.layers.0", "self_attn", "lm_head"]
    hf = quantized(
        folder,
        "row",
        "weight_scale",
        lambda name: name.split(".")[-2] in ffn and ".layers.0." not in name,
        **FBGEMM,
        modules_to_not_convert=skipped,
    )
    layers = check_logits(folder, hf).weights.layers
    assert [layer.down.scale is None for layer in layers] == [True, False, False]
    assert layers[1].gate_up.scale_ub == 1200.0 and layers[1].qkv.scale is None


def test_reads_fine_grained_fp8(folder: Path, layout: dict[str, int]) -> None:
    """As stored where a block's rows are of one weight; else a scale per row and 128 columns."""
    hf = quantized(folder, "block_2d", "weight_scale_inv", **BLOCK)
    qkv = check_logits(folder, hf).weights.layers[0].qkv
    assert torch.equal(plain(qkv), fused(hf))
    fits = layout["num_attention_heads"] == 16
    assert qkv.scale is not None and tuple(qkv.scale.shape) == ((4, 2) if fits else (192, 2))


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_reads_auto_fp8(folder: Path, scheme: str) -> None:
    hf = quantized(folder, "tensor", "weight_scale", **AUTO_FP8, activation_scheme=scheme)
    if scheme == "static":
        held = tensors(folder)
        inputs = [n.replace("weight_scale", "input_scale") for n in held if n.endswith("_scale")]
        write(folder, held | {name: torch.ones(1) for name in inputs})
    qkv = check_logits(folder, hf).weights.layers[0].qkv
    assert torch.equal(plain(qkv), fused(hf))


@pytest.mark.parametrize("key", ["ignored_layers", "modules_to_not_convert"])
def test_auto_fp8_may_exclude_modules_by_either_list(key: str) -> None:
    form = parse({"quant_method": "fp8", key: ["lm_head"]})
    assert form is not None and form.excludes("lm_head") and not form.excludes("mlp.up_proj")


@pytest.mark.parametrize("where", ["hf_quant_config.json", "config.json"])
def test_reads_modelopt(folder: Path, where: str) -> None:
    hf = quantized(folder, "tensor", "weight_scale", stored=lambda scale: scale[0])
    held = tensors(folder)
    for i in range(3):
        at = f"model.layers.{i}.self_attn"
        held |= {f"{at}.k_proj.k_scale": torch.tensor(0.5), f"{at}.v_proj.v_scale": torch.ones(1)}
        held[f"{at}.o_proj.input_scale"] = torch.tensor(0.1)
    write(folder, held)
    if where == "config.json":
        settings = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
        edit_json(folder / where, quantization_config=settings)
    else:
        (folder / where).write_text(json.dumps(MODELOPT))
    weights = check_logits(folder, hf).weights
    assert weights.k_scale is not None and weights.k_scale.tolist() == [[0.5]] * 3
    config = LlamaConfig.from_pretrained(folder)
    scales = {"k_scale": weights.k_scale, "v_scale": weights.v_scale}
    cache = KVCache(config, 9, dtype=torch.float8_e4m3fn, **scales)
    assert torch.equal(cache.scales(1)["k_scale"], torch.tensor([0.5]))


# Each: the granularity, its config, and the shape of the scale in the file.
STORED: dict[str, Any] = {
    "[1, 1]": ("tensor", AUTO_FP8, lambda scale: scale.view(1, 1)),
    "0-d": ("tensor", AUTO_FP8, lambda scale: scale.view(())),
    "[N]": ("row", FBGEMM, lambda scale: scale.view(-1)),
    "block": ("block_2d", BLOCK, lambda scale: scale),
    "[N / 128, 1, K / 128, 1]": (
        "block_2d",
        {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"},
        lambda scale: scale[:, None, :, None],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", STORED)
def test_reads_scales_of_any_form(folder: Path, case: str, dtype: torch.dtype) -> None:
    granularity, config, reshaped = STORED[case]
    name = "weight_scale_inv" if config is BLOCK else "weight_scale"
    hf = quantized(folder, granularity, name, stored=lambda s: reshaped(s).to(dtype), **config)
    assert torch.equal(plain(check_logits(folder, hf).weights.layers[0].qkv), fused(hf))


def test_reads_scales_that_are_powers_of_two(folder: Path) -> None:
    def stored(scale: Tensor) -> Tensor:
        return scale.log2().ceil().exp2().to(torch.float8_e8m0fnu)

    hf = quantized(folder, "block_2d", "weight_scale_inv", stored=stored, **BLOCK)
    assert torch.equal(plain(check_logits(folder, hf).weights.layers[0].qkv), fused(hf))


def test_parts_of_one_weight_may_have_scales_of_other_forms(folder: Path) -> None:
    hf = quantized(folder, "block_2d", "weight_scale_inv", lambda n: "q_proj" in n, **BLOCK)
    others = quantized(folder, "tensor", "weight_scale_inv", lambda n: "v_proj" in n, **BLOCK)
    third = quantized(folder, "row", "weight_scale_inv", lambda n: "k_proj" in n, **BLOCK)
    for layer, v, k in zip(*(m.model.layers for m in (hf, others, third)), strict=True):
        layer.self_attn.v_proj, layer.self_attn.k_proj = v.self_attn.v_proj, k.self_attn.k_proj
    assert torch.equal(plain(check_logits(folder, hf).weights.layers[0].qkv), fused(hf))


def test_a_fused_weight_of_mixed_formats_is_dequantized(folder: Path) -> None:
    hf = quantized(folder, "row", "weight_scale", lambda name: "q_proj" in name, **FBGEMM)
    assert check_logits(folder, hf).weights.layers[0].qkv.scale is None


def test_excluded_modules_match_whole_components() -> None:
    form = Format(
        ("weight_scale",), False, ("model.layers.1", "lm_head", "re:.*gate.*", "model.layers.4*")
    )
    assert form.excludes("model.layers.1.mlp.up_proj") and form.excludes("lm_head")
    assert form.excludes("model.layers.3.mlp.gate_proj")
    assert form.excludes("model.layers.4.mlp.up_proj")
    assert not form.excludes("model.layers.12.mlp.up_proj")
    assert not form.excludes("model.layers.3.mlp.up_proj")


def test_excluded_by_a_regex_of_the_beginning() -> None:
    """Match at the start of the name, not necessarily to its end, as compressed-tensors does."""
    form = Format(
        ("weight_scale",), False, (r"re:model\.layers\.[01]\.mlp", "re:mlp", "re:lm_head$")
    )
    assert form.excludes("model.layers.1.mlp.up_proj") and form.excludes("lm_head")
    assert not form.excludes("model.layers.2.mlp.up_proj")
    assert not form.excludes("model.layers.1.self_attn.q_proj")
