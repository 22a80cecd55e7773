"""Llama in transformers on these kernels. Only this package imports transformers.

Importing it registers attn_implementation="llama_fast".
"""

from transformers import AttentionInterface, AttentionMaskInterface

from .accelerate import accelerate, restore
from .attention import NAME, attend
from .kernelize import kernel_mapping
from .masks import make_mask
from .report import Report, report

__all__ = ["Report", "accelerate", "kernel_mapping", "report", "restore"]

AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)
