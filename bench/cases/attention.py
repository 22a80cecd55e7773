"""Cases of attention: prompts, whose limit is a matrix product, and decode, a read of K and V."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llama_fast import reference

from ..timing import Run, limits
from .case import PARTS, Case, Plan, Spec, eager
from .shapes import Shapes

EAGER_SCORES = 2 << 30  # bytes of fp32 scores beyond which eager attention is left out
CHECKED_QUERIES = 64  # from the end, compared with fp64
BLOCK = 128  # tokens of a paged cache's block
SCALES = (0.75, 1.25)  # of an FP8 cache's K and V
SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def plans(s: Spec) -> Iterator[Plan]:
    m, sweep = s.shapes, s.sweep
    heads = f"{m.heads}/{m.kv_heads} x {m.head_dim}"
    kinds = [("causal", n) for n in sweep.prompts]
    if sweep.variants:
        kinds += [("full", sweep.prompts[-1]), ("packed", sweep.prompts[0])]
    for kind, tokens in kinds:
        activations = 2.0 * tokens * (m.heads + m.kv_heads) * m.head_dim * s.size
        scores = {"causal": tokens**2 / 2, "full": tokens**2}.get(kind)
        if scores is None:
            scores = sum(n * n for n in _lengths(tokens)) / 2
        memory = 8.0 * tokens * m.heads * m.head_dim * s.size
        memory += _scores(m, tokens) * (6.0 if s.fp32_too else 4.0)
        work = activations, 4.0 * scores * m.heads * m.head_dim, memory
        make = _packed if kind == "packed" else partial(_prefill, causal=kind == "causal")
        name = f"{kind} {tokens}, {heads}"
        yield Plan("attention", name, {"tokens": tokens}, *work, partial(make, s, tokens))
    caches = [("", 1, batch, context) for batch, context in sweep.caches]
    if sweep.variants:
        caches += [(kind, 1, *c) for kind in (", paged", ", FP8 cache") for c in sweep.caches[:2]]
    if sweep.chunk:
        caches.append((", paged", sweep.chunk[0], 1, sweep.chunk[1]))
    for kind, queries, batch, context in caches:
        count = f"{queries} quer{'y' if queries == 1 else 'ies'}"
        query = count if batch == 1 else f"{batch} x {count}"
        size = 2.0 * batch * context * m.kv_heads * m.head_dim * s.size
        flops = 4.0 * batch * queries * (context - (queries - 1) / 2) * m.heads * m.head_dim
        repeated = 4 * m.heads / m.kv_heads * (2 if s.fp32_too else 1)
        yield Plan(
            "attention_with_kvcache",
            f"{query}, {context} keys{kind}, {heads}",
            {"batch": batch, "context": context},
            size / s.size if kind == ", FP8 cache" else size,
            flops,
            size * (s.copies(size) + repeated + 2),
            partial(_decode, s, queries, batch, context, kind, s.copies(size)),
        )


def _scores(m: Shapes, tokens: int) -> float:
    """Return the bytes of fp32 scores that eager attention writes; 0 where it is left out."""
    size = 4.0 * m.heads * tokens**2
    return size if size <= EAGER_SCORES else 0.0


def _lengths(tokens: int) -> list[int]:
    """Return four prompts' lengths for one launch."""
    return [tokens // 16, 3 * tokens // 16, tokens // 4, tokens // 2]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)


def _sdpa_on(backend: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Run:
    """Return a run of one of SDPA's backends; it raises where the backend refuses the case."""

    def run(_: int) -> Tensor:
        with sdpa_kernel(backend):
            return _sdpa(q, k, v, causal=causal)

    return run


def _heads(s: Spec, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q [*shape, H, D], k and v [*shape, Hkv, D]."""
    m = s.shapes
    q = s.randn(*shape, m.heads, m.head_dim)
    k, v = (s.randn(*shape, m.kv_heads, m.head_dim) for _ in range(2))
    return q, k, v


def _last(
    q: Tensor, k: Tensor, v: Tensor, group: int, causal: bool = True
) -> tuple[Callable[..., Tensor], ...]:
    """Return value and exact of the last queries, which see every key, in the first and the last
    group of heads."""
    last = slice(max(0, q.shape[1] - CHECKED_QUERIES), None)

    def value(out: Tensor) -> Tensor:
        return torch.cat((out[:, last, :group], out[:, last, -group:]), dim=2)

    def exact() -> Tensor:
        ends = ((slice(None, group), slice(None, 1)), (slice(-group, None), slice(-1, None)))
        groups = [(q[:, last, heads], k[:, :, of], v[:, :, of]) for heads, of in ends]
        truth = [reference.attention(*(t.double() for t in g), causal=causal) for g in groups]
        return torch.cat(truth, dim=2)

    return value, exact


def _prefill(s: Spec, tokens: int, causal: bool = True) -> Case:
    m = s.shapes
    q, k, v = _heads(s, 1, tokens)
    value, exact = _last(q, k, v, m.heads // m.kv_heads, causal)

    def of(f: Callable[..., Tensor], dtype: torch.dtype, n: int) -> Run:
        """Return a run of f on an nth of the heads."""
        qn, kn, vn = (t[:, :, : t.shape[2] // n].to(dtype) for t in (q, k, v))
        return lambda _: f(qn, kn, vn, causal=causal)

    eager_too: dict[str, Any] = {"eager": reference.attention} if _scores(m, tokens) else {}
    kinds = {"": s.dtype, " fp32": torch.float32} if s.fp32_too else {"": s.dtype}
    backends = {n: _sdpa_on(b, q, k, v, causal) for n, b in SDPA.items()} if s.on_gpu else {}
    targets = {"SDPA": 2.5, "limit": 0.6} if tokens >= 2048 and causal else {}
    return Case(
        "attention",
        lambda _: (q, k, v),
        s.compute(),
        exact,
        value,
        options={} if causal else {"causal": False},
        baselines=backends,
        parts={
            f"{name}{kind}": partial(of, f, dtype)
            for kind, dtype in kinds.items()
            for name, f in {**eager_too, "SDPA": _sdpa}.items()
        },
        divides=m.kv_heads % PARTS == 0,
        inputs={"q": q, "k": k, "v": v} if causal else {},
        targets={"limit": 0.6} if targets and s.on_gpu else targets,
    )


def _packed(s: Spec, tokens: int) -> Case:
    """Make a case of prompts of different lengths in one launch."""
    m, starts = s.shapes, torch.tensor([0, *_lengths(tokens)]).cumsum(0).tolist()
    cu = torch.tensor(starts, dtype=torch.int32, device=s.device)
    q, k, v = _heads(s, tokens)
    spans = [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]
    one, longest = [t[None] for t in (q, k, v)], spans[-1]
    last_q, last_k, last_v = (t[:, longest] for t in one)
    value, exact = _last(last_q, last_k, last_v, m.heads // m.kv_heads)

    def one_by_one(_: int) -> Tensor:
        return torch.cat([_sdpa(*[t[:, span] for t in one], causal=True)[0] for span in spans])

    return Case(
        "attention",
        lambda _: (q, k, v),
        s.compute(),
        exact,
        lambda out: value(out[None, longest]),
        options={"cu_seqlens_q": cu, "cu_seqlens_k": cu},
        baselines={"SDPA, one by one": one_by_one},
    )


def _decode(s: Spec, queries: int, batch: int, context: int, kind: str, n: int) -> Case:
    """Make a case over n caches. kind: "", ", paged" (blocks in random order) or ", FP8 cache"."""
    m, op = s.shapes, "attention_with_kvcache"
    q = s.randn(batch, queries, m.heads, m.head_dim)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=s.device)
    options: dict[str, Any] = {}
    places: tuple[int, ...] = (batch, context)
    if kind == ", paged":
        blocks = -(-context // BLOCK)
        order = torch.randperm(batch * blocks, device=s.device).int()
        options["block_table"], places = order.view(batch, blocks), (batch * blocks, BLOCK)
    pools = [s.randn(2, *places, m.kv_heads, m.head_dim, cache=True) for _ in range(n)]
    if kind == ", FP8 cache":
        pools = [pool.to(torch.float8_e4m3fn) for pool in pools]
        for name, scale in zip(("k_scale", "v_scale"), SCALES, strict=True):
            options[name] = torch.tensor([scale], device=s.device)
    picked = [0, batch - 1] if batch > 1 else [0]
    plain = not options

    def arguments(i: int) -> tuple[Tensor, ...]:
        return (q, *pools[i % n], lengths)

    def exact() -> Tensor:
        return torch.cat([reference.attention(q[b : b + 1].double(), *cache(b)) for b in picked])

    def cache(b: int) -> Iterator[Tensor]:
        for t, scale in zip(pools[0], SCALES if "k_scale" in options else (1, 1), strict=True):
            rows = t[options["block_table"][b].long()] if "block_table" in options else t[b]
            yield rows.reshape(1, -1, m.kv_heads, m.head_dim)[:, :context].double() * scale

    baselines = {"eager": eager(op, arguments, **options)}
    if plain:
        baselines["SDPA"] = lambda i: _sdpa(q, *pools[i % n], causal=False)
    if s.fp32_too and plain:
        wide, (k, v) = q.float(), (t.float() for t in pools[0])  # one is more than caches hold
        baselines["eager fp32"] = eager(op, lambda _: (wide, k, v, lengths))
        baselines["SDPA fp32"] = lambda _: _sdpa(wide, k, v, causal=False)
    inputs = {
        "q": q,
        "k_caches": [p[0] for p in pools],
        "v_caches": [p[1] for p in pools],
        "cache_seqlens": lengths,
    }
    targets = {"limit": 0.8, "SDPA": 20.0} if plain and batch == 1 and context >= 8192 else {}
    return Case(
        op,
        arguments,
        limits.read(pools) if queries == 1 else s.compute(),
        exact,
        lambda out: out[picked],
        options=options,
        baselines=baselines,
        inputs=inputs if plain else {},
        targets={"limit": 0.85} if plain and s.on_gpu else targets,
        copies=n,
        waits=("eager",),  # it reads the lengths
    )
