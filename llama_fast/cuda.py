"""The cuda backend: the compiled kernels of csrc/cuda, on the tensors' device's current stream.

With LLAMA_FAST_CUDA_EMULATOR=1 the same kernels run on CPU tensors in tests/cuda_emulator: slowly,
and only where that module was built (make test does).
"""

from __future__ import annotations

import importlib
import importlib.util
import os

import torch
from torch import Tensor

from .native import Native

EMULATED = os.environ.get("LLAMA_FAST_CUDA_EMULATOR", "0") == "1"
_MODULE = f"llama_fast.{'_cuda_emulated' if EMULATED else '_cuda'}"


def missing() -> str | None:
    """Why the compiled kernels cannot be had, or None."""
    if importlib.util.find_spec(_MODULE) is None:
        return f"{_MODULE} was not built: nvcc was not found, or LLAMA_FAST_CUDA=off"
    return None


def _where(t: Tensor) -> tuple[int, int]:
    """Device index and stream."""
    if not t.is_cuda:
        return 0, 0
    return t.device.index, torch.cuda.current_stream(t.device).cuda_stream


def prefers_fp8_activations(x: Tensor) -> bool:
    """Where matrix instructions take e4m3. For every number of rows: a row's result must not depend
    on the batch."""
    return not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 9)


if missing() is None:
    _native = Native(importlib.import_module(_MODULE), _where)
    rms_norm = _native.rms_norm
    silu_and_mul = _native.silu_and_mul
    quantize_fp8 = _native.quantize_fp8
    rope = _native.rope
    attention = _native.attention
    attention_with_kvcache = _native.attention_with_kvcache
    linear = _native.linear
