"""The header of a GGUF file: metadata, and the tensors' names, types, shapes and places.

gguf's GGUFReader makes an array of each number and string, which takes seconds for the vocabulary
of Llama 3, and trusts the counts in the file. Source: docs/gguf.md of ggml.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import naming

_SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_MOST_ITEMS = 2_000_000  # of all lists of strings; tokens and merges of Llama 3 have 0.4 million
_MOST_FIELDS = 100_000  # and as many tensors


class TensorInfo(NamedTuple):
    kind: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # as in Hugging Face's files: rows first
    data: np.ndarray  # uint8 [..., bytes of a row]


class Header:
    def __init__(self, path: Path) -> None:
        """Read the header. Raises ImportError without gguf, ValueError for a broken file."""
        try:
            import gguf
        except ImportError:
            raise ImportError(
                f"{path}: GGUF needs its package: pip install 'llama_fast[gguf]'"
            ) from None
        self.path = path
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            with naming(path), open(path, "rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._at = self._items = 0
            self._read(gguf)
        except (ValueError, struct.error) as error:
            raise ValueError(f"{path}: not a valid GGUF file: {error}") from None

    def values(self, *keys: str) -> list[Any]:
        """Return the fields' values, None for those that the file lacks."""
        return [self.fields.get(key) for key in keys]

    def _read(self, gguf: Any) -> None:
        magic, version, tensors, fields = self._take("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"magic {magic!r}, version {version}; want b'GGUF', 2 or 3")
        if max(tensors, fields) > _MOST_FIELDS:
            raise ValueError(f"{fields} fields and {tensors} tensors, want {_MOST_FIELDS} at most")
        for _ in range(fields):
            key = self._string()
            self.fields[key] = self._value(*self._take("I"))
        infos = [self._info() for _ in range(tensors)]
        alignment = self.fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 16:
            raise ValueError(f"general.alignment: got {alignment!r}")
        start = -(-self._at // alignment) * alignment
        everything = np.frombuffer(self._data, np.uint8)
        for name, shape, number, offset in infos:
            kind = gguf.GGMLQuantizationType(number)
            columns, nbytes = gguf.GGML_QUANT_SIZES[kind]
            begin, size = start + offset, math.prod(shape) // columns * nbytes
            if name in self.tensors or shape[-1] % columns or begin + size > len(everything):
                raise ValueError(f"{name}: {list(shape)} of {kind.name} at byte {begin}")
            data = everything[begin : begin + size]
            self.tensors[name] = TensorInfo(
                kind, shape, data.reshape(*shape[:-1], shape[-1] // columns * nbytes)
            )

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, (rank,) = self._string(), self._take("I")
        if not 1 <= rank <= 4:
            raise ValueError(f"{name}: {rank} dimensions")
        shape = self._take(f"{rank}Q")[::-1]
        return name, shape, *self._take("IQ")

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._take(_SCALARS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ValueError(f"a value of type {kind}")
        kind, count = self._take("IQ")
        if kind in _SCALARS:
            return list(self._take(f"{count}{_SCALARS[kind]}")) if count else []
        self._items += count
        if kind != _STRING or self._items > _MOST_ITEMS:
            raise ValueError(f"a list of {count} values of type {kind}")
        return [self._string() for _ in range(count)]

    def _string(self) -> str:
        (size,) = self._take("Q")
        begin, self._at = self._at, self._at + size
        if self._at > len(self._data):
            raise ValueError("ends within a string")
        return self._data[begin : self._at].decode("utf-8")

    def _take(self, layout: str) -> tuple[Any, ...]:
        layout = f"<{layout}"
        size = struct.calcsize(layout)
        values = struct.unpack_from(layout, self._data, self._at)
        self._at += size
        return values
