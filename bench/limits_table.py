"""Print the least time of each op on a chip by its data sheet: python -m bench.limits_table.

For each of the suite's cases on a GPU it prints the bytes that have to move (each input read and
each output written once), the floating-point operations, and the longer of the times that the
chip's memory and matrix units take for them. No kernel is faster.
"""

from __future__ import annotations

import argparse

import torch

from llama_fast.plan.gpus import GPUS, Gpu

from . import cases
from .cases.shapes import PRESETS


def microseconds(gpu: Gpu, op: str, moved: float, flops: float) -> tuple[float, str]:
    """Return the least time and what bounds it. Without FP8 fp8_gemm multiplies in bf16."""
    compute = (op == "fp8_gemm" and gpu.fp8) or gpu.bf16
    times = {"memory": moved / gpu.bandwidth, "compute": flops / compute}
    bound = max(times, key=lambda name: times[name])
    return times[bound] / 1e6, bound


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.limits_table", description=__doc__)
    p.add_argument("--model", choices=PRESETS, default="8b")
    p.add_argument("--chip", nargs="+", choices=GPUS, default=["h100", "h200"])
    args = p.parse_args(argv)
    print(f"{'op':<24}{'shape':<44}{'MB':>9}{'GFLOP':>10}", end="")
    print(*(f"{name:>12} us bound by" for name in args.chip))
    for plan in cases.plan(cases.spec(args.model, device=torch.device("cuda"))):
        print(f"{plan.op:<24}{plan.shape:<44}", end="")
        print(f"{plan.bytes / 1e6:>9.3f}{plan.flops / 1e9:>10.3f}", end="")
        for chip in args.chip:
            least, bound = microseconds(GPUS[chip], plan.op, plan.bytes, plan.flops)
            print(f"{least:>12.1f}    {bound:<8}", end="")
        print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
