"""Tests of all ops alike: the reference's signature and results, registration, torch.compile,
threads, zero rows, memory."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import llama_fast as lf
from llama_fast import _cpu, reference
from llama_fast.generation import sampling

from ..support.op_examples import (
    FP8,
    OPS,
    D,
    H,
    K,
    T,
    call,
    example,
    registered_arguments,
    tensors,
    x,
)

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


class _DivisionsByNumbers(TorchDispatchMode):
    """List divisions by a Python number or a CPU scalar. On a GPU PyTorch multiplies by the
    reciprocal instead, which is off by an ulp there and does not show here."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        divides = op.name().startswith("aten::div") and args[0].is_floating_point()
        if divides and not (isinstance(args[1], Tensor) and args[1].dim()):
            self.found.append(f"{op.name()} by {args[1]}")
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", OPS)
def test_no_twin_divides_by_a_number(op: str) -> None:
    arguments = example(op)
    with _DivisionsByNumbers() as divisions:
        getattr(reference, op)(**arguments)
    assert not divisions.found


def test_sampling_does_not_divide_by_a_number() -> None:
    """Sample without such divisions, so that a seed gives the same tokens on every device."""
    logits, u = torch.randn(2, 50), torch.rand(2, dtype=torch.float64)
    with _DivisionsByNumbers() as divisions:
        for top_k in (0, 3):
            sampling.sample_rows(logits, u, 0.7, 0.9, top_k, 0.1)
        sampling.penalized(logits, logits > 0, 1.3)
    assert not divisions.found
    assert sampling.sample(torch.tensor([1.0, 2.0, 2.5]), temperature=1e-310) == 2


def test_f11_zero_rows_then_a_normal_call() -> None:
    others = {  # those whose rows are not their first dimension, or are not T
        "attention": {"q": x(2, 0, H, D)},
        "attention_with_kvcache": {"q": x(3, 0, H, D)},
        "pack_weight": {"weight": x(0, K)},
    }
    for op in OPS:
        rows = {n: v[:0] for n, v in example(op).items() if isinstance(v, Tensor) and len(v) == T}
        replaced = others.get(op, rows)
        assert replaced
        assert tensors(call(op, **replaced))[0].numel() == 0, op
        assert tensors(call(op))[0].numel() > 0, op


@pytest.mark.skipif(sys.platform != "linux", reason="uses Linux's constants of mprotect")
def test_f29_no_op_reads_past_its_inputs(run_python: Callable[..., Any]) -> None:
    """Put inputs at the end of mapped memory: only there does a vector load of a tail fault."""
    run = run_python("from tests.support.guarded import main; main()", check=False)
    assert run.returncode == 0, run.stdout.splitlines()[-1:] + run.stderr.splitlines()[-3:]
    assert all(f" {op} " in run.stdout for op in {*OPS} - {"add_rms_norm"})


# ---- registration ----


@pytest.mark.parametrize("op", [*OPS, "rms_norm_fp8-plain"])
def test_f40_opcheck(op: str) -> None:
    """Check schema, fake version, strides and functionalization with torch's own checker."""
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


# ---- threads and memory ----


def test_no_op_holds_the_interpreter_lock_or_shared_state() -> None:
    """Call one op from eight Python threads."""
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


@pytest.mark.parametrize("rows, asked", [(4096, True), (4095, False)])
def test_large_outputs_ask_for_huge_pages(
    rows: int, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ask from 32 MB on, where each allocation is fresh memory, and before it is written."""
    asked_for: list[Tensor] = []
    monkeypatch.setattr(_cpu, "advise_huge_pages", asked_for.append)
    x = torch.ones(rows, 4096, dtype=torch.bfloat16)
    out = lf.rms_norm(x, torch.ones(4096, dtype=torch.bfloat16))
    assert [t is out for t in asked_for] == ([True] if asked else [])
