"""Attention: prompts, limited by a matrix product; single queries, limited by reading K and V."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

import llama_fast as lf
from llama_fast import reference

from .baselines import SDPA
from .case import Case, Plan, Spec, compute_limit, copies, read
from .shapes import Shapes
from .timing import PARTS, Run

EAGER_SCORES = 2 << 30  # bytes of fp32 scores beyond which eager attention is left out
CHECKED_QUERIES = 64  # from the end, held against fp64


def attention(s: Spec) -> Iterator[Plan]:
    m = s.shapes
    for tokens in s.sweep.prompts:
        shape = f"causal {tokens}, {m.heads}/{m.kv_heads} x {m.head_dim}"
        scores = _scores(m, tokens) * (6.0 if s.fp32_too else 4.0)
        memory = 8.0 * tokens * m.heads * m.head_dim * s.size + scores
        yield Plan("attention", shape, memory, functools.partial(_prefill, s, tokens, shape))
    for batch, context in s.sweep.caches:
        query = "1 query" if batch == 1 else f"{batch} x 1 query"
        shape = f"{query}, {context} keys, {m.heads}/{m.kv_heads} x {m.head_dim}"
        size = 2.0 * batch * context * m.kv_heads * m.head_dim * s.size
        repeated = 4 * m.heads / m.kv_heads * (2 if s.fp32_too else 1)
        memory = size * (copies(size, s.device) + repeated + 2)
        make = functools.partial(_decode, s, batch, context, shape, size)
        yield Plan("attention_with_kvcache", shape, memory, make)


def _scores(m: Shapes, tokens: int) -> float:
    """Bytes of the fp32 scores that eager attention writes; 0 where that is not tried."""
    size = 4.0 * m.heads * tokens**2
    return size if size <= EAGER_SCORES else 0.0


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)


def _sdpa_on(backend: Any, q: Tensor, k: Tensor, v: Tensor) -> Run:
    """One of SDPA's backends; where it refuses the case, the call raises."""

    def run(_: int) -> Tensor:
        with sdpa_kernel(backend):
            return _sdpa(q, k, v, True)

    return run


def _prefill(s: Spec, tokens: int, shape: str) -> Case:
    m = s.shapes
    q = s.randn(1, tokens, m.heads, m.head_dim)
    k, v = (s.randn(1, tokens, m.kv_heads, m.head_dim) for _ in range(2))
    group = m.heads // m.kv_heads
    last = slice(max(0, tokens - CHECKED_QUERIES), None)

    def value(out: Tensor) -> Tensor:
        """The last queries of the first and the last group: they see every key."""
        return torch.cat((out[:, last, :group], out[:, last, -group:]), dim=2)

    def exact() -> Tensor:
        groups = ((q[:, last, :group], k[:, :, :1], v[:, :, :1]),)
        groups += ((q[:, last, -group:], k[:, :, -1:], v[:, :, -1:]),)
        return torch.cat([reference.attention(*(t.double() for t in g)) for g in groups], dim=2)

    def of(f: Callable[..., Tensor], n: int, dtype: torch.dtype) -> Run:
        """f of an nth of the heads."""
        qn, kn, vn = (t[:, :, : t.shape[2] // n].to(dtype) for t in (q, k, v))
        return lambda _: f(qn, kn, vn)

    functions: dict[str, Callable[..., Tensor]] = {"SDPA": functools.partial(_sdpa, causal=True)}
    if _scores(m, tokens):
        functions = {"eager": reference.attention, **functions}
    kinds = {"": s.dtype, " fp32": torch.float32} if s.fp32_too else {"": s.dtype}
    parts = {
        f"{name}{kind}": functools.partial(of, f, dtype=dtype)
        for kind, dtype in kinds.items()
        for name, f in functions.items()
    }
    baselines = {name: part(1) for name, part in parts.items()}
    if s.device.type == "cuda":
        baselines.update({name: _sdpa_on(backend, q, k, v) for name, backend in SDPA.items()})
    limit, limit_work, limit_name = compute_limit(s)
    return Case(
        op="attention",
        shape=shape,
        axes={"tokens": tokens},
        bytes=2.0 * (q.nbytes + k.nbytes),
        flops=2.0 * tokens**2 * m.heads * m.head_dim,
        ours=lambda _: lf.attention(q, k, v),
        baselines=baselines,
        limit=limit,
        limit_work=limit_work,
        limit_name=limit_name,
        exact=exact,
        value=value,
        arguments=lambda _: (q, k, v),
        inputs={"q": q, "k": k, "v": v},
        parts=parts if m.kv_heads % PARTS == 0 else {},
        targets={"SDPA": 2.5, "limit": 0.6} if tokens >= 2048 else {},
    )


def _decode(s: Spec, batch: int, context: int, shape: str, size: float) -> Case:
    m = s.shapes
    q = s.randn(batch, 1, m.heads, m.head_dim)
    pools = [
        s.randn(2, batch, context, m.kv_heads, m.head_dim) for _ in range(copies(size, s.device))
    ]
    lengths = torch.full((batch,), context, dtype=torch.int32, device=s.device)
    picked = [0, batch - 1] if batch > 1 else [0]

    def caches(i: int) -> tuple[Tensor, Tensor]:
        pool = pools[i % len(pools)]
        return pool[0], pool[1]

    def exact() -> Tensor:
        parts = [
            reference.attention(q[b : b + 1].double(), *(c[b : b + 1].double() for c in caches(0)))
            for b in picked
        ]
        return torch.cat(parts)

    baselines: dict[str, Run] = {
        "eager": lambda i: reference.attention_with_kvcache(q, *caches(i), lengths),
        "SDPA": lambda i: _sdpa(q, *caches(i), False),
    }
    if s.fp32_too:
        wide, (k, v) = q.float(), (t.float() for t in caches(0))  # no cache holds these
        twin = reference.attention_with_kvcache
        baselines["eager fp32"] = lambda _: twin(wide, k, v, lengths)
        baselines["SDPA fp32"] = lambda _: _sdpa(wide, k, v, False)
    return Case(
        op="attention_with_kvcache",
        shape=shape,
        axes={"batch": batch, "context": context},
        bytes=size,
        flops=4.0 * batch * context * m.heads * m.head_dim,
        ours=lambda i: lf.attention_with_kvcache(q, *caches(i), lengths),
        baselines=baselines,
        limit=read(pools),
        limit_work=size,
        limit_name="read",
        exact=exact,
        value=lambda out: out[picked],
        arguments=lambda i: (q, *caches(i), lengths),
        inputs={
            "q": q,
            "k_caches": [p[0] for p in pools],
            "v_caches": [p[1] for p in pools],
            "cache_seqlens": lengths,
        },
        targets={"limit": 0.8, "SDPA": 20.0} if batch == 1 and context >= 8192 else {},
    )
