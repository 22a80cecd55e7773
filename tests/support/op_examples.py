"""Valid arguments for every op, in small shapes, for tests of all ops."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import llama_fast as lf
from llama_fast import dispatch, ops, tune
from llama_fast.ops.checks import shown

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
T, H, HKV, D, HIDDEN, K, N = 6, 4, 2, 16, 64, 128, 64


def watch_kernels(monkeypatch: pytest.MonkeyPatch, look: Callable[..., Any]) -> None:
    """Replace dispatch.kernels, which every op asks for its backend, by look."""
    for family in {*dispatch.OPS.values()}:
        monkeypatch.setattr(getattr(ops, family), "kernels", look)


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def fp8(*shape: int) -> Tensor:
    return torch.randn(shape).to(FP8)


def tuned_example(op: str) -> dict[str, Any]:
    """Return the arguments of the first call of op in tune.py, in small shapes and fp32."""
    config = dataclasses.replace(
        lf.LlamaConfig.llama_3_1_8b(),
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_attention_heads=H,
        num_key_value_heads=HKV,
        head_dim=D,
        rope_scaling=None,
    )
    for _, call in tune.calls(config, torch.device("cpu"), (T,), ((2, 16),), T, torch.float32):
        if call.func.__name__ == op:
            bound = inspect.signature(call.func).bind(*call.args, **call.keywords)
            bound.apply_defaults()
            return bound.arguments
    raise LookupError(f"tune.calls has no call of {op}")


def example(op: str) -> dict[str, Any]:
    """Return valid arguments for op, by name."""
    qkv = {"q": x(T, H, D), "k": x(T, HKV, D)}
    rope = {**qkv, "positions": torch.arange(T), "table": lf.rope_table(1e4, 32, head_dim=D)}
    caches = {"k_cache": x(2, 8, HKV, D), "v_cache": x(2, 8, HKV, D)}
    return {
        "rms_norm": lambda: {"x": x(T, HIDDEN), "weight": x(HIDDEN), "eps": 1e-5},
        "add_rms_norm": lambda: {
            "x": x(T, HIDDEN),
            "residual": x(T, HIDDEN),
            "weight": x(HIDDEN),
            "eps": 1e-5,
        },
        "rms_norm_fp8": lambda: {
            "x": x(T, HIDDEN),
            "weight": x(HIDDEN),
            "eps": 1e-5,
            "residual": x(T, HIDDEN),
            "scale_ub": 2.0,
        },
        "silu_and_mul": lambda: {"gate_up": x(T, 2 * HIDDEN)},
        "silu_and_mul_fp8": lambda: {"gate_up": x(T, 2 * HIDDEN), "scale_ub": 2.0},
        "apply_rope": lambda: {**rope, "interleaved": False},
        "apply_rope_and_append": lambda: {
            **rope,
            "v": x(T, HKV, D),
            **caches,
            "slots": torch.arange(T),
            "interleaved": False,
            "k_scale": None,
            "v_scale": None,
            "layer": None,
        },
        "attention": lambda: {
            "q": x(2, 5, H, D),
            "k": x(2, 7, HKV, D),
            "v": x(2, 7, HKV, D),
            "causal": True,
            "softmax_scale": 0.25,
        },
        "attention_with_kvcache": lambda: {
            "q": x(3, 2, H, D),
            **caches,
            "cache_seqlens": i32(3, 16, 9),
            "block_table": torch.tensor([[0, 1], [1, 0], [0, 1]], dtype=torch.int32),
            "causal": True,
            "softmax_scale": 0.25,
            "num_splits": 0,
            "k_scale": None,
            "v_scale": None,
        },
        "quantize_fp8": lambda: {"x": x(T, HIDDEN), "granularity": "row", "scale_ub": 2.0},
        "fp8_gemm": lambda: {
            "a": fp8(T, K),
            "b": fp8(N, K),
            "scale_a": torch.rand(T, 1),
            "scale_b": torch.rand(N, 1),
            "bias": x(N, dtype=BF16),
            "out_dtype": BF16,
        },
        "fp8_linear": lambda: {
            "x": x(T, K),
            "weight": fp8(N, K),
            "weight_scale": torch.rand(N, 1),
            "bias": x(N),
            "quantize_activation": True,
            "scale_ub": 100.0,
        },
        "linear": lambda: {"x": x(T, K), "weight": x(N, K), "bias": x(N)},
        "pack_weight": lambda: {"weight": x(N, K)},
    }.get(op, lambda: tuned_example(op))()


OPS = list(lf.backends())


def call(op: str, **replaced: Any) -> Any:
    return getattr(lf, op)(**{**example(op), **replaced})


def tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def described(value: Any) -> str:
    """Return an argument's name in a test's id, the same in every process."""
    return f"{list(value.shape)}-{value.dtype}" if isinstance(value, Tensor) else shown(value)


def registered_arguments(op: str) -> tuple[Any, tuple[Any, ...]]:
    arguments = example(op)
    name = "add_rms_norm_fp8" if op == "rms_norm_fp8" else op
    overload = getattr(torch.ops.llama_fast, name).default
    return overload, tuple(arguments.get(a.name) for a in overload._schema.arguments)
