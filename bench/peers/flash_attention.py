"""flash-attn: attention over a prompt and over a cache. Written against its repository of
August 2026 (PyPI then had 2.8.3), and never run: so far there was no GPU to run it on.

The package needs an Ampere GPU or later and bf16 or fp16. FlashAttention-3, which its repository
keeps apart and PyPI does not have, is offered beside it where it is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from .in_transformers import InTransformers
from .peer import Inputs, ModelPeer, Run, Unsupported, refusing


def _libraries() -> dict[str, ModuleType]:
    import flash_attn

    found = {"flash-attn": flash_attn}
    if importlib.util.find_spec("flash_attn_interface") is not None:
        found["flash-attn 3"] = importlib.import_module("flash_attn_interface")
    return found


def attention(inputs: Inputs) -> dict[str, Run]:
    q, k, v = (inputs[name] for name in "qkv")
    _check(q)
    return {
        name: refusing(lambda _, f=library.flash_attn_func: f(q, k, v, causal=True))
        for name, library in _libraries().items()
    }


def attention_with_kvcache(inputs: Inputs) -> dict[str, Run]:
    q, lengths = inputs["q"], inputs["cache_seqlens"]
    ks, vs = inputs["k_caches"], inputs["v_caches"]
    _check(q)

    def over(library: ModuleType) -> Run:
        f, n = library.flash_attn_with_kvcache, len(ks)
        return lambda i: f(q, ks[i % n], vs[i % n], cache_seqlens=lengths, causal=True)

    return {name: refusing(over(library)) for name, library in _libraries().items()}


def _check(q: torch.Tensor) -> None:
    if q.device.type != "cuda":
        raise Unsupported(f"flash-attn runs on cuda only, not on {q.device}")


def models(hf_model: Any, config: Any, device: torch.device) -> Iterator[ModelPeer]:
    """transformers with flash-attn's attention in it."""
    if device.type != "cuda":
        raise Unsupported(f"flash-attn runs on cuda only, not on {device}")

    def change(model: Any) -> None:
        model.set_attn_implementation("flash_attention_2")

    yield InTransformers("transformers, flash-attn", hf_model, change)


OPS = {"attention": attention, "attention_with_kvcache": attention_with_kvcache}
