"""Plan a Llama's memory and least time on GPUs, without any of them: capacity.plan()."""
