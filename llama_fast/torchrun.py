"""What torchrun says of a process, without torch: usage is checked before torch is imported."""

from __future__ import annotations

import os
import time

FIRST = 5.0  # seconds in which another process may report a failure


class PeerError(RuntimeError):
    """Another rank failed, or does not answer."""


def launched() -> int | None:
    """Return how many processes torchrun started, or None if it did not start this one."""
    size = os.environ.get("WORLD_SIZE")
    return int(size) if size and "RANK" in os.environ else None


def is_first() -> bool:
    return launched() is None or os.environ["RANK"] == "0"


def let_first_report() -> None:
    """Let the first of torchrun's processes report an error that all of them have: wait in the
    others. torchrun ends these when the first has ended."""
    if not is_first():
        time.sleep(FIRST)


def label(error: Exception) -> str:
    """Return what comes before an error's message, once the rank that failed has reported it."""
    if launched() is None:
        return ""
    if isinstance(error, PeerError):
        time.sleep(FIRST)
        return ""
    return f"rank {os.environ['RANK']}: "
