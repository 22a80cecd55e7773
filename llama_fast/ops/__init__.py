"""The ops, a file for each family: public functions, checks, allocation, schemas and fakes.

A public function checks its arguments once, for every backend, and calls the registered op, which
allocates, asks dispatch.py for a backend and launches. What needs a tensor's data (positions,
slots, lengths) is checked on CPU tensors only: on a GPU it would synchronize, and the kernel stays
in bounds by itself.

T tokens, H query heads, Hkv key/value heads, D head_dim. Activations are bf16, fp16 or fp32; all
tensors of a call share one device; rows may have any stride, the last dimension is contiguous.
Wrong types and dtypes raise TypeError, wrong shapes, strides, devices and ranges ValueError. Zero
tokens give empty outputs. Inference only: no op has a backward.
"""
