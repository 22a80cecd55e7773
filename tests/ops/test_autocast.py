"""Tests of torch.autocast: each op takes mixed dtypes and gives what PyTorch's own op gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import llama_fast as lf

from ..support.op_examples import FP8, OPS, call, example, tensors, x

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LOW = pytest.mark.parametrize("low", [BF16, FP16], ids=str)
INPUT = pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # F.rms_norm's
@LOW
@INPUT
def test_norms_keep_the_dtype_of_x(dtype: torch.dtype, low: torch.dtype) -> None:
    """Give F.rms_norm's dtype. add_rms_norm's sum has the dtype of PyTorch's sum."""
    a, residual, weight = x(4, 64, dtype=dtype), x(4, 64), x(64)
    with torch.autocast("cpu", dtype=low):
        ours, total = lf.rms_norm(a, weight), lf.add_rms_norm(a, residual, weight)[1]
        assert ours.dtype == F.rms_norm(a, (64,), weight).dtype == dtype
        assert total.dtype == (a + residual).dtype == FP32
        q, _ = lf.rms_norm_fp8(a, weight)
    assert torch.equal(ours, lf.rms_norm(a, weight.to(dtype)))
    assert torch.equal(total, a + residual)
    assert torch.equal(q.float(), lf.rms_norm_fp8(a, weight.to(dtype))[0].float())


@LOW
@INPUT
def test_products_run_in_the_dtype_of_autocast(dtype: torch.dtype, low: torch.dtype) -> None:
    a, weight, bias = x(4, 64, dtype=dtype), x(128, 64), x(128)
    scale, fp8 = torch.rand(128, 1), weight.to(FP8)
    q, k, v = x(1, 5, 4, 16, dtype=dtype), x(1, 5, 2, 16), x(1, 5, 2, 16)
    with torch.autocast("cpu", dtype=low):
        ours = lf.linear(a, weight, bias)
        packed = lf.linear(a, lf.pack_weight(weight), bias)
        quantized = lf.fp8_linear(a, fp8, scale, bias)
        attended = lf.attention(q, k, v)
        assert ours.dtype == F.linear(a, weight, bias).dtype == low
        heads = [t.transpose(1, 2) for t in (q, k, v)]
        theirs = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        assert attended.dtype == theirs.dtype == low
    cast = [t.to(low) for t in (a, weight, bias)]
    assert torch.equal(ours, lf.linear(*cast)) and torch.equal(packed, ours)
    assert torch.equal(quantized, lf.fp8_linear(cast[0], fp8, scale, cast[2]))
    assert torch.equal(attended, lf.attention(*(t.to(low) for t in (q, k, v))))


@LOW
def test_elementwise_ops_keep_their_input_dtype(low: torch.dtype) -> None:
    arguments = example("apply_rope")
    arguments["k"] = arguments["k"].to(BF16)
    with torch.autocast("cpu", dtype=low):
        assert lf.silu_and_mul(x(3, 8)).dtype == FP32
        assert [t.dtype for t in lf.apply_rope(**arguments)] == [FP32, FP32]


@pytest.mark.parametrize("cache", [FP32, BF16], ids=str)
@LOW
def test_caches_keep_their_dtype(cache: torch.dtype, low: torch.dtype) -> None:
    append, attend = example("apply_rope_and_append"), example("attention_with_kvcache")
    for arguments in (append, attend):
        for name in ("k_cache", "v_cache"):
            arguments[name] = arguments[name].to(cache)
    with torch.autocast("cpu", dtype=low):
        q = lf.apply_rope_and_append(**append)
        out = lf.attention_with_kvcache(**attend)
    assert q.dtype == out.dtype == cache
    plain = {**append, "k_cache": append["k_cache"].clone(), "v_cache": append["v_cache"].clone()}
    plain |= {name: append[name].to(cache) for name in ("q", "k", "v")}
    assert torch.equal(q, lf.apply_rope_and_append(**plain))
    assert torch.equal(plain["v_cache"], append["v_cache"])
    assert torch.equal(out, lf.attention_with_kvcache(**{**attend, "q": attend["q"].to(cache)}))


def test_an_eager_twin_sums_in_fp32_under_autocast() -> None:
    with lf.use_backend("reference"):
        arguments = example("fp8_gemm")
        plain = lf.fp8_gemm(**arguments)
        with torch.autocast("cpu", dtype=FP16):
            assert torch.equal(lf.fp8_gemm(**arguments), plain)


@pytest.mark.parametrize("op", OPS)
def test_every_op_runs_and_compiles_under_autocast(op: str) -> None:
    arguments = example(op)
    names = [n for n, v in arguments.items() if isinstance(v, Tensor)]
    fixed = {n: v for n, v in arguments.items() if n not in names}

    def run(*values: Tensor) -> Any:
        with torch.autocast("cpu", dtype=BF16):
            return getattr(lf, op)(**dict(zip(names, values, strict=True)), **fixed)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    values = [arguments[n] for n in names]
    expected = tensors(run(*(v.clone() for v in values)))
    for a, b in zip(tensors(compiled(*values)), expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.float(), b.float())


def test_gradients_have_the_dtypes_of_the_inputs() -> None:
    """Cast inside the graph: a weight in fp32 gets its gradient in fp32."""
    a, weight, product = (x(*s).requires_grad_() for s in ((4, 64), (64,), (32, 64)))
    ours: Any = (a, weight, product)
    twins = [t.detach().clone().requires_grad_() for t in ours]
    with torch.autocast("cpu", dtype=BF16):
        lf.linear(lf.rms_norm(a, weight), product).float().square().sum().backward()
        F.linear(
            F.rms_norm(twins[0], (64,), twins[1], 1e-5), twins[2]
        ).float().square().sum().backward()
    for t, twin in zip(ours, twins, strict=True):
        assert t.grad.dtype == FP32
        # The gradients pass through bf16 products in both: 2^-8 a rounding, two roundings each.
        assert (t.grad - twin.grad).abs().max() <= 2.0**-6 * twin.grad.abs().max()


@pytest.mark.parametrize("enabled", [False, True])
def test_without_autocast_for_the_device_mixed_dtypes_are_refused(enabled: bool) -> None:
    with torch.autocast("cpu", enabled=enabled):
        if enabled:
            call("rms_norm", weight=x(64, dtype=BF16))
        else:
            with pytest.raises(TypeError, match="weight: got dtype bfloat16, want x's, float32"):
                call("rms_norm", weight=x(64, dtype=BF16))
        with pytest.raises(TypeError, match="weight: got dtype float64"):
            call("rms_norm", weight=x(64).double())


@pytest.mark.parametrize("low", [BF16, FP16], ids=str)
def test_what_is_not_cast_is_not_mixed(low: torch.dtype) -> None:
    """Refuse a 16-bit operand for an FP8 one, and caches of two dtypes: kernels read both alike."""
    wrong = [("fp8_gemm", "b", {}), ("fp8_gemm", "a", {})]
    wrong += [(op, "v_cache", {}) for op in ("attention_with_kvcache", "apply_rope_and_append")]
    fp8 = {"k_cache": x(2, 8, 2, 16).to(FP8), "k_scale": torch.ones(1), "v_scale": torch.ones(1)}
    wrong += [(op, "v_cache", fp8) for op, _, _ in wrong[2:]]
    for op, name, others in wrong:
        given = example(op) | others
        with torch.autocast("cpu", dtype=low), pytest.raises(TypeError, match=f"^{name}: got"):
            getattr(lf, op)(**{**given, name: given[name].to(low)})
