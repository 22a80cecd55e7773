"""Llama in transformers on these kernels. Only this package imports transformers."""
