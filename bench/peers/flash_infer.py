"""Run flashinfer's elementwise ops, and its attention over a prompt and over a paged cache. Written
against 0.7.2's source; not yet run. Its kernels compile on first use, in the first, untimed run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..timing import Run
from . import Ops, Unsupported

PAGE = 16  # tokens: as in its documentation
WORKSPACE = 128 << 20  # bytes, as in its documentation
LABEL = "flashinfer"


def _library() -> Any:
    import flashinfer

    return flashinfer


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> dict[str, Run]:
    f = _library().rmsnorm
    return {LABEL: lambda _: f(x, weight, eps)}


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> dict[str, Run]:
    """Return a run on copies, since x is overwritten by the result and the residual by the sum. The
    sums grow from round to round; the work stays the same."""
    x, residual, f = x.clone(), residual.clone(), _library().fused_add_rmsnorm
    return {f"{LABEL}, in place": lambda _: f(x, residual, weight, eps)}


def apply_rope(q: Tensor, k: Tensor, positions: Tensor, table: Tensor) -> dict[str, Run]:
    f, dim = _library().apply_rope_with_cos_sin_cache, q.shape[-1]
    flat = q.flatten(1), k.flatten(1)
    return {LABEL: lambda _: f(positions, *flat, dim, table, is_neox=True)}


def silu_and_mul(gate_up: Tensor) -> dict[str, Run]:
    f = _library().silu_and_mul
    return {LABEL: lambda _: f(gate_up)}


def attention(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Run]:
    f = _library().single_prefill_with_kv_cache
    if q.shape[0] != 1:
        raise Unsupported(f"flashinfer's single_prefill takes one prompt, not {q.shape[0]}")
    return {LABEL: lambda _: f(q[0], k[0], v[0], causal=True)}


def attention_with_kvcache(
    q: Tensor, k_caches: list[Tensor], v_caches: list[Tensor], cache_seqlens: Tensor
) -> dict[str, Run]:
    """Return runs over the contiguous caches as consecutive pages. The plan is not timed, since a
    model plans once for all its layers."""
    wrapper_of = _library().BatchDecodeWithPagedKVCacheWrapper
    batch, queries, heads, head_dim = q.shape
    _, room, kv_heads, _ = k_caches[0].shape
    lengths = cache_seqlens.tolist()
    if queries != 1:
        raise Unsupported(f"flashinfer's decode takes one query a sequence, not {queries}")
    if room % PAGE:
        raise Unsupported(f"a cache of {room} tokens does not divide into pages of {PAGE}")
    if min(lengths) < 1:
        raise Unsupported("an empty cache: flashinfer's last page holds at least one token")
    used = [-(-length // PAGE) for length in lengths]
    indices = torch.cat([torch.arange(n) + b * (room // PAGE) for b, n in enumerate(used)])
    last = torch.tensor([(length - 1) % PAGE + 1 for length in lengths])
    plan = [torch.tensor([0, *used]).cumsum(0), indices, last]
    plan = [t.to(q.device, torch.int32) for t in plan]
    paged = [
        tuple(t.view(-1, PAGE, kv_heads, head_dim) for t in kv)
        for kv in zip(k_caches, v_caches, strict=True)
    ]
    flat, shape = q[:, 0], (heads, kv_heads, head_dim, PAGE)
    dtypes = q.dtype, k_caches[0].dtype

    def over(tensor_cores: bool) -> Run:
        workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=q.device)
        wrapper = wrapper_of(workspace, "NHD", use_tensor_cores=tensor_cores)
        wrapper.plan(*plan, *shape, q_data_type=dtypes[0], kv_data_type=dtypes[1])
        return lambda i: wrapper.run(flat, paged[i % len(paged)])

    return {LABEL: over(False), f"{LABEL}, tensor cores": over(True)}


OPS: Ops = {
    f.__name__: f
    for f in (rms_norm, add_rms_norm, apply_rope, silu_and_mul, attention, attention_with_kvcache)
}
