"""Checkpoints: reading Hugging Face's files into Weights, and writing them quantized."""
