"""Print the least time of each op on a chip by its data sheet: python -m bench.limits_table.

For each op at the shapes of a Llama 3.1 layer it prints the bytes that have to move (each input
read and each output written once), the floating-point operations, and the longer of the times that
the chip's memory and matrix units take for them. No kernel is faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import llama_fast as lf

from .cases.shapes import PRESETS


class Chip(NamedTuple):
    """Dense rates, by the manufacturer's data sheet. fp8: 0 where matrix units do not take it."""

    bandwidth: float  # TB/s
    bf16: float  # TFLOP/s
    fp8: float


CHIPS = {
    "A100": Chip(2.04, 312, 0),
    "L40S": Chip(0.864, 362, 733),
    "H100": Chip(3.35, 989, 1979),
    "H200": Chip(4.8, 989, 1979),
    "B200": Chip(8.0, 2250, 4500),
    "MI300X": Chip(5.3, 1307, 2615),
}


class Work(NamedTuple):
    """An op's bytes and operations at a shape, in bf16 unless its name says FP8."""

    op: str
    shape: str
    bytes: float
    flops: float
    fp8: bool = False  # whether its matrix product takes FP8 operands

    def microseconds(self, chip: Chip) -> tuple[float, str]:
        """Return the least time and what bounds it. Chips without FP8 multiply in bf16."""
        compute = (self.fp8 and chip.fp8) or chip.bf16
        times = {"memory": self.bytes / chip.bandwidth, "compute": self.flops / compute}
        bound = max(times, key=lambda name: times[name])
        return times[bound] / 1e6, bound


def elementwise(c: lf.LlamaConfig, rows: int) -> Iterator[Work]:
    h, inner, kv = c.hidden_size, c.intermediate_size, c.num_key_value_heads
    size, wide = f"{rows} x {h}", f"{rows} x {inner}"
    yield Work("rms_norm", size, 4 * rows * h, 4 * rows * h)
    yield Work("add_rms_norm", size, 8 * rows * h, 5 * rows * h)
    yield Work("rms_norm_fp8 + residual", size, rows * (7 * h + 4), 7 * rows * h)
    yield Work("silu_and_mul", wide, 6 * rows * inner, 5 * rows * inner)
    yield Work("silu_and_mul_fp8", wide, rows * (5 * inner + 4), 7 * rows * inner)
    yield Work("quantize_fp8", size, rows * (3 * h + 4), 3 * rows * h)
    for op, heads in (("apply_rope", kv), ("apply_rope_and_append", 2 * kv)):
        values = rows * (c.num_attention_heads + heads) * c.head_dim
        yield Work(op, f"{rows} tokens", 4 * (values + rows * c.head_dim), 3 * values)


def attention(c: lf.LlamaConfig, batch: int, queries: int, keys: int, cache: int = 2) -> Work:
    """Return the work of causal attention, bottom-right aligned. cache: bytes per cache element."""
    heads, kv, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    scores = batch * heads * queries * (keys - (queries - 1) / 2)
    moved = 2 * cache * batch * keys * kv * d + 4 * batch * queries * heads * d
    op = "attention" if queries > 1 else "attention_with_kvcache" + " FP8" * (cache == 1)
    return Work(op, f"{batch} x {queries} x {keys}", moved, 4 * d * scores)


def products(c: lf.LlamaConfig, rows: int) -> Iterator[Work]:
    """Yield the work of the gate and up projection."""
    n, k = 2 * c.intermediate_size, c.hidden_size
    for op, x, weight in (("linear", 2, 2), ("fp8_linear, bf16 x", 2, 1), ("fp8_gemm", 1, 1)):
        moved = n * k * weight + rows * k * x + 2 * rows * n
        yield Work(op, f"{rows} x {n} x {k}", moved, 2.0 * rows * n * k, x == 1)


def table(c: lf.LlamaConfig) -> list[Work]:
    return [
        *elementwise(c, 8192),
        attention(c, 1, 16384, 16384),
        *(attention(c, 32, 1, 4096, size) for size in (2, 1)),
        attention(c, 1, 1, 131072),
        *(work for rows in (1, 16, 8192) for work in products(c, rows)),
    ]


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.limits_table", description=__doc__)
    p.add_argument("--model", choices=PRESETS, default="8b")
    p.add_argument("--chip", nargs="+", choices=CHIPS, default=["H100", "H200"])
    args = p.parse_args(argv)
    print(f"{'op':<28}{'shape':<24}{'GB':>8}{'GFLOP':>10}", end="")
    print(*(f"{name:>12} us bound by" for name in args.chip))
    for w in table(PRESETS[args.model]()):
        print(f"{w.op:<28}{w.shape:<24}{w.bytes / 1e9:>8.3f}{w.flops / 1e9:>10.1f}", end="")
        for microseconds, bound in (w.microseconds(CHIPS[name]) for name in args.chip):
            print(f"{microseconds:>12.1f}    {bound:<8}", end="")
        print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
