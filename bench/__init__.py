"""The benchmark suite: `make bench`, `llama-fast bench` and `python -m bench` are one thing."""
