"""Read small files that may come from anywhere: regular ones only, up to a size."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

# Bytes of a file, by the end of its name. Llama 3's tokenizer.json has 9 MB, the index of the 405B
# 0.1 MB.
_MOST_BYTES = {".index.json": 64 << 20, "tokenizer.json": 128 << 20, "": 32 << 20}
_MOST_LEVELS = 64  # of objects and lists in each other; Python's own limit depends on the caller


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, without waiting for the writer of a pipe.

    Raises OSError that names the path, and ValueError for a file larger than its kind may be.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{path}: no such file; want a folder in Hugging Face's format"
        ) from None
    info, most = os.fstat(fd), most_bytes(path)
    if stat.S_ISREG(info.st_mode) and info.st_size <= most:
        return os.fdopen(fd, "rb")
    os.close(fd)
    if not stat.S_ISREG(info.st_mode):
        raise OSError(f"{path}: not a regular file")
    raise ValueError(f"{path}: got {info.st_size} bytes, want at most {most}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError name the path: that of a read, a write or a mapping has no name."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def most_bytes(path: Path) -> int:
    return next(most for end, most in _MOST_BYTES.items() if path.name.endswith(end))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises OSError or ValueError that names the file."""
    try:
        with naming(path), open_regular(path) as file:
            text = file.read(most_bytes(path))  # one that grows meanwhile is no longer valid
        value = json.loads(text.decode("utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    except ValueError as error:
        named = str(error).startswith(f"{path}: ")
        raise (error if named else ValueError(f"{path}: not valid JSON: {error}")) from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got a JSON {type(value).__name__}, want an object")
    level: list[Any] = [value]
    for _ in range(_MOST_LEVELS):
        held = (x.values() if isinstance(x, dict) else x for x in level)
        level = [x for values in held for x in values if isinstance(x, (dict, list))]
    if level:
        raise ValueError(f"{path}: not valid JSON: more than {_MOST_LEVELS} levels")
    return value
