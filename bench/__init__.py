"""The benchmark suite: `python -m bench`, `llama-fast bench` and `make bench` are the same thing."""
