"""The arguments of a case, from a few numbers.

Tensors lie in buffers with poison between and around their elements."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

import llama_fast as lf

from ..support.op_examples import example
from .broken import FP8, WRONG

SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 31, 33, 64, 65, 129)
HEAD_DIMS = (8, 12, 16, 20, 64, 72, 128)
INDICES = ("positions", "slots", "cache_seqlens", "block_table", "cu_seqlens_q", "cu_seqlens_k")


@dataclasses.dataclass(frozen=True)
class Case:
    op: str
    sizes: tuple[int, int, int, int] = (3, 5, 2, 1)
    flags: int = 0  # bits: the op's options
    dtype: str = "float32"
    layouts: int = 0  # three bits a tensor: rows apart, outer dimensions swapped, expanded
    values: str = "normal"  # of one of the tensors
    seed: int = 0
    mode: str = "no_grad"
    backend: str = "cpu"
    isa: int = 0
    wrong: tuple[tuple[str, str], ...] = ()  # argument, kind of WRONG


class Arguments:
    """The arguments of a case by name, and the buffers that their tensors lie in."""

    def __init__(self, case: Case) -> None:
        self.case, self.dtype = case, getattr(torch, case.dtype)
        self.random = torch.Generator().manual_seed(case.seed)
        self.buffers: dict[str, Tensor] = {}
        self.named: dict[str, Any] = {}
        self.made = 0
        if hasattr(self, case.op):
            getattr(self, case.op)(*case.sizes)
        else:  # a new op, in one shape
            torch.manual_seed(case.seed)
            for name, value in example(case.op).items():
                self.named[name] = value
                if isinstance(value, Tensor):
                    self.put(name, value)
        for name, kind in case.wrong:
            same = kind == "k_cache" and "k_cache" in self.named
            self.named[name] = self.named[kind] if same else WRONG[kind](self.named[name])

    def flag(self, bit: int) -> bool:
        return bool(self.case.flags >> bit & 1)

    def real(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> None:
        x = torch.randn(shape, generator=self.random)
        if self.case.seed % 4 == self.made and x.numel():
            at = self.case.seed % x.numel()
            match self.case.values:
                case "zero":
                    x.zero_()
                case "large":
                    x *= 1e4
                case "tiny":
                    x *= 1e-6
                case "nan" | "inf" as value:
                    x.view(-1)[at] = float(value)
        self.put(name, x.to(dtype or self.dtype))

    def scales(self, name: str, *shape: int) -> None:
        self.put(name, torch.rand(shape, generator=self.random) + 0.5)

    def integers(self, name: str, values: Any, dtype: torch.dtype) -> None:
        self.put(name, torch.as_tensor(values).to(dtype))

    def below(self, n: int, *shape: int) -> Tensor:
        return torch.randint(0, max(n, 1), shape, generator=self.random)

    def put(self, name: str, t: Tensor) -> None:
        """Add t as an argument, copied into a buffer of poison in the case's layout."""
        layout, self.made = self.case.layouts >> 3 * self.made & 7, self.made + 1
        dense_last = name not in INDICES
        if t.dim() == 4 and t.shape[2:] == (64, 2):
            layout = 0  # a packed weight is contiguous
        apart, swapped, expanded = layout & 1, layout & 2, layout == 4
        if expanded and t.dim() > 1 and len(t) and "cache" not in name:
            t = t[:1].expand(t.shape)
        order = list(range(t.dim()))
        if swapped and t.dim() > 1 + dense_last:
            order[0], order[1] = order[1], order[0]
        strides, room = [0] * t.dim(), 1
        for d in reversed(order):
            if apart and room == 1 and not dense_last:
                room = 2
            strides[d] = room
            room *= max(t.shape[d], 1)
            if apart:
                room += 3
        if t.dim() and t.stride(0) == 0 and len(t) > 1:
            strides[0] = 0
        fill = -77 if not t.is_floating_point() else math.nan
        buffer = torch.full((8 + room + 8,), 0.0).to(t.dtype)
        (buffer if t.itemsize > 1 else buffer.view(torch.uint8)).fill_(
            fill if t.itemsize > 1 else 0x7F
        )
        view = buffer.as_strided(t.shape, strides, 8)
        if t.numel():
            raw, of = (view, t) if t.itemsize > 1 else (view.view(torch.uint8), t.view(torch.uint8))
            if 0 in strides:
                raw[:1].copy_(of[:1])
            else:
                raw.copy_(of)
        self.buffers[name], self.named[name] = buffer, view

    # ---- the ops' arguments ----

    def _rows(self, rows: int, cols: int, more: int) -> tuple[int, ...]:
        return ((rows, cols), (more, rows, cols), (cols,))[self.case.flags >> 6 & 3 and 1]

    def rms_norm(self, rows: int, hidden: int, more: int, _: int) -> None:
        hidden += 1
        self.real("x", *self._rows(rows, hidden, more))
        self.real("weight", hidden)
        self.named["eps"] = 1e-5

    def add_rms_norm(self, rows: int, hidden: int, more: int, _: int) -> None:
        self.rms_norm(rows, hidden, more, _)
        self.real("residual", *self.named["x"].shape)

    def rms_norm_fp8(self, rows: int, hidden: int, more: int, _: int) -> None:
        self.rms_norm(rows, hidden, more, _)
        self.named["residual"] = None
        if self.flag(0):
            self.real("residual", *self.named["x"].shape)
        self.named["scale_ub"] = 1.5 if self.flag(1) else None

    def silu_and_mul(self, rows: int, width: int, more: int, _: int) -> None:
        self.real("gate_up", *self._rows(rows, 2 * (width + 1), more))

    def silu_and_mul_fp8(self, rows: int, width: int, more: int, _: int) -> None:
        self.silu_and_mul(rows, width, more, _)
        self.named["scale_ub"] = 0.5 if self.flag(1) else None

    def quantize_fp8(self, rows: int, cols: int, more: int, _: int) -> None:
        self.real("x", *self._rows(rows, 2 * cols + 1, more))
        granularities = ("tensor", "row", "block", "block_2d")
        self.named["granularity"] = granularities[self.case.flags & 3]
        self.named["scale_ub"] = 1.5 if self.flag(2) else None

    def apply_rope(self, tokens: int, at: int, group: int, kv_heads: int) -> None:
        d = HEAD_DIMS[at % len(HEAD_DIMS)]
        kv_heads = kv_heads % 4 + (not self.flag(5))
        self.real("q", tokens, kv_heads * (group % 5 + 1), d)
        self.real("k", tokens, kv_heads, d)
        kind = torch.int32 if self.flag(0) else torch.int64
        self.integers("positions", self.below(40, tokens), kind)
        self.put("table", lf.rope_table(1e4, 40, head_dim=d))
        self.named["interleaved"] = self.flag(1)

    def apply_rope_and_append(self, tokens: int, at: int, group: int, kv_heads: int) -> None:
        self.apply_rope(tokens, at, group, kv_heads)
        _, kv_heads, d = self.named["k"].shape
        self.real("v", tokens, kv_heads, d)
        block = group % 7 + 1
        blocks = -(-tokens // block) + 1
        pool = (3,) if self.flag(2) else ()
        for name in "kv":
            dtype = FP8 if self.flag(3) else None
            self.real(f"{name}_cache", *pool, blocks, block, kv_heads, d, dtype=dtype)
            self.named[f"{name}_scale"] = None
            if self.flag(3):
                self.scales(f"{name}_scale", kv_heads if self.flag(4) else 1)
        slots = torch.randperm(blocks * block, generator=self.random)[:tokens]
        slots[self.below(4, tokens) == 0] = -1
        self.integers("slots", slots, torch.int32 if self.flag(5) else torch.int64)
        self.named["layer"] = 1 if self.flag(2) else None

    def _heads(self, at: int, group: int, kv_heads: int) -> tuple[int, int, int]:
        kv_heads = kv_heads % 3 + 1
        return kv_heads * (group % 5 + 1), kv_heads, HEAD_DIMS[at % len(HEAD_DIMS)]

    def attention(self, seqlen_q: int, seqlen_k: int, group: int, kv_heads: int) -> None:
        heads, kv_heads, d = self._heads(self.case.seed, group, kv_heads)
        batch = (self.case.flags >> 2 & 3,)
        self.named["causal"] = self.flag(0)
        self.named["softmax_scale"] = 0.3 if self.flag(1) else None
        if self.flag(4):
            batch = ()
            n = self.case.flags >> 2 & 3
            for name, total in (("cu_seqlens_q", seqlen_q), ("cu_seqlens_k", seqlen_k)):
                cuts = sorted(self.below(total + 1, n).tolist())
                self.integers(name, [0, *cuts, total], torch.int32)
        self.real("q", *batch, seqlen_q, heads, d)
        self.real("k", *batch, seqlen_k, kv_heads, d)
        self.real("v", *batch, seqlen_k, kv_heads, d)

    def attention_with_kvcache(self, seqlen: int, batch: int, group: int, kv_heads: int) -> None:
        heads, kv_heads, d = self._heads(self.case.seed, group, kv_heads)
        batch, block = batch % 4, group % 9 + 1
        self.real("q", batch, self.case.flags >> 5 & 3, heads, d)
        blocks, paged = -(-seqlen // block) + 1, self.flag(0)
        first = (batch * blocks + 1, block) if paged else (batch, seqlen)
        for name in "kv":
            dtype = FP8 if self.flag(1) else None
            self.real(f"{name}_cache", *first, kv_heads, d, dtype=dtype)
            self.named[f"{name}_scale"] = None
            if self.flag(1):
                self.scales(f"{name}_scale", kv_heads if self.flag(2) else 1)
        self.named["block_table"] = None
        if paged:
            ids = torch.randperm(first[0], generator=self.random)[: batch * blocks]
            self.integers("block_table", ids.view(batch, blocks), torch.int32)
        self.integers("cache_seqlens", self.below(seqlen + 1, batch), torch.int32)
        self.named["causal"] = self.flag(3)
        self.named["softmax_scale"] = 0.3 if self.flag(4) else None
        self.named["num_splits"] = (0, 1, 3, 1000)[self.case.seed % 4]

    def linear(self, rows: int, n: int, k: int, more: int) -> None:
        packed = self.flag(0)
        n, k = (64 * (n % 3), 2 * (k + 1)) if packed else (n, k + 1)
        self.real("x", *self._rows(rows, k, more % 3))
        self.real("weight", *((n // 64, k // 2, 64, 2) if packed else (n, k)))
        self.named["bias"] = None
        if self.flag(1):
            self.real("bias", n)

    def _scale(self, name: str, rows: int, cols: int, kind: int) -> None:
        blocks = -(-cols // 128)
        shapes = ((1,), (rows, 1), (rows, blocks), (-(-rows // 128), blocks))
        self.scales(name, *shapes[kind])

    def fp8_linear(self, rows: int, n: int, k: int, more: int) -> None:
        packed = self.flag(0)
        n, k = (64 * (n % 3), 4 * (k + 1)) if packed else (n, 3 * k + 1)
        self.real("x", *self._rows(rows, k, more % 3))
        self.real("weight", *((n // 64, k // 2, 64, 2) if packed else (n, k)), dtype=FP8)
        self._scale("weight_scale", n, k, self.case.flags >> 2 & 3)
        self.named["bias"] = None
        if self.flag(1):
            self.real("bias", n)
        self.named["quantize_activation"] = (None, False, True)[self.case.seed % 3]
        self.named["scale_ub"] = 1.5 if self.flag(4) else None

    def fp8_gemm(self, m: int, n: int, k: int, _: int) -> None:
        k = 3 * k + 1
        self.real("a", m, k, dtype=FP8)
        self.real("b", n, k, dtype=FP8)
        self._scale("scale_a", m, k, self.case.flags & 1 or self.case.flags >> 1 & 2)
        self._scale("scale_b", n, k, self.case.flags >> 2 & 3)
        self.named["out_dtype"], self.named["bias"] = self.dtype, None
        if self.flag(4):
            self.real("bias", n)

    def pack_weight(self, n: int, k: int, _: int, __: int) -> None:
        self.real("weight", 64 * (n % 3), 2 * (k + 1), dtype=FP8 if self.flag(0) else None)
