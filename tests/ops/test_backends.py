"""Tests of which backend serves an op: defaults, use_backend(), environment, missing backends."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import llama_fast as lf
from llama_fast import cuda, dispatch, reference

from ..support.op_examples import OPS, call


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
    monkeypatch.setattr(dispatch, "_no_triton", lambda: "triton is not installed")
    for backend, why in (("cuda", "was not built"), ("triton", "is not installed")):
        with pytest.raises(NotImplementedError, match=why), lf.use_backend(backend):
            pass


@pytest.mark.parametrize(("backend", "op"), [("cudnn", None), ("cpu", "softmax")])
def test_unknown_names(backend: str, op: str | None) -> None:
    with pytest.raises(ValueError, match="want one of"), lf.use_backend(backend, op=op):
        pass


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("reference", ["reference", "reference", "reference"]),
        ("attention=reference,linear=reference", ["reference", "reference", "cpu"]),
    ],
)
def test_backend_from_the_environment(
    run_python: Callable, value: str, expected: list[str]
) -> None:
    code = "import llama_fast as lf; table = lf.backends()\n"
    code += "print(*(table[op]['cpu'].backend for op in ('attention', 'linear', 'rms_norm')))"
    assert run_python(code, LLAMA_FAST_BACKEND=value).stdout.split() == expected


@pytest.mark.parametrize("value", ["cudnn", "linear=triton", "softmax=cpu"])
def test_bad_backend_in_the_environment(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("LLAMA_FAST_BACKEND", value)
    with pytest.raises((ValueError, NotImplementedError), match="LLAMA_FAST_BACKEND"):
        dispatch.read_environment()


def test_a_bad_backend_in_the_environment_fails_the_import(run_python: Callable) -> None:
    result = run_python("import llama_fast; llama_fast.nn", LLAMA_FAST_BACKEND="fast", check=False)
    assert result.returncode == 1 and "LLAMA_FAST_BACKEND" in result.stderr


def test_isa_from_the_environment(run_python: Callable) -> None:
    code = "import llama_fast; from llama_fast import _cpu; print(_cpu.isa())"
    assert run_python(code, LLAMA_FAST_CPU_ISA="generic").stdout.strip() == "generic"
    bad = run_python(code, LLAMA_FAST_CPU_ISA="sse9", check=False)
    assert bad.returncode == 1 and "sse9" in bad.stderr and "generic" in bad.stderr
