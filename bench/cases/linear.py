"""Cases of a layer's matrix products: FP8 weights at any number of rows, 16-bit ones at one row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llama_fast as lf
from llama_fast import _cpu, cpu, reference

from ..timing import Run, limits
from .case import PARTS, Case, Plan, Spec, eager, ends, ours

CHECKED_FEATURES = 512  # from each end, compared with fp64
FEW = 64  # rows up to which reading the weight limits a GPU


@dataclass(frozen=True)
class Weights:
    """Copies of a linear's weight, in every form that an implementation takes."""

    plain: list[Tensor]  # [N, K]
    quantized: list[tuple[Tensor, Tensor]]  # e4m3 [N, K], scale [N, 1]
    packed: list[Tensor]  # the e4m3 weights in our layout
    packed_plain: list[Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        return self.plain[0].shape[0], self.plain[0].shape[1]


kept: dict[tuple[Spec, int, int], Weights] = {}  # the last linear's, which its cases share


def _weights(s: Spec, n: int, k: int) -> Weights:
    if (s, n, k) not in kept:
        kept.clear()  # first: two linears' weights may not fit
        count = s.copies(n * k)
        plain = [s.randn(n, k) for _ in range(max(2, count // 2))]
        quantized = [lf.quantize_fp8(plain[i % len(plain)]) for i in range(count)]
        pack = (lambda w: w) if s.on_gpu else lf.pack_weight  # a layout for CPUs
        packed, packed_plain = [pack(q) for q, _ in quantized], [pack(w) for w in plain]
        kept[s, n, k] = Weights(plain, quantized, packed, packed_plain)
    return kept[s, n, k]


def plans(s: Spec) -> Iterator[Plan]:
    for name in s.sweep.linears:
        n, k = s.shapes.linears[name]
        count = s.copies(n * k)
        memory = n * k * (2.0 * count + 3.0 * max(2, count // 2) * s.size)
        memory += 8.0 * n * k * s.fp32_too

        def planned(op: str, make: Callable[..., Case], m: int, shape: str = "") -> Plan:
            what = f"{shape}M={m}, {n} x {k}"  # noqa: B023
            extra = 4.0 * m * (n + k) * s.size  # noqa: B023
            return Plan(op, what, memory + extra, functools.partial(make, s, n, k, m, what))  # noqa: B023

        large = [m for m in s.sweep.rows if m > FEW] or s.sweep.rows[-1:]
        for m in large:
            yield planned("fp8_gemm", _fp8_gemm, m)
        if s.sweep.variants:
            blocks = functools.partial(_fp8_gemm, granularity=("block", "block_2d"))
            yield planned("fp8_gemm", blocks, large[-1], "blocks ")
        for m in s.sweep.rows:
            yield planned("fp8_linear", _fp8_linear, m)
        for m in s.sweep.rows[:1]:
            yield planned("linear", _linear, m)


def _case(op: str, n: int, k: int, m: int, shape: str, size: float, **fields: Any) -> Case:
    return Case(
        op=op,
        shape=shape,
        axes={"rows": m, "features": n, "inner": k},
        bytes=size,
        flops=2.0 * m * n * k,
        value=lambda out: ends(ends(out).t(), CHECKED_FEATURES).t(),
        **fields,
    )


def _exact_product(x: Tensor, w: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return the checked rows and features of x @ w.T in fp64."""
    w = ends(w, CHECKED_FEATURES)
    if scale is not None:
        scale = ends(scale, CHECKED_FEATURES)
        return ends(x).double() @ reference.dequantize_fp8(w, scale, dtype=torch.float64).t()
    return ends(x).double() @ w.double().t()


def _linear(s: Spec, n: int, k: int, m: int, shape: str) -> Case:
    w = _weights(s, n, k)
    x = s.randn(m, k)
    size = 1.0 * n * k * x.itemsize
    baselines: dict[str, Run] = {"F.linear": lambda i: F.linear(x, w.plain[i % len(w.plain)])}
    if s.fp32_too:
        baselines["F.linear fp32"] = _linear_fp32(x, w, 1)
    return _case(
        "linear",
        *(n, k, m, shape, size),
        arguments=lambda i: (x, w.plain[i % len(w.plain)]),
        ours=lambda i: lf.linear(x, w.packed_plain[i % len(w.packed_plain)]),
        baselines=baselines,
        limit=limits.read(w.packed_plain, size),
        exact=lambda: _exact_product(x, w.plain[0]),
        inputs={"x": x, "weights": w.plain},
    )


def _linear_fp32(x: Tensor, w: Weights, n: int) -> Run:
    """Return a run with an nth of the weight's rows. One weight is more than caches hold."""
    wide, weight = x.float(), w.plain[0][: w.shape[0] // n].float()
    return lambda _: F.linear(wide, weight)


def _fp8_linear(s: Spec, n: int, k: int, m: int, shape: str) -> Case:
    w = _weights(s, n, k)
    x = s.randn(m, k)
    streams = m <= FEW if s.on_gpu else m == 1  # bound by reading the weight

    def arguments(i: int) -> tuple[Any, ...]:
        return (x, *w.quantized[i % len(w.quantized)])

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
        parts["F.linear fp32"] = functools.partial(_linear_fp32, x, w)
        parts["eager fp32"] = functools.partial(twin, x=x.float())
    targets = {1: {"bf16 F.linear": 4.0, "limit": 0.9}, 16: {"bf16 F.linear": 1.7}}.get(m, {})
    if m >= 512:
        parts["torch._scaled_mm"] = functools.partial(_scaled_mm, x, w)
        targets = {"bf16 F.linear": 0.95, "torch._scaled_mm": 4.5}
    baselines = {name: part(1) for name, part in parts.items()}
    if m >= 512 and s.on_gpu:  # there ours quantizes the activations
        baselines["torch._scaled_mm + quantizing"] = _scaled_mm(x, w, quantize=True)
    if not s.on_gpu and m >= cpu.INT16_ROWS and _cpu.isa() == "avx2":
        baselines["ours int16"] = _rounding(packed)
    if s.on_gpu:
        targets = {"limit": 0.85 if streams else 0.8}
    return _case(
        "fp8_linear",
        *(n, k, m, shape, 1.0 * n * k + x.nbytes + m * n * x.itemsize),
        arguments=arguments,
        ours=ours("fp8_linear", packed),
        baselines=baselines,
        limit=limits.read(w.packed, 1.0 * n * k) if streams else s.compute(fp8=True),
        exact=lambda: _exact_product(x, *w.quantized[0]),
        inputs={"x": x, "weights": w.plain, "quantized": w.quantized},
        targets=targets,
        parts=parts if n % PARTS == 0 else {},
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
    rows = w.shape[0] // part
    scales = [scale[:rows].t().contiguous() for _, scale in w.quantized]
    given = lf.quantize_fp8(x)

    def run(i: int) -> Tensor:
        i %= len(scales)
        q, scale = lf.quantize_fp8(x) if quantize else given
        weight = w.quantized[i][0][:rows].t()
        return torch._scaled_mm(q, weight, scale, scales[i], out_dtype=x.dtype)

    return run


def _fp8_gemm(
    s: Spec,
    n: int,
    k: int,
    m: int,
    shape: str,
    granularity: tuple[str, str] = ("row", "row"),
) -> Case:
    """Make a case with both operands in FP8, with scales by row or by block."""
    w = _weights(s, n, k)
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
        if by_row:
            return torch._scaled_mm(a, b.t(), scale_a, scale_b.t(), out_dtype=s.dtype)
        columns = scale_a.t().contiguous().t()  # torch wants them column-major
        return torch._scaled_mm(a, b.t(), columns, scale_b.t(), out_dtype=s.dtype)

    def exact() -> Tensor:
        x = reference.dequantize_fp8(a, scale_a, dtype=torch.float64)
        return _exact_product(x, reference.dequantize_fp8(*made[0], dtype=torch.float64))

    return _case(
        "fp8_gemm",
        *(n, k, m, shape, 1.0 * (m + n) * k + m * n * s.size),
        arguments=arguments,
        options={"out_dtype": s.dtype},
        ours=ours("fp8_gemm", arguments, out_dtype=s.dtype),
        baselines={
            "eager": eager("fp8_gemm", arguments, out_dtype=s.dtype),
            "torch._scaled_mm": scaled_mm,
            "bf16 F.linear": lambda _: F.linear(wide, plain),
        },
        limit=s.compute(fp8=True),
        exact=exact,
        targets={"limit": 0.85} if s.on_gpu else {},
    )
