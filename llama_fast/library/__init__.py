"""torch.library registration of every op: schema, implementation, fake (shape-only) version.

An implementation allocates, chooses the backend and launches; checks of shapes and dtypes are in
ops.py. What needs a tensor's data (positions, slots, lengths) is checked here, on CPU tensors only:
on a GPU it would cost a synchronisation, and the kernel stays in bounds by itself.

A file for each family of ops, named as its kernels are; importing it registers them.

Library.define/impl rather than torch.library.custom_op: about 2 us a call against 5 to 15.
"""

from __future__ import annotations

from . import activation, attention, linear, quantize, rms_norm, rope
from .linear import out_features, prefers_fp8_activations

__all__ = [
    "activation",
    "attention",
    "linear",
    "out_features",
    "prefers_fp8_activations",
    "quantize",
    "rms_norm",
    "rope",
]
