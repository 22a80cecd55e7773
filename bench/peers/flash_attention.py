"""Run flash-attn's attention over a prompt and over a cache. Written against its repository of
August 2026 (PyPI then had 2.8.3); not yet run.

The package needs an Ampere GPU or later and bf16 or fp16. FlashAttention-3, a separate package that
is not on PyPI, runs too if it is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from ..timing import Run
from .in_transformers import exchanged
from .peer import Inputs, ModelPeer


def _libraries() -> dict[str, ModuleType]:
    names = {"flash-attn": "flash_attn"}
    if importlib.util.find_spec("flash_attn_interface") is not None:
        names["flash-attn 3"] = "flash_attn_interface"
    return {name: importlib.import_module(module) for name, module in names.items()}


def attention(inputs: Inputs) -> dict[str, Run]:
    q, k, v = (inputs[name] for name in "qkv")

    def over(library: ModuleType) -> Run:
        return lambda _: library.flash_attn_func(q, k, v, causal=True)

    return {name: over(library) for name, library in _libraries().items()}


def attention_with_kvcache(inputs: Inputs) -> dict[str, Run]:
    q, ks, vs = inputs["q"], inputs["k_caches"], inputs["v_caches"]
    options, n = {"cache_seqlens": inputs["cache_seqlens"], "causal": True}, len(ks)

    def over(library: ModuleType) -> Run:
        return lambda i: library.flash_attn_with_kvcache(q, ks[i % n], vs[i % n], **options)

    return {name: over(library) for name, library in _libraries().items()}


def models(hf_model: Any, device: torch.device) -> Iterator[ModelPeer]:
    """Yield transformers with flash-attn's attention."""

    def change(model: Any) -> None:
        model.set_attn_implementation("flash_attention_2")

    yield exchanged("transformers, flash-attn", hf_model, change)


OPS = {"attention": attention, "attention_with_kvcache": attention_with_kvcache}
