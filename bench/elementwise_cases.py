"""The ops that move rows: norms, rope, SwiGLU, quantisation; limited by a copy of the bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llama_fast as lf
from llama_fast import reference

from .case import Case, Plan, Spec, checked, copy, ends
from .timing import Run

EPS = 1e-5


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of an eager twin. Nothing is compiled before it is called."""
    found: list[Callable[..., Any]] = []

    def call(*arguments: Any) -> Any:
        if not found:
            torch._dynamo.reset()  # or one case's shapes count against another's limit of variants
            # A cached graph is found again whatever instruction set it was made for: loops in steps
            # of AVX-512's vectors, held to AVX2, leave half of the elements out.
            torch.compiler.config.cache_key_tag = torch.backends.cpu.get_cpu_capability()
            found.append(torch.compile(f, dynamic=False))
        return found[0](*arguments)

    return call


def _twins(name: str, arguments: Callable[[int], tuple[Any, ...]]) -> dict[str, Run]:
    """The eager twin of an op, and the same compiled."""
    twin = getattr(reference, name)
    fast = compiled(twin)
    return {
        "eager": lambda i: twin(*arguments(i)),
        "torch.compile": lambda i: fast(*arguments(i)),
    }


def norms(s: Spec) -> Iterator[Plan]:
    for rows in s.sweep.tokens:
        shape = f"{rows} x {s.shapes.hidden}"
        memory = 12.0 * rows * s.shapes.hidden * s.size
        yield Plan("rms_norm", shape, memory, functools.partial(_rms_norm, s, rows, shape))
        yield Plan("add_rms_norm", shape, memory, functools.partial(_add_rms_norm, s, rows, shape))


_NORM_TARGETS = {"eager": 60.0, "F.rms_norm": 15.0, "torch.compile": 2.0}


def _rms_norm(s: Spec, rows: int, shape: str) -> Case:
    x, w = s.movable(rows, s.shapes.hidden), s.randn(s.shapes.hidden)
    moved = 2.0 * x.nbytes
    twins = _twins("rms_norm", lambda _: (x, w, EPS))
    functional: Run = lambda _: F.rms_norm(x, (s.shapes.hidden,), w, EPS)  # noqa: E731
    return Case(
        op="rms_norm",
        shape=shape,
        axes={"tokens": rows},
        bytes=moved,
        flops=4.0 * x.numel(),
        ours=lambda _: lf.rms_norm(x, w, EPS),
        baselines={"eager": twins["eager"], "F.rms_norm": functional, **twins},
        limit=copy(x),
        limit_work=moved,
        limit_name="copy",
        exact=lambda: norm_fp64(ends(x).double(), w),
        value=checked,
        arguments=lambda _: (x, w, EPS),
        inputs={"x": x, "weight": w, "eps": EPS},
        movable=(x,),
        targets=_NORM_TARGETS,
    )


def _add_rms_norm(s: Spec, rows: int, shape: str) -> Case:
    x, residual = (s.movable(rows, s.shapes.hidden) for _ in range(2))
    w, both = s.randn(s.shapes.hidden), s.movable(2 * rows, s.shapes.hidden)
    moved = 4.0 * x.nbytes
    twins = _twins("add_rms_norm", lambda _: (x, residual, w, EPS))

    def functional(_: int) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, (s.shapes.hidden,), w, EPS), total

    return Case(
        op="add_rms_norm",
        shape=shape,
        axes={"tokens": rows},
        bytes=moved,
        flops=5.0 * x.numel(),
        ours=lambda _: lf.add_rms_norm(x, residual, w, EPS),
        baselines={"eager": twins["eager"], "F.rms_norm": functional, **twins},
        limit=copy(both),
        limit_work=moved,
        limit_name="copy",
        exact=lambda: norm_fp64(ends(x).double() + ends(residual).double(), w),
        value=checked,
        arguments=lambda _: (x, residual, w, EPS),
        inputs={"x": x, "residual": residual, "weight": w, "eps": EPS},
        movable=(x, residual, both),
        targets=_NORM_TARGETS,
    )


def norm_fp64(x: Tensor, weight: Tensor) -> Tensor:
    """The eager twin passes through fp32 whatever it is given."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight.double()


def rope(s: Spec) -> Iterator[Plan]:
    m = s.shapes
    for rows in s.sweep.tokens:
        shape = f"{rows} x {m.heads}/{m.kv_heads} x {m.head_dim}"
        memory = 10.0 * rows * (m.heads + m.kv_heads) * m.head_dim * s.size
        yield Plan("apply_rope", shape, memory, functools.partial(_rope, s, rows, shape))


def _rope(s: Spec, rows: int, shape: str) -> Case:
    m = s.shapes
    q, k = (s.movable(rows, heads, m.head_dim) for heads in (m.heads, m.kv_heads))
    both = s.movable(rows, m.heads + m.kv_heads, m.head_dim)
    table = lf.rope_table(5e5, max(rows, 8), head_dim=m.head_dim, device=s.device)
    positions = torch.arange(rows, device=s.device)
    moved = 2.0 * (q.nbytes + k.nbytes)
    return Case(
        op="apply_rope",
        shape=shape,
        axes={"tokens": rows},
        bytes=moved,
        flops=3.0 * (q.numel() + k.numel()),
        ours=lambda _: lf.apply_rope(q, k, positions, table),
        baselines=_twins("apply_rope", lambda _: (q, k, positions, table)),
        limit=copy(both),
        limit_work=moved,
        limit_name="copy",
        exact=lambda: rope_fp64(ends(q), ends(positions), table),
        value=checked,
        arguments=lambda _: (q, k, positions, table),
        inputs={"q": q, "k": k, "positions": positions, "table": table},
        movable=(q, k, both),
        targets={"eager": 8.0},
    )


def rope_fp64(q: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    cos, sin = table.double()[positions].unsqueeze(1).chunk(2, -1)
    a, b = q.double().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def activations(s: Spec) -> Iterator[Plan]:
    for rows in s.sweep.tokens:
        inner, hidden = s.shapes.inner, s.shapes.hidden
        shape = f"{rows} x 2*{inner}"
        memory = 20.0 * rows * inner * s.size
        yield Plan("silu_and_mul", shape, memory, functools.partial(_swiglu, s, rows, shape))
        shape = f"{rows} x {hidden} by row"
        memory = 12.0 * rows * hidden * s.size
        yield Plan("quantize_fp8", shape, memory, functools.partial(_quantize, s, rows, shape))


def _swiglu(s: Spec, rows: int, shape: str) -> Case:
    x = s.movable(rows, 2 * s.shapes.inner)
    return Case(
        op="silu_and_mul",
        shape=shape,
        axes={"tokens": rows},
        bytes=1.5 * x.nbytes,
        flops=3.0 * x.numel(),
        ours=lambda _: lf.silu_and_mul(x),
        baselines=_twins("silu_and_mul", lambda _: (x,)),
        limit=copy(x),
        limit_work=2.0 * x.nbytes,
        limit_name="copy",
        exact=lambda: reference.silu_and_mul(ends(x).double()),
        value=checked,
        arguments=lambda _: (x,),
        inputs={"gate_up": x},
        movable=(x,),
        targets={"eager": 3.0},
    )


def _quantize(s: Spec, rows: int, shape: str) -> Case:
    x = s.movable(rows, s.shapes.hidden)
    return Case(
        op="quantize_fp8",
        shape=shape,
        axes={"tokens": rows},
        bytes=x.numel() * (x.itemsize + 1.0),
        flops=3.0 * x.numel(),
        ours=lambda _: lf.quantize_fp8(x),
        baselines={"eager": lambda _: reference.quantize_fp8(x)},
        limit=copy(x),
        limit_work=2.0 * x.nbytes,
        limit_name="copy",
        exact=lambda: ends(x).double(),
        value=lambda result: reference.dequantize_fp8(*(ends(t) for t in result)),
        arguments=lambda _: (x,),
        inputs={"x": x},
        movable=(x,),
    )
