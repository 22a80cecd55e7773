"""Cases of norms, rope, SwiGLU and quantization, whose limit is a copy of the bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llama_fast as lf
from llama_fast import reference

from ..timing import limits
from .case import Arguments, Case, Plan, Spec, checked, compiled, eager, ends

EPS = 1e-5
BLOCK = 128  # tokens of a cache's block
NORM_TARGETS = {"eager": 60.0, "F.rms_norm": 15.0, "torch.compile": 2.0}


def plans(s: Spec) -> Iterator[Plan]:
    m, size = s.shapes, s.size
    h, wide = m.hidden, 2 * m.inner
    heads, qkv = f"{m.heads}/{m.kv_heads} x {m.head_dim}", sum(_qkv(s)) * m.head_dim
    # The op, a row's description, and per row the bytes, the operations, and elements of memory.
    ops: list[tuple[str, str, float, float, float, Callable[[Spec, int], Case]]] = [
        ("rms_norm", f"{h}", 2 * size * h, 4 * h, 12 * h, _rms_norm),
        ("add_rms_norm", f"{h}", 4 * size * h, 5 * h, 12 * h, _add_rms_norm),
        ("rms_norm_fp8", f"{h} + residual", (3 * size + 1) * h, 7 * h, 12 * h, _rms_norm_fp8),
        ("apply_rope", heads, 2 * size * m.rotated, 3 * m.rotated, 10 * m.rotated, _rope),
        ("apply_rope_and_append", heads, 2 * size * qkv, 3 * m.rotated, 20 * m.rotated, _append),
        ("silu_and_mul", f"2*{m.inner}", 1.5 * size * wide, 3 * wide, 10 * wide, _silu_and_mul),
        ("silu_and_mul_fp8", f"2*{m.inner}", (size + 0.5) * wide, 3 * wide, 10 * wide, _silu_fp8),
        ("quantize_fp8", f"{h} by row", (size + 1) * h, 3 * h, 12 * h, _quantize),
    ]
    for op, row, moved, flops, elements, make in ops:
        for n in s.sweep.tokens:
            work = float(n * moved), float(n * flops), float(n * elements * size)
            yield Plan(op, f"{n} x {row}", {"tokens": n}, *work, partial(make, s, n))


def _case(
    op: str,
    arguments: Arguments,
    moved: list[Tensor],
    exact: Callable[[], Tensor],
    *,
    compile_too: bool = True,
    **fields: Any,
) -> Case:
    """Make a case. moved: as much memory as the op reads; the limit is its copy. The eager twin and
    its compiled form are baselines too."""
    twins = {"eager": eager(op, arguments, **fields.get("options", {}))}
    twins |= fields.pop("baselines", {})
    if compile_too:
        twins["torch.compile"] = compiled(op, arguments)
    fields = {"baselines": twins, "copies": len(moved), **fields}
    return Case(op, arguments, limits.copy(moved), exact, **fields)


def _rms_norm(s: Spec, rows: int) -> Case:
    hidden = s.shapes.hidden
    xs, w = s.rotating(rows, hidden, parts=2), s.randn(hidden)
    return _case(
        "rms_norm",
        lambda i: (xs[i % len(xs)], w, EPS),
        xs,
        lambda: norm_fp64(ends(xs[0]).double(), w),
        baselines={"F.rms_norm": lambda i: F.rms_norm(xs[i % len(xs)], (hidden,), w, EPS)},
        inputs={"x": xs[0], "weight": w, "eps": EPS},
        targets=s.either(NORM_TARGETS, {"limit": 0.92, "eager": 5.0}),
    )


def _add_rms_norm(s: Spec, rows: int) -> Case:
    hidden, w = s.shapes.hidden, s.randn(s.shapes.hidden)
    xs, residuals, both = (s.rotating(n * rows, hidden, parts=4 / n) for n in (1, 1, 2))
    n = len(xs)

    def functional(i: int) -> tuple[Tensor, Tensor]:
        total = xs[i % n] + residuals[i % n]
        return F.rms_norm(total, (hidden,), w, EPS), total

    return _case(
        "add_rms_norm",
        lambda i: (xs[i % n], residuals[i % n], w, EPS),
        both,
        lambda: norm_fp64(ends(xs[0]).double() + ends(residuals[0]).double(), w),
        baselines={"F.rms_norm": functional},
        inputs={"x": xs[0], "residual": residuals[0], "weight": w, "eps": EPS},
        targets=s.either(NORM_TARGETS, {}),
    )


def _rms_norm_fp8(s: Spec, rows: int) -> Case:
    hidden = s.shapes.hidden
    residual, w = s.randn(rows, hidden), s.randn(hidden)
    xs, both = (s.rotating(n * rows, hidden, parts=4 / n) for n in (1, 2))
    return _case(
        "rms_norm_fp8",
        lambda i: (xs[i % len(xs)], w, EPS),
        both,
        lambda: norm_fp64(ends(xs[0]).double() + ends(residual).double(), w),
        options={"residual": residual},
        value=_dequantized,
        compile_too=False,
        targets=s.either({}, {"limit": 0.88}),
    )


def _dequantized(out: tuple[Tensor, ...]) -> Tensor:
    return reference.dequantize_fp8(ends(out[0]), ends(out[1]))


def norm_fp64(x: Tensor, weight: Tensor) -> Tensor:
    """Compute the norm in fp64; the eager twin would compute it in fp32."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight.double()


def _rope(s: Spec, rows: int) -> Case:
    m = s.shapes
    heads = (m.heads, m.kv_heads, m.heads + m.kv_heads)
    qs, ks, both = (s.rotating(rows, n, m.head_dim, parts=2 * heads[2] / n) for n in heads)
    positions, table = _positions(s, rows)
    return _case(
        "apply_rope",
        lambda i: (qs[i % len(qs)], ks[i % len(ks)], positions, table),
        both,
        lambda: rope_fp64(ends(qs[0]), ends(positions), table),
        inputs={"q": qs[0], "k": ks[0], "positions": positions, "table": table},
        targets=s.either({"eager": 8.0}, {"limit": 0.85, "eager": 9.0}),
    )


def _positions(s: Spec, rows: int) -> tuple[Tensor, Tensor]:
    table = lf.rope_table(5e5, max(rows, 8), head_dim=s.shapes.head_dim, device=s.device)
    return torch.arange(rows, device=s.device), table


def _qkv(s: Spec) -> tuple[int, int, int]:
    return s.shapes.heads, s.shapes.kv_heads, s.shapes.kv_heads


def _append(s: Spec, rows: int) -> Case:
    """Make a case with q, k and v as views of one product's output, as in the model."""
    m, heads = s.shapes, _qkv(s)
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
        "apply_rope_and_append",
        lambda i: (*fused[i % n].split(heads, 1), positions, table, *caches[i % n], slots),
        fused,
        exact,
        value=value,
        compile_too=False,
        targets=s.either({}, {"limit": 0.85, "eager": 9.0}),
        waits=("eager",),  # it reads how many slots are not -1
    )


def rope_fp64(q: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    cos, sin = table.double()[positions].unsqueeze(1).chunk(2, -1)
    a, b = q.double().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _silu_and_mul(s: Spec, rows: int, op: str = "silu_and_mul") -> Case:
    xs, fp8 = s.rotating(rows, 2 * s.shapes.inner, parts=1.5), op.endswith("fp8")
    return _case(
        op,
        lambda i: (xs[i % len(xs)],),
        xs,
        lambda: reference.silu_and_mul(ends(xs[0]).double()),
        value=_dequantized if fp8 else checked,
        inputs={} if fp8 else {"gate_up": xs[0]},
        targets=s.either({} if fp8 else {"eager": 3.0}, {}),
    )


_silu_fp8 = partial(_silu_and_mul, op="silu_and_mul_fp8")


def _quantize(s: Spec, rows: int) -> Case:
    xs = s.rotating(rows, s.shapes.hidden, parts=1.5)
    return _case(
        "quantize_fp8",
        lambda i: (xs[i % len(xs)],),
        xs,
        lambda: ends(xs[0]).double(),
        value=_dequantized,
        compile_too=s.on_gpu,
        inputs={"x": xs[0]},
    )
