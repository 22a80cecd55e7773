"""Run flash-attn's attention over a prompt and over a cache. Written against its repository of
August 2026 (PyPI then had 2.8.3); not yet run.

The package needs an Ampere GPU or later and bf16 or fp16. FlashAttention-3, a separate package that
is not on PyPI, runs too if it is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..timing import Run
from . import ModelPeer, Ops
from .in_transformers import exchanged


def _each(over: Callable[[Any], Run]) -> dict[str, Run]:
    names = {"flash-attn": "flash_attn"}
    if importlib.util.find_spec("flash_attn_interface"):
        names["flash-attn 3"] = "flash_attn_interface"
    return {name: over(importlib.import_module(module)) for name, module in names.items()}


def attention(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Run]:
    return _each(lambda library: lambda _: library.flash_attn_func(q, k, v, causal=True))


def attention_with_kvcache(
    q: Tensor, k_caches: list[Tensor], v_caches: list[Tensor], cache_seqlens: Tensor
) -> dict[str, Run]:
    caches = list(zip(k_caches, v_caches, strict=True))
    options = {"cache_seqlens": cache_seqlens, "causal": True}

    def over(library: Any) -> Run:
        f = library.flash_attn_with_kvcache
        return lambda i: f(q, *caches[i % len(caches)], **options)

    return _each(over)


def models(hf_model: Any, device: torch.device) -> Iterator[ModelPeer]:
    """Yield transformers with flash-attn's attention."""

    def change(model: Any) -> None:
        model.set_attn_implementation("flash_attention_2")

    yield exchanged("transformers, flash-attn", hf_model, change)


OPS: Ops = {"attention": attention, "attention_with_kvcache": attention_with_kvcache}
