"""The triton backend: the kernels of kernels/."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from .kernels import common
from .kernels.activation import activation
from .kernels.attention import attention
from .kernels.decode_attention import decode_attention
from .kernels.linear import linear
from .kernels.quantize import quantize
from .kernels.rms_norm import rms_norm
from .kernels.rope import rope

__all__ = [
    "attention",
    "decode_attention",
    "linear",
    "prefers_fp8_activations",
    "quantize",
    "rms_norm",
    "rope",
    "activation",
    "tuned_folder",
]


def prefers_fp8_activations(x: Tensor) -> bool:
    """Whether fp8_linear quantizes x where the caller does not say: on chips that multiply e4m3, at
    any number of rows, so that a row does not depend on the batch."""
    return common.chip_of(x).has_e4m3


def tuned_folder() -> Path:
    """Where this user's own choices are stored: LLAMA_FAST_TUNED, or the cache folder."""
    named = os.environ.get("LLAMA_FAST_TUNED")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "llama_fast" / "tuned"


# Those that come with the package first, then the user's own, which win.
common.load_choices(Path(__file__).parent / "tuned", tuned_folder())
