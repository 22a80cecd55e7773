"""Tests of FP8 weights in transformers: quantized while loading, loaded as they are, and saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import llama_fast as lf
from llama_fast import reference
from llama_fast.checkpoint.quantize import quantize_checkpoint
from llama_fast.hf import LlamaFastFP8Config
from llama_fast.nn import FP8Linear

from ..support.checkpoints import (
    LINEARS,
    edit_json,
    hf_logits,
    hf_model,
    relative_error,
    save,
    tensors,
    write,
    write_fp8,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# Of the largest logit, fp32, as in tests/checkpoint: e4m3 times a scale is exact in fp32 but for a
# rounding, so both models sum the same products in another order.
LOGITS = 2e-5
FP8 = torch.float8_e4m3fn
WIDE = {"num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 256}
TOKENS = torch.arange(3, 41).view(2, 19)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an fp32 checkpoint whose q, k, v, gate and up fill blocks of 128 rows."""
    torch.manual_seed(0)
    return save(hf_model(**WIDE), tmp_path_factory.mktemp("plain"))


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """Return a copy to rewrite."""
    for file in plain.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def load(path: Path, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
    return auto.from_pretrained(path, **{"dtype": torch.float32, **options})


def quantized(path: Path, *args: Any, **options: Any) -> Any:
    return load(path, quantization_config=LlamaFastFP8Config(*args, **options))


def layers(model: nn.Module) -> dict[str, FP8Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, FP8Linear)}


def dequantized(held: dict[str, Tensor]) -> transformers.LlamaForCausalLM:
    """Return transformers' own model with the weights that a checkpoint means, in fp32."""
    model = hf_model(**WIDE)
    model.load_state_dict(held)
    return model


def check(model: Any, held: dict[str, Tensor], count: int) -> None:
    """Compare a model that holds count FP8 layers with transformers' on the dequantized weights."""
    assert len(layers(model)) == count
    for name, layer in layers(model).items():
        assert layer.weight.dim() == 4 and not layer.weight.requires_grad, name  # packed
        assert torch.equal(layer.dequantize(), held[f"{name}.weight"]), name
    expected = hf_logits(dequantized(held), TOKENS)
    assert relative_error(hf_logits(model, TOKENS), expected) < LOGITS


# ---- quantize while loading, save, load ----

RECIPES: dict[str, tuple[dict[str, Any], int, str]] = {
    "row": ({}, 21, "compressed-tensors"),
    "block": ({"granularity": "block"}, 21, "fp8"),
    "fp8_ffn": ({"recipe": "fp8_ffn"}, 3, "fbgemm_fp8"),
    "some": ({"modules_to_not_convert": ["layers.0", "re:.*down"]}, 12, "compressed-tensors"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_quantizes_saves_and_loads_again(plain: Path, tmp_path: Path, case: str) -> None:
    options, count, method = RECIPES[case]
    model = quantized(plain, **options)
    by = "block_2d" if case == "block" else "row"
    held = tensors(plain)
    for name in layers(model):
        weight = f"{name}.weight"
        held[weight] = reference.dequantize_fp8(*reference.quantize_fp8(held[weight], by))
    check(model, held, count)
    assert {m.scale_ub for m in layers(model).values()} == {1200.0 if case == "fp8_ffn" else None}

    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == method
    excluded = config.get("ignore", config.get("modules_to_not_convert"))
    linears = {name for name in held if name.split(".")[-2] in LINEARS}
    assert {f"{name}.weight" for name in {*excluded, *layers(model)}} == linears
    saved = tensors(tmp_path)
    assert sum(t.dtype == FP8 and t.dim() == 2 for t in saved.values()) == count

    logits = hf_logits(model, TOKENS)
    for again in (load(tmp_path), quantized(tmp_path)):
        assert torch.equal(hf_logits(again, TOKENS), logits)
        assert {m.scale_ub for m in layers(again).values()} == {
            m.scale_ub for m in layers(model).values()
        }
    ours = lf.Llama.from_pretrained(tmp_path, torch.float32)
    assert relative_error(ours(TOKENS), logits) < LOGITS


@pytest.mark.parametrize("recipe", ["fp8", "fp8_ffn"])
def test_loads_what_llama_fast_quantizes(plain: Path, tmp_path: Path, recipe: str) -> None:
    quantize_checkpoint(plain, tmp_path / "out", recipe)
    ours = lf.Llama.from_pretrained(tmp_path / "out", torch.float32)
    got = hf_logits(quantized(tmp_path / "out"), TOKENS)
    assert relative_error(got, ours(TOKENS)) < LOGITS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_other_weights_have_the_dtype(plain: Path, dtype: torch.dtype) -> None:
    model = load(plain, quantization_config=LlamaFastFP8Config(), dtype=dtype)
    assert model.dtype == model.model.norm.weight.dtype == model.lm_head.weight.dtype == dtype
    layer = model.model.layers[1].mlp.up_proj
    assert layer.weight.dtype == FP8 and layer.weight_scale.dtype == torch.float32
    held = tensors(plain)["model.layers.1.mlp.up_proj.weight"]
    assert relative_error(layer.dequantize(), held) < 2**-4 + 2**-8  # half an ulp, and dtype's
    ids = model.generate(TOKENS, max_new_tokens=3, do_sample=False)
    assert ids.shape == (2, 22)


def test_other_heads_find_the_layers(plain: Path, tmp_path: Path) -> None:
    """Names lose or gain the prefix model. between a model and its base."""
    quantized(plain).save_pretrained(tmp_path / "causal")
    for source, options in (
        (plain, {"quantization_config": LlamaFastFP8Config()}),
        (tmp_path / "causal", {}),
    ):
        expected = hf_logits(load(source, **options), TOKENS)
        base = load(source, AutoModel, **options)
        classifier = load(source, AutoModelForSequenceClassification, **options)
        assert len(layers(base)) == len(layers(classifier)) == 21
        with torch.no_grad():
            head = load(source, **options).lm_head
            for model in (base, classifier.model):
                assert torch.equal(head(model(TOKENS).last_hidden_state), expected)
    base.save_pretrained(tmp_path / "base")
    assert len(layers(load(tmp_path / "base", AutoModel))) == 21
    assert len(layers(load(tmp_path / "base"))) == 21  # its head is new


def test_a_tied_head_stays(tmp_path: Path) -> None:
    folder = save(hf_model(tie_word_embeddings=True), tmp_path / "tied")
    model = quantized(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "fp8")
    again = load(tmp_path / "fp8")
    assert torch.equal(hf_logits(again, TOKENS), hf_logits(model, TOKENS))
    ours = lf.Llama.from_pretrained(tmp_path / "fp8", torch.float32)
    assert relative_error(ours(TOKENS), hf_logits(model, TOKENS)) < LOGITS


def test_dequantize_returns_plain_layers(plain: Path) -> None:
    model = quantized(plain)
    logits = hf_logits(model, TOKENS)
    model.dequantize()
    assert not layers(model) and relative_error(hf_logits(model, TOKENS), logits) < LOGITS


# ---- checkpoints of every FP8 format ----


def but_head(name: str) -> bool:
    return name != "lm_head.weight"


def test_loads_fbgemm_fp8(folder: Path) -> None:
    """Meta's 405B form. transformers raises for it without an H100."""

    def chosen(name: str) -> bool:
        return ".mlp." in name and ".layers.0." not in name

    config = {
        "quant_method": "fbgemm_fp8",
        "activation_scale_ub": 1200.0,
        "modules_to_not_convert": ["model.layers.0", "self_attn", "lm_head"],
    }
    held = write_fp8(folder, "row", "weight_scale", chosen, **config)
    model = quantized(folder)
    check(model, held, 6)
    assert {m.scale_ub for m in layers(model).values()} == {1200.0}


def test_loads_fp8_in_blocks(folder: Path) -> None:
    """DeepSeek's form. transformers dequantizes it on a CPU."""
    config = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    held = write_fp8(folder, "block_2d", "weight_scale_inv", but_head, **config)
    check(quantized(folder), held, 21)


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
def test_loads_fp8_by_tensor(folder: Path, name: str, scheme: str, caplog: Any) -> None:
    """transformers' name of the scale, [], and AutoFP8's, [1], with and without static scales of
    activations, which no warning may call unexpected."""
    config = {"quant_method": "fp8", "activation_scheme": scheme, "ignored_layers": ["lm_head"]}
    held = write_fp8(folder, "tensor", name, but_head, **config)
    stored = tensors(folder)
    for tensor in list(stored):
        if tensor.endswith(name):
            stored[tensor] = stored[tensor][0] if name == "weight_scale_inv" else stored[tensor]
            if scheme == "static":
                other = "activation_scale" if name == "weight_scale_inv" else "input_scale"
                stored[tensor.removesuffix(name) + other] = torch.ones(())
    write(folder, stored)
    transformers.logging.enable_propagation()
    check(quantized(folder), held, 21)
    transformers.logging.disable_propagation()
    assert "_scale" not in caplog.text


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_loads_compressed_tensors(plain: Path, tmp_path: Path, strategy: str, static: bool) -> None:
    """Load what the library that defines the format writes."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors import quantization as ct

    e4m3 = {"num_bits": 8, "type": "float", "symmetric": True}
    activations = {"strategy": "tensor"} if static else {"strategy": "token", "dynamic": True}
    scheme = ct.QuantizationScheme(
        targets=["Linear"],
        weights=ct.QuantizationArgs(**e4m3, strategy=strategy),
        input_activations=ct.QuantizationArgs(**e4m3, **activations),
    )
    config = ct.QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    model, held = load(plain), tensors(plain)
    ct.apply_quantization_config(model, config)
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            weight = held[f"{name}.weight"]
            q, scale = reference.quantize_fp8(weight, "row" if strategy == "channel" else "tensor")
            module.weight_scale.data = scale
            if static:
                module.input_scale.data = torch.ones(1)
            held[f"{name}.weight"] = reference.dequantize_fp8(q, scale)
    compressor = compressors.ModelCompressor.from_pretrained_model(
        model, quantization_format="float-quantized"
    )
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    check(quantized(tmp_path), held, 21)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method: got 'gptq'"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"got \[64, 64\]"),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "int-quantized"),
    ],
)
def test_other_formats_are_refused(folder: Path, config: Any, message: str) -> None:
    edit_json(folder / "config.json", quantization_config=config)
    with pytest.raises(ValueError, match=message):
        quantized(folder)


UP = "model.layers.1.mlp.up_proj"
BROKEN = {
    "no-scale": ({f"{UP}.weight_scale": None}, rf"{UP}.*but has no scale"),
    "scale-shape": ({f"{UP}.weight_scale": torch.ones(255, 1)}, rf"{UP}: .*got shape \[255, 1\]"),
    "nan-scale": ({f"{UP}.weight_scale": torch.full((256, 1), torch.nan)}, f"{UP}: .*holds NaN"),
    "no-fp8": (
        {f"{UP}.weight": torch.ones(256, 128)},
        "is F32, but has a scale|got dtype.*float32",
    ),
    "excluded": ({"lm_head.weight_scale": torch.ones(320, 1)}, "lm_head.*not converted"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_refused(folder: Path, case: str) -> None:
    config = {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]}
    write_fp8(folder, "row", "weight_scale", but_head, **config)
    change, message = BROKEN[case]
    held = tensors(folder) | change
    write(folder, {name: t for name, t in held.items() if t is not None})
    with pytest.raises((ValueError, RuntimeError), match=message):
        quantized(folder)


def test_nan_has_no_fp8_form(folder: Path) -> None:
    held = tensors(folder)
    held[f"{UP}.weight"][3, 3] = torch.nan
    write(folder, held)
    with pytest.raises((ValueError, RuntimeError)):  # transformers 5 wraps it
        quantized(folder)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="recipe: got 'int4'"):
        LlamaFastFP8Config("int4")
    with pytest.raises(ValueError, match="granularity: got 'tensor'"):
        LlamaFastFP8Config(granularity="tensor")
    with pytest.raises(ValueError, match="want 'row' for the recipe fp8_ffn"):
        LlamaFastFP8Config("fp8_ffn", granularity="block")


# ---- memory ----

PEAK = """
import gc, sys, threading, time, torch, transformers
from llama_fast.hf import LlamaFastFP8Config
def anonymous():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith("RssAnon"))
torch.set_num_threads(1)
config = LlamaFastFP8Config()
transformers.LlamaForCausalLM, transformers.AutoModelForCausalLM._model_mapping
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
for source in sys.argv[1:]:
    model = None
    gc.collect()
    peak, before, done = 0, anonymous(), False
    thread = threading.Thread(target=watch)
    thread.start()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=torch.bfloat16
    )
    done = True
    thread.join()
    fp8 = sum(t.nbytes for t in model.state_dict().values() if t.element_size() == 1)
    rest = sum(t.nbytes for t in model.state_dict().values() if t.element_size() != 1)
    print(peak - before, fp8, rest)
"""


def test_loading_holds_the_quantized_model_and_a_layer(tmp_path: Path) -> None:
    """Count anonymous memory: the checkpoint's pages are mapped, and the system may drop them."""
    with torch.device("meta"):
        shapes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
        hf = hf_model(**shapes, num_attention_heads=64, max_position_embeddings=64)
    hf.config.save_pretrained(tmp_path / "bf16")
    held = {n: torch.ones(p.shape, dtype=torch.bfloat16) for n, p in hf.named_parameters()}
    write(tmp_path / "bf16", held)
    layer = sum(t.nbytes for name, t in held.items() if ".layers.0." in name)
    quantize_checkpoint(tmp_path / "bf16", tmp_path / "fp8")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "bf16"), str(tmp_path / "fp8")]
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    for source, line in zip(("bf16", "fp8"), run.stdout.splitlines()[-2:], strict=True):
        grown, fp8, rest = map(int, line.split())
        assert fp8 > 110e6 and grown < fp8 + rest + layer, (source, grown, fp8, rest, layer)
