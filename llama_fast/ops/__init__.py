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
