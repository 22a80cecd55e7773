"""The GPU report's attention: prompts, and queries over a cache."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llama_fast as lf
from llama_fast import reference
from llama_fast.generation.cache import BLOCK_SIZE

from .baselines import Baselines, offer_sdpa
from .case import errors
from .gpu_case import CHECKED_ROWS, GpuCase, Place, Spec, Unsupported


def prefills(p: Place) -> Iterator[Spec]:
    for seqlen in p.sizes.prefill:
        tag = f"prefill {seqlen}" if p.sizes.prefill[0] == seqlen else ""
        yield Spec(f"attention causal {seqlen}", lambda n=seqlen: _prefill(p, n, True), tag)
    longest_full = sorted(p.sizes.prefill)[-2]
    yield Spec(f"attention full {longest_full}", lambda: _prefill(p, longest_full, False))
    yield Spec("attention packed", lambda: _packed(p))


def _heads(p: Place, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [*shape, H, D], k and v [*shape, Hkv, D]."""
    s = p.sizes
    q = p.randn(*shape, s.heads, s.head_dim)
    k, v = (p.randn(*shape, s.kv_heads, s.head_dim) for _ in range(2))
    return q, k, v


def _attention_errors(
    ours: Callable[[], Tensor], q: Tensor, k: Tensor, v: Tensor, causal: bool
) -> Callable[[], tuple[float, float]]:
    """Over the first and the last queries, of which the worse counts: few keys make large outputs,
    beside which the errors of the last ones would be lost. causal is bottom-right aligned, so that
    the last queries with every key, and the first ones with the first keys, stand alone."""
    n = min(CHECKED_ROWS, q.shape[1])
    first = slice(0, n) if causal else slice(None)

    def end(out: Tensor, rows: slice, k: Tensor, v: Tensor) -> tuple[float, float]:
        part = (q[:, rows], k, v)
        return errors(
            lambda: out[:, rows],
            lambda: reference.attention(*part, causal=causal),
            lambda: reference.attention(*(t.double() for t in part), causal=causal),
        )()

    def compare() -> tuple[float, float]:
        out = ours()
        last = slice(q.shape[1] - n, None)
        return worst([end(out, slice(0, n), k[:, first], v[:, first]), end(out, last, k, v)])

    return compare


def worst(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """The pair (ours, eager's) that is the furthest beyond twice eager's error; NaN is."""
    return max(pairs, key=lambda e: math.inf if math.isnan(e[0]) else e[0] - 2 * e[1])


def _prefill(p: Place, seqlen: int, causal: bool) -> GpuCase:
    s = p.sizes
    q, k, v = _heads(p, 1, seqlen)
    to = Baselines(lambda _: lf.attention(q, k, v, causal=causal))
    if seqlen <= s.eager_prefill:
        to.add("eager", lambda _: reference.attention(q, k, v, causal=causal))
    else:
        to.skipped["eager"] = "its scores would not fit"
    offer_sdpa(to, lambda _: (q, k, v), causal)
    return GpuCase(
        "attention",
        f"{'causal' if causal else 'full'} {seqlen}, {s.heads}/{s.kv_heads} x {s.head_dim}",
        2.0 * (2 * q.numel() + k.numel() + v.numel()),
        (2.0 if causal else 4.0) * seqlen**2 * s.heads * s.head_dim,
        "bf16",
        to.runs,
        _attention_errors(lambda: lf.attention(q, k, v, causal=causal), q, k, v, causal),
        to.skipped,
        arguments=(q,),
        predict=_attention_shape(p, batch=1, seqlen_q=seqlen, seqlen_k=seqlen, causal=causal),
    )


def _attention_shape(p: Place, **shape: Any) -> dict[str, Any]:
    s = p.sizes
    return {**shape, "heads": s.heads, "kv_heads": s.kv_heads, "d": s.head_dim}


def _packed(p: Place) -> GpuCase:
    """Four prompts of different lengths in one launch."""
    s, total = p.sizes, p.sizes.prefill[0]
    lengths = [total // 16, 3 * total // 16, total // 4, total // 2]
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    cu = torch.tensor(starts, dtype=torch.int32, device=p.device)
    q, k, v = _heads(p, total)
    spans = [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]

    def one_by_one(_: int) -> list[Tensor]:
        out = []
        for span in spans:
            heads_first = (t[None, span].transpose(1, 2) for t in (q, k, v))
            out.append(
                F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
            )
        return out

    def ours() -> Tensor:
        return lf.attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)

    last = spans[-1]
    to = Baselines(lambda _: ours())
    to.offer("SDPA, one by one", one_by_one)
    return GpuCase(
        "attention",
        f"packed causal {'+'.join(map(str, lengths))}",
        2.0 * (2 * q.numel() + k.numel() + v.numel()),
        2.0 * sum(n * n for n in lengths) * s.heads * s.head_dim,
        "bf16",
        to.runs,
        _attention_errors(lambda: ours()[None, last], *(t[None, last] for t in (q, k, v)), True),
        to.skipped,
        arguments=(q,),
    )


def decodes(p: Place) -> Iterator[Spec]:
    tags = ("decode batch", "decode long")
    for i, (batch, keys) in enumerate(p.sizes.decode):
        tag = tags[i] if i < len(tags) else ""
        name = f"attention_with_kvcache B{batch} x {keys}"
        yield Spec(name, lambda b=batch, n=keys: _decode(p, b, n), tag)
    for batch, keys in p.sizes.decode:
        name = f"attention_with_kvcache B{batch} x {keys} paged"
        yield Spec(name, lambda b=batch, n=keys: _decode(p, b, n, paged=True))
    queries, context = p.sizes.chunk
    name = f"attention_with_kvcache B1 x {context}, {queries} queries"
    yield Spec(name, lambda: _decode(p, 1, context, queries, paged=True))
    for batch, keys in p.sizes.decode[:2]:
        name = f"attention_with_kvcache B{batch} x {keys} FP8"
        yield Spec(name, lambda b=batch, n=keys: _decode_fp8(p, b, n))


def _cached(p: Place, batch: int, keys: int, paged: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """k, v and the block table: blocks in random order, none where the cache is contiguous."""
    s = p.sizes
    if not paged:
        shape: tuple[int, ...] = (batch, keys, s.kv_heads, s.head_dim)
        return p.randn(*shape), p.randn(*shape), None
    blocks = -(-keys // BLOCK_SIZE)
    shape = (batch * blocks, BLOCK_SIZE, s.kv_heads, s.head_dim)
    table = torch.randperm(batch * blocks, device=p.device).int().view(batch, blocks)
    return p.randn(*shape), p.randn(*shape), table


def _decode(p: Place, batch: int, keys: int, queries: int = 1, paged: bool = False) -> GpuCase:
    s = p.sizes
    k, v, table = _cached(p, batch, keys, paged)
    q = p.randn(batch, queries, s.heads, s.head_dim)
    lengths = torch.full((batch,), keys, dtype=torch.int32, device=p.device)

    def ours(_: int) -> Tensor:
        return lf.attention_with_kvcache(q, k, v, lengths, block_table=table)

    to = Baselines(ours)
    to.add(
        "eager",
        lambda _: reference.attention_with_kvcache(q, k, v, lengths, block_table=table),
    )
    if table is None:  # queries = 1: the mask hides nothing
        offer_sdpa(to, lambda _: (q, k, v), causal=False)
    size = 2.0 * (2 * batch * keys * s.kv_heads * s.head_dim + 2 * q.numel())
    return GpuCase(
        "attention_with_kvcache",
        f"B{batch} x {keys}{f', {queries} queries' if queries > 1 else ''}"
        f"{' paged' if paged else ''}",
        size,
        4.0 * batch * queries * (keys - queries / 2) * s.heads * s.head_dim,
        "read" if queries == 1 else "bf16",
        to.runs,
        _decode_errors(lambda: ours(0), q, k, v, lengths, table),
        to.skipped,
        uncapturable=("eager",),  # it asks for the lengths
        arguments=(q, k),
        predict=_attention_shape(p, batch=batch, seqlen_q=queries, seqlen_k=keys),
    )


def _decode_errors(
    ours: Callable[[], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    scales: tuple[float, float] = (1.0, 1.0),
) -> Callable[[], tuple[float, float]]:
    """Of the first and the last sequence. An FP8 cache is decoded for eager and the truth alike."""
    few = sorted({0, q.shape[0] - 1})

    def twin(dtype: torch.dtype) -> Tensor:
        out = []
        for i in few:
            blocks = slice(i, i + 1) if table is None else table[i].long()
            one = (
                (t[blocks].flatten(0, 1)[None, : int(lengths[i])].to(dtype) * scale)
                for t, scale in zip((k, v), scales, strict=True)
            )
            out.append(reference.attention(q[i : i + 1].to(dtype), *one))
        return torch.cat(out)

    return errors(lambda: ours()[few], lambda: twin(q.dtype), lambda: twin(torch.float64))


def _decode_fp8(p: Place, batch: int, keys: int) -> GpuCase:
    """The cache in e4m3: half the bytes."""
    if "k_scale" not in inspect.signature(lf.attention_with_kvcache).parameters:
        raise Unsupported("attention_with_kvcache takes no FP8 cache")
    s = p.sizes
    k, v = (t.to(torch.float8_e4m3fn) for t in _cached(p, batch, keys, False)[:2])
    q = p.randn(batch, 1, s.heads, s.head_dim)
    lengths = torch.full((batch,), keys, dtype=torch.int32, device=p.device)
    scales = (0.75, 1.25)
    k_scale, v_scale = (torch.tensor([x], device=p.device) for x in scales)

    def run(f: Callable[..., Tensor]) -> Tensor:
        return f(q, k, v, lengths, k_scale=k_scale, v_scale=v_scale)

    try:
        run(lf.attention_with_kvcache)
    except NotImplementedError as why:  # the CPU's kernels
        raise Unsupported(str(why)) from None
    to = Baselines(lambda _: run(lf.attention_with_kvcache))
    to.offer("eager", lambda _: run(reference.attention_with_kvcache))
    return GpuCase(
        "attention_with_kvcache",
        f"B{batch} x {keys} FP8",
        2.0 * batch * keys * s.kv_heads * s.head_dim + 4.0 * q.numel(),
        4.0 * batch * keys * s.heads * s.head_dim,
        "read",
        to.runs,
        _decode_errors(lambda: run(lf.attention_with_kvcache), q, k, v, lengths, None, scales),
        to.skipped,
        uncapturable=("eager",),
        arguments=(q, k),
        predict=_attention_shape(p, batch=batch, seqlen_q=1, seqlen_k=keys, cache_bytes=1),
    )
