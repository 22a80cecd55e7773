"""What a GPU can do at most, measured beside the kernels: bandwidths and matrix rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import gpu_timing, timing
from .baselines import Baselines, offer_scaled_mm
from .case import matmul_limit, read
from .gpu_case import BF16, Place, Unsupported
from .timing import Run, Timing

BUFFER = 1 << 30  # bytes; eight of them rotate, 80 times the last-level cache


def measure(place: Place, runs: dict[str, Run], budget: float, **options: Any) -> dict[str, Timing]:
    """By the GPU's events, or on a CPU by the host's clock."""
    if place.device.type == "cpu":
        return timing.measure(runs, budget)
    return gpu_timing.measure(runs, budget, **options)


def tasks(place: Place, budget: float) -> dict[str, Callable[[], list[dict[str, Any]]]]:
    """Limit -> what measures it."""
    return {
        "copy": lambda: [_memory(place, budget, copy=True)],
        "read": lambda: [_memory(place, budget, copy=False)],
        "bf16": lambda: [_bf16(place, budget)],
        "fp8": lambda: [_fp8(place, budget)],
    }


def of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Limit -> bytes or flops a second."""
    return {row["shape"]: row["rate"] for row in rows}


def _row(
    name: str, work: float, timings: dict[str, Timing], unit: str, what: str
) -> dict[str, Any]:
    best = min(timings, key=lambda n: timings[n].median)
    return {
        "op": "limit",
        "shape": name,
        "rate": work / timings[best].median,
        "unit": unit,
        "what": what,
        "best": best,
        "seconds": {n: t.to_json() for n, t in timings.items()},
    }


def _memory(place: Place, budget: float, copy: bool) -> dict[str, Any]:
    size = BUFFER if place.device.type == "cuda" else 1 << 16
    buffers = [torch.empty(size // 8, dtype=torch.int64, device=place.device) for _ in range(8)]
    for b in buffers:
        b.random_()
    if copy:
        runs: dict[str, Run] = {"copy_": lambda i: buffers[i % 4].copy_(buffers[4 + i % 4])}
    else:
        runs = {"read": read(buffers), "sum": lambda i: buffers[i % 8].sum()}
    timings = measure(place, runs, budget, copies=4 if copy else 8)
    what = f"{'copy of' if copy else 'reading'} rotating buffers of {size >> 20} MiB"
    return _row("copy" if copy else "read", size * (2.0 if copy else 1.0), timings, "GB/s", what)


def _bf16(place: Place, budget: float) -> dict[str, Any]:
    run, flops = matmul_limit(BF16, place.device)
    return _row("bf16", flops, measure(place, {"matmul": run}, budget), "TFLOP/s", "bf16 product")


def _fp8(place: Place, budget: float) -> dict[str, Any]:
    n = place.sizes.square
    a, b = (place.randn(n, n).to(torch.float8_e4m3fn) for _ in range(2))
    scale = torch.ones(n, 1, device=place.device)
    to = Baselines(lambda _: None)
    offer_scaled_mm(to, lambda _: (a, b), scale, scale)
    runs = {name: run for name, run in to.runs.items() if name != "ours"}
    if not runs:
        raise Unsupported(f"torch._scaled_mm: {next(iter(to.skipped.values()))}")
    return _row("fp8", 2.0 * n**3, measure(place, runs, budget), "TFLOP/s", "torch._scaled_mm")
