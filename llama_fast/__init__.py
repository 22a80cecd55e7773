"""Custom kernels for Llama 3.1 behind one small functional API."""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

import torch as _torch  # noqa: F401  first: _cpu shares the OpenMP runtime that it loads

# In a checkout, kernels/ and bench/ lie beside this package; installed, inside it.
_root = _Path(__file__).resolve().parent.parent
if (_root / "setup.py").exists():
    __path__.append(str(_root))

from . import nn, parallel  # noqa: E402
from .config import LlamaConfig  # noqa: E402
from .dispatch import backends, use_backend  # noqa: E402
from .generation.cache import KVCache  # noqa: E402
from .model import Llama  # noqa: E402
from .ops.activation import silu_and_mul, silu_and_mul_fp8  # noqa: E402
from .ops.attention import attention  # noqa: E402
from .ops.decode_attention import attention_with_kvcache  # noqa: E402
from .ops.linear import fp8_gemm, fp8_linear, linear, pack_weight  # noqa: E402
from .ops.quantize import quantize_fp8  # noqa: E402
from .ops.rms_norm import add_rms_norm, rms_norm, rms_norm_fp8  # noqa: E402
from .ops.rope import apply_rope, apply_rope_and_append, rope_table  # noqa: E402
from .rope_scaling import RopeScaling  # noqa: E402
from .text import TextStreamer  # noqa: E402

if TYPE_CHECKING:
    from . import hf
    from .hf import accelerate, report, restore

__version__ = "0.1.0"

__all__ = [
    "KVCache",
    "Llama",
    "LlamaConfig",
    "RopeScaling",
    "TextStreamer",
    "accelerate",
    "add_rms_norm",
    "apply_rope",
    "apply_rope_and_append",
    "attention",
    "attention_with_kvcache",
    "backends",
    "fp8_gemm",
    "fp8_linear",
    "hf",
    "linear",
    "nn",
    "pack_weight",
    "parallel",
    "quantize_fp8",
    "report",
    "restore",
    "rms_norm",
    "rms_norm_fp8",
    "rope_table",
    "silu_and_mul",
    "silu_and_mul_fp8",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """Import what needs transformers when it is first used."""
    if name not in ("hf", "accelerate", "report", "restore"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package = _import_module(f"{__name__}.hf")
    return package if name == "hf" else getattr(package, name)
