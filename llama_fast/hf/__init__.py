"""Run the models of transformers on these kernels.

Importing it registers attn_implementation="llama_fast" and the quantization method llama_fast_fp8.
"""

from transformers import AttentionInterface, AttentionMaskInterface

from .apply import accelerate
from .attention import NAME, attend
from .describe import Report, report
from .fp8 import LlamaFastFP8Quantizer
from .fp8_config import LlamaFastFP8Config
from .kernelize import kernel_mapping
from .masks import make_mask
from .undo import restore

__all__ = [
    "LlamaFastFP8Config",
    "LlamaFastFP8Quantizer",
    "Report",
    "accelerate",
    "kernel_mapping",
    "report",
    "restore",
]

AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)
