"""The kernels as modules. State dicts have the names of Hugging Face's Llama and its FP8 forms."""

from .layers import Attention, RMSNorm, RotaryEmbedding, SwiGLU
from .linear import FP8Linear

__all__ = ["Attention", "FP8Linear", "RMSNorm", "RotaryEmbedding", "SwiGLU"]
