"""Run transformers models on llama_fast's kernels: lf.accelerate, in 16 bits and FP8."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from . import ModelPeer
from .in_transformers import exchanged

OPS: dict[str, Any] = {}


def models(hf_model: Any, device: torch.device) -> Iterator[ModelPeer]:
    """Yield a copy of the model in each form; the caller's baseline stays as it is."""
    from llama_fast.hf import accelerate

    for suffix, quantize in (("", None), (" FP8", "fp8_all")):
        change = partial(accelerate, quantize=quantize)
        yield exchanged(f"transformers + llama_fast{suffix}", hf_model, change)
