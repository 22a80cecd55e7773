"""Generation: the loops, the KV cache, sampling and speculation."""
