"""Tests of which GPU backend a call takes, by chip and class of shapes, from dispatch.CHOICES."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import llama_fast as lf
from llama_fast import _cpu, cuda, dispatch

from ..support.op_examples import call, watch_kernels

GPU = torch.device("cuda", 0)
NONE_YET = "Triton kernels, the default on GPUs; not yet measured on hardware"
ON_GPUS = [op for op in dispatch.OPS if op not in ("linear", "pack_weight")]
RESULTS = Path(__file__).parents[2] / "bench" / "results"
MEASURED = {
    ("decode_attention", "sm_90", "1 query, head_dim 128"): ("cuda", "h200"),
    ("decode_attention", "sm_90", "several queries, head_dim 128"): ("triton", "h200"),
    ("rms_norm", "sm_90", "16-bit"): ("cuda", "h200"),
    ("rope", "sm_90", "16-bit"): ("triton", "h200"),
}


@pytest.fixture
def on_sm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return on_sm(90), which simulates that chip, the CUDA extension and MEASURED choices."""

    def clear() -> None:
        for cached in (dispatch._on_gpu, dispatch._no_chip, dispatch._warn_once):
            cached.cache_clear()

    def pretend(sm: int, chosen: Any = MEASURED, missing: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: divmod(sm, 10))
        monkeypatch.setattr(dispatch, "CHOICES", chosen)
        monkeypatch.setattr(cuda, "missing", lambda: missing)
        monkeypatch.setattr(cuda, "EMULATED", False)
        monkeypatch.setattr(dispatch, "_no_triton", lambda: None)
        clear()

    yield pretend
    clear()


def decode(queries: int = 1, d: int = 128, cache: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    q = torch.empty(3, queries, 8, d, dtype=torch.bfloat16)
    return q, torch.empty(1, 1, 2, d, dtype=cache)


def test_each_choice_names_a_committed_report() -> None:
    for (family, chip, shapes), (backend, report) in dispatch.CHOICES.items():
        assert family in _cpu.families and chip.startswith("sm_") and shapes
        assert backend in ("triton", "cuda") and (RESULTS / report / "report.json").exists()


def test_without_choices_triton_serves(on_sm: Callable[..., None]) -> None:
    on_sm(90, {})
    for op in ON_GPUS:
        assert dispatch._on_gpu(op, 0) == (("triton", NONE_YET), {})
    assert dispatch.choose("attention_with_kvcache", GPU, *decode()) == "triton"


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (decode(), "cuda"),
        (decode(queries=2), "triton"),
        (decode(d=64), "triton"),
        (decode(cache=torch.float8_e4m3fn), "triton"),
        ((), "triton"),
    ],
    ids=["one query", "slower there", "not measured", "cache not measured", "shapes unknown"],
)
def test_a_call_is_served_by_its_class(
    on_sm: Callable[..., None], arguments: Any, wanted: str
) -> None:
    on_sm(90)
    assert dispatch.choose("attention_with_kvcache", GPU, *arguments) == wanted


def test_kernels_are_those_of_the_choice(on_sm: Callable[..., None]) -> None:
    on_sm(90)
    x: Any = SimpleNamespace(device=GPU, itemsize=2, is_cpu=False)
    assert dispatch.kernels("rms_norm", x) is cuda
    on = dispatch.kernels("apply_rope", x)
    assert on is not None and on.__name__ == "llama_fast.triton_backend"
    assert dispatch.kernels("linear", x) is None


def test_table_says_why(on_sm: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    on_sm(90)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    table = lf.backends()
    why = "measured: cuda for 16-bit (bench/results/h200); other shapes: triton"
    assert table["add_rms_norm"]["cuda"] == ("cuda", why)
    assert table["attention_with_kvcache"]["cuda"].backend == "cuda, triton"
    assert table["attention"]["cuda"] == ("triton", NONE_YET)


def test_another_chip_is_not_measured(
    on_sm: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reject gfx90a, which reports 9.0 as H100 does."""
    on_sm(89)
    assert dispatch._on_gpu("rms_norm", 0).choice == ("triton", NONE_YET)
    on_sm(90)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert dispatch._on_gpu("rms_norm", 0).by_class == {}


def test_without_the_extension_triton_serves_and_says_so(
    on_sm: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_sm(90, missing="llama_fast._cuda was not built: nvcc was not found")
    assert dispatch.choose("attention_with_kvcache", GPU, *decode()) == "triton"
    why = dispatch._on_gpu("attention_with_kvcache", 0).choice.why
    assert why.startswith("Triton kernels: llama_fast._cuda was not built: nvcc was not found; ")
    assert "not built" not in dispatch._on_gpu("apply_rope", 0).choice.why  # CUDA was not chosen
    on_sm(90)
    monkeypatch.setattr(cuda, "EMULATED", True)
    assert dispatch.choose("attention_with_kvcache", GPU, *decode()) == "triton"
    with (
        lf.use_backend("cuda", "rms_norm"),
        pytest.raises(ValueError, match=r"cuda backend cannot serve tensors on cuda \(emulated\)"),
    ):
        dispatch.choose("rms_norm", GPU)


def test_use_backend_comes_first(on_sm: Callable[..., None]) -> None:
    on_sm(90)
    x = torch.empty(2, dtype=torch.bfloat16)
    assert dispatch.choose("rms_norm", GPU, x) == "cuda"
    with lf.use_backend("triton"):
        assert dispatch.choose("rms_norm", GPU, x) == "triton"
    with lf.use_backend("cuda", "attention_with_kvcache"):
        assert dispatch.choose("attention_with_kvcache", GPU, *decode(queries=2)) == "cuda"


# ---- classes ----


@pytest.mark.parametrize("op", ON_GPUS)
def test_every_op_hands_over_what_decides_its_class(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    right = dispatch.kernels

    def look(name: str, *arguments: Any) -> Any:
        if name == op:
            seen.append(dispatch.shape_class(op, *arguments))
        return right(name, *arguments)

    watch_kernels(monkeypatch, look)
    call(op)
    assert len(seen) == 1


def rows(op: str, n: int) -> tuple[Any, ...]:
    """Return the tensors that op passes to kernels() for n rows, queries or packed tokens."""
    x = torch.empty(n, 512, dtype=torch.bfloat16)
    if op == "fp8_gemm":
        return x.to(torch.float8_e4m3fn), torch.empty(64, 1), torch.bfloat16
    if op == "fp8_linear":
        return x, torch.empty(64, 1), None
    if op == "attention_with_kvcache":
        return x.view(n, 1, 4, 128), torch.empty(n, 16, 2, 128, dtype=torch.bfloat16)
    return (x.view(n, 4, 128) if op in ("attention", "apply_rope", "apply_rope_and_append") else x,)


@pytest.mark.parametrize("op", ON_GPUS)
def test_a_class_depends_on_no_number_of_rows(op: str) -> None:
    """Require one class for any number of rows. Only FP8 products change kernels, after 64 rows."""
    found = [dispatch.shape_class(op, *rows(op, n)) for n in (1, 2, 64, 65, 4096)]
    assert None not in found
    if op.startswith("fp8_"):
        assert len(set(found[:3])) == len(set(found[3:])) == 1 and found[2] != found[3]
    else:
        assert len(set(found)) == 1


def test_fp8_linear_has_fp8_gemms_classes() -> None:
    """Compare classes: a producer that quantizes calls fp8_gemm, others call fp8_linear."""
    for scale in (torch.empty(1), torch.empty(64, 1), torch.empty(1, 4)):
        for shape in ((1, 512), (2, 40, 512)):
            x = torch.empty(shape, dtype=torch.bfloat16)
            a: Tensor = torch.empty(math.prod(shape[:-1]), 512).to(torch.float8_e4m3fn)
            assert dispatch.shape_class("fp8_linear", x, scale, None) == dispatch.shape_class(
                "fp8_gemm", a, scale, torch.bfloat16
            )
    x16 = torch.empty(1, 8, dtype=torch.bfloat16)
    assert dispatch.shape_class("fp8_linear", x16.float(), torch.empty(1), None) is None
    assert dispatch.shape_class("fp8_linear", x16, torch.empty(1), False) is None
