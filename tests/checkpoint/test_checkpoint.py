"""Tests of reading checkpoints: quantizing, every FP8 format, memory, and hostile files."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_fast import Llama, reference
from llama_fast.checkpoint.formats import Format
from llama_fast.checkpoint.shards import Shards

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

LOGITS = 2e-5  # of the largest, fp32, as in test_model.py: FP8 weights are exact in fp32
ALL_FP8_FFN = {"gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(hf_model(), tmp_path)


def check_means(folder: Path, meant: dict[str, Tensor], tolerance: float = LOGITS) -> Llama:
    """Compare the loaded model with transformers on the dequantized weights."""
    hf = hf_model(**LAYOUT)
    hf.load_state_dict(meant, strict=False)
    tokens = torch.randint(320, (2, 19))
    model = Llama.from_pretrained(folder, torch.float32)
    assert relative_error(model(tokens), hf_logits(hf, tokens)) <= tolerance
    return model


# Blocks of 128 rows fit q, k and v here, and gate and up.
LAYOUT: dict[str, Any] = {
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 256,
}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
        }
    },
}
BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    return save(hf_model(**LAYOUT), tmp_path)


def test_reads_fbgemm_fp8(wide: Path) -> None:
    skipped = ["model.layers.0", "self_attn", "lm_head"]
    meant = write_fp8(
        wide,
        "row",
        "weight_scale",
        lambda name: name.split(".")[-2] in ALL_FP8_FFN and ".layers.0." not in name,
        **FBGEMM,
        modules_to_not_convert=skipped,
    )
    layers = check_means(wide, meant).weights.layers
    assert [layer.down.scale is None for layer in layers] == [True, False, False]
    assert layers[1].gate_up.scale_ub == 1200.0 and layers[1].qkv.scale is None


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_reads_compressed_tensors(wide: Path, granularity: str) -> None:
    meant = write_fp8(
        wide, granularity, "weight_scale", lambda n: n != "lm_head.weight", **COMPRESSED
    )
    held = tensors(wide)
    held["model.layers.0.mlp.up_proj.input_scale"] = torch.ones(1)
    write(wide, held)
    weights = check_means(wide, meant).weights
    assert weights.layers[0].qkv.scale is not None and weights.head.scale is None


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
def test_reads_fp8_by_tensor(wide: Path, name: str) -> None:
    """Read the fp8 format without blocks: transformers' name, and AutoFP8's, with static scales."""
    config = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    meant = write_fp8(wide, "tensor", name, lambda n: n != "lm_head.weight", **config)
    held = tensors(wide)
    held["model.layers.0.mlp.up_proj.activation_scale"] = torch.ones(())
    held[f"model.layers.0.mlp.up_proj.{name}"] = held[f"model.layers.0.mlp.up_proj.{name}"][0]
    write(wide, held)
    weights = check_means(wide, meant).weights
    assert weights.layers[0].qkv.scale is not None and weights.head.scale is None


def test_reads_fine_grained_fp8(wide: Path) -> None:
    meant = write_fp8(
        wide, "block_2d", "weight_scale_inv", lambda n: n != "lm_head.weight", **BLOCK
    )
    scale = check_means(wide, meant).weights.layers[0].qkv.scale
    assert scale is not None and tuple(scale.shape) == (4, 1)  # as stored: 512 rows, 128 columns


def test_blocks_that_straddle_fused_parts_are_quantized_by_row(folder: Path) -> None:
    """Give k 32 rows, so that its block's scale would also cover rows of v."""
    meant = write_fp8(
        folder, "block_2d", "weight_scale_inv", lambda n: n != "lm_head.weight", **BLOCK
    )
    layer = Llama.from_pretrained(folder, torch.float32).weights.layers[0]
    parts = [meant[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv"]
    expected = reference.dequantize_fp8(*reference.quantize_fp8(torch.cat(parts)))
    assert layer.qkv.scale is not None and tuple(layer.qkv.scale.shape) == (192, 1)
    plain = reference.dequantize_fp8(reference.unpack_weight(layer.qkv.weight), layer.qkv.scale)
    assert torch.equal(plain, expected)


def test_a_fused_weight_of_mixed_formats_is_dequantized(wide: Path) -> None:
    meant = write_fp8(wide, "row", "weight_scale", lambda name: "q_proj" in name, **FBGEMM)
    assert check_means(wide, meant).weights.layers[0].qkv.scale is None


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("quantize", ["fp8", "fp8_all", "fp8_ffn"])
def test_quantizes_on_load(tmp_path: Path, quantize: str, tied: bool) -> None:
    hf = hf_model(tie_word_embeddings=tied)
    model = Llama.from_pretrained(save(hf, tmp_path), torch.float32, quantize)
    with torch.no_grad():
        for name, linear in hf.named_modules():
            if name.split(".")[-1] not in LINEARS:
                continue
            inside = ".layers.1.mlp." in f".{name}"
            if inside or (quantize == "fp8" and name != "lm_head") or quantize == "fp8_all":
                q = reference.dequantize_fp8(*reference.quantize_fp8(linear.weight))
                linear.weight = torch.nn.Parameter(q)  # a tied embedding keeps its own
    tokens = torch.randint(320, (2, 19))
    assert relative_error(model(tokens), hf_logits(hf, tokens)) <= LOGITS


def test_quantizes_what_the_file_holds(folder: Path) -> None:
    """Load fp32 weights into a bf16 model. Rounding them to bf16 first would round twice."""
    held = tensors(folder)["model.layers.1.self_attn.o_proj.weight"]
    ours = Llama.from_pretrained(folder, torch.bfloat16, "fp8").weights.layers[1].output
    q, scale = reference.quantize_fp8(held)
    assert torch.equal(reference.unpack_weight(ours.weight).float(), q.float())
    assert ours.scale is not None and torch.equal(ours.scale, scale)


def test_a_tied_checkpoint_may_store_its_head(tmp_path: Path) -> None:
    folder = save(hf_model(tie_word_embeddings=True), tmp_path)
    tokens, held = torch.randint(320, (1, 9)), tensors(folder)
    assert "lm_head.weight" not in held
    model = Llama.from_pretrained(folder, torch.float32)
    assert model.weights.nbytes == sum(t.nbytes for t in held.values())  # a tied one once
    first = model(tokens)
    write(folder, held | {"lm_head.weight": held["model.embed_tokens.weight"].clone()})
    assert torch.equal(Llama.from_pretrained(folder, torch.float32)(tokens), first)


def test_shards_give_what_one_file_gives(tmp_path: Path) -> None:
    hf = hf_model()
    one, many = save(hf, tmp_path / "one"), save(hf, tmp_path / "many", max_shard_size="100KB")
    assert len(list(many.glob("*.safetensors"))) > 3
    tokens = torch.randint(320, (1, 9))
    first, second = (Llama.from_pretrained(path)(tokens) for path in (one, many))
    assert torch.equal(first, second)


def test_harmless_extras_are_ignored(folder: Path) -> None:
    held = tensors(folder)
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    write(folder, held)
    Llama.from_pretrained(folder)


def test_excluded_modules_match_whole_components() -> None:
    form = Format(("weight_scale",), False, ("model.layers.1", "lm_head", "re:.*gate.*"))
    assert form.excludes("model.layers.1.mlp.up_proj") and form.excludes("lm_head")
    assert form.excludes("model.layers.3.mlp.gate_proj")
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


PEAK = """
import resource, sys, torch
from llama_fast import Llama
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = Llama.from_pretrained(sys.argv[1], torch.bfloat16, sys.argv[2] or None)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((peak - before) * 1024, model.weights.nbytes)
"""


@pytest.mark.parametrize("quantize", ["", "fp8"], ids=["bf16", "fp8"])
def test_loading_holds_no_second_copy(tmp_path: Path, quantize: str) -> None:
    with torch.device("meta"):
        shapes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
        hf = hf_model(**shapes, num_attention_heads=64, max_position_embeddings=64)
    hf.config.save_pretrained(tmp_path)
    held = {n: torch.ones(p.shape, dtype=torch.bfloat16) for n, p in hf.named_parameters()}
    write(tmp_path, held)
    command = [sys.executable, "-c", PEAK, str(tmp_path), quantize]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, held = map(int, run.stdout.split())
    largest = 2 * 4096 * 1024 * 2  # gate and up, bf16
    # A fused weight may exist three times: mapped, plain, packed.
    assert grown < 1.05 * held + 3 * largest + (16 << 20)


# ---- faults 55 and 56 ----


class Boom:
    """Create a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_f55_pickles_are_refused(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Boom(folder / "ran")))
    for path in (folder, folder / name):
        with pytest.raises(ValueError, match=f"{name}: pickles run code .*save_pretrained"):
            Shards(path)
    with pytest.raises(ValueError, match="save_pretrained"):
        Llama.from_pretrained(folder)
    assert not (folder / "ran").exists()


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def f32(start: int, end: int, *shape: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape or [(end - start) // 4], "data_offsets": [start, end]}


HOSTILE = {
    "overlap": raw({"a": f32(0, 8), "b": f32(4, 12)}, bytes(12)),
    "hole": raw({"a": f32(0, 8), "b": f32(12, 20)}, bytes(20)),
    "shape-overflows": raw({"a": f32(0, 8, 2**62, 4)}, bytes(8)),
    "shape-2-to-64": raw({"a": f32(0, 8, 2**64)}, bytes(8)),
    "negative-shape": raw({"a": f32(0, 8, -2)}, bytes(8)),
    "huge-header": raw({"a": f32(0, 8)}, bytes(8), length=2**62),
    "header-past-the-end": raw({"a": f32(0, 8)}, bytes(8), length=10_000),
    "truncated": raw({"a": f32(0, 8)}, bytes(4)),
    "trailing": raw({"a": f32(0, 8)}, bytes(9)),
    "not-json": raw(b'{"a": [', bytes(8)),
    "unknown-dtype": raw({"a": f32(0, 8) | {"dtype": "F7"}}, bytes(8)),
    "empty": b"",
    "pickle": b"\x80\x02}q\x00.",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_f56_hostile_file_is_named(folder: Path, case: str) -> None:
    (folder / "model.safetensors").write_bytes(HOSTILE[case])
    with pytest.raises(ValueError, match="model.safetensors: not a valid safetensors file"):
        Llama.from_pretrained(folder)


def test_f56_truncated_real_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors: not a valid"):
        Llama.from_pretrained(folder)


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({NORM: torch.ones(64)}, r"model.norm.weight: got shape \[64\], the config wants \[128\]"),
        ({UP: torch.ones(128, 192)}, r"up_proj.weight: got shape \[128, 192\]"),
        ({UP: torch.ones(192, 128, dtype=torch.int32)}, "up_proj.weight: got dtype I32"),
        ({UP: torch.ones(192, 128).to(torch.float8_e4m3fn)}, "up_proj.weight: is FP8, but"),
        ({UP: None}, f"the checkpoint lacks {UP}"),
        ({"lm_head.weight": None}, "the checkpoint lacks lm_head.weight"),
        ({"model.layers.7.x.weight": torch.ones(1)}, "does not want: model.layers.7.x.weight"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(128)}, "does not want: .*bias"),
    ],
    ids=["shape", "transposed", "dtype", "fp8", "missing", "missing-head", "extra", "bias"],
)
def test_f56_contents_other_than_the_config_says(
    folder: Path, change: dict[str, Tensor | None], message: str
) -> None:
    held = {name: t for name, t in (tensors(folder) | change).items() if t is not None}
    write(folder, held)
    with pytest.raises(ValueError, match=message):
        Llama.from_pretrained(folder)


def test_f56_a_config_of_absurd_size_allocates_nothing(folder: Path) -> None:
    edit_json(folder / "config.json", vocab_size=2**60)
    with pytest.raises(ValueError, match="embed_tokens.weight: got shape"):
        Llama.from_pretrained(folder)


@pytest.mark.parametrize(
    "target", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", 7, "x.bin"]
)
def test_f56_index_stays_in_the_folder(tmp_path: Path, target: Any) -> None:
    folder = save(hf_model(), tmp_path / "model", max_shard_size="100KB")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {NORM: target})
    with pytest.raises(ValueError, match=f"{NORM}: got .*want the name of a file in the folder"):
        Llama.from_pretrained(folder)


def test_f56_shards_and_index_must_agree(tmp_path: Path) -> None:
    folder = save(hf_model(), tmp_path, max_shard_size="100KB")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    other = next(file for file in weight_map.values() if file != weight_map[NORM])
    for changed, message in (
        (weight_map | {NORM: other}, f"{other}: holds no {NORM}"),
        ({n: f for n, f in weight_map.items() if n != NORM}, f"{NORM}: in a shard, but not listed"),
        ({}, "weight_map: missing"),
        ([], "weight_map: missing"),
    ):
        edit_json(index, weight_map=changed)
        with pytest.raises(ValueError, match=message):
            Llama.from_pretrained(folder)
    edit_json(index, weight_map=weight_map)
    whole = (folder / other).read_bytes()
    twice = load_file(folder / other) | {NORM: load_file(folder / weight_map[NORM])[NORM]}
    save_file(twice, folder / other, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{NORM}: in a shard, but not listed"):
        Llama.from_pretrained(folder)
    (folder / other).write_bytes(whole)
    Llama.from_pretrained(folder)
    (folder / other).unlink()
    with pytest.raises(OSError, match=other):
        Llama.from_pretrained(folder)


def test_missing_files_are_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        Llama.from_pretrained(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="model.safetensors: no such file"):
        Llama.from_pretrained(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method: got 'gptq'"),
        ("fp8", "quantization_config: got str"),
        (BLOCK | {"weight_block_size": [64, 64]}, r"weight_block_size: got \[64, 64\]"),
        (COMPRESSED | {"format": "int-quantized"}, "format: got 'int-quantized'"),
        (COMPRESSED | {"config_groups": {"g": {"weights": {"num_bits": 4}}}}, "num_bits: got 4"),
        (COMPRESSED | {"ignore": ["re:("]}, "ignore: 're:\\('"),
        (FBGEMM | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert: got 'lm_head'"),
    ],
)
def test_other_quantizations_are_refused(folder: Path, config: Any, message: str) -> None:
    edit_json(folder / "config.json", quantization_config=config)
    with pytest.raises(ValueError, match=message):
        Llama.from_pretrained(folder)


def test_fp8_must_agree_with_its_config(wide: Path) -> None:
    write_fp8(wide, "row", "weight_scale", lambda n: "up_proj" in n, **FBGEMM)
    edit_json(
        wide / "config.json", quantization_config=FBGEMM | {"modules_to_not_convert": ["up_proj"]}
    )
    with pytest.raises(ValueError, match="up_proj.weight: is FP8, but quantization_config"):
        Llama.from_pretrained(wide)
    edit_json(wide / "config.json", quantization_config=FBGEMM)
    held = tensors(wide)
    name = "model.layers.1.mlp.up_proj.weight_scale"
    for scale, message in (
        (torch.full((256, 1), float("nan")), f"{name}: holds NaN"),
        (torch.ones(255, 1), f"{name}: got shape"),
        (None, f"lacks {name}"),
    ):
        changed = {n: t for n, t in (held | {name: scale}).items() if t is not None}
        write(wide, changed)
        with pytest.raises(ValueError, match=message):
            Llama.from_pretrained(wide)


def test_progress_goes_to_stderr(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Llama.from_pretrained(folder, progress=True)
    Llama.from_pretrained(folder)
    assert capsys.readouterr().out == ""
