"""Read Hugging Face's checkpoints into Weights, and write them quantized."""
