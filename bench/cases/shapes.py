"""Shapes of Llama 3.1's layers, whole or one tensor-parallel rank's, and the sizes to run."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

import llama_fast as lf

from ..timing.machine import halved

PRESETS = {
    "8b": lf.LlamaConfig.llama_3_1_8b,
    "70b": lf.LlamaConfig.llama_3_1_70b,
    "405b": lf.LlamaConfig.llama_3_1_405b,
}
MODELS = (*PRESETS, "tiny")
LEVELS = ("quick", "default", "full")


@dataclass(frozen=True)
class Shapes:
    """One layer's sizes. Heads and the inner width are one tensor-parallel rank's; the hidden width
    is never divided."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def rotated(self) -> int:
        """Return the number of elements of a token's queries and keys."""
        return (self.heads + self.kv_heads) * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Return [N, K] of a layer's products. "up" is half of "gate_up", for layers that do not
        fuse the two."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "up": (self.inner, self.hidden),
            "gate_up": (2 * self.inner, self.hidden),
            "down": (self.hidden, self.inner),
            "qkv": (q + 2 * kv, self.hidden),
            "output": (self.hidden, q),
        }


def layer_shapes(model: str, tp: int = 1) -> Shapes:
    """Return the Shapes of one of MODELS on one of tp ranks, which repeat key/value heads if there
    are fewer of them. Raises ValueError if tp does not divide the heads or the inner width."""
    if model == "tiny":  # every line of the suite in seconds
        hidden, inner, heads, kv_heads, head_dim = 64, 128, 8, 4, 16
    else:
        c = PRESETS[model]()
        hidden, inner, head_dim = c.hidden_size, c.intermediate_size, c.head_dim
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    if tp < 1 or heads % tp or inner % tp:
        raise ValueError(
            f"--tp: got {tp}, want a divisor of {model}'s {heads} heads and inner width {inner}"
        )
    return Shapes(hidden, inner // tp, heads // tp, max(1, kv_heads // tp), head_dim)


@dataclass(frozen=True)
class Sweep:
    """The sizes to run."""

    tokens: tuple[int, ...]  # rows of norms, rope and SwiGLU
    prompts: tuple[int, ...]  # of causal attention
    caches: tuple[tuple[int, int], ...]  # (batch, context) of decode attention
    rows: tuple[int, ...]  # M of matrix products
    linears: tuple[str, ...]  # which products
    chunk: tuple[int, int] | None = None  # queries and keys of chunked prefill, paged
    variants: bool = False  # packed and full attention, paged and FP8 caches, block scales too


_ALL = ("gate_up", "down", "qkv", "output")
_SWEEPS = {
    ("cuda", False): Sweep(
        tokens=(32768, 1),
        prompts=(16384, 4096),
        caches=((32, 4096), (1, 131072), (8, 32768)),
        rows=(1, 16, 64, 512, 8192),
        linears=("up",),
        chunk=(512, 8192),
        variants=True,
    ),
    ("cuda", True): Sweep(
        tokens=(1, 16, 128, 1024, 8192, 16384, 32768),
        prompts=(128, 1024, 4096, 16384, 65536, 131072),
        caches=((1, 2048), (1, 8192), (1, 32768), (1, 131072), (8, 8192), (32, 4096), (64, 4096)),
        rows=(1, 4, 16, 64, 512, 4096, 16384),
        linears=_ALL,
        chunk=(512, 8192),
        variants=True,
    ),
    ("cpu", False): Sweep((512,), (2048,), ((1, 8192), (1, 32768)), (1, 16, 512), ("up",)),
    ("cpu", True): Sweep(
        tokens=(1, 16, 128, 512, 4096, 16384),
        prompts=(128, 512, 2048, 8192),
        caches=((1, 2048), (1, 8192), (1, 32768), (1, 131072), (8, 2048), (64, 1024)),
        rows=(1, 4, 16, 64, 512, 4096),
        linears=_ALL,
        variants=True,
    ),
    ("tiny", False): Sweep((8,), (32,), ((1, 64),), (1, 16, 48), ("up",), (4, 64), True),
    ("tiny", True): Sweep(
        (1, 8), (16, 32), ((1, 64), (2, 32)), (1, 16, 48), ("up", "down"), (4, 64), True
    ),
}


def sweep(model: str, device: torch.device, level: str) -> Sweep:
    """Choose the sizes; a GPU's are larger."""
    return _SWEEPS["tiny" if model == "tiny" else device.type, level == "full"]


CALL = 1.0  # seconds that one call of ours may take
LEAST_PROMPT, LEAST_ROWS = 256, 16


def fitted(sizes: Sweep, layer: Shapes, rate: float) -> Sweep:
    """Halve prompts and rows until one call of ours takes at most CALL seconds at `rate` operations
    a second."""

    def prompt(tokens: int) -> int:
        while 2.0 * tokens**2 * layer.heads * layer.head_dim > CALL * rate:
            if tokens < 2 * LEAST_PROMPT:
                break
            tokens //= 2
        return tokens

    widest = max(n * k for n, k in (layer.linears[name] for name in sizes.linears))
    rows = [halved(m, 2.0 * m * widest / rate, CALL, LEAST_ROWS) for m in sizes.rows]
    prompts = dict.fromkeys(map(prompt, sizes.prompts))
    return replace(sizes, prompts=tuple(prompts), rows=tuple(dict.fromkeys(rows)))
