"""Measure peak and free memory, and set whether freed memory is kept."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _NEVER = -3, -1, -1  # of glibc's malloc.h
_HIGHEST = 32 << 20  # bytes, the most that glibc accepts for _MMAP_THRESHOLD


@dataclass
class Peak:
    bytes: float = 0.0  # once the block has ended


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the most memory that a block takes beyond what was in use before: on a GPU PyTorch's
    allocations, on a CPU resident pages (Linux)."""
    found = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = float(torch.cuda.memory_allocated(device))
        yield found
        torch.cuda.synchronize(device)
        found.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    trim()
    Path("/proc/self/clear_refs").write_text("5")  # set the peak to what is resident now
    before = _bytes("self/status", "VmRSS")
    yield found
    found.bytes = max(0.0, _bytes("self/status", "VmHWM") - before)


def keep_freed() -> bool:
    """Make this process keep freed memory for its next allocations, up to 32 MiB each; return
    whether the C library can do that.

    glibc does so by itself after it has freed large blocks. Until then an op's output may be new
    pages, whose faults take longer than many ops.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _HIGHEST) and mallopt(_TRIM_THRESHOLD, _NEVER))


def trim() -> None:
    """Give freed memory back to the system, if the C library can do that, since the reuse of kept
    memory does not show in the peak."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _bytes(file: str, name: str) -> float:
    """Return the bytes on a line of a file of /proc. Raises OSError if there is none."""
    for line in Path("/proc", file).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return float(line.split()[1]) * 1024
    raise OSError(f"/proc/{file}: no {name}")


def free_memory(device: torch.device) -> float:
    """Return the bytes that can be allocated now."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    with contextlib.suppress(OSError):
        return _bytes("meminfo", "MemAvailable")
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
