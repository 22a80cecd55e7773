"""The matrix products of a layer: FP8 weights at any number of rows, 16-bit ones at one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llama_fast as lf
from llama_fast import reference

from .case import Case, Plan, Spec, compute_limit, copies, ends, read
from .timing import PARTS, Run

CHECKED_FEATURES = 512  # from each end, held against fp64


@dataclass(frozen=True)
class Weights:
    """A linear's weight, several times over, in every form that somebody multiplies by."""

    plain: list[Tensor]  # [N, K]
    quantised: list[tuple[Tensor, Tensor]]  # e4m3 [N, K], scale [N, 1]
    packed: list[Tensor]  # the e4m3 weights, in ours
    packed_plain: list[Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        return self.plain[0].shape[0], self.plain[0].shape[1]


def _weights(s: Spec, n: int, k: int) -> Weights:
    count = copies(n * k, s.device)
    plain = [s.randn(n, k) for _ in range(max(2, count // 2))]
    quantised = [lf.quantize_fp8(plain[i % len(plain)]) for i in range(count)]
    pack = lf.pack_weight if s.device.type == "cpu" else lambda w: w  # a layout for CPUs
    return Weights(plain, quantised, [pack(q) for q, _ in quantised], [pack(w) for w in plain])


class _Kept:
    """The last weights asked for, which the cases of one linear share. fresh(): for others."""

    def __init__(self) -> None:
        self.key: object = None
        self.weights: Weights | None = None

    def get(self, s: Spec, n: int, k: int) -> Weights:
        key = (s, n, k)
        if self.key != key or self.weights is None:
            self.fresh()
            self.key, self.weights = key, _weights(s, n, k)
        return self.weights

    def fresh(self) -> None:
        self.key = self.weights = None


kept = _Kept()


def linears(s: Spec) -> Iterator[Plan]:
    for name in s.sweep.linears:
        n, k = s.shapes.linears[name]
        count = copies(n * k, s.device)
        memory = n * k * (2.0 * count + 3.0 * max(2, count // 2) * s.size)
        memory += 8.0 * n * k * s.fp32_too
        for m in s.sweep.rows:
            shape, extra = f"M={m}, {n} x {k}", 4.0 * m * (n + k) * s.size
            make = functools.partial(_fp8_linear, s, n, k, m, shape)
            yield Plan("fp8_linear", shape, memory + extra, make)
        for m in s.sweep.rows[:1]:
            shape = f"M={m}, {n} x {k}"
            yield Plan("linear", shape, memory, functools.partial(_linear, s, n, k, m, shape))


def _exact_product(x: Tensor, w: Tensor, scale: Tensor | None = None) -> Tensor:
    """The checked rows and features of x @ w.T in fp64."""
    w = ends(w, CHECKED_FEATURES)
    if scale is not None:
        return (
            ends(x).double()
            @ reference.dequantize_fp8(w, ends(scale, CHECKED_FEATURES), dtype=torch.float64).t()
        )
    return ends(x).double() @ w.double().t()


def _checked_product(out: Tensor) -> Tensor:
    return ends(ends(out).t(), CHECKED_FEATURES).t()


def _linear(s: Spec, n: int, k: int, m: int, shape: str) -> Case:
    w = kept.get(s, n, k)
    x = s.randn(m, k)
    size = 1.0 * n * k * x.itemsize
    baselines: dict[str, Run] = {"F.linear": lambda i: F.linear(x, w.plain[i % len(w.plain)])}
    if s.fp32_too:
        baselines["F.linear fp32"] = _linear_fp32(x, w, 1)
    return Case(
        op="linear",
        shape=shape,
        axes={"rows": m, "features": n, "inner": k},
        bytes=size,
        flops=2.0 * m * n * k,
        ours=lambda i: lf.linear(x, w.packed_plain[i % len(w.packed_plain)]),
        baselines=baselines,
        limit=read(w.packed_plain),
        limit_work=size,
        limit_name="read",
        exact=lambda: _exact_product(x, w.plain[0]),
        value=_checked_product,
        arguments=lambda i: (x, w.plain[i % len(w.plain)]),
        inputs={"x": x, "weights": w.plain},
    )


def _linear_fp32(x: Tensor, w: Weights, n: int) -> Run:
    """By an nth of the weight's rows. One is more than caches hold."""
    wide, weight = x.float(), w.plain[0][: w.shape[0] // n].float()
    return lambda _: F.linear(wide, weight)


def _fp8_linear(s: Spec, n: int, k: int, m: int, shape: str) -> Case:
    w = kept.get(s, n, k)
    x = s.randn(m, k)
    streams = m == 1  # bound by reading the weight; from a few rows on CPUs compute
    limit, limit_work, limit_name = (
        (read(w.packed), 1.0 * n * k, "read") if streams else compute_limit(s)
    )

    def arguments(i: int) -> tuple[Any, ...]:
        return (x, *w.quantised[i % len(w.quantised)])

    def ours(i: int) -> Tensor:
        i %= len(w.packed)
        return lf.fp8_linear(x, w.packed[i], w.quantised[i][1])

    def plain(part: int) -> Run:
        return lambda i: F.linear(x, w.plain[i % len(w.plain)][: n // part])

    def eager(part: int, x: Tensor = x) -> Run:
        def run(i: int) -> Tensor:
            q, scale = w.quantised[i % len(w.quantised)]
            return reference.fp8_linear(x, q[: n // part], scale[: n // part])

        return run

    parts: dict[str, Callable[[int], Run]] = {"bf16 F.linear": plain, "eager": eager}
    if s.fp32_too:
        parts["F.linear fp32"] = functools.partial(_linear_fp32, x, w)
        parts["eager fp32"] = functools.partial(eager, x=x.float())
    targets = {1: {"bf16 F.linear": 4.0, "limit": 0.9}, 16: {"bf16 F.linear": 1.7}}.get(m, {})
    if m >= 512:
        parts["torch._scaled_mm"] = functools.partial(_scaled_mm, x, w)
        targets = {"bf16 F.linear": 0.95, "torch._scaled_mm": 4.5}
    baselines = {name: part(1) for name, part in parts.items()}
    if m >= 512 and x.device.type == "cuda":  # where ours takes FP8 activations
        baselines["torch._scaled_mm + quantising"] = _scaled_mm(x, w, quantise=True)
    return Case(
        op="fp8_linear",
        shape=shape,
        axes={"rows": m, "features": n, "inner": k},
        bytes=1.0 * n * k + x.nbytes + m * n * x.itemsize,
        flops=2.0 * m * n * k,
        ours=ours,
        baselines=baselines,
        limit=limit,
        limit_work=limit_work,
        limit_name=limit_name,
        exact=lambda: _exact_product(x, *w.quantised[0]),
        value=_checked_product,
        arguments=arguments,
        inputs={"x": x, "weights": w.plain, "quantised": w.quantised},
        targets=targets,
        parts=parts if n % PARTS == 0 else {},
    )


def _scaled_mm(x: Tensor, w: Weights, part: int = 1, quantise: bool = False) -> Run:
    """torch's FP8 product by rows, of a part of the weight's; quantise: with that of x."""
    rows = w.shape[0] // part
    scales = [scale[:rows].t().contiguous() for _, scale in w.quantised]
    given = lf.quantize_fp8(x)

    def run(i: int) -> Tensor:
        i %= len(scales)
        q, scale = lf.quantize_fp8(x) if quantise else given
        weight = w.quantised[i][0][:rows].t()
        return torch._scaled_mm(q, weight, scale, scales[i], out_dtype=x.dtype)

    return run
