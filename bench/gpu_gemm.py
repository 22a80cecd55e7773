"""The GPU report's FP8 products."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

import llama_fast as lf
from llama_fast import reference

from .baselines import Baselines, offer_scaled_mm, offer_scaled_mm_blocks
from .case import errors
from .gpu_case import BF16, GpuCase, Place, Spec, ends


def gemms(p: Place) -> Iterator[Spec]:
    s = p.sizes
    square = (s.square,) * 3
    yield Spec(f"fp8_gemm row {_by(*square)}", lambda: _gemm(p, *square), "gemm row")
    name = f"fp8_gemm blocks {_by(*s.block)}"
    yield Spec(name, lambda: _gemm(p, *s.block, blocks=True), "gemm blocks")
    name = f"fp8_linear quantised {_by(*square)}"
    yield Spec(name, lambda: _linear(p, *square, quantise=True), "gemm quantised")
    for what, (n, k) in s.weights.items():
        for m in s.few:
            name = f"fp8_linear {what} {_by(m, n, k)}"
            yield Spec(name, lambda m=m, n=n, k=k: _linear(p, m, n, k), "gemm few")
    for m in s.many[::-1]:
        for what, (n, k) in s.weights.items():
            name = f"fp8_gemm row {what} {_by(m, n, k)}"
            yield Spec(name, lambda m=m, n=n, k=k: _gemm(p, m, n, k))


def _by(m: int, n: int, k: int) -> str:
    return f"{m} x {n} x {k}"


def _operand(p: Place, rows: int, k: int, granularity: str) -> tuple[Tensor, Tensor]:
    return reference.quantize_fp8(p.randn(rows, k), granularity)


def _gemm(p: Place, m: int, n: int, k: int, blocks: bool = False) -> GpuCase:
    kinds = ("block", "block_2d") if blocks else ("row", "row")
    copies = p.copies(1.0 * (m + n) * k)
    made = [(_operand(p, m, k, kinds[0]), _operand(p, n, k, kinds[1])) for _ in range(copies)]
    scale_a, scale_b = made[0][0][1], made[0][1][1]

    def at(i: int) -> tuple[Tensor, Tensor]:
        (a, _), (b, _) = made[i % copies]
        return a, b

    to = Baselines(lambda i: lf.fp8_gemm(*at(i), scale_a, scale_b))
    to.add("eager", lambda i: reference.fp8_gemm(*at(i), scale_a, scale_b))
    offer = offer_scaled_mm_blocks if blocks else offer_scaled_mm
    offer(to, at, scale_a, scale_b)
    plain = [reference.dequantize_fp8(*x, dtype=BF16) for x in made[0]]
    to.add("bf16 F.linear", lambda _: F.linear(*plain))
    a, b = at(0)
    few = ends(a), ends(scale_a)

    def exact() -> Tensor:
        x = reference.dequantize_fp8(*few).double()
        return x @ reference.dequantize_fp8(b, scale_b).double().t()

    return GpuCase(
        "fp8_gemm",
        f"{'blocks' if blocks else 'row'} {_by(m, n, k)}",
        1.0 * (m + n) * k + 2.0 * m * n,
        2.0 * m * n * k,
        "fp8",
        to.runs,
        errors(
            lambda: ends(lf.fp8_gemm(a, b, scale_a, scale_b)),
            lambda: reference.fp8_gemm(few[0], b, few[1], scale_b),
            exact,
        ),
        to.skipped,
        copies=copies,
        arguments=(a, scale_b, BF16),
        predict={"m": m, "n": n, "k": k},
    )


def _linear(p: Place, m: int, n: int, k: int, quantise: bool | None = None) -> GpuCase:
    """bf16 activations, FP8 weights. quantise None: the backend's choice, as in the model."""
    copies = p.copies(1.0 * n * k + 2.0 * m * k)
    weights = [_operand(p, n, k, "row") for _ in range(copies)]
    xs = [p.randn(m, k) for _ in range(copies)]
    plain = [reference.dequantize_fp8(*w, dtype=BF16) for w in weights]

    def ours(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return lf.fp8_linear(x, weight, scale, quantize_activation=quantise)

    to = Baselines(lambda i: ours(xs[i % copies], *weights[i % copies]))
    to.add("bf16 F.linear", lambda i: F.linear(xs[i % copies], plain[i % copies]))
    q, q_scale = reference.quantize_fp8(xs[0])
    offer_scaled_mm(to, lambda i: (q, weights[i % copies][0]), q_scale, weights[0][1])
    few = m in p.sizes.few
    x, w = ends(xs[0]), reference.dequantize_fp8(*weights[0])
    quantised = reference.dequantize_fp8(*reference.quantize_fp8(x))
    return GpuCase(
        "fp8_linear",
        f"{'quantised ' if quantise else ''}{_by(m, n, k)}",
        1.0 * n * k + 2.0 * m * (n + k),
        2.0 * m * n * k,
        "read" if few else "fp8",
        to.runs,
        errors(  # whoever quantises activations is off by what that costs
            lambda: ends(ours(xs[0], *weights[0])),
            lambda: (quantised @ w.t()).to(BF16),
            lambda: x.double() @ w.double().t(),
        ),
        to.skipped,
        copies=copies,
        arguments=(xs[0], weights[0][1], quantise),
        predict={"m": m, "n": n, "k": k, **({"quantised": True} if quantise else {})},
    )
