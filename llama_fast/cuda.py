"""The cuda backend: the compiled kernels of csrc/cuda, launched on the current stream.

With LLAMA_FAST_CUDA_EMULATOR=1 the same kernels run on CPU tensors, slowly, in
tests/cuda_emulator, which `make test` builds.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from . import _cpu

EMULATED = os.environ.get("LLAMA_FAST_CUDA_EMULATOR", "0") == "1"
_MODULE = f"llama_fast.{'_cuda_emulated' if EMULATED else '_cuda'}"


def missing() -> str | None:
    """Return why the compiled kernels are unavailable, or None."""
    if importlib.util.find_spec(_MODULE) is None:
        return f"{_MODULE} was not built: nvcc was not found, or LLAMA_FAST_CUDA=off"
    return None


def prefers_fp8_activations(x: Tensor) -> bool:
    """Return whether matrix instructions take e4m3 on x's device, for every number of rows: a row's
    result must not depend on the batch."""
    return not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 9)


if missing() is None:
    _module = importlib.import_module(_MODULE)
    # Each module is built apart, so this one may be older and lack a family.
    globals().update({f: getattr(_module, f) for f in _cpu.families if hasattr(_module, f)})


def decode_attention(out: Tensor, q: Tensor, k_cache: Tensor, *rest: Any) -> None:
    """Launch the kernel, with a workspace for partial results if the keys are split."""
    _, _, block_table, _, _, num_splits, *_ = rest
    splits = _module.decode_attention_splits(q, k_cache, block_table, num_splits)
    if splits == 1:
        return _module.decode_attention(out, q, k_cache, *rest)
    shape = (*q.shape[:3], splits, q.shape[3] + 2)
    workspace = q.new_empty(shape, dtype=torch.float32)
    _module.decode_attention_split(workspace, out, q, k_cache, *rest)
