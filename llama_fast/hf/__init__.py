"""Llama in transformers on these kernels. Only this package imports transformers."""

from .fp8 import LlamaFastFP8Quantizer
from .fp8_config import LlamaFastFP8Config

__all__ = ["LlamaFastFP8Config", "LlamaFastFP8Quantizer"]
