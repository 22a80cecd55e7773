"""Run llama.cpp through llama-cpp-python's bindings of its C API.

A GGUF file holds the same weights, in bf16 or in Q8_0, llama.cpp's own 8-bit form (blocks of 32
int8 with an fp16 scale: 8.5 bits a weight; FP8 has 8). The cache is fp16, the default; flash
attention is on; llama.cpp chooses how it quantizes activations.

Its last layer's feed-forward runs only for tokens whose logits are wanted, one of a prompt: in a
model of four layers that saves a fifth of a prompt's work, in one of 32 layers 3 %.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..timing import Run
from . import CHUNK, ModelPeer, Unsupported, ggml, gguf_file

ERROR = 4  # ggml_log_level


def models(hf_model: Any, device: torch.device) -> Iterator[ModelPeer]:
    return every_kind(Model, hf_model)


def every_kind(of: type[Model], hf_model: Any) -> Iterator[ModelPeer]:
    for label, kind in (("Q8_0", "Q8_0"), ("bf16", "BF16")):
        yield of(f"{of.name} {label}", hf_model, kind)


class Model(ModelPeer):
    """One GGUF file in memory. A fork overrides the methods from _bindings on."""

    name, package = "llama.cpp", "llama-cpp-python"

    def __init__(self, label: str, hf_model: Any, kind: str) -> None:
        self.label = label
        self._vocab = hf_model.config.vocab_size
        self._contexts: list[Any] = []
        self._shared: dict[tuple[int, ...], tuple[Any, int, int]] = {}  # by their tokens
        self._model = None
        self._api = api = self._bindings()
        # Load into memory, as ours does, so that no page of the file is mapped while it runs.
        params = self._set(api.llama_model_default_params(), n_gpu_layers=0, **self._unmapped())
        with tempfile.TemporaryDirectory(prefix="llama_fast-bench-") as folder:
            path = Path(folder, "model.gguf")
            try:
                self._weight_bytes = gguf_file.write(path, hf_model, kind)
            except ValueError as why:
                raise Unsupported(str(why)) from why
            self._model = api.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise Unsupported(f"{self.name} does not load this model in {kind}")

    def logits(self, tokens: Tensor) -> Tensor:
        ids = _ids(tokens)
        context = self._context(len(ids), len(ids))
        batch = self._batch(ids, 0)
        batch.logits = (ctypes.c_int8 * len(ids))(*[1] * len(ids))
        return self._decode(context, batch, len(ids))[None].clone()

    def after(self, context: Tensor, tokens: Tensor, times: int) -> Run:
        length, ids = context.shape[1], _ids(tokens)
        handle = self._filled(context, len(ids) * times, len(ids))
        # Such a batch gives only the last token's logits.
        batches = [self._batch(ids, length + i * len(ids)) for i in range(times)]

        def run(_: int, alive: Any = ids) -> Tensor:  # the batches point to the ids
            if not self._rewind(handle, length):
                raise RuntimeError(f"{self.name} did not rewind its cache")
            for batch in batches:
                logits = self._decode(handle, batch)
            return logits

        return run

    def _filled(self, context: Tensor, room: int, batch: int) -> Any:
        """Return a cache that holds the context, with room for so many more tokens, up to `batch`
        at once."""
        ids = _ids(context)
        key, length = tuple(ids), len(ids)
        handle, free, most = self._shared.get(key, (None, 0, 0))
        if free < room or most < batch:
            batch = max(batch, min(CHUNK, length))
            room = max(room, batch)
            handle = self._context(length + room, batch)
            self._shared[key] = handle, room, batch
            for i in range(0, length, batch):
                part = (ctypes.c_int32 * min(batch, length - i))(*ids[i : i + batch])
                self._decode(handle, self._batch(part, i))
        return handle

    def weight_bytes(self) -> int:
        return self._weight_bytes

    def close(self) -> None:
        self._shared.clear()
        while self._contexts:
            self._api.llama_free(self._contexts.pop())
        if self._model:
            self._free(self._model)
        self._model = None

    def _context(self, length: int, batch: int) -> Any:
        """Make an empty cache for `length` tokens, up to `batch` of them processed at once."""
        sizes = {"n_ctx": length, "n_batch": batch, "n_ubatch": batch}
        threads = dict.fromkeys(("n_threads", "n_threads_batch"), torch.get_num_threads())
        params = self._api.llama_context_default_params()
        params = self._set(params, **sizes, **threads, **self._attention())
        context = self._api.llama_init_from_model(self._model, params)
        if not context:
            raise Unsupported(f"{self.name} makes no context of {length} tokens")
        self._contexts.append(context)
        return context

    def _decode(self, context: Any, batch: Any, rows: int = 1) -> Tensor:
        """Return the logits [rows, vocab] in the library's own memory, valid until the next
        call."""
        if failed := self._api.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode: {failed}")
        found = self._api.llama_get_logits(context)  # waits for them
        return torch.from_numpy(np.ctypeslib.as_array(found, shape=(rows, self._vocab)))

    def _set(self, params: Any, **values: Any) -> Any:
        """Set a ctypes structure's fields. Raises Unsupported for one that this version lacks,
        which ctypes would ignore."""
        for name, value in values.items():
            if not hasattr(params, name):
                raise Unsupported(f"this version of {self.package} has no {name}")
            setattr(params, name, value)
        return params

    def _bindings(self) -> Any:
        return _bindings()

    def _unmapped(self) -> dict[str, Any]:
        return {"load_mode": self._api.LLAMA_LOAD_MODE_NONE}

    def _attention(self) -> dict[str, Any]:
        return {"flash_attn_type": self._api.LLAMA_FLASH_ATTN_TYPE_ENABLED, "no_perf": True}

    def _batch(self, ids: Any, position: int) -> Any:
        """Make a batch of tokens. position: the first one's, for forks; llama.cpp continues where
        its cache ends."""
        return self._api.llama_batch_get_one(ids, len(ids))

    def _rewind(self, context: Any, length: int) -> bool:
        return self._api.llama_memory_seq_rm(self._api.llama_get_memory(context), 0, length, -1)

    def _free(self, model: Any) -> None:
        self._api.llama_model_free(model)


def _ids(tokens: Tensor) -> Any:
    (row,) = tokens.tolist()
    return (ctypes.c_int32 * len(row))(*row)


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def errors_only(level: int, text: bytes, _: Any) -> None:
    """Print only errors of the library's log."""
    if level == ERROR:
        print(text.decode(errors="replace"), end="")


@cache
def _bindings() -> Any:
    import llama_cpp

    llama_cpp.llama_log_set(errors_only, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def _libraries() -> list[ctypes.CDLL]:
    """Return the libraries that llama-cpp-python has loaded."""
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    return [ctypes.CDLL(str(p)) for p in sorted(folder.glob("libggml*.so"))]


OPS = ggml.ops(ggml.Library(Model.name, Model.package, _libraries))
