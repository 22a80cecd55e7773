"""Call every op with valid and with broken arguments.

A valid call must agree with the reference, in results and gradients; a refusal names the argument;
an accepted call that was meant to be broken must agree too. Afterwards only what the op writes in
place may have changed."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import llama_fast as lf
from llama_fast import _cpu, cpu

from .agreement import GRADIENTS, agree, compare, compare_gradients, tensors, tolerance
from .arguments import SIZES, Arguments, Case
from .broken import BF16, F16, F32, FP8, WRONG
from .drive import REFUSALS, drive

OPS = tuple(lf.backends())
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
    if refusal is not None or "huge" in dict(case.wrong).values():  # the twin would copy it
        return 1
    if any(t.is_meta for t in tensors(result)):
        if not case.wrong:
            real = op(**Arguments(case).named)
            described = [
                [(t.shape, t.stride(), t.dtype) for t in tensors(r)] for r in (result, real)
            ]
            assert described[0] == described[1]
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


# What once failed: without the argument's name, by backend, or by reading past an input.
FAILED = (
    Case("rms_norm", wrong=(("x", "csr"),)),
    Case("rms_norm", wrong=(("weight", "nested"),)),
    Case("quantize_fp8", wrong=(("x", "jagged"),)),
    Case("fp8_gemm", wrong=(("scale_b", "mkldnn"),)),
    Case("linear", wrong=(("weight", "bsr"),)),
    Case("apply_rope_and_append", flags=24, wrong=(("k_scale", "columns apart"),)),
    Case("apply_rope_and_append", wrong=(("k_cache", "neg"),)),
    Case("linear", sizes=(1, 0, 0, 0), wrong=(("x", "huge"),)),
    Case("add_rms_norm", wrong=(("eps", "10**5000"),)),
    Case("rms_norm_fp8", backend="reference", wrong=(("scale_ub", "1e+300"),)),
    Case("attention_with_kvcache", wrong=(("num_splits", "9223372036854775808"),)),
    Case("apply_rope", wrong=(("k", "zero tensor"),)),
    Case("apply_rope", mode="meta", wrong=(("k", "torch.float16"),)),
    Case("fp8_gemm", mode="autocast", wrong=(("b", "torch.float16"),)),
    Case("attention_with_kvcache", mode="autocast", wrong=(("v_cache", "torch.float16"),)),
    Case("apply_rope_and_append", wrong=(("k_cache", "expanded"),)),
    Case("apply_rope_and_append", wrong=(("v_cache", "k_cache"),)),
    Case("apply_rope_and_append", wrong=(("v_cache", "zero tensor"),)),
)


def run(seconds: float, seed: int, count: int | None = None) -> int:
    """Check calls for that many seconds, or `count` of them; return their number."""
    importlib.import_module("torch._dynamo")  # some calls do, for seconds
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*(beta|prototype|deprecated)")
    guard_outputs()
    return drive(check, CASES, FAILED, seconds, seed, count)
