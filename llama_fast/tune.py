"""Measure every Triton kernel's configurations at Llama shapes and store the fastest of each.

Each GPU has a JSON file (kernels/tuning.py) in llama_fast/tuned/, which comes with the package, and
one in triton_backend.tuned_folder(), the user's, which has priority.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llama_fast as lf

from . import triton_backend
from .config import LlamaConfig
from .dispatch import use_backend
from .generation.cache import BLOCK_SIZE
from .kernels import common

# Rows of matrix products and elementwise ops: decode of one sequence and of batches, prompts.
ROWS = (1, 16, 64, 256, 2048, 8192)
CONTEXTS = ((1, 8192), (1, 131072), (32, 4096))  # sequences, keys a sequence
PROMPT = 8192
PRESETS = {"8B": LlamaConfig.llama_3_1_8b, "70B": LlamaConfig.llama_3_1_70b}

Call = partial[Any]  # of a public op


def tune(
    device: str = "cuda", folder: str | None = None, say: Callable[[str], object] = print
) -> Path:
    """Measure what this process has not yet measured on the GPU, and return the file. It is written
    after every model, so that an interrupt loses one model's measurements at most."""
    if not torch.cuda.is_available():
        raise RuntimeError("tune: needs a GPU, and torch finds none here")
    target = torch.device(device)
    chip = common.chip_of(torch.empty(0, device=target))
    path = into = Path(folder) if folder else triton_backend.tuned_folder()
    for name, preset in PRESETS.items():
        with use_backend("triton"), torch.inference_mode(), common.tuning():
            for what, call in calls(preset(), target):
                say(f"{name}: {what}")
                call()
        path = common.save_choices(chip.name, into)
    return path


def calls(
    c: LlamaConfig,
    device: torch.device,
    rows: tuple[int, ...] = ROWS,
    contexts: tuple[tuple[int, int], ...] = CONTEXTS,
    prompt: int = PROMPT,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[tuple[str, Call]]:
    """Yield a name and a call for every op at a model's shapes. Values are random: on zeros a GPU
    runs cooler and so faster. Buffers live as long as the call."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    d, heads, kv_heads = c.head_dim, c.num_attention_heads, c.num_key_value_heads
    yield from _elementwise(c, rows, randn)
    table = lf.rope_table(c, prompt, device=device)
    for n in sorted({1, prompt}):
        q, k, v = randn(n, heads + 2 * kv_heads, d).split((heads, kv_heads, kv_heads), 1)
        at = torch.arange(n, device=device)
        yield f"apply_rope {n}", partial(lf.apply_rope, q, k, at, table)
        cache = randn(2, -(-n // BLOCK_SIZE), BLOCK_SIZE, kv_heads, d)
        yield (
            f"apply_rope_and_append {n}",
            partial(lf.apply_rope_and_append, q, k, v, at, table, cache[0], cache[1], at),
        )
    q, k, v = (randn(1, prompt, n, d) for n in (heads, kv_heads, kv_heads))
    starts = torch.tensor([0, prompt // 2, prompt], dtype=torch.int32, device=device)
    for causal in (True, False):
        yield "attention", partial(lf.attention, q, k, v, causal=causal)
    yield (
        "attention, packed",
        partial(lf.attention, q[0], k[0], v[0], cu_seqlens_q=starts, cu_seqlens_k=starts),
    )
    for batch, keys in contexts:
        yield from _cached(c, batch, keys, randn)
    yield from _products(c, rows, randn)


def _elementwise(
    c: LlamaConfig, rows: tuple[int, ...], randn: Callable[..., Tensor]
) -> Iterator[tuple[str, Call]]:
    weight = randn(c.hidden_size)
    for n in rows:
        x, residual = randn(n, c.hidden_size), randn(n, c.hidden_size)
        gate_up = randn(n, 2 * c.intermediate_size)
        yield f"rms_norm {n}", partial(lf.rms_norm, x, weight)
        yield f"add_rms_norm {n}", partial(lf.add_rms_norm, x, residual, weight)
        yield f"rms_norm_fp8 {n}", partial(lf.rms_norm_fp8, x, weight)
        yield (
            f"rms_norm_fp8 + residual {n}",
            partial(lf.rms_norm_fp8, x, weight, residual=residual),
        )
        yield f"silu_and_mul {n}", partial(lf.silu_and_mul, gate_up)
        yield f"silu_and_mul_fp8 {n}", partial(lf.silu_and_mul_fp8, gate_up)
        for kind in ("tensor", "row", "block", "block_2d"):
            yield f"quantize_fp8 {kind} {n}", partial(lf.quantize_fp8, x, kind)


def _cached(
    c: LlamaConfig, batch: int, keys: int, randn: Callable[..., Tensor]
) -> Iterator[tuple[str, Call]]:
    """Yield decode and a chunk of a prompt over a paged cache and a contiguous one."""
    heads, kv_heads, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    blocks = -(-keys // BLOCK_SIZE)
    pool = randn(2, batch * blocks, BLOCK_SIZE, kv_heads, d)
    table = torch.randperm(batch * blocks, device=pool.device).int().view(batch, blocks)
    lengths = torch.full((batch,), keys, dtype=torch.int32, device=pool.device)
    k, v = pool
    flat_k, flat_v = pool.view(2, batch, blocks * BLOCK_SIZE, kv_heads, d)
    for queries in (1, 4, 512):
        q = randn(batch, min(queries, keys), heads, d)
        name = f"attention_with_kvcache {batch} x {keys}, {queries} queries"
        yield name, partial(lf.attention_with_kvcache, q, k, v, lengths, block_table=table)
        yield name, partial(lf.attention_with_kvcache, q, flat_k, flat_v, lengths)


def _products(
    c: LlamaConfig, rows: tuple[int, ...], randn: Callable[..., Tensor]
) -> Iterator[tuple[str, Call]]:
    width = c.num_attention_heads * c.head_dim
    shapes = {
        "qkv": (width + 2 * c.num_key_value_heads * c.head_dim, c.hidden_size),
        "output": (c.hidden_size, width),
        "gate_up": (2 * c.intermediate_size, c.hidden_size),
        "down": (c.hidden_size, c.intermediate_size),
    }
    for name, (n, k) in shapes.items():
        plain = randn(n, k)
        by_row, by_block = (lf.quantize_fp8(plain, kind) for kind in ("row", "block_2d"))
        for m in rows:
            x = randn(m, k)
            yield f"linear {name} {m}", partial(lf.linear, x, plain)
            for kind, (w, scale) in (("row", by_row), ("block", by_block)):
                yield f"fp8_linear {name} {m} {kind}", partial(lf.fp8_linear, x, w, scale)
                a, a_scale = lf.quantize_fp8(x, kind)
                yield f"fp8_gemm {name} {m} {kind}", partial(lf.fp8_gemm, a, w, a_scale, scale)
