"""The ops, one file per family: public functions, checks, allocation, schemas and fakes.

A public function checks its arguments once, for every backend, and calls the registered op, which
allocates, asks dispatch.py for a backend and launches. Values in tensors (positions, slots) are
checked on the CPU only: on a GPU that would synchronize, and the kernels stay in bounds without it.

T tokens, H query heads, Hkv key/value heads, D head_dim. Activations are bf16, fp16 or fp32. All
tensors of a call share one device. Rows may have any stride; the last dimension is contiguous.
Wrong types and dtypes raise TypeError; wrong shapes, strides, devices and ranges raise ValueError.
Zero tokens give empty outputs. An op without a gradient's formula raises NotImplementedError in the
backward pass. Under torch.autocast activations may have different dtypes.
"""

from importlib import import_module

import torch

from .. import _cpu, reference
from ..dispatch import OPS, read_environment

for _family in _cpu.families:
    _module = import_module(f"{__name__}.{_family}")
    for _name, _value in vars(_module).items():
        # An op is a function of the module that is registered and has an eager twin of its name.
        if getattr(_value, "__module__", "") == _module.__name__ and (
            hasattr(reference, _name) and hasattr(torch.ops.llama_fast, _name)
        ):
            OPS[_name] = _family
read_environment()
