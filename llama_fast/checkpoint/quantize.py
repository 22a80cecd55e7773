"""Rewrite a 16- or 32-bit Llama checkpoint with FP8 weights, in compressed-tensors'
"float-quantized" layout, which transformers, vLLM and llama_fast load.

Each row has its own scale, so a piece of a tensor is read, quantized and written before the next
one: memory use does not grow with the model.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..chat import load_tokenizer
from ..config import LlamaConfig, is_gguf
from ..files import read_json
from ..hub import resolve
from ..ops.quantize import quantize_fp8
from .formats import MODELOPT, describe, quantization_of
from .gguf_file import read_config
from .load import check
from .output import appears_whole
from .shards import Shards
from .weights import RECIPES, is_quantized

_PIECE_BYTES = 32 << 20  # of a weight, quantized at once
_HEADER_BYTES = 300  # of a tensor, at most, in headers and index together
_DTYPES = {  # by safetensors' names
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_ITEMSIZE = {"F8_E4M3": 1} | {name: dtype.itemsize for name, dtype in _DTYPES.items()}
_WEIGHT_FILES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
_SINGLE = "model.safetensors"
_INDEX = f"{_SINGLE}.index.json"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Summary(NamedTuple):
    quantized: int  # tensors now in FP8
    tensors: int
    bytes_before: int
    bytes_after: int


class _Tensor(NamedTuple):
    name: str
    dtype: str  # of the source, as safetensors spells it
    shape: tuple[int, ...]
    quantized: bool

    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the output's tensors for it: name -> dtype, shape."""
        if not self.quantized:
            return {self.name: (self.dtype, self.shape)}
        return {
            self.name: ("F8_E4M3", self.shape),
            f"{self.name}_scale": ("F32", (self.shape[0], 1)),
        }


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    recipe: str = "fp8",
    *,
    on_bytes: Callable[[int, int], None] | None = None,
) -> Summary:
    """Write source's checkpoint to the new folder target with weights in e4m3, a scale per row.
    source: a folder, a GGUF file, or the id of a model on the Hub (hub.resolve).

    recipe: as quantize of Llama.from_pretrained (weights.is_quantized). With "fp8_all" and tied
    embeddings, the head is written beside the embedding, and config.json unties them. Readers of
    the format quantize activations by token; it cannot store the 405B recipe's bound of 1200 on
    them.

    on_bytes(done, total) reports progress in bytes read. An error, an interrupt or SIGTERM leaves
    no target behind. Raises ValueError or OSError that names the file: also, before it writes, if
    the disk has too little space.
    """
    source, target = resolve(source, weights=True), Path(target).expanduser()
    if recipe not in RECIPES:
        raise ValueError(f"recipe: got {recipe!r}, want one of {', '.join(RECIPES)}")
    gguf = is_gguf(source)
    config = _config_of_gguf(source) if gguf else read_json(source / "config.json")
    if not gguf and quantization_of(source) is not None:
        raise ValueError(f"{source}: already quantized; start from the 16-bit weights")
    shards = Shards(source)
    meant = check(LlamaConfig.from_pretrained(source), shards, None)
    layers, tied = meant.num_hidden_layers, meant.tie_word_embeddings and recipe != "fp8_all"
    if meant.tie_word_embeddings and not tied:
        shards.entries[_HEAD] = shards.entries[_EMBEDDING]
    plan = _plan(source, shards, recipe, layers)
    tensors = [t for held in plan.values() for t in held]
    total = sum(_nbytes(t.dtype, t.shape) for t in tensors)
    after = sum(_nbytes(*entry) for t in tensors for entry in t.stored().values())

    tokenizer = _tokenizer_of_gguf(source) if gguf else None
    headers = _HEADER_BYTES * sum(len(t.stored()) for t in tensors)
    with appears_whole(source, target, after + headers + _bytes_beside(source)) as folder:
        done = 0
        for file, held in plan.items():
            for read in _write_shard(shards, folder / file, held):
                done += read
                if on_bytes is not None:
                    on_bytes(done, total)
        if (source / _INDEX).exists():
            weight_map = {n: file for file, held in plan.items() for t in held for n in t.stored()}
            index = {"metadata": {"total_size": after}, "weight_map": weight_map}
            _write_json(folder / _INDEX, index)
        modules = (t.name.removesuffix(".weight") for t in tensors if not t.quantized)
        ignore = [m for m in modules if is_quantized(m, "fp8", layers)]
        if recipe != "fp8_all":
            ignore.insert(0, "lm_head")
        if config.get("tie_word_embeddings"):
            config["tie_word_embeddings"] = tied
        config["quantization_config"] = describe(ignore)
        _write_json(folder / "config.json", config)
        for path in _companions(source):
            shutil.copyfile(path, folder / path.name)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        shards.check_unchanged()
    before = source.stat().st_size if gguf else total
    return Summary(sum(t.quantized for t in tensors), len(tensors), before, after)


def _config_of_gguf(source: Path) -> dict[str, Any]:
    """Return a config.json in the style that transformers 4 and 5 read."""
    config = read_config(source)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] != "default":
        config["rope_scaling"] = rope
    return {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", **config}


def _tokenizer_of_gguf(source: Path) -> Any:
    try:
        return load_tokenizer(source)
    except (ImportError, ValueError) as error:
        warnings.warn(f"the output has no tokenizer: {error}", stacklevel=3)
        return None


def _plan(source: Path, shards: Shards, recipe: str, layers: int) -> dict[str, list[_Tensor]]:
    """Return each file's tensors, and whether each is to be quantized."""
    plan: dict[str, list[_Tensor]] = {}
    for name, (file, dtype, shape, _) in sorted(shards.entries.items()):
        if dtype not in _DTYPES:
            raise ValueError(f"{file}: {name} is {dtype}, want one of {', '.join(_DTYPES)}")
        module, _, parameter = name.rpartition(".")
        quantized = parameter == "weight" and is_quantized(module, recipe, layers)
        if quantized and len(shape) != 2:
            raise ValueError(f"{file}: {name} has shape {list(shape)}, want a matrix")
        output = file.name if file.suffix == ".safetensors" else _SINGLE
        plan.setdefault(output, []).append(_Tensor(name, dtype, shape, quantized))
    if not any(t.quantized for tensors in plan.values() for t in tensors):
        raise ValueError(f"{source}: recipe {recipe} leaves all of its {layers} layers as they are")
    return plan


def _write_shard(shards: Shards, target: Path, tensors: list[_Tensor]) -> Iterator[int]:
    """Write a shard, and yield the number of bytes read after each read."""
    stored = {name: entry for t in tensors for name, entry in t.stored().items()}
    # Widest dtype first, as safetensors does, so that every tensor is aligned to its item size.
    order = sorted(stored, key=lambda name: (-_ITEMSIZE[stored[name][0]], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        dtype, shape = stored[name]
        start, end = end, end + _nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    offset = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in order}
    with open(target, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)
        for t in tensors:
            values = shards.read(t.name)
            if t.quantized:
                for rows in _write_quantized(out, t.name, values, offset):
                    yield _nbytes(t.dtype, (rows, *t.shape[1:]))
            else:
                _write_at(out, offset[t.name], values.to(_DTYPES[t.dtype]))
                yield _nbytes(t.dtype, t.shape)
        out.flush()
        os.fsync(out.fileno())


def _write_quantized(
    out: BinaryIO, name: str, weight: Tensor, offset: dict[str, int]
) -> Iterator[int]:
    """Write a weight and its scales, and yield the number of rows after each piece."""
    at, scale_at = offset[name], offset[f"{name}_scale"]
    rows = max(1, _PIECE_BYTES // max(1, weight.shape[1] * weight.itemsize))
    for piece in weight.split(rows):
        q, scale = quantize_fp8(piece.float() if piece.dtype == torch.float64 else piece)
        if not (scale.isfinite() & (scale > 0)).all():
            raise ValueError(f"{name}: holds NaN or infinity; such a weight has no FP8 form")
        at, scale_at = _write_at(out, at, q), _write_at(out, scale_at, scale)
        yield len(piece)


def _write_at(out: BinaryIO, offset: int, tensor: Tensor) -> int:
    """Write a tensor at offset and return the offset of its end."""
    out.seek(offset)
    out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return offset + tensor.nbytes


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return _ITEMSIZE[dtype] * torch.Size(shape).numel()


def _companions(source: Path) -> list[Path]:
    """Return the files to copy: tokenizer, chat template, generation_config.json, license."""
    written = (_INDEX, "config.json", MODELOPT)
    if not source.is_dir():  # a GGUF file, beside which anything may lie
        return []
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file()
        and path.suffix not in _WEIGHT_FILES
        and not path.name.startswith(".")
        and not path.name.endswith(".index.json")
        and path.name not in written
    ]


def _bytes_beside(source: Path) -> int:
    """Return the size of the output's files without tensors, but for the index's new names."""
    configs = [p for p in (source / _INDEX, source / "config.json") if p.exists()]
    return sum(path.stat().st_size for path in (*_companions(source), *configs))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
