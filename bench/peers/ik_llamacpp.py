"""Run ik_llama.cpp, a fork of llama.cpp with its own CPU kernels, through ik-llama-cpp-python.

It reads the same GGUF files. Its C API is an older llama.cpp's, and its bindings lack a few of the
library's functions. Its instruction set is fixed at compile time: AVX2 and FMA in PyPI's wheels.
Its shared libraries have other names than llama.cpp's, so that both run in one process."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from llama_fast import LlamaConfig

from . import ModelPeer, Unsupported, ggml, llamacpp

_P, _I = ctypes.c_void_p, ctypes.c_int32
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [_P]),
    "llama_kv_cache_seq_rm": (ctypes.c_bool, [_P, _I, _I, _I]),
    "llama_log_set": (None, [_P, _P]),
}


def models(hf_model: Any, device: torch.device) -> Iterator[ModelPeer]:
    scaling = LlamaConfig.from_hf(hf_model.config).rope_scaling
    if scaling is not None:  # mended later by ikawrakow/ik_llama.cpp#2291
        raise Unsupported("ik-llama-cpp-python 0.1.5 reads a model's rotary scaling and ignores it")
    return llamacpp.every_kind(Model, hf_model)


class Model(llamacpp.Model):
    name, package = "ik_llama.cpp", "ik-llama-cpp-python"

    def _bindings(self) -> Any:
        return _bindings()

    def _unmapped(self) -> dict[str, Any]:
        return {"use_mmap": False}

    def _attention(self) -> dict[str, Any]:
        return {"flash_attn": True}

    def _batch(self, ids: Any, position: int) -> Any:
        return self._api.llama_batch(len(ids), ids, all_pos_0=position, all_pos_1=1)

    def _rewind(self, context: Any, length: int) -> bool:
        return self._api.llama_kv_cache_seq_rm(context, 0, length, -1)

    def _free(self, model: Any) -> None:
        self._api.llama_free_model(model)


@cache
def _bindings() -> Any:
    from ik_llama_cpp import _ctypes_api as bindings

    (library,) = _libraries()
    for name, (result, arguments) in _FUNCTIONS.items():
        f = getattr(library, name)
        f.restype, f.argtypes = result, arguments
        setattr(bindings, name, f)
    bindings.llama_log_set(llamacpp.errors_only, None)
    bindings.llama_backend_init()
    return bindings


def _libraries() -> list[ctypes.CDLL]:
    """Return the library that the bindings have loaded, which also exports ggml's functions."""
    from ik_llama_cpp import _ctypes_api as bindings

    return [ctypes.CDLL(bindings._lib._name)]


OPS = ggml.ops(ggml.Library(Model.name, Model.package, _libraries))
