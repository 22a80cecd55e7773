"""Tests of checkpoints written in FP8: their contents, their readers, and interrupted writing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import llama_fast as lf
from llama_fast.checkpoint import quantize as module
from llama_fast.checkpoint.quantize import quantize_checkpoint
from llama_fast.hf.fp8 import LlamaFastFP8Config
from llama_fast.reference import dequantize_fp8, quantize_fp8

from ..support.checkpoints import (
    edit_json,
    hf_logits,
    hf_model,
    relative_error,
    save,
    tensors,
    write,
)

RECIPES = ["fp8", "fp8_all", "fp8_ffn"]
INDEX = "model.safetensors.index.json"
STAY = {"consolidated.00.pth", "model.gguf", "pytorch_model.bin.index.json", ".gitattributes"}
TOKENS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bf16 checkpoint in shards, with files that should and should not be copied."""
    torch.manual_seed(0)
    folder = save(
        hf_model(num_hidden_layers=4).bfloat16(),
        tmp_path_factory.mktemp("source"),
        max_shard_size="300KB",
    )
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("a license")
    for name in STAY:
        (folder / name).write_text("weights in another format, or no part of the checkpoint")
    return folder


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def expected_fp8(name: str, recipe: str) -> bool:
    if name == "lm_head.weight":
        return recipe == "fp8_all"
    if not name.endswith("_proj.weight"):
        return False
    return recipe != "fp8_ffn" or (".mlp." in name and name.split(".")[2] in "12")


@pytest.mark.parametrize("recipe", RECIPES)
def test_tensors_are_the_reference_bit_for_bit(source: Path, tmp_path: Path, recipe: str) -> None:
    out = tmp_path / "out"
    seen: list[tuple[int, int]] = []
    summary = quantize_checkpoint(source, out, recipe, on_bytes=lambda *x: seen.append(x))
    before, after = all_tensors(source), all_tensors(out)
    for name, weight in before.items():
        got = after.pop(name)
        if expected_fp8(name, recipe):
            q, scale = quantize_fp8(weight)
            assert torch.equal(got.view(torch.uint8), q.view(torch.uint8)), name
            assert torch.equal(after.pop(f"{name}_scale"), scale), name
        else:
            assert got.dtype == weight.dtype and torch.equal(got, weight), name
    assert not after
    assert summary.quantized == sum(expected_fp8(name, recipe) for name in before)
    assert summary.tensors == len(before)
    assert seen[-1] == (summary.bytes_before, summary.bytes_before)


def test_the_folder_is_complete(source: Path, tmp_path: Path) -> None:
    summary = quantize_checkpoint(source, tmp_path / "out")
    files = {p.name for p in source.iterdir()} - STAY
    assert {p.name for p in (tmp_path / "out").iterdir()} == files
    for name in ("tokenizer.json", "LICENSE", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == summary.bytes_after
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    before, after = (
        json.loads((p / "config.json").read_text()) for p in (source, tmp_path / "out")
    )
    assert after.pop("quantization_config")["format"] == "float-quantized"
    assert after == before


def test_everything_in_a_file_is_aligned(tmp_path: Path) -> None:
    """Require alignment, because readers map files: the data begins at a multiple of 8 bytes and
    each tensor at a multiple of its item size, also beside FP8 weights of 33 x 101."""
    model = hf_model(
        hidden_size=101, intermediate_size=33, num_attention_heads=1, num_key_value_heads=1
    )
    folder = save(model, tmp_path / "in", max_shard_size="100KB")
    quantize_checkpoint(folder, tmp_path / "out")
    files = [*(tmp_path / "out").glob("*.safetensors")]
    assert len(files) > 3
    for file in files:
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        assert length % 8 == 0
        for name, entry in json.loads(content[8 : 8 + length]).items():
            if name != "__metadata__":
                size = {"F32": 4, "F8_E4M3": 1}[entry["dtype"]]
                assert entry["data_offsets"][0] % size == 0, name


@pytest.mark.parametrize("recipe", RECIPES)
def test_transformers_and_llama_fast_read_it(source: Path, tmp_path: Path, recipe: str) -> None:
    quantize_checkpoint(source, tmp_path / "out", recipe)
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in expected.named_parameters():
            if expected_fp8(name, recipe):
                weight.copy_(dequantize_fp8(*quantize_fp8(weight.bfloat16())))
    want = hf_logits(expected, TOKENS)
    dequantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    assert torch.equal(hf_logits(dequantized, TOKENS), want)
    ours = lf.Llama.from_pretrained(tmp_path / "out", torch.float32)
    assert relative_error(ours(TOKENS), want) < 2e-5
    # transformers also quantizes activations. e4m3 has 3 bits of mantissa, and random weights
    # average none of the noise away.
    in_fp8 = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    error = hf_logits(in_fp8, TOKENS) - want
    assert 0 < error.norm() / want.norm() < 0.3


def test_large_weights_go_piece_by_piece(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_checkpoint(source, tmp_path / "whole")
    monkeypatch.setattr(module, "_PIECE_BYTES", 1000)
    quantize_checkpoint(source, tmp_path / "pieces")
    whole, pieces = all_tensors(tmp_path / "whole"), all_tensors(tmp_path / "pieces")
    for name, tensor in whole.items():
        assert torch.equal(tensor.view(torch.uint8), pieces[name].view(torch.uint8)), name


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_loading_with_a_recipe_means_what_the_command_writes(
    tmp_path: Path, recipe: str, tied: bool
) -> None:
    """Compare bits of one fp16 file's logits: loaded with the recipe, or written and loaded."""
    source, out = tmp_path / "in", tmp_path / "out"
    save(hf_model(tie_word_embeddings=tied).half(), source)
    summary = quantize_checkpoint(source, out, recipe)
    assert not (out / INDEX).exists()
    assert summary.tensors == len(tensors(source)) + (tied and recipe == "fp8_all")
    written = lf.Llama.from_pretrained(out, torch.float32)
    loaded = lf.Llama.from_pretrained(source, torch.float32, recipe)
    for model in (written, loaded):
        assert (model.weights.head.scale is not None) == (recipe == "fp8_all")
    assert torch.equal(written(TOKENS), loaded(TOKENS))
    theirs = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert relative_error(written(TOKENS), hf_logits(theirs, TOKENS)) < 2e-5


ENDS = {
    "SIGINT": (KeyboardInterrupt, None),
    "SIGTERM": (SystemExit, str(128 + signal.SIGTERM)),
    "SIGHUP": (SystemExit, str(128 + signal.SIGHUP)),
    "a full disk": (OSError, r"No space left on device: .*a/b/out"),
}


@pytest.mark.parametrize("how", ENDS)
def test_interrupted_it_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    calls, target = 0, tmp_path / "a" / "b" / "out"

    def stop_midway(x: Tensor) -> Any:
        nonlocal calls
        calls += 1
        if calls == 9:
            assert any(target.parent.glob(".out.partial-*/*.safetensors")), "nothing written yet"
            if how == "a full disk":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            signal.raise_signal(getattr(signal, how))
        return quantize_fp8(x)

    monkeypatch.setattr(module, "quantize_fp8", stop_midway)
    error, message = ENDS[how]
    # A shell's background job, in CI too, starts with SIGINT ignored.
    defaults = {signal.SIGINT: signal.default_int_handler}
    defaults |= dict.fromkeys((signal.SIGTERM, signal.SIGHUP), signal.SIG_DFL)
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    try:
        with pytest.raises(error, match=message):
            quantize_checkpoint(source, target)
        assert {number: signal.getsignal(number) for number in defaults} == defaults
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert list(tmp_path.iterdir()) == []


def test_a_program_keeps_its_own_handler_of_sigterm(source: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        quantize_checkpoint(
            source, tmp_path / "out", on_bytes=lambda *_: signal.raise_signal(signal.SIGTERM)
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen and (tmp_path / "out").exists()


def test_space_is_checked_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Require the files' size, within a few kilobytes of headers, and both sizes in the message."""
    quantize_checkpoint(source, tmp_path / "out")
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    for free, fits in ((size - 1, False), (size + 20_000, True)):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda path, usage=usage: usage)
        target = tmp_path / str(fits) / "out"
        if fits:
            quantize_checkpoint(source, target)
            continue
        message = rf"No space left.*has [\d,]+ bytes, the disk {free:,} free: '{target}'"
        with pytest.raises(OSError, match=message):
            quantize_checkpoint(source, target)
        assert not target.parent.exists()


def test_an_empty_folder_may_be_there_already(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    quantize_checkpoint(source, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_refuses_to_overwrite(source: Path, tmp_path: Path) -> None:
    (tmp_path / "keep").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        quantize_checkpoint(source, tmp_path)
    with pytest.raises(FileExistsError, match="exists already"):
        quantize_checkpoint(source, tmp_path / "keep")
    assert (tmp_path / "keep").read_text() == "mine"


def test_refuses_to_write_into_the_input(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    for same in (source, source / ".." / source.name, tmp_path / "link"):
        with pytest.raises(ValueError, match="the input itself"):
            quantize_checkpoint(source, same)


def test_refuses_what_is_quantized_already(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "once")
    with pytest.raises(ValueError, match="already quantized"):
        quantize_checkpoint(tmp_path / "once", tmp_path / "twice")
    modelopt = Path(shutil.copytree(source, tmp_path / "modelopt")) / "hf_quant_config.json"
    modelopt.write_text('{"quantization": {"quant_algo": "FP8"}}')
    with pytest.raises(ValueError, match="already quantized"):
        quantize_checkpoint(modelopt.parent, tmp_path / "twice")
    modelopt.write_text('{"quantization": null}')  # says nothing, also not of the output
    quantize_checkpoint(modelopt.parent, tmp_path / "twice")
    assert not (tmp_path / "twice" / modelopt.name).exists()


def test_refuses_weights_that_have_no_fp8_form(tmp_path: Path) -> None:
    folder = save(hf_model(), tmp_path / "in")
    held = tensors(folder)
    held["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    write(folder, held)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight: holds NaN"):
        quantize_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_zero_weights_under_flush_to_zero(tmp_path: Path) -> None:
    folder = save(hf_model(), tmp_path / "in")
    held = tensors(folder)
    held["model.layers.1.mlp.up_proj.weight"].zero_()
    write(folder, held)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU has no flush-to-zero mode")
    try:
        quantize_checkpoint(folder, tmp_path / "out")
        scale = all_tensors(tmp_path / "out")["model.layers.1.mlp.up_proj.weight_scale"]
        assert (scale >= torch.finfo(torch.float32).tiny).all()
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("wrong", [0.0, float("nan"), float("inf")])
def test_no_scale_is_written_that_is_no_positive_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    folder = save(hf_model(), tmp_path / "in")
    monkeypatch.setattr(
        module, "quantize_fp8", lambda x: (quantize_fp8(x)[0], torch.full((len(x), 1), wrong))
    )
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        quantize_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = save(hf_model(), tmp_path / "in")
    held = tensors(folder)
    del held["model.norm.weight"]
    write(folder, held)
    with pytest.raises(ValueError, match=r"lacks model\.norm\.weight"):
        quantize_checkpoint(folder, tmp_path / "out")


def test_refuses_a_recipe_that_would_change_nothing(tmp_path: Path) -> None:
    folder = save(hf_model(num_hidden_layers=2), tmp_path / "in")
    with pytest.raises(ValueError, match="leaves all of its 2 layers"):
        quantize_checkpoint(folder, tmp_path / "out", "fp8_ffn")


def test_refuses_other_architectures_and_recipes(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recipe: got 'int4'"):
        quantize_checkpoint(source, tmp_path / "out", "int4")
    folder = save(hf_model(), tmp_path / "in")
    edit_json(folder / "config.json", model_type="mamba")
    with pytest.raises(ValueError, match="model_type: got 'mamba'"):
        quantize_checkpoint(folder, tmp_path / "out")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_transformers_models_have_the_same_recipes(tmp_path: Path, recipe: str, tied: bool) -> None:
    """Compare the modules in FP8 after accelerate() and after loading with LlamaFastFP8Config."""
    hf = hf_model(num_hidden_layers=4, tie_word_embeddings=tied)
    linears = {n for n, m in hf.named_modules() if isinstance(m, torch.nn.Linear)}
    assert "lm_head" in linears
    wanted = {n for n in linears if expected_fp8(f"{n}.weight", recipe)}
    config = LlamaFastFP8Config(recipe)
    save(hf, tmp_path)
    assert in_fp8(lf.accelerate(hf, recipe)) == wanted
    if tied and recipe == "fp8_all":
        with pytest.raises(ValueError, match="a head that is tied to the embedding"):
            AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
        assert in_fp8(loaded) == wanted


def in_fp8(model: torch.nn.Module) -> set[str]:
    return {n for n, m in model.named_modules() if isinstance(m, lf.nn.FP8Linear)}
