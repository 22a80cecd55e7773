"""Cases of a layer's matrix products: FP8 weights at any number of rows, 16-bit ones at one row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llama_fast as lf
from llama_fast import _cpu, cpu, reference

from ..timing import Run, limits
from .case import PARTS, Case, Plan, Spec, eager, ends

CHECKED_FEATURES = 512  # from each end, compared with fp64
FEW = 64  # rows up to which reading the weight limits a GPU


@dataclass(frozen=True)
class Weights:
    """Copies of a linear's weight, in every form that an implementation takes."""

    plain: list[Tensor]  # [N, K]
    quantized: list[tuple[Tensor, Tensor]]  # e4m3 [N, K], scale [N, 1]
    packed: list[Tensor]  # the e4m3 weights in our layout
    packed_plain: list[Tensor]


kept: dict[tuple[Spec, int, int], Weights] = {}  # the last linear's, which its cases share


def _weights(s: Spec, n: int, k: int) -> Weights:
    if (s, n, k) not in kept:
        kept.clear()  # first: two linears' weights may not fit
        count = s.copies(n * k)
        plain = [s.randn(n, k) for _ in range(max(2, count // 2))]
        quantized = [lf.quantize_fp8(plain[i % len(plain)]) for i in range(count)]
        pack = s.either(lf.pack_weight, lambda w: w)  # a layout for CPUs
        packed, packed_plain = [pack(q) for q, _ in quantized], [pack(w) for w in plain]
        kept[s, n, k] = Weights(plain, quantized, packed, packed_plain)
    return kept[s, n, k]


def plans(s: Spec) -> Iterator[Plan]:
    large = [m for m in s.sweep.rows if m > FEW] or s.sweep.rows[-1:]
    blocks = partial(_fp8_gemm, granularity=("block", "block_2d"))
    wanted: list[tuple[str, Callable[..., Case], int, str, int]]
    wanted = [("fp8_gemm", _fp8_gemm, m, "", 1) for m in large]
    wanted += [("fp8_gemm", blocks, m, "blocks ", 1) for m in large[-1:] if s.sweep.variants]
    wanted += [("fp8_linear", _fp8_linear, m, "", s.size) for m in s.sweep.rows]
    for name in s.sweep.linears:
        n, k = s.shapes.linears[name]
        count = s.copies(n * k)
        weights = n * k * (2.0 * count + 3.0 * max(2, count // 2) * s.size)
        weights += 8.0 * n * k * s.fp32_too
        for op, make, m, kind, x in [*wanted, ("linear", _linear, s.sweep.rows[0], "", 0)]:
            # linear, at one row, counts only its weight.
            moved = 1.0 * n * k + m * (x * k + n * s.size) if x else 1.0 * n * k * s.size
            work = moved, 2.0 * m * n * k, weights + 4.0 * m * (n + k) * s.size
            shape, axes = f"{kind}M={m}, {n} x {k}", {"rows": m, "features": n, "inner": k}
            yield Plan(op, shape, axes, *work, partial(make, s, n, k, m))


def _value(out: Tensor) -> Tensor:
    return ends(ends(out).t(), CHECKED_FEATURES).t()


def _exact_product(x: Tensor, w: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return the checked rows and features of x @ w.T in fp64."""
    w = ends(w, CHECKED_FEATURES)
    if scale is not None:
        w = reference.dequantize_fp8(w, ends(scale, CHECKED_FEATURES), dtype=torch.float64)
    return ends(x).double() @ w.double().t()


def _linear(s: Spec, n: int, k: int, m: int) -> Case:
    w, x = _weights(s, n, k), s.randn(m, k)
    baselines: dict[str, Run] = {"F.linear": lambda i: F.linear(x, w.plain[i % len(w.plain)])}
    if s.fp32_too:
        baselines["F.linear fp32"] = _linear_fp32(x, w, 1)
    return Case(
        "linear",
        lambda i: (x, w.plain[i % len(w.plain)]),
        limits.read(w.packed_plain, 1.0 * n * k * s.size),
        lambda: _exact_product(x, w.plain[0]),
        _value,
        packed=lambda i: (x, w.packed_plain[i % len(w.packed_plain)]),
        baselines=baselines,
        inputs={"x": x, "weights": w.plain},
    )


def _linear_fp32(x: Tensor, w: Weights, n: int) -> Run:
    """Return a run with an nth of the weight's rows. One weight is more than caches hold."""
    wide, weight = x.float(), w.plain[0][: len(w.plain[0]) // n].float()
    return lambda _: F.linear(wide, weight)


def _fp8_linear(s: Spec, n: int, k: int, m: int) -> Case:
    w, x = _weights(s, n, k), s.randn(m, k)
    streams = m <= FEW if s.on_gpu else m == 1  # bound by reading the weight

    def packed(i: int) -> tuple[Any, ...]:
        i %= len(w.packed)
        return x, w.packed[i], w.quantized[i][1]

    def plain(part: int) -> Run:
        return lambda i: F.linear(x, w.plain[i % len(w.plain)][: n // part])

    def twin(part: int, x: Tensor = x) -> Run:
        def run(i: int) -> Tensor:
            q, scale = w.quantized[i % len(w.quantized)]
            return reference.fp8_linear(x, q[: n // part], scale[: n // part])

        return run

    parts: dict[str, Callable[[int], Run]] = {"bf16 F.linear": plain, "eager": twin}
    if s.fp32_too:
        parts["F.linear fp32"] = partial(_linear_fp32, x, w)
        parts["eager fp32"] = partial(twin, x=x.float())
    baselines = {}
    targets = {1: {"bf16 F.linear": 4.0, "limit": 0.9}, 16: {"bf16 F.linear": 1.7}}.get(m, {})
    if m >= 512:
        parts["torch._scaled_mm"] = partial(_scaled_mm, x, w)
        targets = {"bf16 F.linear": 0.95, "torch._scaled_mm": 4.5}
        if s.on_gpu:  # there ours quantizes the activations
            baselines["torch._scaled_mm + quantizing"] = _scaled_mm(x, w, quantize=True)
    if not s.on_gpu and m >= cpu.INT16_ROWS and _cpu.isa() == "avx2":
        baselines["ours int16"] = _rounding(packed)
    return Case(
        "fp8_linear",
        lambda i: (x, *w.quantized[i % len(w.quantized)]),
        limits.read(w.packed, 1.0 * n * k) if streams else s.compute(fp8=True),
        lambda: _exact_product(x, *w.quantized[0]),
        _value,
        packed=packed,
        baselines=baselines,
        parts=parts,
        divides=n % PARTS == 0,
        inputs={"x": x, "weights": w.plain},
        targets=s.either(targets, {"limit": 0.85 if streams else 0.8}),
    )


def _rounding(arguments: Callable[[int], tuple[Any, ...]]) -> Run:
    """Return a run of fp8_linear under LLAMA_FAST_CPU_INT16=on."""

    def run(i: int) -> Tensor:
        before, cpu.int16 = cpu.int16, True
        try:
            return lf.fp8_linear(*arguments(i))
        finally:
            cpu.int16 = before

    return run


def _scaled_mm(x: Tensor, w: Weights, part: int = 1, quantize: bool = False) -> Run:
    """Return a run of torch's FP8 product scaled by row, with a part of the weight's rows.
    quantize: include the quantization of x."""
    rows = len(w.plain[0]) // part
    scales = [scale[:rows].t().contiguous() for _, scale in w.quantized]
    given = lf.quantize_fp8(x)

    def run(i: int) -> Tensor:
        i %= len(scales)
        q, scale = lf.quantize_fp8(x) if quantize else given
        weight = w.quantized[i][0][:rows].t()
        return torch._scaled_mm(q, weight, scale, scales[i], out_dtype=x.dtype)

    return run


def _fp8_gemm(
    s: Spec, n: int, k: int, m: int, granularity: tuple[str, str] = ("row", "row")
) -> Case:
    """Make a case with both operands in FP8, with scales by row or by block."""
    w, options = _weights(s, n, k), {"out_dtype": s.dtype}
    a, scale_a = reference.quantize_fp8(s.randn(m, k), granularity[0])
    made = [reference.quantize_fp8(t, granularity[1]) for t in w.plain]
    plain = reference.dequantize_fp8(*made[0], dtype=s.dtype)
    wide = reference.dequantize_fp8(a, scale_a, dtype=s.dtype)
    by_row = granularity[0] == "row"

    def arguments(i: int) -> tuple[Tensor, ...]:
        b, scale_b = made[i % len(made)]
        return a, b, scale_a, scale_b

    def scaled_mm(i: int) -> Tensor:
        b, scale_b = made[i % len(made)]
        # torch wants a block's scales column-major.
        scale = scale_a if by_row else scale_a.t().contiguous().t()
        return torch._scaled_mm(a, b.t(), scale, scale_b.t(), out_dtype=s.dtype)

    def exact() -> Tensor:
        x, b = (reference.dequantize_fp8(*t, dtype=torch.float64) for t in ((a, scale_a), made[0]))
        return _exact_product(x, b)

    return Case(
        "fp8_gemm",
        arguments,
        s.compute(fp8=True),
        exact,
        _value,
        options=options,
        baselines={
            "eager": eager("fp8_gemm", arguments, **options),
            "torch._scaled_mm": scaled_mm,
            "bf16 F.linear": lambda _: F.linear(wide, plain),
        },
        targets=s.either({}, {"limit": 0.85}),
    )
