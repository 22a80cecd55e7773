"""The benchmark suite, which `make bench`, `llama-fast bench` and `python -m bench` run."""
