"""Run flashinfer's elementwise ops, and its attention over a prompt and over a paged cache. Written
against 0.7.2's source; not yet run. Its kernels compile on first use, in the first, untimed run.
"""

from __future__ import annotations

from typing import Any

import torch

from ..timing import Run
from .peer import Inputs, Unsupported

PAGE = 16  # tokens: as in its documentation
WORKSPACE = 128 << 20  # bytes, as in its documentation
LABEL = "flashinfer"


def _library() -> Any:
    import flashinfer

    return flashinfer


def rms_norm(inputs: Inputs) -> dict[str, Run]:
    x, weight, eps = (inputs[name] for name in ("x", "weight", "eps"))
    f = _library().rmsnorm
    return {LABEL: lambda _: f(x, weight, eps)}


def add_rms_norm(inputs: Inputs) -> dict[str, Run]:
    """Return a run on copies, since x is overwritten by the result and the residual by the sum. The
    sums grow from round to round; the work stays the same."""
    x, residual = inputs["x"].clone(), inputs["residual"].clone()
    weight, eps, f = inputs["weight"], inputs["eps"], _library().fused_add_rmsnorm
    return {f"{LABEL}, in place": lambda _: f(x, residual, weight, eps)}


def apply_rope(inputs: Inputs) -> dict[str, Run]:
    q, k, positions, table = (inputs[name] for name in ("q", "k", "positions", "table"))
    f, dim = _library().apply_rope_with_cos_sin_cache, q.shape[-1]
    flat = q.flatten(1), k.flatten(1)
    return {LABEL: lambda _: f(positions, *flat, dim, table, is_neox=True)}


def silu_and_mul(inputs: Inputs) -> dict[str, Run]:
    gate_up, f = inputs["gate_up"], _library().silu_and_mul
    return {LABEL: lambda _: f(gate_up)}


def attention(inputs: Inputs) -> dict[str, Run]:
    q, k, v = (inputs[name] for name in "qkv")
    f = _library().single_prefill_with_kv_cache
    if q.shape[0] != 1:
        raise Unsupported(f"flashinfer's single_prefill takes one prompt, not {q.shape[0]}")
    return {LABEL: lambda _: f(q[0], k[0], v[0], causal=True)}


def attention_with_kvcache(inputs: Inputs) -> dict[str, Run]:
    """Return runs over the contiguous caches as consecutive pages. The plan is not timed, since a
    model plans once for all its layers."""
    q, ks, vs = inputs["q"], inputs["k_caches"], inputs["v_caches"]
    wrapper_of = _library().BatchDecodeWithPagedKVCacheWrapper
    batch, queries, heads, head_dim = q.shape
    _, room, kv_heads, _ = ks[0].shape
    if queries != 1:
        raise Unsupported(f"flashinfer's decode takes one query a sequence, not {queries}")
    if room % PAGE:
        raise Unsupported(f"a cache of {room} tokens does not divide into pages of {PAGE}")
    lengths = inputs["cache_seqlens"].tolist()
    if min(lengths) < 1:
        raise Unsupported("an empty cache: flashinfer's last page holds at least one token")
    used = [-(-length // PAGE) for length in lengths]
    indices = torch.cat([torch.arange(n) + b * (room // PAGE) for b, n in enumerate(used)])
    indptr = torch.tensor([0, *used]).cumsum(0)
    last = torch.tensor([(length - 1) % PAGE + 1 for length in lengths])
    plan = [t.to(q.device, torch.int32) for t in (indptr, indices, last)]
    paged = [
        tuple(t.view(-1, PAGE, kv_heads, head_dim) for t in kv) for kv in zip(ks, vs, strict=True)
    ]
    flat = q[:, 0]

    def over(tensor_cores: bool) -> Run:
        workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=q.device)
        wrapper = wrapper_of(workspace, "NHD", use_tensor_cores=tensor_cores)
        wrapper.plan(
            *plan, heads, kv_heads, head_dim, PAGE, q_data_type=q.dtype, kv_data_type=ks[0].dtype
        )
        return lambda i: wrapper.run(flat, paged[i % len(paged)])

    return {LABEL: over(False), f"{LABEL}, tensor cores": over(True)}


OPS = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "apply_rope": apply_rope,
    "silu_and_mul": silu_and_mul,
    "attention": attention,
    "attention_with_kvcache": attention_with_kvcache,
}
