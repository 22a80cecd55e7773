"""The ops at Llama shapes: for each case ours, the baselines, the limit, and what counts as work.

The limit is a run of its own, in the same rounds as the rest: a copy of the same bytes for ops on
activations, a read of the same weights or cache for what streams them, a bf16 matrix product for
what computes. Weights and caches rotate through more memory than the last-level cache holds;
activations do not: in a model the op before has just written them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import llama_fast as lf
from llama_fast import _cpu, reference

from . import read_probe
from .timing import Run

CACHE_BYTES = 96 << 20  # more than the last-level caches of the machines this was tried on
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shapes:
    """One model's layer, as its ops see it."""

    name: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    prefill: int
    contexts: tuple[int, ...]


SHAPES = {
    "8b": Shapes("8b", 4096, 14336, 32, 8, 128, 512, 2048, (8192, 32768)),
    "70b": Shapes("70b", 8192, 28672, 64, 8, 128, 512, 2048, (8192, 32768)),
    "tiny": Shapes("tiny", 64, 128, 4, 2, 16, 8, 32, (64,)),
}


def shapes(name: str, device: torch.device) -> Shapes:
    """On a GPU more tokens: 512 rows are a few microseconds' work there."""
    found = SHAPES[name]
    if device.type == "cpu" or name == "tiny":
        return found
    return replace(found, tokens=8192, prefill=8192)


@dataclass(frozen=True)
class Case:
    op: str
    shape: str
    work: float  # bytes, or flops when unit is TFLOP/s
    unit: str  # "GB/s" or "TFLOP/s"
    ours: Run
    baselines: dict[str, Run]
    limit: Run
    limit_work: float  # what one run of limit moves or computes
    limit_name: str
    error: Callable[[], tuple[float, float]]  # ours and eager's, max |x - exact| / max |exact|
    targets: dict[str, float] = field(default_factory=dict)  # baseline or "limit" -> ratio wanted
    device: torch.device = CPU
    uncapturable: tuple[str, ...] = ()  # runs that wait for a GPU: no CUDA graph of them


def errors(ours: Callable[[], Tensor], eager: Callable[[], Tensor], exact: Callable[[], Tensor]):
    def compare() -> tuple[float, float]:
        truth = exact().double()
        scale = truth.abs().max().clamp(min=1e-30)
        ours_error, eager_error = (
            ((f().double() - truth).abs().max() / scale).item() for f in (ours, eager)
        )
        return ours_error, eager_error

    return compare


def read(tensors: list[Tensor]) -> Run:
    """Reads a rotating tensor's memory as fast as it can be had."""
    if tensors[0].device.type != "cpu":
        words = [t.flatten().view(torch.int32) for t in tensors]
        return lambda i: read_probe.checksums(words[i % len(words)])
    threads = torch.get_num_threads()

    def run(i: int) -> None:
        t = tensors[i % len(tensors)]
        _cpu.read_bandwidth_probe(t.data_ptr(), t.numel() * t.itemsize, threads)

    return run


def _copy(t: Tensor) -> Run:
    out = torch.empty_like(t)
    return lambda _: out.copy_(t)


def matmul_limit(dtype: torch.dtype, device: torch.device = CPU) -> tuple[Run, float]:
    m, n, k = (512, 4096, 2048) if device.type == "cpu" else (8192, 8192, 8192)
    a, b = _randn(m, k, dtype=dtype, device=device), _randn(n, k, dtype=dtype, device=device)
    return (lambda _: a @ b.t()), 2.0 * m * n * k


def _randn(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Drawn in fp32, whatever the dtype: the same values in each, rounded."""
    return torch.randn(*shape, device=device).to(dtype)


def cache_bytes(device: torch.device) -> int:
    """What rotating buffers have to add up to. Four times a GPU's last level: it is not LRU."""
    if device.type == "cpu":
        return CACHE_BYTES
    return 4 * torch.cuda.get_device_properties(device).L2_cache_size


def _copies(bytes_each: float, device: torch.device) -> int:
    return max(1, min(8, round(cache_bytes(device) / bytes_each) + 1))


def _compiled(f: Callable[..., object], compiled: bool) -> dict[str, Callable[..., object]]:
    return {"torch.compile": torch.compile(f, dynamic=False)} if compiled else {}


def norms(
    s: Shapes, dtype: torch.dtype, compiled: bool, device: torch.device = CPU
) -> Iterator[Case]:
    x, residual = _randn(2, s.tokens, s.hidden, dtype=dtype, device=device)
    w = _randn(s.hidden, dtype=dtype, device=device)
    shape = f"{s.tokens} x {s.hidden}"
    baselines: dict[str, Run] = {
        "eager": lambda _: reference.rms_norm(x, w),
        "F.rms_norm": lambda _: F.rms_norm(x, (s.hidden,), w, 1e-5),
    }
    for name, f in _compiled(reference.rms_norm, compiled).items():
        baselines[name] = lambda _, f=f: f(x, w)
    yield Case(
        "rms_norm",
        shape,
        2.0 * x.numel() * x.itemsize,
        "GB/s",
        lambda _: lf.rms_norm(x, w),
        baselines,
        _copy(x),
        2.0 * x.numel() * x.itemsize,
        "copy",
        errors(
            lambda: lf.rms_norm(x, w),
            lambda: reference.rms_norm(x, w),
            lambda: norm_fp64(x.double(), w),
        ),
        {"eager": 60, "F.rms_norm": 15, "torch.compile": 2},
    )
    baselines = {
        "eager": lambda _: reference.add_rms_norm(x, residual, w),
        "F.rms_norm": lambda _: F.rms_norm(x + residual, (s.hidden,), w, 1e-5),
    }
    for name, f in _compiled(reference.add_rms_norm, compiled).items():
        baselines[name] = lambda _, f=f: f(x, residual, w)
    yield Case(
        "add_rms_norm",
        shape,
        4.0 * x.numel() * x.itemsize,
        "GB/s",
        lambda _: lf.add_rms_norm(x, residual, w),
        baselines,
        _copy(torch.cat((x, residual))),
        4.0 * x.numel() * x.itemsize,
        "copy",
        errors(
            lambda: lf.add_rms_norm(x, residual, w)[0],
            lambda: reference.add_rms_norm(x, residual, w)[0],
            lambda: norm_fp64(x.double() + residual.double(), w),
        ),
        {"eager": 60, "F.rms_norm": 15, "torch.compile": 2},
    )


def norm_fp64(x: Tensor, weight: Tensor) -> Tensor:
    """The eager twin passes through fp32 whatever it is given."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()


def rope(
    s: Shapes, dtype: torch.dtype, compiled: bool, device: torch.device = CPU
) -> Iterator[Case]:
    q = _randn(s.tokens, s.heads, s.head_dim, dtype=dtype, device=device)
    k = _randn(s.tokens, s.kv_heads, s.head_dim, dtype=dtype, device=device)
    table = lf.rope_table(5e5, 8192, head_dim=s.head_dim, device=device)
    positions = torch.arange(s.tokens, device=device)
    work = 2.0 * (q.numel() + k.numel()) * q.itemsize
    baselines: dict[str, Run] = {"eager": lambda _: reference.apply_rope(q, k, positions, table)}
    for name, f in _compiled(reference.apply_rope, compiled).items():
        baselines[name] = lambda _, f=f: f(q, k, positions, table)
    yield Case(
        "apply_rope",
        f"{s.tokens} x {s.heads}/{s.kv_heads} x {s.head_dim}",
        work,
        "GB/s",
        lambda _: lf.apply_rope(q, k, positions, table),
        baselines,
        _copy(torch.cat((q, k), dim=1)),
        work,
        "copy",
        errors(
            lambda: lf.apply_rope(q, k, positions, table)[0],
            lambda: reference.apply_rope(q, k, positions, table)[0],
            lambda: rope_fp64(q, positions, table),
        ),
        {"eager": 8},
    )


def rope_fp64(q: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    cos, sin = table.double()[positions].unsqueeze(1).chunk(2, -1)
    a, b = q.double().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def activations(
    s: Shapes, dtype: torch.dtype, compiled: bool, device: torch.device = CPU
) -> Iterator[Case]:
    x = _randn(s.tokens, 2 * s.inner, dtype=dtype, device=device)
    work = 1.5 * x.numel() * x.itemsize
    baselines: dict[str, Run] = {"eager": lambda _: reference.silu_and_mul(x)}
    for name, f in _compiled(reference.silu_and_mul, compiled).items():
        baselines[name] = lambda _, f=f: f(x)
    yield Case(
        "silu_and_mul",
        f"{s.tokens} x 2*{s.inner}",
        work,
        "GB/s",
        lambda _: lf.silu_and_mul(x),
        baselines,
        _copy(x),
        2.0 * x.numel() * x.itemsize,
        "copy",
        errors(
            lambda: lf.silu_and_mul(x),
            lambda: reference.silu_and_mul(x),
            lambda: reference.silu_and_mul(x.double()),
        ),
        {"eager": 3},
    )
    h = _randn(s.tokens, s.hidden, dtype=dtype, device=device)
    yield Case(
        "quantize_fp8",
        f"{s.tokens} x {s.hidden} by row",
        h.numel() * (h.itemsize + 1.0),
        "GB/s",
        lambda _: lf.quantize_fp8(h),
        {"eager": lambda _: reference.quantize_fp8(h)},
        _copy(h),
        2.0 * h.numel() * h.itemsize,
        "copy",
        errors(
            lambda: reference.dequantize_fp8(*lf.quantize_fp8(h)),
            lambda: reference.dequantize_fp8(*reference.quantize_fp8(h)),
            lambda: h,
        ),
    )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def attention(
    s: Shapes, dtype: torch.dtype, compiled: bool, device: torch.device = CPU
) -> Iterator[Case]:
    q = _randn(1, s.prefill, s.heads, s.head_dim, dtype=dtype, device=device)
    k, v = _randn(2, 1, s.prefill, s.kv_heads, s.head_dim, dtype=dtype, device=device)
    rows = slice(0, min(s.prefill, 256))  # the error is read off the first rows: fp64 is slow
    limit, limit_work = matmul_limit(dtype, device)
    yield Case(
        "attention",
        f"causal {s.prefill}, {s.heads}/{s.kv_heads} x {s.head_dim}",
        2.0 * s.prefill**2 * s.heads * s.head_dim,
        "TFLOP/s",
        lambda _: lf.attention(q, k, v),
        {"SDPA": lambda _: _sdpa(q, k, v, True)},
        limit,
        limit_work,
        "matmul",
        errors(
            lambda: lf.attention(q, k, v)[:, rows],
            lambda: reference.attention(q[:, rows], k[:, rows], v[:, rows]),
            lambda: reference.attention(*(t[:, rows].double() for t in (q, k, v))),
        ),
        {"SDPA": 2.5, "limit": 0.6},
    )
    for context in s.contexts:
        shape = (1, context, s.kv_heads, s.head_dim)
        size = 2.0 * context * s.kv_heads * s.head_dim * k.itemsize
        pools = [
            _randn(2, *shape, dtype=dtype, device=device) for _ in range(_copies(size, device))
        ]
        yield _decode(s, dtype, context, pools, size)


def _decode(s: Shapes, dtype: torch.dtype, context: int, pools: list[Tensor], size: float) -> Case:
    device = pools[0].device
    q = _randn(1, 1, s.heads, s.head_dim, dtype=dtype, device=device)
    lengths = torch.tensor([context], dtype=torch.int32, device=device)

    def caches(i: int) -> tuple[Tensor, Tensor]:
        pool = pools[i % len(pools)]
        return pool[0], pool[1]

    return Case(
        "attention_with_kvcache",
        f"1 query, {context} keys, {s.heads}/{s.kv_heads} x {s.head_dim}",
        size,
        "GB/s",
        lambda i: lf.attention_with_kvcache(q, *caches(i), lengths),
        {
            "eager": lambda i: reference.attention_with_kvcache(q, *caches(i), lengths),
            "SDPA": lambda i: _sdpa(q, *caches(i), False),
        },
        read(pools),
        size,
        "read",
        errors(
            lambda: lf.attention_with_kvcache(q, *caches(0), lengths),
            lambda: reference.attention_with_kvcache(q, *caches(0), lengths),
            lambda: reference.attention(q.double(), *(c.double() for c in caches(0))),
        ),
        {"limit": 0.8, "SDPA": 20},
    )


def linears(
    s: Shapes, dtype: torch.dtype, compiled: bool, device: torch.device = CPU
) -> Iterator[Case]:
    n, k = s.inner, s.hidden
    count = _copies(n * k, device)
    weights = [_randn(n, k, dtype=dtype, device=device) for _ in range(max(2, count // 2))]
    quantised = [lf.quantize_fp8(weights[i % len(weights)]) for i in range(count)]
    pack = lf.pack_weight if device.type == "cpu" else lambda w: w  # a layout for CPUs
    packed = [pack(q) for q, _ in quantised]
    scales = [scale for _, scale in quantised]
    packed16 = [pack(w) for w in weights]
    for m in (1, 16, 512):
        x = _randn(m, k, dtype=dtype, device=device)
        yield _fp8_linear(x, weights, packed, scales, quantised)
    x = _randn(1, k, dtype=dtype, device=device)
    size = 1.0 * n * k * x.itemsize
    yield Case(
        "linear",
        f"M=1, {n} x {k}",
        size,
        "GB/s",
        lambda i: lf.linear(x, packed16[i % len(packed16)]),
        {"F.linear": lambda i: F.linear(x, weights[i % len(weights)])},
        read(packed16),
        size,
        "read",
        errors(
            lambda: lf.linear(x, packed16[0]),
            lambda: F.linear(x, weights[0]),
            lambda: x.double() @ weights[0].double().t(),
        ),
    )


def _fp8_linear(
    x: Tensor,
    weights: list[Tensor],
    packed: list[Tensor],
    scales: list[Tensor],
    quantised: list[tuple[Tensor, Tensor]],
) -> Case:
    m, k = x.shape
    n = weights[0].shape[0]
    xq, x_scale = lf.quantize_fp8(x)
    baselines: dict[str, Run] = {"bf16 F.linear": lambda i: F.linear(x, weights[i % len(weights)])}
    targets = {1: {"bf16 F.linear": 4.0, "limit": 0.9}, 16: {"bf16 F.linear": 1.7}}.get(
        m, {"bf16 F.linear": 0.95, "torch._scaled_mm": 4.5}
    )
    if m >= 512:
        one = torch.ones(1, device=x.device)

        def scaled_mm(i: int) -> Tensor:
            w = quantised[i % len(quantised)][0]
            return torch._scaled_mm(xq, w.t(), one, one, out_dtype=x.dtype)

        try:
            scaled_mm(0)
            baselines["torch._scaled_mm"] = scaled_mm
        except (RuntimeError, NotImplementedError):
            targets.pop("torch._scaled_mm")
    bound_by_memory = m == 1
    limit, limit_work = (
        (read(packed), 1.0 * n * k) if bound_by_memory else matmul_limit(x.dtype, x.device)
    )
    exact = torch.float64 if m < 512 else torch.float32
    return Case(
        "fp8_linear",
        f"M={m}, {n} x {k}",
        1.0 * n * k if bound_by_memory else 2.0 * m * n * k,
        "GB/s" if bound_by_memory else "TFLOP/s",
        lambda i: lf.fp8_linear(x, packed[i % len(packed)], scales[i % len(scales)]),
        baselines,
        limit,
        limit_work,
        "read" if bound_by_memory else "matmul",
        errors(
            lambda: lf.fp8_linear(x, packed[0], scales[0]),
            lambda: F.linear(x, reference.dequantize_fp8(*quantised[0], dtype=x.dtype)),
            lambda: x.to(exact) @ reference.dequantize_fp8(*quantised[0], dtype=exact).t(),
        ),
        targets,
    )


GROUPS = {
    "norms": norms,
    "rope": rope,
    "activations": activations,
    "attention": attention,
    "linears": linears,
}
OPS = {
    "rms_norm": "norms",
    "add_rms_norm": "norms",
    "apply_rope": "rope",
    "silu_and_mul": "activations",
    "quantize_fp8": "activations",
    "attention": "attention",
    "attention_with_kvcache": "attention",
    "fp8_linear": "linears",
    "linear": "linears",
}


def on(
    device: torch.device, group: str, name: str, dtype: torch.dtype, compiled: bool
) -> Iterator[Case]:
    """A group's cases on a device. The targets here are a CPU's; a GPU's are in targets.py."""
    for case in GROUPS[group](shapes(name, device), dtype, compiled, device):
        if device.type == "cpu":
            yield case
        else:
            waits = ("eager",) if case.op == "attention_with_kvcache" else ()
            yield replace(case, device=device, targets={}, uncapturable=waits)
