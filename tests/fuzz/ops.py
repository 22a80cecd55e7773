"""Call every op with valid and with broken arguments.

A valid call must agree with the reference; a refusal names the argument; an accepted call that was
meant to be broken must agree too. Tensors lie in buffers with poison between and around their
elements. After the call, only what the op writes in place may have changed."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import llama_fast as lf
from llama_fast import _cpu, cpu, reference

from .drive import REFUSALS, drive

BF16, F16, F32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
OPS = tuple(lf.backends())
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
        getattr(self, case.op)(*case.sizes)
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


# ---- broken arguments ----


class Subclass(Tensor):
    """A tensor whose class PyTorch does not know."""


def _tensors(change: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    """Return change for tensors; what it cannot change, and other arguments, become a string."""

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor):
            with contextlib.suppress(RuntimeError, TypeError, ValueError, IndexError):
                return change(value)
        return "wrong"

    return changed


def _filled(value: float) -> Callable[[Any], Any]:
    """Return a function that puts value, if the dtype has it, in the middle of a copy."""

    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t.view(-1)[t.numel() // 2] = value
        return t

    return _tensors(change)


WRONG: dict[str, Callable[[Any], Any]] = {
    **{
        repr(v): lambda _, v=v: v
        for v in (None, True, 0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**400, 1.5, -0.0)
    },
    "10**5000": lambda _: 10**5000,  # whose repr raises ValueError
    **{repr(v): lambda _, v=v: v for v in (math.nan, math.inf, -math.inf, 5e-324, 1e-40, 1e300)},
    **{repr(v): lambda _, v=v: v for v in ("x", b"x", [], [1.0], {}, torch.float32)},
    "complex": lambda _: 1j,
    "numpy int": lambda _: np.int64(1),
    "numpy float": lambda _: np.float32(1.0),
    "numpy double": lambda _: np.float64(1.0),
    "numpy bool": lambda _: np.bool_(True),
    "object": lambda _: object(),
    "lambda": lambda _: len,
    "to list": _tensors(lambda t: t.tolist()),
    "to numpy": _tensors(lambda t: t.float().numpy()),
    "coo": _tensors(lambda t: t.to_sparse()),
    "csr": _tensors(lambda t: t.to_sparse_csr()),
    "csc": _tensors(lambda t: t.to_sparse_csc()),
    "bsr": _tensors(lambda t: t.to_sparse_bsr((1, 1))),
    "mkldnn": _tensors(lambda t: t.to_mkldnn()),
    "nested": _tensors(lambda t: torch.nested.nested_tensor(list(t))),
    "jagged": _tensors(lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged)),
    "meta": _tensors(lambda t: t.to("meta")),
    "quantized": _tensors(lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)),
    "conj": _tensors(lambda t: t.to(torch.complex64).conj()),
    "neg": _tensors(torch._neg_view),
    "zero tensor": _tensors(lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype)),
    "subclass": _tensors(lambda t: t.as_subclass(Subclass)),
    "parameter": _tensors(lambda t: torch.nn.Parameter(t, requires_grad=t.is_floating_point())),
    "scalar": _tensors(lambda t: t.new_ones(())),
    "one more": _tensors(lambda t: torch.cat([t, t[:1]])),
    "one less": _tensors(lambda t: t[1:]),
    "narrow": _tensors(lambda t: t[..., :-1]),
    "dense narrow": _tensors(lambda t: t[..., :-1].contiguous()),
    "empty": _tensors(lambda t: t[..., :0]),
    "unsqueezed": _tensors(lambda t: t[None]),
    "squeezed": _tensors(lambda t: t[0]),
    "flat": _tensors(lambda t: t.reshape(-1)),
    "transposed": _tensors(lambda t: t.transpose(0, -1)),
    "k_cache": lambda _: None,  # the case's own, see Arguments
    "columns apart": _tensors(lambda t: t.repeat_interleave(2, -1)[..., ::2]),
    "expanded": _tensors(lambda t: t[:1].expand(t.shape)),
    "one for all": _tensors(lambda t: t.as_strided(t.shape, [0] * t.dim())),
    "huge": _tensors(lambda t: t[:1].expand(2**40, *t.shape[1:])),
    **{
        str(d): _tensors(lambda t, d=d: t.to(d))
        for d in (BF16, F16, F32, torch.float64, FP8, torch.float8_e5m2, torch.int8, torch.uint8)
    },
    **{str(d): _tensors(lambda t, d=d: t.to(d)) for d in (torch.int32, torch.int64, torch.bool)},
    **{f"has {v}": _filled(v) for v in (-1, -2, 0, 41, 2**31 - 1, -(2**31), 2**62, math.nan)},
}


# ---- agreement ----

# What torch.autocast casts to its dtype; those after the bar only with an FP8 cache.
AUTOCAST = {
    "attention": "q k v",
    "linear": "x weight bias",
    "fp8_linear": "x bias",
    "apply_rope_and_append": "| q k v",
    "attention_with_kvcache": "| q",
}
GRADIENTS = {  # the arguments that have one
    "rms_norm": "x weight",
    "add_rms_norm": "x residual weight",
    "silu_and_mul": "gate_up",
    "apply_rope": "q k",
    "attention": "q k v",
    "linear": "x weight bias",
    "fp8_linear": "x bias",
}
PRODUCTS = ("linear", "fp8_linear", "fp8_gemm")


def twin_arguments(case: Case, named: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for the reference: in fp32 for sums, whose roundings in the dtype are
    the reference's own."""
    out = dict(named)
    always, _, with_fp8 = AUTOCAST.get(case.op, "").partition("|")
    cache = named.get("k_cache")
    fp8_cache = isinstance(cache, Tensor) and cache.dtype == FP8
    casts = (always + with_fp8 * fp8_cache).split() if "autocast" in case.mode else []
    wide = "attention" in case.op or case.op in PRODUCTS
    for name, value in named.items():
        if isinstance(value, Tensor) and value._is_zerotensor():  # x / it is +inf in PyTorch
            value = out[name] = torch.zeros(value.shape, dtype=value.dtype)
        if isinstance(value, Tensor) and value.dtype in (BF16, F16, F32):
            value = value.to(BF16) if name in casts else value
            out[name] = value.float() if wide else value
    if case.op == "fp8_gemm":
        out["out_dtype"] = F32
    return out


def tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def largest(named: dict[str, Any], *names: str) -> float:
    """Return the largest finite magnitude among tensors, FP8 ones times their scales."""
    found = [0.0]
    for name in names:
        if isinstance(t := named.get(name), Tensor) and t.numel():
            scale = named.get(f"{name[0]}_scale")
            times = scale.max().item() if isinstance(scale, Tensor) and scale.numel() else 1.0
            found.append(t.float().abs().nan_to_num(0, 0, 0).max().item() * times)
    return max(found)


def tolerance(op: str, dtype: torch.dtype, named: dict[str, Any]) -> tuple[float, float]:
    """Return (rtol, atol) for an op's results in dtype. Roundings of the dtype are in rtol, and
    sums and cancellations in fp32, or probabilities in the dtype, in atol."""
    eps, least = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    tiny = 2 * least * eps
    if "attention" in op:
        return 4 * eps, tiny + largest(named, "v", "v_cache") * max(4 * eps, 3e-5)
    if op in PRODUCTS:
        return 2 * eps, tiny
    if "rope" in op:
        return 2 * eps, tiny + 1e-6 * largest(named, "q", "k")
    return max(4 * eps, 1e-5), tiny


def agree(actual: Tensor, expected: Tensor, rtol: float, atol: Any, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, want {expected.shape}"
    if not actual.numel():
        return
    largest = torch.finfo(actual.dtype).max
    a, b = actual.double(), expected.double()
    error = (a - b).abs()
    near = b.abs() > 0.99 * largest
    bad = torch.where(b.isfinite() & ~near, ~(error <= atol + rtol * b.abs()), False)
    bad |= ~b.isfinite() & (a.isfinite() & (a.abs() < 0.98 * largest))
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(f"{what}: {a[at]} at {list(at)}, want {b[at]} ({int(bad.sum())} bad)")


def compare(case: Case, ours: Any, named: dict[str, Any]) -> None:
    """Compare results with the reference's."""
    given = twin_arguments(case, named)
    twins, results = tensors(getattr(reference, case.op)(**given)), tensors(ours)
    assert len(results) == len(twins)
    dtype = next((t.dtype for t in (*results, *given.values())
                  if isinstance(t, Tensor) and t.dtype in (BF16, F16, F32)), F32)  # fmt: skip
    if "fp8" in case.op and case.op not in PRODUCTS:
        dtype = given["gate_up" if "gate_up" in given else "x"].dtype
    rtol, atol = tolerance(case.op, dtype, given)
    bound: Any = 0.0
    if case.op in PRODUCTS:  # of the sum of magnitudes
        size = {n: magnitude(v) if isinstance(v, Tensor) else v for n, v in given.items()}
        bound = 4e-6 * tensors(getattr(reference, case.op)(**size))[0].double().nan_to_num(0, 0, 0)
    if len(results) > 1 and results[0].dtype == FP8:
        (q, scale), (twin_q, twin_scale) = results[:2], twins[:2]
        agree(scale, twin_scale, rtol, atol / 448, "scale")
        cols = q.shape[-1]
        a, b = (
            reference.dequantize_fp8(x.reshape(x.numel() // cols, cols), s)
            for x, s in ((q, scale), (twin_q, twin_scale))
        )
        spread = reference.spread_scale(twin_scale, *b.shape).double().nan_to_num(0, 0, 0)
        agree(a, b, 0.13, atol + 2.01 * 2**-9 * spread, "q * scale")  # one code beside
        results, twins = results[2:], twins[2:]
    for i, (a, b) in enumerate(zip(results, twins, strict=True)):
        if a.dtype == FP8:
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        else:
            agree(a, b.to(a.dtype), rtol, atol + bound, f"result {i}")


def compare_gradients(case: Case, ours: Any, named: dict[str, Any], twins: dict[str, Any]) -> None:
    """Compare gradients with eager PyTorch's, or see that there are none."""
    outputs = [t for t in tensors(ours) if t.dtype in (BF16, F16, F32)]
    if case.op not in GRADIENTS or not outputs or not outputs[0].requires_grad:
        return
    random = torch.Generator().manual_seed(case.seed)
    towards = [torch.randn(t.shape, generator=random).to(t.dtype) for t in outputs]
    inputs = [n for n in GRADIENTS[case.op].split() if isinstance(named.get(n), Tensor)]
    if case.op == "fp8_linear" and case.seed % 3 == 2:  # the twin's rounding of x has no gradient
        return
    found = torch.autograd.grad(outputs, [named[n] for n in inputs], towards, allow_unused=True)
    eager = tensors(getattr(reference, case.op)(**twins))
    want = torch.autograd.grad(
        [t for t in eager if t.requires_grad],
        [twins[n] for n in inputs],
        towards,
        allow_unused=True,
    )
    part = 0.06 if outputs[0].dtype != F32 else 1e-3  # two ways of 16-bit roundings
    for name, a, b in zip(inputs, found, want, strict=True):
        if a is not None and b is not None and b.numel():
            agree(a, b, part, part * b.double().abs().max().item() + 1e-6, f"gradient of {name}")


def magnitude(t: Tensor) -> Tensor:
    return t.view(torch.uint8).bitwise_and(0x7F).view(FP8) if t.dtype == FP8 else t.abs()


# ---- a case ----

MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "grad": contextlib.nullcontext,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", BF16),
    "autocast inference": lambda: _both(torch.autocast("cpu", BF16), torch.inference_mode()),
    "meta": torch.no_grad,
}


@contextlib.contextmanager
def _both(a: Any, b: Any) -> Any:
    with a, b:
        yield


def is_named(error: BaseException, op: str) -> bool:
    first = str(error).partition(":")[0].partition("[")[0]
    named = first in inspect.signature(getattr(lf, op)).parameters
    return named or (isinstance(error, NotImplementedError) and first == op)


def check(case: Case) -> int:
    isas = _cpu.isas()
    _cpu.set_isa(isas[case.isa % len(isas)])
    op = getattr(lf, case.op)
    with MODES[case.mode](), lf.use_backend(case.backend):
        ours, twin = Arguments(case), Arguments(case)
        if case.mode == "meta":
            for arguments in (ours, twin):
                for name, value in arguments.named.items():
                    if isinstance(value, Tensor):
                        with contextlib.suppress(RuntimeError):  # a sparse or quantized one
                            arguments.named[name] = value.to("meta")
        if case.mode == "grad":
            for arguments in (ours, twin):
                for name, value in arguments.named.items():
                    if isinstance(value, Tensor) and value.dtype in (BF16, F16, F32):
                        value.requires_grad_(name in GRADIENTS.get(case.op, "x q k v").split())
        refusal = result = None
        try:
            result = op(**ours.named)
        except REFUSALS as error:
            refusal = error
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):
                raise
            return 1
    if refusal is not None:
        if not case.wrong:
            raise AssertionError("a valid call was refused") from refusal
        if not is_named(refusal, case.op) or "nternal error" in str(refusal):
            raise AssertionError("a refusal without the argument's name") from refusal
        assert len(str(refusal)) < 500
    written = {"k_cache", "v_cache"} if case.op == "apply_rope_and_append" else set()
    for name in ours.buffers:
        if refusal is not None or name not in written:
            same = torch.equal(*(b[name].view(torch.uint8) for b in (ours.buffers, twin.buffers)))
            assert same, f"{name} was written"
    if refusal is not None or any(t.is_meta for t in tensors(result)):
        return 1
    if case.mode == "grad" and case.values == "normal" and not case.wrong:
        compare_gradients(case, result, ours.named, twin.named)
    with torch.inference_mode("inference" in case.mode), torch.no_grad():
        compare(case, result, twin.named)
        for name in written:  # the reference has written the twin's
            a, b = (x.buffers[name] for x in (ours, twin))
            rtol, atol = tolerance(case.op, ours.dtype, twin.named)
            if a.dtype == FP8:
                a, b, rtol, atol = a.float(), b.float(), 0.13, 2**-9
            same = torch.where(a.isnan(), b.isnan(), b == b)  # poison stays
            assert same.all(), f"{name}: other elements were written"
            agree(a, b, rtol, atol, name)
    return 1


# One draw for all of these: hypothesis repeats values within a case, so that several draws would
# leave most combinations out.
WAYS = list(
    itertools.product(
        OPS,
        sorted(MODES),
        ("normal", "normal", "zero", "large", "tiny", "nan", "inf"),
        ("cpu", "cpu", "cpu", "reference"),
    )
)
NAMES = {op: sorted(Arguments(Case(op)).named) for op in OPS}


def _case(way: tuple[str, str, str, str], wrong: list[tuple[int, str]], **rest: Any) -> Case:
    op, mode, values, backend = way
    broken = tuple((NAMES[op][i % len(NAMES[op])], kind) for i, kind in wrong)
    return Case(op, mode=mode, values=values, backend=backend, wrong=broken, **rest)


SIZE = st.sampled_from(SIZES)
BROKEN = st.tuples(st.integers(0, 11), st.sampled_from(sorted(WRONG)))
CASES = st.builds(
    _case,
    st.sampled_from(WAYS),
    st.one_of(st.just([]), st.lists(BROKEN, min_size=1, max_size=2)),
    sizes=st.tuples(SIZE, SIZE, SIZE, SIZE),
    flags=st.integers(0, 127),
    dtype=st.sampled_from(("float32", "bfloat16", "float16")),
    layouts=st.one_of(st.just(0), st.integers(0, 2**24 - 1)),
    seed=st.integers(0, 2**31),
    isa=st.integers(0, 3),
)


# ---- what kernels write ----

OUTPUTS = {  # positions among a kernel's arguments
    **{family: (0,) for family in (*_cpu.families, "pack_weight")},
    "rms_norm": (0, 5, 6),
    "activation": (0, 2),
    "quantize": (0, 1),
    "rope": (0, 1),
}
EDGE = 64  # bytes


def guard_outputs() -> None:
    """Let the compiled kernels write into copies that have an edge of poison, which must stay."""

    def guarded(run: Any, outputs: tuple[int, ...]) -> Any:
        def kernel(*arguments: Any) -> None:
            given, framed = list(arguments), []
            for i in outputs:
                if isinstance(out := given[i], Tensor):
                    buffer = torch.full((out.nbytes + 2 * EDGE,), 0xA5, dtype=torch.uint8)
                    inside = buffer[EDGE : EDGE + out.nbytes]
                    given[i] = inside.view(out.dtype).view(out.shape)
                    framed.append((out, buffer, inside))
            run(*given)
            for out, buffer, inside in framed:
                assert (buffer[:EDGE] == 0xA5).all() and (buffer[-EDGE:] == 0xA5).all()
                out.view(-1).view(torch.uint8).copy_(inside)

        return kernel

    for name, outputs in OUTPUTS.items():
        setattr(cpu, name, guarded(getattr(cpu, name), outputs))


FAILED: tuple[Case, ...] = ()


def run(seconds: float, seed: int, count: int | None = None) -> int:
    """Check calls for that many seconds, or `count` of them; return their number."""
    torch.set_num_threads(1)
    guard_outputs()
    return drive(check, CASES, FAILED, seconds, seed, count)
