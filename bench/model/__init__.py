"""Measure whole models: ours and every other implementation, with the same random weights."""
