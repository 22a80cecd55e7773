"""The safetensors files of a checkpoint, as one mapping from names to tensors.

The files are not trusted. The safetensors library rejects headers whose tensors overlap, leave
gaps, overflow or do not match the file's size; its errors become ValueErrors that name the file. An
index may not point outside the folder. Pickles run code when opened, so none is opened. Files that
are replaced or written to while they are read raise OSError.
"""

from __future__ import annotations

import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import META, check_folder, is_gguf
from ..files import naming, read_json
from ..rope_scaling import shown
from .gguf_file import GGUF

_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
_CONVERT = (
    "pickles run code when they are opened, so only safetensors are read; convert where you trust "
    "the file: transformers' AutoModelForCausalLM.from_pretrained(IN).save_pretrained(OUT)"
)
_MOST_HEADER = 16 << 20  # bytes; a Llama of 126 layers needs 0.2 MB, with FP8 scales
# DistributedDataParallel and torch.compile add components to names; a model saved without its head
# has no "model.".
_WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod)\.")
_BARE = re.compile(r"^(?=(?:embed_tokens|layers|norm)\.)")


class Entry(NamedTuple):
    file: Path
    dtype: str  # as safetensors spells it: BF16, F8_E4M3, ...; BF16 for GGUF's blocks
    shape: tuple[int, ...]
    stored: str  # its name in the file


class Shards:
    def __init__(self, path: str | Path) -> None:
        """Read the headers in path: a folder with model.safetensors, or with shards and index.

        path may also be a GGUF file. The files decide what the checkpoint holds; the index names
        the files, and chooses between two tensors of one name. An index is ignored beside a
        model.safetensors that it does not name, as in transformers: it is left over from other
        weights. entries: by Hugging Face's names.
        """
        self.path = folder = Path(path)
        self.entries: dict[str, Entry] = {}
        self._versions: dict[Path, tuple[int, ...]] = {}
        self._gguf: GGUF | None = None
        if is_gguf(folder):
            self._versions[folder] = _version(folder)
            self._gguf = GGUF(folder)
            dtypes, shapes = self._gguf.dtypes, self._gguf.shapes.items()
            self.entries = {
                name: Entry(folder, dtypes[name], shape, name) for name, shape in shapes
            }
            return
        if not folder.is_dir():
            if folder.suffix in _PICKLES and folder.exists():
                raise ValueError(f"{folder}: {_why_not(folder)}")
            raise NotADirectoryError(f"{folder}: not a folder; want one in Hugging Face's format")
        check_folder(folder)
        weight_map = _weight_map(folder)
        for file in sorted(set(weight_map.values())) or [_single(folder)]:
            self._versions[folder / file] = _version(folder / file)
            for stored, entry in _header(folder / file).items():
                name = _BARE.sub("model.", _WRAPPERS.sub("", stored))
                other = self.entries.setdefault(name, entry)
                if other is entry or weight_map.get(other.stored) == other.file.name:
                    continue
                if weight_map.get(stored) != file:
                    raise ValueError(f"{entry.file}: {stored}: is in {other.file.name} too")
                self.entries[name] = entry

    def read(self, name: str, *index: slice) -> Tensor:
        """Return the tensor, or the part that a slice of each dimension selects, memory-mapped by
        itself (0.1 ms): freeing it frees its pages, and only what is used of it is read."""
        entry = self.entries[name]
        with torch.device("cpu"):
            if self._gguf is not None:
                return self._gguf.read(entry.stored)[index]
            with _opened(entry.file) as f:
                self.check_unchanged(entry.file)
                return f.get_slice(entry.stored)[index] if index else f.get_tensor(entry.stored)

    def check_unchanged(self, *files: Path) -> None:
        """Raise OSError if one of the files, or of all, is not the one whose header was read."""
        for file in files or self._versions:
            if _version(file) != self._versions[file]:
                raise OSError(f"{file}: was replaced or written to while it was read; start again")


def _version(file: Path) -> tuple[int, ...]:
    """Return what tells a file from another of its name, or from itself with other contents."""
    try:
        info = file.stat()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{file}: no such file; a shard of the checkpoint is missing"
        ) from None
    if not stat.S_ISREG(info.st_mode):
        raise OSError(f"{file}: not a regular file")
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as f:
            yield f
    except SafetensorError as error:
        raise ValueError(f"{file}: not a valid safetensors file: {error}") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    except OSError as error:  # safetensors' own do not name the file
        if str(file) in str(error):
            raise
        raise OSError(f"{file}: {error}") from None


def _header(file: Path) -> dict[str, Entry]:
    with naming(file), open(file, "rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
    if length > _MOST_HEADER:
        raise ValueError(
            f"{file}: not a valid safetensors file: a header of {length} bytes, want at most "
            f"{_MOST_HEADER}"
        )
    with _opened(file) as f:
        slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118  not a dict
        return {
            name: Entry(file, s.get_dtype(), tuple(s.get_shape()), name)
            for name, s in slices.items()
        }


def _weight_map(folder: Path) -> dict[str, str]:
    """Return the index, tensor -> file; {} if there is none that counts."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.exists():
        return {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map: missing, or not an object with an entry a tensor")
    for name, file in weight_map.items():
        named = isinstance(file, str) and file.endswith(".safetensors")
        if not named or Path(file).name != file or not file.isprintable():
            raise ValueError(
                f"{index}: {name}: got {shown(file)}, want the name of a file in the folder"
            )
    if single.exists() and single.name not in weight_map.values():
        warnings.warn(
            f"{folder}: holds {single.name} and an index of other files; read {single.name}, as "
            "transformers does. Remove what is left over from other weights.",
            stacklevel=2,
        )
        return {}
    return weight_map


def _why_not(pickle: Path) -> str:
    return META if pickle.name.startswith("consolidated.") else _CONVERT


def _single(folder: Path) -> str:
    file = folder / "model.safetensors"
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles and not file.exists():
        raise ValueError(f"{folder / pickles[0]}: {_why_not(folder / pickles[0])}")
    if not file.exists():
        raise FileNotFoundError(
            f"{file}: no such file, and no model.safetensors.index.json beside it"
        )
    return file.name
