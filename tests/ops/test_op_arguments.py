"""Tests that a bad argument of any op raises an error that names it, its value and valid values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import llama_fast as lf
from llama_fast import _cpu
from llama_fast.ops.checks import shown

from ..support.op_examples import (
    BF16,
    FP8,
    HIDDEN,
    HKV,
    OPS,
    D,
    H,
    K,
    N,
    T,
    call,
    described,
    example,
    fp8,
    i32,
    tensors,
    x,
)

WRONG: dict[str, list[tuple[str, Any, type[Exception]]]] = {
    "rms_norm": [
        ("x", [1.0], TypeError),
        ("x", x(T, HIDDEN).double(), TypeError),
        ("x", torch.ones(T, HIDDEN, dtype=torch.int32), TypeError),
        ("x", torch.tensor(1.0), ValueError),
        ("x", x(HIDDEN, T).t(), ValueError),
        ("x", x(T, 0), ValueError),
        ("weight", x(HIDDEN + 1), ValueError),
        ("weight", x(1, HIDDEN), ValueError),
        ("weight", x(HIDDEN).bfloat16(), TypeError),
        ("weight", x(2 * HIDDEN)[::2], ValueError),
        ("weight", None, TypeError),
        ("weight", x(HIDDEN).to("meta"), ValueError),
        ("eps", "1e-5", TypeError),
        ("eps", True, TypeError),
        ("eps", -1.0, ValueError),
        ("eps", float("nan"), ValueError),
        ("eps", 1e39, ValueError),
        ("eps", 10**400, ValueError),
        ("eps", 10**5000, ValueError),  # Python does not print it
    ],
    "add_rms_norm": [
        ("residual", x(T + 1, HIDDEN), ValueError),
        ("residual", x(T, HIDDEN).half(), TypeError),
        ("residual", None, TypeError),
    ],
    "rms_norm_fp8": [
        ("scale_ub", 0.0, ValueError),
        ("scale_ub", float("inf"), ValueError),
        ("scale_ub", "big", TypeError),
        ("scale_ub", 1e300, ValueError),
        ("scale_ub", 10**400, ValueError),
        ("scale_ub", True, TypeError),
        ("residual", x(HIDDEN), ValueError),
    ],
    "silu_and_mul": [
        ("gate_up", x(T, 7), ValueError),
        ("gate_up", fp8(T, 8), TypeError),
    ],
    "silu_and_mul_fp8": [("scale_ub", -1.0, ValueError)],
    "apply_rope": [
        ("q", x(T, H * D), ValueError),
        ("q", x(T, H, D + 1), ValueError),
        ("k", x(T + 1, HKV, D), ValueError),
        ("k", x(T, HKV, D).half(), TypeError),
        ("positions", torch.arange(T).float(), TypeError),
        ("positions", torch.arange(T + 1), ValueError),
        ("positions", torch.full((T,), 32), ValueError),
        ("positions", torch.full((T,), -1), ValueError),
        ("positions", i32(0, 1, 2, 3, 4, 32), ValueError),
        ("table", x(32, D).half(), TypeError),
        ("table", x(32, D + 2), ValueError),
        ("interleaved", 1, TypeError),
    ],
    "apply_rope_and_append": [
        ("v", x(T, HKV, D + 8), ValueError),
        ("k_cache", x(2, 8, HKV + 1, D), ValueError),
        ("v_cache", x(2, 9, HKV, D), ValueError),
        ("v_cache", x(2, 8, HKV, D).half(), TypeError),
        ("k_cache", x(2, 8, D, HKV).transpose(2, 3), ValueError),
        ("slots", torch.full((T,), 16), ValueError),
        ("slots", torch.full((T,), -2), ValueError),
        ("slots", torch.arange(T - 1), ValueError),
        ("slots", torch.arange(T).short(), TypeError),
        ("layer", 2**63, ValueError),
        ("k_scale", torch.ones(1), ValueError),
        ("v_scale", torch.ones(HKV), ValueError),
        ("k_cache", fp8(2, 8, HKV, D), ValueError),
        ("v_cache", fp8(2, 8, HKV, D), TypeError),
    ],
    "attention": [
        ("q", x(5, H, D), ValueError),
        ("q", x(2, 5, 3, D), ValueError),
        ("q", x(2, 5, H, 12), ValueError),
        ("k", x(1, 7, HKV, D), ValueError),
        ("v", x(2, 8, HKV, D), ValueError),
        ("v", x(2, 7, HKV, D).half(), TypeError),
        ("causal", 1, TypeError),
        ("softmax_scale", 0.0, ValueError),
        ("softmax_scale", "1", TypeError),
        ("cu_seqlens_q", i32(0, 5), ValueError),
    ],
    "attention_with_kvcache": [
        ("q", x(3, H, D), ValueError),
        ("q", x(3, 2, 3, D), ValueError),
        ("k_cache", x(2, 8, HKV, 2 * D), ValueError),
        ("v_cache", x(2, 8, HKV, D).half(), TypeError),
        ("cache_seqlens", torch.tensor([3, 16, 9]), TypeError),
        ("cache_seqlens", i32(3, 16), ValueError),
        ("cache_seqlens", i32(3, 17, 9), ValueError),
        ("cache_seqlens", i32(3, -1, 9), ValueError),
        ("block_table", torch.zeros(3, 2), TypeError),
        ("block_table", torch.zeros(2, 2, dtype=torch.int32), ValueError),
        ("block_table", torch.full((3, 2), 2, dtype=torch.int32), ValueError),
        ("block_table", torch.full((3, 2), -1, dtype=torch.int32), ValueError),
        ("block_table", None, ValueError),
        ("num_splits", -1, ValueError),
        ("num_splits", 1.0, TypeError),
        ("num_splits", True, TypeError),
        ("num_splits", 2**63, ValueError),
        ("k_scale", torch.ones(1), ValueError),
        ("v_scale", torch.ones(HKV), ValueError),
        ("k_cache", fp8(2, 8, HKV, D), ValueError),
        ("v_cache", fp8(2, 8, HKV, D), TypeError),
    ],
    "quantize_fp8": [
        ("granularity", "column", ValueError),
        ("granularity", None, ValueError),
        ("granularity", ["row"], ValueError),
        ("granularity", 10**5000, ValueError),
        ("scale_ub", 0, ValueError),
        ("x", fp8(T, HIDDEN), TypeError),
    ],
    "fp8_gemm": [
        ("a", x(T, K), TypeError),
        ("a", torch.randn(T, K).to(torch.float8_e5m2), TypeError),
        ("b", fp8(N, K - 1), ValueError),
        ("b", fp8(K, N).t(), ValueError),
        ("scale_a", torch.rand(T), ValueError),
        ("scale_a", torch.rand(1, T), ValueError),
        ("scale_a", torch.rand(T, 1).double(), TypeError),
        ("scale_b", torch.rand(N + 1, 1), ValueError),
        ("bias", x(N), TypeError),
        ("bias", x(N + 1, dtype=BF16), ValueError),
        ("out_dtype", FP8, TypeError),
        ("out_dtype", "bf16", TypeError),
    ],
    "fp8_linear": [
        ("x", x(T, K + 1), ValueError),
        ("weight", x(N, K), TypeError),
        ("weight", fp8(1, K // 2, 64, 3), ValueError),
        ("weight_scale", torch.rand(N), ValueError),
        ("weight_scale", None, TypeError),
        ("bias", x(N).half(), TypeError),
        ("quantize_activation", 1, TypeError),
        ("scale_ub", -3.0, ValueError),
    ],
    "linear": [
        ("weight", x(N, K + 1), ValueError),
        ("weight", x(N, K).half(), TypeError),
        ("bias", x(1, N), ValueError),
    ],
    "pack_weight": [
        ("weight", x(63, K), ValueError),
        ("weight", x(N, 3), ValueError),
        ("weight", x(N, K).long(), TypeError),
        ("weight", x(N), ValueError),
    ],
}


CASES = [(op, *case) for op, cases in WRONG.items() for case in cases]


def _id(case: tuple[str, str, Any, type]) -> str:
    op, name, value, _ = case
    got = repr(value) if isinstance(value, str) else described(value)
    return f"{op}-{name}-{got}".replace("torch.", "").replace(" ", "")


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_bad_argument_is_named(case: tuple[str, str, Any, type[Exception]]) -> None:
    op, name, value, error = case
    with pytest.raises(error) as caught:
        call(op, **{name: value})
    message = str(caught.value)
    named = message.split(":", 1)[0]
    assert named in example(op) or named.startswith("cu_seqlens"), message
    assert type(caught.value) is error and "got" in message and "want" in message


@pytest.mark.parametrize(
    ("q", "k"),
    [
        (i32(0, 2, 4), i32(0, 3, 8)),
        (i32(1, 2, 5), i32(0, 3, 7)),
        (i32(0, 6, 5), i32(0, 3, 7)),
        (i32(0, 5), i32(0, 3, 7)),
        (i32(), i32()),
        (torch.tensor([0, 2, 5]), i32(0, 3, 7)),
        (None, i32(0, 3, 7)),
    ],
    ids=str,
)
def test_bad_cu_seqlens(q: Tensor | None, k: Tensor) -> None:
    with pytest.raises((ValueError, TypeError), match="cu_seqlens"):
        lf.attention(x(5, H, D), x(7, HKV, D), x(7, HKV, D), cu_seqlens_q=q, cu_seqlens_k=k)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"config_or_theta": "5e5", "max_positions": 4, "head_dim": 8}, TypeError),
        ({"config_or_theta": 0.5, "max_positions": 4, "head_dim": 8}, ValueError),
        ({"config_or_theta": 1e4, "max_positions": 4}, ValueError),
        ({"config_or_theta": 1e4, "max_positions": 0, "head_dim": 8}, ValueError),
        ({"config_or_theta": 1e4, "max_positions": 4.0, "head_dim": 8}, TypeError),
        ({"config_or_theta": 1e4, "max_positions": 4, "head_dim": 7}, ValueError),
        ({"config_or_theta": 1e4, "max_positions": 4, "head_dim": 8, "scaling": 8.0}, TypeError),
        ({"config_or_theta": 10**400, "max_positions": 4, "head_dim": 8}, ValueError),
        ({"config_or_theta": 1e4, "max_positions": 2**63, "head_dim": 8}, ValueError),
        ({"config_or_theta": 1e4, "max_positions": 2**24 + 1, "head_dim": 8}, ValueError),
        ({"config_or_theta": 1e4, "max_positions": 4, "head_dim": 2**63}, ValueError),
        ({"config_or_theta": 1e4, "max_positions": 4, "head_dim": True}, TypeError),
        ({"config_or_theta": 1e4, "max_positions": 4, "head_dim": 8, "device": "disk"}, ValueError),
        ({"config_or_theta": 1e4, "max_positions": 4, "head_dim": 8, "device": 1.5}, ValueError),
    ],
    ids=shown,
)
def test_bad_rope_table(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(
        error, match=r"^(config_or_theta|max_positions|head_dim|scaling|device): got"
    ):
        lf.rope_table(**arguments)


def test_f14_query_heads_not_a_multiple_of_kv_heads() -> None:
    with pytest.raises(ValueError, match="33 query heads for 2"):
        lf.attention(x(1, 3, 33, D), x(1, 3, 2, D), x(1, 3, 2, D))
    with pytest.raises(ValueError, match="33 query heads for 2"):
        lf.attention_with_kvcache(x(1, 1, 33, D), x(1, 3, 2, D), x(1, 3, 2, D), i32(3))


@pytest.mark.parametrize("op", ["apply_rope", "apply_rope_and_append"])
@pytest.mark.parametrize("bad", [32, -1, 2**31])
def test_f23_position_outside_the_table(op: str, bad: int) -> None:
    with pytest.raises(ValueError, match=f"positions: got {bad} at index 2, want 0 to 31"):
        call(op, positions=torch.tensor([0, 1, bad, 3, 4, 5]))


# ---- layouts ----

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse_coo": Tensor.to_sparse,
    "sparse_csr": Tensor.to_sparse_csr,
    "sparse_csc": Tensor.to_sparse_csc,
    "sparse_bsr": lambda t: t.to_sparse_bsr((1, 1)),
    "sparse_bsc": lambda t: t.to_sparse_bsc((1, 1)),
    "mkldnn": Tensor.to_mkldnn,
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "nested jagged": lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.filterwarnings("ignore:.*(beta state|prototype stage)")
def test_only_strided_tensors(op: str, layout: str) -> None:
    """Give each tensor of each op such a layout, as far as it can have it: PyTorch's own answers
    are internal errors, or a wrong stride."""
    tried = 0
    for name, value in (given := example(op) | (PACKED if op == "attention" else {})).items():
        if not isinstance(value, Tensor):
            continue
        try:
            other = LAYOUTS[layout](value)
        except (RuntimeError, TypeError, IndexError):  # of 1 dimension, not fp32, ...
            continue
        tried += 1
        with pytest.raises(TypeError) as caught:
            getattr(lf, op)(**{**given, name: other})
        kind = layout.split()[0]
        assert str(caught.value) == f"{name}: got a {kind} tensor, want a strided one"
    assert tried or layout in ("sparse_bsr", "sparse_bsc", "mkldnn")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", ("zero", "lazily negated"))
def test_tensors_whose_memory_lacks_their_values(kind: str, op: str) -> None:
    """PyTorch gives autograd zeros that have no memory, and kernels one element expanded to their
    shape. Other tensors it negates when they are read, and cannot write."""
    for name, value in (given := example(op)).items():
        if not isinstance(value, Tensor) or name in ("slots", "weight_scale", "scale_a", "scale_b"):
            continue
        if kind == "zero":
            lazy, plain = (
                torch._efficientzerotensor(value.shape, dtype=value.dtype),
                torch.zeros_like(value),
            )
        elif value.dtype.is_floating_point:
            lazy, plain = torch._neg_view(value), value.float().neg().to(value.dtype)
        else:
            continue
        if name in ("k_cache", "v_cache") and op == "apply_rope_and_append":
            before = [given[cache].clone() for cache in ("k_cache", "v_cache")]
            with pytest.raises(TypeError, match=f"^{name}: got a {kind} tensor"):
                getattr(lf, op)(**{**given, name: lazy})
            assert all(map(torch.equal, before, (given["k_cache"], given["v_cache"])))
            continue
        results = [getattr(lf, op)(**{**given, name: t}) for t in (lazy, plain)]
        for a, b in zip(*map(tensors, results), strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_the_kernels_refuse_rows_with_gaps() -> None:
    gaps = x(2, 2 * HIDDEN)[:, ::2]
    with pytest.raises(ValueError, match="last dimension has gaps"):
        _cpu.rms_norm(x(2, HIDDEN), gaps, x(HIDDEN), 1e-5, None, None, None, None)


KV, PAIRS = torch.zeros(2, 8, HKV, 2, D), torch.zeros(2, 2, 8, HKV, D)
ROW, SQUARE = torch.zeros(4, 8, HKV, D), torch.zeros(8, 8, HKV, D)
OVERLAPPING = {
    "k of stride 0": ("k_cache", ROW[:1].expand(2, -1, -1, -1), PAIRS[0]),
    "v of stride 0": ("v_cache", PAIRS[0], ROW[:2, :1].expand(-1, 8, -1, -1)),
    "windows": ("k_cache", ROW.as_strided((2, 8, HKV, D), (64, 32, 8, 1)), PAIRS[0]),
    "one cache": ("v_cache", ROW, ROW),
    "shifted": ("v_cache", ROW[:2], ROW[1:3]),
    "shifted by a head": ("v_cache", KV[..., 0, :], KV.view(2, 8, -1, D)[..., 1:3, :]),
    "other strides": ("v_cache", SQUARE, SQUARE.transpose(0, 1)),
}
APART = {
    "by head": (KV[..., 0, :], KV[..., 1, :]),
    "by block": (PAIRS[:, 1], PAIRS[:, 0]),
    "halves": (ROW[2:], ROW[:2]),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", OVERLAPPING)
def test_caches_that_share_memory(kind: str, backend: str) -> None:
    name, k_cache, v_cache = OVERLAPPING[kind]
    with lf.use_backend(backend), pytest.raises(ValueError, match=f"^{name}: got"):
        call("apply_rope_and_append", k_cache=k_cache, v_cache=v_cache)


@pytest.mark.parametrize("kind", APART)
def test_caches_within_one_buffer(kind: str) -> None:
    k_cache, v_cache = (cache.zero_() for cache in APART[kind])
    call("apply_rope_and_append", k_cache=k_cache, v_cache=v_cache)
    assert all(cache.count_nonzero() == T * HKV * D for cache in (k_cache, v_cache))


# Integer arguments, tables and scales may have any stride.


def _spaced(t: Tensor, fill: float) -> Tensor:
    """Return the same values at every second place of each dimension, with fill between them."""
    wide = torch.full([2 * n for n in t.shape], fill, dtype=t.dtype)
    return wide[tuple(slice(None, None, 2) for _ in t.shape)].copy_(t)


def _rows_apart(t: Tensor, fill: float) -> Tensor:
    return torch.full((t.shape[0], t.shape[1] + 3), fill, dtype=t.dtype)[:, :-3].copy_(t)


def _transposed(t: Tensor, fill: float) -> Tensor:
    return t.t().contiguous().t()


BY_BLOCK = {"a": fp8(T, 256), "b": fp8(N, 256), "scale_a": torch.rand(T, 2)}
STRIDED: list[tuple[str, str, Any, float, dict[str, Any]]] = [
    ("apply_rope", "positions", _spaced, 0, {}),
    ("apply_rope", "table", _rows_apart, float("nan"), {}),
    ("apply_rope_and_append", "positions", _spaced, 0, {}),
    ("apply_rope_and_append", "slots", _spaced, -1, {}),
    ("attention", "cu_seqlens_q", _spaced, 0, {}),
    ("attention", "cu_seqlens_k", _spaced, 0, {}),
    ("attention_with_kvcache", "cache_seqlens", _spaced, 0, {}),
    *(
        ("attention_with_kvcache", "block_table", layout, -1, {})
        for layout in (_spaced, _rows_apart, _transposed)
    ),
    *(
        (op, name, layout, float("nan"), changed)
        for op, names, changed in (
            ("fp8_gemm", ("scale_a", "scale_b"), {**BY_BLOCK, "scale_b": torch.rand(N, 2)}),
            ("fp8_linear", ("weight_scale",), {"x": x(T, 256), "weight": fp8(N, 256),
                                               "weight_scale": torch.rand(N, 2)}),
        )
        for name in names
        for layout in (_spaced, _transposed)
    ),
]  # fmt: skip
PACKED = {"q": x(6, H, D), "k": x(9, HKV, D), "v": x(9, HKV, D),
          "cu_seqlens_q": i32(0, 2, 6), "cu_seqlens_k": i32(0, 4, 9)}  # fmt: skip


@pytest.mark.parametrize(
    ("op", "name", "layout", "fill", "changed"),
    STRIDED,
    ids=lambda v: v.__name__ if callable(v) else v if isinstance(v, str) else "",
)
def test_f31_strided_arguments(
    op: str, name: str, layout: Any, fill: float, changed: dict[str, Any]
) -> None:
    """Call twice, with other strides of one argument. Poison lies between its elements."""
    arguments = example(op) | changed | (PACKED if op == "attention" else {})
    results = []
    for argument in (arguments[name], layout(arguments[name], fill)):
        copies = {n: v.clone() if isinstance(v, Tensor) else v for n, v in arguments.items()}
        copies[name] = argument
        out = tensors(getattr(lf, op)(**copies))
        results.append([*out, *(v for n, v in copies.items() if n.endswith("_cache"))])
    assert not layout(arguments[name], fill).is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
