"""Cases of norms, rope, SwiGLU and quantization, whose limit is a copy of the bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llama_fast as lf
from llama_fast import reference

from ..timing import Run, limits
from .case import Arguments, Case, Plan, Spec, checked, compiled, eager, ends, ours

EPS = 1e-5
BLOCK = 128  # tokens of a cache's block
NORM_TARGETS = {"eager": 60.0, "F.rms_norm": 15.0, "torch.compile": 2.0}

Make = Callable[[Spec, int, str], Case]


def _plans(s: Spec, *ops: tuple[str, str, float, Make]) -> Iterator[Plan]:
    """Yield plans. ops: the name, a row's description and elements of memory, and the case's
    maker."""
    for rows in s.sweep.tokens:
        for op, row, elements, make in ops:
            shape = f"{rows} x {row}"
            yield Plan(op, shape, elements * rows * s.size, functools.partial(make, s, rows, shape))


def norms(s: Spec) -> Iterator[Plan]:
    hidden = s.shapes.hidden
    return _plans(
        s,
        ("rms_norm", f"{hidden}", 12.0 * hidden, _rms_norm),
        ("add_rms_norm", f"{hidden}", 12.0 * hidden, _add_rms_norm),
        ("rms_norm_fp8", f"{hidden} + residual", 12.0 * hidden, _rms_norm_fp8),
    )


def rope(s: Spec) -> Iterator[Plan]:
    m = s.shapes
    row, elements = f"{m.heads}/{m.kv_heads} x {m.head_dim}", 10.0 * m.rotated
    return _plans(
        s,
        ("apply_rope", row, elements, _rope),
        ("apply_rope_and_append", row, 2 * elements, _rope_and_append),
    )


def activations(s: Spec) -> Iterator[Plan]:
    m = s.shapes
    return _plans(
        s,
        ("silu_and_mul", f"2*{m.inner}", 20.0 * m.inner, _silu_and_mul),
        ("silu_and_mul_fp8", f"2*{m.inner}", 20.0 * m.inner, _silu_and_mul_fp8),
        ("quantize_fp8", f"{m.hidden} by row", 12.0 * m.hidden, _quantize),
    )


def _case(
    s: Spec,
    op: str,
    shape: str,
    arguments: Arguments,
    moved: list[Tensor],
    flops: float,
    *,
    baselines: dict[str, Run] | None = None,
    compile_too: bool = True,
    gpu_targets: dict[str, float] | None = None,
    value: Callable[[Any], Tensor] = checked,
    **fields: Any,
) -> Case:
    """Make a case. moved: at least as much memory as the op reads; the limit is its copy. flops:
    per element of moved. The eager twin and its compiled form are baselines too."""
    limit, options = limits.copy(moved), fields.get("options", {})
    twins = {"eager": eager(op, arguments, **options), **(baselines or {})}
    if compile_too:
        twins["torch.compile"] = compiled(op, arguments)
    if s.on_gpu:
        fields["targets"] = gpu_targets or {}
    return Case(
        op=op,
        shape=shape,
        axes={"tokens": int(shape.split()[0])},
        flops=flops * moved[0].numel(),
        arguments=arguments,
        ours=ours(op, arguments, **options),
        baselines=twins,
        limit=limit,
        value=value,
        copies=len(moved),
        **{"bytes": limit.work, **fields},
    )


def _rms_norm(s: Spec, rows: int, shape: str) -> Case:
    hidden = s.shapes.hidden
    xs, w = s.rotating(rows, hidden, parts=2), s.randn(hidden)
    return _case(
        s,
        "rms_norm",
        shape,
        lambda i: (xs[i % len(xs)], w, EPS),
        xs,
        4.0,
        baselines={"F.rms_norm": lambda i: F.rms_norm(xs[i % len(xs)], (hidden,), w, EPS)},
        exact=lambda: norm_fp64(ends(xs[0]).double(), w),
        inputs={"x": xs[0], "weight": w, "eps": EPS},
        targets=NORM_TARGETS,
        gpu_targets={"limit": 0.92, "eager": 5.0},
    )


def _add_rms_norm(s: Spec, rows: int, shape: str) -> Case:
    hidden, w = s.shapes.hidden, s.randn(s.shapes.hidden)
    xs, residuals, both = (s.rotating(n * rows, hidden, parts=4 / n) for n in (1, 1, 2))
    n = len(xs)

    def functional(i: int) -> tuple[Tensor, Tensor]:
        total = xs[i % n] + residuals[i % n]
        return F.rms_norm(total, (hidden,), w, EPS), total

    return _case(
        s,
        "add_rms_norm",
        shape,
        lambda i: (xs[i % n], residuals[i % n], w, EPS),
        both,
        2.5,
        baselines={"F.rms_norm": functional},
        exact=lambda: norm_fp64(ends(xs[0]).double() + ends(residuals[0]).double(), w),
        inputs={"x": xs[0], "residual": residuals[0], "weight": w, "eps": EPS},
        targets=NORM_TARGETS,
    )


def _rms_norm_fp8(s: Spec, rows: int, shape: str) -> Case:
    hidden = s.shapes.hidden
    residual, w = s.randn(rows, hidden), s.randn(hidden)
    xs, both = (s.rotating(n * rows, hidden, parts=4 / n) for n in (1, 2))
    return _case(
        s,
        "rms_norm_fp8",
        shape,
        lambda i: (xs[i % len(xs)], w, EPS),
        both,
        3.5,
        options={"residual": residual},
        compile_too=False,
        bytes=rows * hidden * (3.0 * s.size + 1),
        exact=lambda: norm_fp64(ends(xs[0]).double() + ends(residual).double(), w),
        value=_dequantized,
        gpu_targets={"limit": 0.88},
    )


def _dequantized(out: tuple[Tensor, ...]) -> Tensor:
    return reference.dequantize_fp8(ends(out[0]), ends(out[1]))


def norm_fp64(x: Tensor, weight: Tensor) -> Tensor:
    """Compute the norm in fp64; the eager twin would compute it in fp32."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight.double()


def _rope(s: Spec, rows: int, shape: str) -> Case:
    m = s.shapes
    heads = (m.heads, m.kv_heads, m.heads + m.kv_heads)
    qs, ks, both = (s.rotating(rows, n, m.head_dim, parts=2 * heads[2] / n) for n in heads)
    positions, table = _positions(s, rows)
    return _case(
        s,
        "apply_rope",
        shape,
        lambda i: (qs[i % len(qs)], ks[i % len(ks)], positions, table),
        both,
        3.0,
        exact=lambda: rope_fp64(ends(qs[0]), ends(positions), table),
        inputs={"q": qs[0], "k": ks[0], "positions": positions, "table": table},
        targets={"eager": 8.0},
        gpu_targets={"limit": 0.85, "eager": 9.0},
    )


def _positions(s: Spec, rows: int) -> tuple[Tensor, Tensor]:
    table = lf.rope_table(5e5, max(rows, 8), head_dim=s.shapes.head_dim, device=s.device)
    return torch.arange(rows, device=s.device), table


def _rope_and_append(s: Spec, rows: int, shape: str) -> Case:
    """Make a case with q, k and v as views of one product's output, as in the model."""
    m = s.shapes
    heads = (m.heads, m.kv_heads, m.kv_heads)
    fused = s.rotating(rows, sum(heads), m.head_dim, parts=2)
    positions, table = _positions(s, rows)
    blocks, n = -(-rows // BLOCK) + 1, len(fused)
    caches = s.rotating(2, blocks, BLOCK, m.kv_heads, m.head_dim, count=n)
    slots = torch.randperm(blocks * BLOCK, device=s.device)[:rows]

    def exact() -> Tensor:
        q, k, v = (ends(t) for t in fused[0].split(heads, 1))
        return torch.cat((rope_fp64(torch.cat((q, k), 1), ends(positions), table), v.double()), 1)

    def value(q: Tensor) -> Tensor:
        """Return the rotated q with the k and v that were just appended."""
        k, v = (cache.flatten(0, 1)[slots] for cache in caches[0])
        return ends(torch.cat((q, k, v), 1))

    return _case(
        s,
        "apply_rope_and_append",
        shape,
        lambda i: (*fused[i % n].split(heads, 1), positions, table, *caches[i % n], slots),
        fused,
        3.0 * m.rotated / (sum(heads) * m.head_dim),
        compile_too=False,
        exact=exact,
        value=value,
        gpu_targets={"limit": 0.85, "eager": 9.0},
        waits=("eager",),  # it reads how many slots are not -1
    )


def rope_fp64(q: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    cos, sin = table.double()[positions].unsqueeze(1).chunk(2, -1)
    a, b = q.double().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _silu_and_mul(s: Spec, rows: int, shape: str, fp8: bool = False) -> Case:
    xs = s.rotating(rows, 2 * s.shapes.inner, parts=1.5)
    fields: dict[str, Any] = {"inputs": {"gate_up": xs[0]}, "targets": {"eager": 3.0}}
    return _case(
        s,
        "silu_and_mul_fp8" if fp8 else "silu_and_mul",
        shape,
        lambda i: (xs[i % len(xs)],),
        xs,
        3.0,
        bytes=xs[0].numel() * (s.size + (0.5 if fp8 else 0.5 * s.size)),
        exact=lambda: reference.silu_and_mul(ends(xs[0]).double()),
        value=_dequantized if fp8 else checked,
        **({} if fp8 else fields),
    )


_silu_and_mul_fp8 = functools.partial(_silu_and_mul, fp8=True)


def _quantize(s: Spec, rows: int, shape: str) -> Case:
    xs = s.rotating(rows, s.shapes.hidden, parts=1.5)
    return _case(
        s,
        "quantize_fp8",
        shape,
        lambda i: (xs[i % len(xs)],),
        xs,
        3.0,
        compile_too=s.on_gpu,
        bytes=xs[0].numel() * (s.size + 1.0),
        exact=lambda: ends(xs[0]).double(),
        value=_dequantized,
        inputs={"x": xs[0]},
    )
