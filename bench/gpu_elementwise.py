"""The GPU report's ops that are bound by bandwidth: norms, rope, activations, quantiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llama_fast as lf
from llama_fast import reference
from llama_fast.generation.cache import BLOCK_SIZE

from .baselines import Baselines
from .case import errors
from .elementwise_cases import norm_fp64, rope_fp64
from .gpu_case import GpuCase, Place, Spec, ends
from .timing import Run


def norms(p: Place) -> Iterator[Spec]:
    s = p.sizes
    for tokens, hidden in [*((s.tokens, h) for h in s.hidden), (s.step_tokens, s.hidden[0])]:
        first = (tokens, hidden) == (s.tokens, s.hidden[0])
        shape = f"{tokens} x {hidden}"
        at = (p, tokens, hidden)
        yield Spec(f"rms_norm {shape}", lambda at=at: _rms_norm(*at), "norm" if first else "")
        yield Spec(
            f"rms_norm_fp8 + residual {shape}",
            lambda at=at: _add_rms_norm_fp8(*at),
            "norm_fp8" if first else "",
        )
        yield Spec(f"add_rms_norm {shape}", lambda at=at: _add_rms_norm(*at))


def _rms_norm(p: Place, tokens: int, hidden: int) -> GpuCase:
    size = 4.0 * tokens * hidden
    xs = [p.randn(tokens, hidden) for _ in range(p.copies(size))]
    w, x = p.randn(hidden), ends(xs[0])

    def at(i: int) -> Tensor:
        return xs[i % len(xs)]

    to = Baselines(lambda i: lf.rms_norm(at(i), w))
    to.add("eager", lambda i: reference.rms_norm(at(i), w))
    to.add("F.rms_norm", lambda i: F.rms_norm(at(i), (hidden,), w, 1e-5))
    p.compiler.offer(to, reference.rms_norm, lambda i: (at(i), w))
    return GpuCase(
        "rms_norm",
        f"{tokens} x {hidden}",
        size,
        4.0 * tokens * hidden,
        "copy",
        to.runs,
        errors(
            lambda: ends(lf.rms_norm(xs[0], w)),
            lambda: reference.rms_norm(x, w),
            lambda: norm_fp64(x.double(), w),
        ),
        to.skipped,
        copies=len(xs),
        arguments=(xs[0],),
        predict={"rows": tokens, "hidden": hidden},
    )


def _pairs(
    p: Place, tokens: int, hidden: int, size: float
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """x and residual."""
    pairs = [(p.randn(tokens, hidden), p.randn(tokens, hidden)) for _ in range(p.copies(size))]
    return lambda i: pairs[i % len(pairs)]


def _add_rms_norm(p: Place, tokens: int, hidden: int) -> GpuCase:
    w = p.randn(hidden)
    size = 8.0 * tokens * hidden
    at = _pairs(p, tokens, hidden, size)
    x, residual = (ends(t) for t in at(0))
    to = Baselines(lambda i: lf.add_rms_norm(*at(i), w))
    to.add("eager", lambda i: reference.add_rms_norm(*at(i), w))
    p.compiler.offer(to, reference.add_rms_norm, lambda i: (*at(i), w))
    return GpuCase(
        "add_rms_norm",
        f"{tokens} x {hidden}",
        size,
        5.0 * tokens * hidden,
        "copy",
        to.runs,
        errors(
            lambda: ends(lf.add_rms_norm(*at(0), w)[0]),
            lambda: reference.add_rms_norm(x, residual, w)[0],
            lambda: norm_fp64((x + residual).double(), w),
        ),
        to.skipped,
        copies=p.copies(size),
        arguments=(x,),
        predict={"rows": tokens, "hidden": hidden},
    )


def _add_rms_norm_fp8(p: Place, tokens: int, hidden: int) -> GpuCase:
    w = p.randn(hidden)
    size = 7.0 * tokens * hidden + 4.0 * tokens
    at = _pairs(p, tokens, hidden, size)
    x, residual = (ends(t) for t in at(0))

    def ours(i: int) -> tuple[Tensor, ...]:
        x, residual = at(i)
        return lf.rms_norm_fp8(x, w, residual=residual)

    def eager(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        return reference.rms_norm_fp8(x, w, residual=residual)

    to = Baselines(ours).add("eager", lambda i: eager(*at(i)))
    p.compiler.offer(to, eager, at)
    return GpuCase(
        "rms_norm_fp8",
        f"{tokens} x {hidden} + residual",
        size,
        7.0 * tokens * hidden,
        "copy",
        to.runs,
        errors(
            lambda: ends(reference.dequantize_fp8(*ours(0)[:2])),
            lambda: reference.dequantize_fp8(*eager(x, residual)[:2]),
            lambda: norm_fp64((x + residual).double(), w),
        ),
        to.skipped,
        copies=p.copies(size),
        arguments=(x,),
        predict={"rows": tokens, "hidden": hidden, "residual": True},
    )


def ropes(p: Place) -> Iterator[Spec]:
    s = p.sizes
    for tokens in (s.tokens, s.step_tokens):
        shape = f"{tokens} x {s.heads}/{s.kv_heads} x {s.head_dim}"
        at, whole = (p, tokens, shape), tokens == s.tokens
        yield Spec(f"apply_rope {shape}", lambda at=at: _rope(*at), "rope" if whole else "")
        name = f"apply_rope_and_append {shape}"
        yield Spec(name, lambda at=at: _append(*at), "append" if whole else "")


def _qkv(
    p: Place, tokens: int, size: float
) -> tuple[Callable[[int], list[Tensor]], Tensor, Tensor]:
    """q, k and v as views of one product's output, as in the model; positions; table."""
    s = p.sizes
    heads = (s.heads, s.kv_heads, s.kv_heads)
    fused = [p.randn(tokens, sum(heads), s.head_dim) for _ in range(p.copies(size))]
    positions = torch.arange(tokens, device=p.device)
    table = lf.rope_table(5e5, tokens, head_dim=s.head_dim, device=p.device)
    return (lambda i: list(fused[i % len(fused)].split(heads, 1))), positions, table


def _rope(p: Place, tokens: int, shape: str) -> GpuCase:
    s = p.sizes
    values = tokens * (s.heads + s.kv_heads) * s.head_dim
    size = 4.0 * values + 4.0 * tokens * s.head_dim
    at, positions, table = _qkv(p, tokens, size)
    to = Baselines(lambda i: lf.apply_rope(*at(i)[:2], positions, table))
    to.add("eager", lambda i: reference.apply_rope(*at(i)[:2], positions, table))
    p.compiler.offer(to, reference.apply_rope, lambda i: (*at(i)[:2], positions, table))
    q, k, _ = (ends(t) for t in at(0))
    return GpuCase(
        "apply_rope",
        shape,
        size,
        3.0 * values,
        "copy",
        to.runs,
        errors(
            lambda: ends(torch.cat(lf.apply_rope(*at(0)[:2], positions, table), 1)),
            lambda: torch.cat(reference.apply_rope(q, k, ends(positions), table), 1),
            lambda: rope_fp64(torch.cat((q, k), 1), ends(positions), table),
        ),
        to.skipped,
        copies=p.copies(size),
        arguments=(at(0)[0],),
        predict={"tokens": tokens, "heads": s.heads, "kv_heads": s.kv_heads, "d": s.head_dim},
    )


def _append(p: Place, tokens: int, shape: str) -> GpuCase:
    s = p.sizes
    values = tokens * (s.heads + 2 * s.kv_heads) * s.head_dim
    size = 4.0 * values + 4.0 * tokens * s.head_dim
    at, positions, table = _qkv(p, tokens, size)
    blocks = -(-tokens // BLOCK_SIZE) + 1
    caches = [p.randn(2, blocks, BLOCK_SIZE, s.kv_heads, s.head_dim) for _ in range(p.copies(size))]
    slots = torch.randperm(blocks * BLOCK_SIZE, device=p.device)[:tokens]

    def run(f: Callable[..., Tensor]) -> Run:
        return lambda i: f(*at(i), positions, table, *caches[i % len(caches)], slots)

    def written(f: Callable[..., Tensor]) -> Tensor:
        q = run(f)(0)
        k, v = (c.flatten(0, 1)[slots] for c in caches[0])
        return ends(torch.cat((q, k, v), 1))

    def exact() -> Tensor:
        q, k, v = (ends(t) for t in at(0))
        rotated = rope_fp64(torch.cat((q, k), 1), ends(positions), table)
        return torch.cat((rotated, v.double()), 1)

    ours, eager = lf.apply_rope_and_append, reference.apply_rope_and_append
    return GpuCase(
        "apply_rope_and_append",
        shape,
        size,
        3.0 * values,
        "copy",
        Baselines(run(ours)).add("eager", run(eager)).runs,
        errors(lambda: written(ours), lambda: written(eager), exact),
        uncapturable=("eager",),  # it picks the slots that are not -1, and asks how many
        copies=p.copies(size),
        arguments=(at(0)[0],),
        predict={"tokens": tokens, "heads": s.heads, "kv_heads": s.kv_heads, "d": s.head_dim},
    )


def activations(p: Place) -> Iterator[Spec]:
    s = p.sizes
    for tokens in (*s.inner_tokens[::-1], s.step_tokens):
        shape = f"{tokens} x 2*{s.inner}"
        yield Spec(f"silu_and_mul {shape}", lambda t=tokens: _silu(p, t, False))
        yield Spec(f"silu_and_mul_fp8 {shape}", lambda t=tokens: _silu(p, t, True))
    for tokens, hidden in [*((s.tokens, h) for h in s.hidden), (s.step_tokens, s.hidden[0])]:
        at = (p, tokens, hidden, f"{tokens} x {hidden} by row")
        yield Spec(f"quantize_fp8 {at[-1]}", lambda at=at: _quantize(*at))


def _silu(p: Place, tokens: int, fp8: bool) -> GpuCase:
    inner = p.sizes.inner
    size = tokens * inner * (5.0 if fp8 else 6.0)
    xs = [p.randn(tokens, 2 * inner) for _ in range(p.copies(size))]
    ours, eager = (
        (lf.silu_and_mul_fp8, reference.silu_and_mul_fp8)
        if fp8
        else (lf.silu_and_mul, reference.silu_and_mul)
    )

    def plain(out: Any) -> Tensor:
        return reference.dequantize_fp8(*out) if fp8 else out

    to = Baselines(lambda i: ours(xs[i % len(xs)]))
    to.add("eager", lambda i: eager(xs[i % len(xs)]))
    p.compiler.offer(to, eager, lambda i: (xs[i % len(xs)],))
    x = ends(xs[0])
    return GpuCase(
        "silu_and_mul_fp8" if fp8 else "silu_and_mul",
        f"{tokens} x 2*{inner}",
        size,
        5.0 * tokens * inner,
        "copy",
        to.runs,
        errors(
            lambda: ends(plain(ours(xs[0]))),
            lambda: plain(eager(x)),
            lambda: reference.silu_and_mul(x.double()),
        ),
        to.skipped,
        copies=len(xs),
        arguments=(xs[0],),
        predict={"rows": tokens, "inner": inner},
    )


def _quantize(p: Place, tokens: int, hidden: int, shape: str) -> GpuCase:
    size = 3.0 * tokens * hidden + 4.0 * tokens
    xs = [p.randn(tokens, hidden) for _ in range(p.copies(size))]
    to = Baselines(lambda i: lf.quantize_fp8(xs[i % len(xs)]))
    to.add("eager", lambda i: reference.quantize_fp8(xs[i % len(xs)]))
    p.compiler.offer(to, reference.quantize_fp8, lambda i: (xs[i % len(xs)],))
    x = ends(xs[0])
    return GpuCase(
        "quantize_fp8",
        shape,
        size,
        3.0 * tokens * hidden,
        "copy",
        to.runs,
        errors(
            lambda: ends(reference.dequantize_fp8(*lf.quantize_fp8(xs[0]))),
            lambda: reference.dequantize_fp8(*reference.quantize_fp8(x)),
            lambda: x,
        ),
        to.skipped,
        copies=len(xs),
        arguments=(xs[0],),
        predict={"rows": tokens, "hidden": hidden},
    )
