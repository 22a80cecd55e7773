"""What holds for every op alike: argument checks, registration, torch.compile, backends."""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import llama_fast as lf
from llama_fast import cuda, library, reference

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
T, H, HKV, D, HIDDEN, K, N = 6, 4, 2, 16, 64, 128, 64


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def fp8(*shape: int) -> Tensor:
    return torch.randn(shape).to(FP8)


def example(op: str) -> dict[str, Any]:
    """Valid arguments for op, by name."""
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
    }[op]()


OPS = list(lf.backends())


def call(op: str, **replaced: Any) -> Any:
    return getattr(lf, op)(**{**example(op), **replaced})


def tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


# ---- the contract ----


@pytest.mark.parametrize("op", OPS)
def test_signature_is_the_reference_twins(op: str) -> None:
    ours, twin = (inspect.signature(getattr(m, op)) for m in (lf, reference))
    assert list(ours.parameters.values()) == list(twin.parameters.values())


@pytest.mark.parametrize("op", OPS)
def test_matches_the_reference(op: str, isa: str) -> None:
    arguments = example(op)
    copies = {n: v.clone() if isinstance(v, Tensor) else v for n, v in arguments.items()}
    ours = tensors(getattr(lf, op)(**arguments))
    twin = tensors(getattr(reference, op)(**copies))
    for a, b in zip((*ours, *arguments.values()), (*twin, *copies.values()), strict=True):
        if isinstance(a, Tensor):
            assert a.shape == b.shape and a.dtype == b.dtype
            torch.testing.assert_close(a.float(), b.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("op", OPS)
def test_docstring_names_shapes(op: str) -> None:
    doc = getattr(lf, op).__doc__ or ""
    assert "[" in doc and "->" in doc or "Returns" in doc


# ---- bad input ----

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
        ("k_scale", torch.ones(1), ValueError),
        ("v_scale", torch.ones(HKV), ValueError),
        ("k_cache", fp8(2, 8, HKV, D), ValueError),
        ("v_cache", fp8(2, 8, HKV, D), TypeError),
    ],
    "quantize_fp8": [
        ("granularity", "column", ValueError),
        ("granularity", None, ValueError),
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
    got = f"{list(value.shape)}-{value.dtype}" if isinstance(value, Tensor) else repr(value)
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
    ],
    ids=str,
)
def test_bad_rope_table(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="got"):
        lf.rope_table(**arguments)


def test_f14_query_heads_not_a_multiple_of_kv_heads() -> None:
    with pytest.raises(ValueError, match="33 query heads for 2"):
        lf.attention(x(1, 3, 33, D), x(1, 3, 2, D), x(1, 3, 2, D))
    with pytest.raises(ValueError, match="33 query heads for 2"):
        lf.attention_with_kvcache(x(1, 1, 33, D), x(1, 3, 2, D), x(1, 3, 2, D), i32(3))


def test_f23_position_outside_the_table() -> None:
    for bad in (32, -1, 2**31):
        with pytest.raises(ValueError, match=f"positions: got {bad} at index 2, want 0 to 31"):
            call("apply_rope", positions=torch.tensor([0, 1, bad, 3, 4, 5]))


# ---- registration ----


def registered_arguments(op: str) -> tuple[Any, tuple[Any, ...]]:
    arguments = example(op)
    name = "add_rms_norm_fp8" if op == "rms_norm_fp8" else op
    overload = getattr(torch.ops.llama_fast, name).default
    return overload, tuple(arguments.get(a.name) for a in overload._schema.arguments)


@pytest.mark.parametrize("op", [*OPS, "rms_norm_fp8-plain"])
def test_f40_opcheck(op: str) -> None:
    """Schema, fake version, strides and functionalisation, by torch's own checker."""
    overload, arguments = registered_arguments(op.removesuffix("-plain"))
    if op.endswith("-plain"):
        overload = torch.ops.llama_fast.rms_norm_fp8.default
        arguments = (arguments[0], arguments[2], *arguments[3:])
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    if any(isinstance(a, Tensor) and a.dtype == FP8 for a in arguments):
        # torch compares the inputs before and after with allclose, which has no FP8 kernel.
        checks.remove("test_schema")
        assert not any(a.alias_info for a in overload._schema.arguments)
    torch.library.opcheck(overload, arguments, test_utils=checks)


@pytest.mark.parametrize("op", OPS)
def test_f40_compiles_whole_with_dynamic_shapes(op: str) -> None:
    arguments = example(op)
    fixed = {n: v for n, v in arguments.items() if not isinstance(v, Tensor)}
    names = [n for n, v in arguments.items() if isinstance(v, Tensor)]

    def run(*values: Tensor) -> Any:
        return getattr(lf, op)(**dict(zip(names, values, strict=True)), **fixed)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.inference_mode():
        values = [arguments[n].clone() for n in names]
        expected = run(*(v.clone() for v in values))
        for a, b in zip(tensors(compiled(*values)), tensors(expected), strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()


def test_no_op_holds_the_interpreter_lock_or_shared_state() -> None:
    """Eight Python threads, one answer."""
    a, w = x(512, 1024), x(1024)
    expected = lf.rms_norm(a, w)
    failures: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(lf.rms_norm(a, w), expected):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


# ---- backends ----


def test_default_backend_is_the_compiled_one() -> None:
    table = lf.backends()
    assert set(table) == set(OPS)
    for op in OPS:
        assert table[op]["cpu"].backend == "cpu" and "compiled" in table[op]["cpu"].why
        gpu = table[op]["cuda"]
        assert gpu.backend == ("reference" if op in ("linear", "pack_weight") else "triton")
    assert str(table).count("\n") == 2 * len(OPS)


def test_use_backend_nests_and_restores() -> None:
    def serving(op: str) -> str:
        return lf.backends()[op]["cpu"].backend

    with lf.use_backend("reference", op="attention"):
        assert (serving("attention"), serving("rms_norm")) == ("reference", "cpu")
        with lf.use_backend("reference"):
            assert serving("rms_norm") == "reference"
            with lf.use_backend("cpu", op="rms_norm"):
                assert serving("rms_norm") == "cpu"
        assert serving("rms_norm") == "cpu"
    assert serving("attention") == "cpu"


def test_use_backend_reaches_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    twin = reference.rms_norm
    monkeypatch.setattr(reference, "rms_norm", lambda *a: calls.append("eager") or twin(*a))
    call("rms_norm")
    assert calls == []
    with lf.use_backend("reference"):
        call("rms_norm")
    assert calls == ["eager"]


def test_absent_backend_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "missing", lambda: "llama_fast._cuda was not built")
    backends = importlib.import_module("llama_fast.backends")  # the package's name is a function
    monkeypatch.setattr(backends, "_no_triton", lambda: "triton is not installed")
    for backend, why in (("cuda", "was not built"), ("triton", "is not installed")):
        with pytest.raises(NotImplementedError, match=why), lf.use_backend(backend):
            pass


@pytest.mark.parametrize(("backend", "op"), [("cudnn", None), ("cpu", "softmax")])
def test_unknown_names(backend: str, op: str | None) -> None:
    with pytest.raises(ValueError, match="want one of"), lf.use_backend(backend, op=op):
        pass


@pytest.mark.parametrize(
    ("value", "op", "expected"),
    [
        ("reference", "attention", "reference"),
        ("attention=reference,rms_norm=cpu", "attention", "reference"),
        ("attention=reference", "rms_norm", "cpu"),
    ],
)
def test_backend_from_the_environment(run_python: Callable, value: str, op: str, expected: str):
    code = f"import llama_fast as lf; print(lf.backends()[{op!r}]['cpu'].backend)"
    assert run_python(code, LLAMA_FAST_BACKEND=value).stdout.strip() == expected


@pytest.mark.parametrize("value", ["fast", "cudnn", "linear=triton", "softmax=cpu"])
def test_bad_backend_in_the_environment(run_python: Callable, value: str) -> None:
    result = run_python("import llama_fast", LLAMA_FAST_BACKEND=value, check=False)
    assert result.returncode == 1 and "LLAMA_FAST_BACKEND" in result.stderr


def test_isa_from_the_environment(run_python: Callable) -> None:
    code = "import llama_fast; from llama_fast import _cpu; print(_cpu.isa())"
    assert run_python(code, LLAMA_FAST_CPU_ISA="generic").stdout.strip() == "generic"
    bad = run_python(code, LLAMA_FAST_CPU_ISA="sse9", check=False)
    assert bad.returncode == 1 and "sse9" in bad.stderr and "generic" in bad.stderr


def test_f11_zero_rows_then_a_normal_call() -> None:
    empty = {
        "rms_norm": {"x": x(0, HIDDEN)},
        "add_rms_norm": {"x": x(0, HIDDEN), "residual": x(0, HIDDEN)},
        "rms_norm_fp8": {"x": x(0, HIDDEN), "residual": x(0, HIDDEN)},
        "silu_and_mul": {"gate_up": x(0, HIDDEN)},
        "silu_and_mul_fp8": {"gate_up": x(0, HIDDEN)},
        "apply_rope": {"q": x(0, H, D), "k": x(0, HKV, D), "positions": torch.arange(0)},
        "apply_rope_and_append": {
            "q": x(0, H, D),
            "k": x(0, HKV, D),
            "v": x(0, HKV, D),
            "positions": torch.arange(0),
            "slots": torch.arange(0),
        },
        "attention": {"q": x(2, 0, H, D)},
        "attention_with_kvcache": {"q": x(3, 0, H, D)},
        "quantize_fp8": {"x": x(0, HIDDEN)},
        "fp8_gemm": {"a": fp8(0, K), "scale_a": torch.rand(0, 1)},
        "fp8_linear": {"x": x(0, K)},
        "linear": {"x": x(0, K)},
        "pack_weight": {"weight": x(0, K)},
    }
    assert set(empty) == set(OPS)
    for op, replaced in empty.items():
        assert tensors(call(op, **replaced))[0].numel() == 0, op
        assert tensors(call(op))[0].numel() > 0, op


@pytest.mark.parametrize("rows, asked", [(4096, True), (4095, False)])
def test_large_outputs_ask_for_huge_pages(
    rows: int, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 32 MB on, where each allocation is fresh memory, and before it is written."""
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(library._cpu, "advise_huge_pages", lambda *a: told.append(a))
    x = torch.ones(rows, 4096, dtype=torch.bfloat16)
    out = lf.rms_norm(x, torch.ones(4096, dtype=torch.bfloat16))
    assert told == ([(out.data_ptr(), out.nbytes)] if asked else [])
