"""The whole model: ours beside every other implementation of it, on the same random weights."""
