"""Generating: the loops, what they cache, how tokens are chosen and proposed."""
