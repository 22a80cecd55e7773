"""The safetensors files of a checkpoint, as one mapping from names to tensors.

The files are not trusted. The safetensors library rejects headers whose tensors overlap, leave
gaps, overflow or do not match the file's size; its errors become ValueErrors that name the file. An
index may not point outside the folder. Pickles run code when opened, so none is opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import read_json

_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
_CONVERT = (
    "pickles run code when they are opened, so only safetensors are read; convert where you trust "
    "the file: transformers' AutoModelForCausalLM.from_pretrained(IN).save_pretrained(OUT)"
)


class Entry(NamedTuple):
    file: Path
    dtype: str  # as safetensors spells it: BF16, F8_E4M3, ...
    shape: tuple[int, ...]


class Shards:
    def __init__(self, path: str | Path) -> None:
        """Read the headers in path: a folder with model.safetensors, or with shards and index."""
        folder = Path(path)
        if not folder.is_dir():
            if folder.suffix in _PICKLES and folder.exists():
                raise ValueError(f"{folder}: {_CONVERT}")
            raise NotADirectoryError(f"{folder}: not a folder; want one in Hugging Face's format")
        self.entries = _sharded(folder) or _single(folder)

    def read(self, name: str) -> Tensor:
        """Return the tensor, memory-mapped by itself (0.1 ms): freeing it frees its pages."""
        with _opened(self.entries[name].file) as f:
            return f.get_tensor(name)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as f:
            yield f
    except SafetensorError as error:
        raise ValueError(f"{file}: not a valid safetensors file: {error}") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None


def _header(file: Path) -> dict[str, Entry]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; a shard of the checkpoint is missing")
    with _opened(file) as f:
        slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118  not a dict
        return {
            name: Entry(file, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()
        }


def _sharded(folder: Path) -> dict[str, Entry]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map: missing, or not an object with an entry a tensor")
    for name, file in weight_map.items():
        named = isinstance(file, str) and file.endswith(".safetensors")
        if not named or Path(file).name != file:
            raise ValueError(
                f"{index}: {name}: got {file!r}, want the name of a file in the folder"
            )
    headers = {file: _header(folder / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise ValueError(f"{folder / file}: holds no {name}, though the index says so")
    stray = {n for file, held in headers.items() for n in held if weight_map.get(n) != file}
    if stray:
        raise ValueError(f"{index}: {min(stray)}: in a shard, but not listed there")
    return {name: headers[file][name] for name, file in weight_map.items()}


def _single(folder: Path) -> dict[str, Entry]:
    file = folder / "model.safetensors"
    if file.exists():
        return _header(file)
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise ValueError(f"{folder / pickles[0]}: {_CONVERT}")
    raise FileNotFoundError(f"{file}: no such file, and no model.safetensors.index.json beside it")
