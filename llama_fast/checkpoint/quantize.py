"""Rewrite a 16- or 32-bit Llama checkpoint with FP8 weights, in compressed-tensors'
"float-quantized" layout, which transformers, vLLM and llama_fast load.

Each row has its own scale, so a piece of a tensor is read, quantized and written before the next
one: memory use does not grow with the model.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..config import LlamaConfig
from ..files import read_json
from ..hub import resolve
from ..ops.quantize import quantize_fp8
from .formats import describe
from .load import check
from .shards import Shards
from .weights import RECIPES, is_quantized

_PIECE_BYTES = 32 << 20  # of a weight, quantized at once
_HEADER_BYTES = 300  # of a tensor, at most, in headers and index together
_FLOATS = ("BF16", "F16", "F32", "F64")  # safetensors' names
_ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "F8_E4M3": 1}
_WEIGHT_FILES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
_INDEX = "model.safetensors.index.json"
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
    source: a folder, or the id of a model on the Hub (hub.resolve).

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
    config = read_json(source / "config.json")
    if config.get("quantization_config") is not None:
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

    headers = _HEADER_BYTES * sum(len(t.stored()) for t in tensors)
    with _appears_whole(source, target, after + headers + _bytes_beside(source)) as folder:
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
        shards.check_unchanged()
    return Summary(sum(t.quantized for t in tensors), len(tensors), total, after)


def _plan(source: Path, shards: Shards, recipe: str, layers: int) -> dict[str, list[_Tensor]]:
    """Return each file's tensors, and whether each is to be quantized."""
    plan: dict[str, list[_Tensor]] = {}
    for name, (file, dtype, shape, _) in sorted(shards.entries.items()):
        if dtype not in _FLOATS:
            raise ValueError(f"{file}: {name} is {dtype}, want one of {', '.join(_FLOATS)}")
        module, _, parameter = name.rpartition(".")
        quantized = parameter == "weight" and is_quantized(module, recipe, layers)
        if quantized and len(shape) != 2:
            raise ValueError(f"{file}: {name} has shape {list(shape)}, want a matrix")
        plan.setdefault(file.name, []).append(_Tensor(name, dtype, shape, quantized))
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
                yield from _write_quantized(out, t.name, values, offset)
            else:
                _write_at(out, offset[t.name], values)
                yield values.nbytes
        out.flush()
        os.fsync(out.fileno())


def _write_quantized(
    out: BinaryIO, name: str, weight: Tensor, offset: dict[str, int]
) -> Iterator[int]:
    at, scale_at = offset[name], offset[f"{name}_scale"]
    rows = max(1, _PIECE_BYTES // max(1, weight.shape[1] * weight.itemsize))
    for piece in weight.split(rows):
        q, scale = quantize_fp8(piece.float() if piece.dtype == torch.float64 else piece)
        if not (scale.isfinite() & (scale > 0)).all():
            raise ValueError(f"{name}: holds NaN or infinity; such a weight has no FP8 form")
        at, scale_at = _write_at(out, at, q), _write_at(out, scale_at, scale)
        yield piece.nbytes


def _write_at(out: BinaryIO, offset: int, tensor: Tensor) -> int:
    """Write a tensor at offset and return the offset of its end."""
    out.seek(offset)
    out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return offset + tensor.nbytes


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return _ITEMSIZE[dtype] * torch.Size(shape).numel()


@contextmanager
def _appears_whole(source: Path, target: Path, size: int) -> Iterator[Path]:
    """Yield a folder beside target. Rename it to target on success; remove it on an exception, or
    on a signal that ends the process. Raises OSError if size bytes do not fit there."""
    target = target.absolute()
    if target.resolve() == source.resolve():
        raise ValueError(f"{target}: is the input itself; name another folder for the output")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target}: exists already; name a new or an empty folder")
    missing = [parent for parent in target.parents if not parent.exists()]
    free = shutil.disk_usage((missing or [target])[-1].parent).free
    if free < size:
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)}: the output has {size:,} bytes, the disk {free:,} free",
            str(target),
        )
    folder = target.parent / f".{target.name}.partial-{os.getpid()}"
    with _ends_by_exception():
        try:
            folder.mkdir(parents=True)
            yield folder
            if target.exists():
                target.rmdir()
            folder.rename(target)
        except BaseException as error:
            with _ends_by_exception(signal.SIG_IGN):
                shutil.rmtree(folder, ignore_errors=True)
                for parent in missing:
                    with suppress(OSError):
                        parent.rmdir()
            if isinstance(error, OSError) and error.filename is None and error.errno:
                raise OSError(error.errno, error.strerror, str(target)) from None
            raise


@contextmanager
def _ends_by_exception(handler: Any = None) -> Iterator[None]:
    """Let SIGTERM and SIGHUP, where they would end the process, raise SystemExit instead, or call
    handler. Python sets handlers in its main thread only."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) in (signal.SIG_DFL, _exit):
                before[number] = signal.signal(number, handler or _exit)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _exit(number: int, frame: Any) -> None:
    sys.exit(128 + number)  # the code that shells give a process which the signal ended


def _companions(source: Path) -> list[Path]:
    """Return all files but weights: tokenizer, chat template, generation_config.json, license."""
    written = (_INDEX, "config.json")
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
