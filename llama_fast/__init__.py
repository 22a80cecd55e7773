"""Custom kernels for Llama 3.1 behind one small functional API."""

from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

# In a checkout, kernels/ and bench/ lie beside this package; installed, inside it.
_root = _Path(__file__).resolve().parent.parent
if (_root / "setup.py").exists():
    __path__.append(str(_root))

if TYPE_CHECKING:
    from . import chat as chat
    from . import hf as hf
    from . import nn as nn
    from . import parallel as parallel
    from .config import LlamaConfig as LlamaConfig
    from .dispatch import backends as backends
    from .dispatch import use_backend as use_backend
    from .generation.cache import KVCache as KVCache
    from .hf import accelerate as accelerate
    from .hf import report as report
    from .hf import restore as restore
    from .model import Llama as Llama
    from .ops.activation import silu_and_mul as silu_and_mul
    from .ops.activation import silu_and_mul_fp8 as silu_and_mul_fp8
    from .ops.attention import attention as attention
    from .ops.decode_attention import attention_with_kvcache as attention_with_kvcache
    from .ops.linear import fp8_gemm as fp8_gemm
    from .ops.linear import fp8_linear as fp8_linear
    from .ops.linear import linear as linear
    from .ops.linear import pack_weight as pack_weight
    from .ops.quantize import quantize_fp8 as quantize_fp8
    from .ops.rms_norm import add_rms_norm as add_rms_norm
    from .ops.rms_norm import rms_norm as rms_norm
    from .ops.rms_norm import rms_norm_fp8 as rms_norm_fp8
    from .ops.rope import apply_rope as apply_rope
    from .ops.rope import apply_rope_and_append as apply_rope_and_append
    from .ops.rope import rope_table as rope_table
    from .rope_scaling import RopeScaling as RopeScaling
    from .text import TextStreamer as TextStreamer

__version__ = "0.1.0"

# Each public name's module, which is imported when the name is first used: torch takes a second.
_MODULES = {
    "KVCache": "generation.cache",
    "Llama": "model",
    "LlamaConfig": "config",
    "RopeScaling": "rope_scaling",
    "TextStreamer": "text",
    "accelerate": "hf",
    "add_rms_norm": "ops.rms_norm",
    "apply_rope": "ops.rope",
    "apply_rope_and_append": "ops.rope",
    "attention": "ops.attention",
    "attention_with_kvcache": "ops.decode_attention",
    "backends": "dispatch",
    "fp8_gemm": "ops.linear",
    "fp8_linear": "ops.linear",
    "linear": "ops.linear",
    "pack_weight": "ops.linear",
    "quantize_fp8": "ops.quantize",
    "report": "hf",
    "restore": "hf",
    "rms_norm": "ops.rms_norm",
    "rms_norm_fp8": "ops.rms_norm",
    "rope_table": "ops.rope",
    "silu_and_mul": "ops.activation",
    "silu_and_mul_fp8": "ops.activation",
    "use_backend": "dispatch",
}
__all__ = [*_MODULES, "chat", "hf", "nn", "parallel"]


def __getattr__(name: str) -> Any:
    """Import a public name's module, or a module."""
    if name not in _MODULES and (name.startswith("__") or not _find_spec(f"{__name__}.{name}")):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name != "cli":
        import torch  # noqa: F401  first: _cpu shares the OpenMP runtime that it loads

        _import_module(f"{__name__}.ops")  # registers them, which backends() lists
    if name not in _MODULES:
        return _import_module(f"{__name__}.{name}")
    value = getattr(_import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
