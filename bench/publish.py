"""README.md's table and docs/results.md, cut from the runs in bench/results."""

from __future__ import annotations


def main() -> int:
    raise NotImplementedError
