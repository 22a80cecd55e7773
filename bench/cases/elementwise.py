"""The ops that move rows: norms, rope, SwiGLU, quantization; limited by a copy of the bytes."""

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
    """ops: the name, what a row is, the elements of memory that it takes, what makes the case."""
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
    rows: int,
    arguments: Arguments,
    baselines: dict[str, Run] | None = None,
    compile_too: bool = True,
    gpu_targets: dict[str, float] | None = None,
    **fields: Any,
) -> Case:
    """The case with the eager twin, the given baselines, and the twin compiled."""
    options = fields.get("options", {})
    twins = {"eager": eager(op, arguments, **options), **(baselines or {})}
    if compile_too:
        twins["torch.compile"] = compiled(op, arguments)
    if s.on_gpu:
        fields["targets"] = gpu_targets or {}
    return Case(
        op=op,
        shape=shape,
        axes={"tokens": rows},
        arguments=arguments,
        ours=ours(op, arguments, **options),
        baselines=twins,
        **fields,
    )


def _rms_norm(s: Spec, rows: int, shape: str) -> Case:
    hidden = s.shapes.hidden
    n = s.rotation(2.0 * rows * hidden * s.size)
    xs, w = s.rotating(n, rows, hidden), s.randn(hidden)
    return _case(
        s,
        "rms_norm",
        shape,
        rows,
        lambda i: (xs[i % n], w, EPS),
        {"F.rms_norm": lambda i: F.rms_norm(xs[i % n], (hidden,), w, EPS)},
        bytes=2.0 * xs[0].nbytes,
        flops=4.0 * xs[0].numel(),
        limit=limits.copy(xs),
        exact=lambda: norm_fp64(ends(xs[0]).double(), w),
        value=checked,
        inputs={"x": xs[0], "weight": w, "eps": EPS},
        targets=NORM_TARGETS,
        gpu_targets={"limit": 0.92, "eager": 5.0},
        copies=n,
    )


def _add_rms_norm(s: Spec, rows: int, shape: str) -> Case:
    hidden = s.shapes.hidden
    n = s.rotation(4.0 * rows * hidden * s.size)
    xs, residuals = (s.rotating(n, rows, hidden) for _ in range(2))
    both, w = s.rotating(n, 2 * rows, hidden), s.randn(hidden)

    def functional(i: int) -> tuple[Tensor, Tensor]:
        total = xs[i % n] + residuals[i % n]
        return F.rms_norm(total, (hidden,), w, EPS), total

    return _case(
        s,
        "add_rms_norm",
        shape,
        rows,
        lambda i: (xs[i % n], residuals[i % n], w, EPS),
        {"F.rms_norm": functional},
        bytes=4.0 * xs[0].nbytes,
        flops=5.0 * xs[0].numel(),
        limit=limits.copy(both),
        exact=lambda: norm_fp64(ends(xs[0]).double() + ends(residuals[0]).double(), w),
        value=checked,
        inputs={"x": xs[0], "residual": residuals[0], "weight": w, "eps": EPS},
        targets=NORM_TARGETS,
        copies=n,
    )


def _rms_norm_fp8(s: Spec, rows: int, shape: str) -> Case:
    hidden = s.shapes.hidden
    n = s.rotation(3.5 * rows * hidden * s.size)
    xs, residual = s.rotating(n, rows, hidden), s.randn(rows, hidden)
    both, w = s.rotating(n, 2 * rows, hidden), s.randn(hidden)
    return _case(
        s,
        "rms_norm_fp8",
        shape,
        rows,
        lambda i: (xs[i % n], w, EPS),
        options={"residual": residual},
        bytes=rows * hidden * (3.0 * s.size + 1),
        flops=7.0 * rows * hidden,
        limit=limits.copy(both),
        exact=lambda: norm_fp64(ends(xs[0]).double() + ends(residual).double(), w),
        value=_dequantized,
        gpu_targets={"limit": 0.88},
        copies=n,
    )


def _dequantized(out: tuple[Tensor, ...]) -> Tensor:
    return reference.dequantize_fp8(ends(out[0]), ends(out[1]))


def norm_fp64(x: Tensor, weight: Tensor) -> Tensor:
    """The eager twin passes through fp32 whatever it is given."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight.double()


def _rope(s: Spec, rows: int, shape: str) -> Case:
    m = s.shapes
    n = s.rotation(2.0 * rows * m.rotated * s.size)
    qs, ks = (s.rotating(n, rows, heads, m.head_dim) for heads in (m.heads, m.kv_heads))
    both = s.rotating(n, rows, m.heads + m.kv_heads, m.head_dim)
    positions, table = _positions(s, rows)
    return _case(
        s,
        "apply_rope",
        shape,
        rows,
        lambda i: (qs[i % n], ks[i % n], positions, table),
        bytes=2.0 * both[0].nbytes,
        flops=3.0 * both[0].numel(),
        limit=limits.copy(both),
        exact=lambda: rope_fp64(ends(qs[0]), ends(positions), table),
        value=checked,
        inputs={"q": qs[0], "k": ks[0], "positions": positions, "table": table},
        targets={"eager": 8.0},
        gpu_targets={"limit": 0.85, "eager": 9.0},
        copies=n,
    )


def _positions(s: Spec, rows: int) -> tuple[Tensor, Tensor]:
    table = lf.rope_table(5e5, max(rows, 8), head_dim=s.shapes.head_dim, device=s.device)
    return torch.arange(rows, device=s.device), table


def _rope_and_append(s: Spec, rows: int, shape: str) -> Case:
    """q, k and v as views of one product's output, as in the model."""
    m = s.shapes
    heads = (m.heads, m.kv_heads, m.kv_heads)
    n = s.rotation(2.0 * rows * sum(heads) * m.head_dim * s.size)
    fused = s.rotating(n, rows, sum(heads), m.head_dim)
    positions, table = _positions(s, rows)
    blocks = -(-rows // BLOCK) + 1
    caches = s.rotating(n, 2, blocks, BLOCK, m.kv_heads, m.head_dim)
    slots = torch.randperm(blocks * BLOCK, device=s.device)[:rows]

    def exact() -> Tensor:
        q, k, v = (ends(t) for t in fused[0].split(heads, 1))
        return torch.cat((rope_fp64(torch.cat((q, k), 1), ends(positions), table), v.double()), 1)

    def value(q: Tensor) -> Tensor:
        """What was returned, and what was written just now."""
        k, v = (cache.flatten(0, 1)[slots] for cache in caches[0])
        return ends(torch.cat((q, k, v), 1))

    return _case(
        s,
        "apply_rope_and_append",
        shape,
        rows,
        lambda i: (*fused[i % n].split(heads, 1), positions, table, *caches[i % n], slots),
        compile_too=False,
        bytes=2.0 * fused[0].nbytes,
        flops=3.0 * rows * m.rotated,
        limit=limits.copy(fused),
        exact=exact,
        value=value,
        gpu_targets={"limit": 0.85, "eager": 9.0},
        copies=n,
        waits=("eager",),  # it picks the slots that are not -1, and asks how many
    )


def rope_fp64(q: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    cos, sin = table.double()[positions].unsqueeze(1).chunk(2, -1)
    a, b = q.double().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _silu_and_mul(s: Spec, rows: int, shape: str) -> Case:
    return _swiglu(s, rows, shape, "silu_and_mul", 1.5 * s.size, checked, targets={"eager": 3.0})


def _silu_and_mul_fp8(s: Spec, rows: int, shape: str) -> Case:
    return _swiglu(s, rows, shape, "silu_and_mul_fp8", s.size + 0.5, _dequantized)


def _swiglu(
    s: Spec,
    rows: int,
    shape: str,
    op: str,
    bytes_each: float,
    value: Callable[[Any], Tensor],
    **fields: Any,
) -> Case:
    size = rows * 2 * s.shapes.inner
    n = s.rotation(bytes_each * size)
    xs = s.rotating(n, rows, 2 * s.shapes.inner)
    return _case(
        s,
        op,
        shape,
        rows,
        lambda i: (xs[i % n],),
        bytes=bytes_each * size,
        flops=3.0 * size,
        limit=limits.copy(xs),
        exact=lambda: reference.silu_and_mul(ends(xs[0]).double()),
        value=value,
        inputs={"gate_up": xs[0]} if op == "silu_and_mul" else {},
        copies=n,
        **fields,
    )


def _quantize(s: Spec, rows: int, shape: str) -> Case:
    size = rows * s.shapes.hidden
    n = s.rotation(size * (s.size + 1.0))
    xs = s.rotating(n, rows, s.shapes.hidden)
    return _case(
        s,
        "quantize_fp8",
        shape,
        rows,
        lambda i: (xs[i % n],),
        compile_too=s.on_gpu,
        bytes=size * (s.size + 1.0),
        flops=3.0 * size,
        limit=limits.copy(xs),
        exact=lambda: ends(xs[0]).double(),
        value=_dequantized,
        inputs={"x": xs[0]},
        copies=n,
    )
