"""Tests of the tensors that a binding takes (csrc/tensor.h): every kind, and nothing else."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llama_fast as lf
from llama_fast import _cpu, cuda, reference, triton_backend


class Subclass(Tensor):
    pass


def inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "Parameter": nn.Parameter,
    "requires_grad": lambda t: t.clone().requires_grad_(),
    "not a leaf": lambda t: t.clone().requires_grad_() * 1,
    "inference": inference,
    "subclass": lambda t: t.as_subclass(Subclass),
    "offset": lambda t: torch.cat((torch.full((3, 64), torch.nan), t))[3:],
    "rows apart": lambda t: torch.cat((t, torch.full((4, 7), torch.nan)), 1)[:, :64],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tensor_is_read(kind: str) -> None:
    x, weight = torch.randn(4, 64), torch.randn(64)
    out = torch.full((4, 64), torch.nan)
    _cpu.rms_norm(out, KINDS[kind](x), weight, 1e-5, None, None, None, None)
    assert torch.equal(out, lf.rms_norm(x, weight))
    torch.testing.assert_close(out, reference.rms_norm(x, weight))
    q, scale = torch.empty(4, 64, dtype=torch.float8_e4m3fn), torch.empty(4, 1)
    _cpu.quantize(q, scale, KINDS[kind](x), "row", None)
    want_q, want_scale = reference.quantize_fp8(x)
    assert torch.equal(q.float(), want_q.float()) and torch.equal(scale, want_scale)


def test_a_negative_bit_is_resolved_before_a_kernel_sees_it() -> None:
    x = torch.randn(64, 4)
    lazy = torch.complex(torch.zeros(64, 4), -x).conj().imag[:, :1]  # one column: dense
    assert lazy.is_neg() and torch.equal(lazy, x[:, :1])
    assert torch.equal(lf.rms_norm(lazy, torch.ones(1)), lf.rms_norm(x[:, :1], torch.ones(1)))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (None, TypeError, "incompatible function arguments"),
        ([[1.0]], TypeError, "incompatible function arguments"),
        (torch.randn(4, 64).numpy(), TypeError, "incompatible function arguments"),
        (torch.randn(4, 64).double(), TypeError, "a tensor whose dtype has no kernels"),
        (torch.randn(64), ValueError, "a tensor of too few dimensions"),
        (torch.empty(4, 64, device="meta"), RuntimeError, "Cannot pack tensors on meta"),
    ],
    ids=["None", "list", "array", "fp64", "1-D", "meta"],
)
def test_anything_else_is_refused(x: Any, error: type[Exception], message: str) -> None:
    out, weight = torch.empty(4, 64), torch.randn(64)
    with pytest.raises(error, match=message):
        _cpu.rms_norm(out, x, weight, 1e-5, None, None, None, None)


def test_no_elements_and_no_dimensions() -> None:
    out = torch.empty(0, 64)
    _cpu.rms_norm(out, out, torch.randn(64), 1e-5, None, None, None, None)
    assert _cpu.first_outside(torch.tensor(7), 0, 6) == 0
    assert _cpu.first_outside(torch.tensor([3, 2**32 + 3]), 0, 6) == 1  # the upper half counts
    assert _cpu.first_outside(torch.empty(0, dtype=torch.int32), 0, 6) == -1


# ---- signatures ----


def kind(annotation: str) -> tuple[bool, bool]:
    """Return whether a parameter is a tensor and whether it may be None. The other types' names
    depend on pybind11's version."""
    return "Tensor" in annotation, "None" in annotation or "Optional" in annotation


@pytest.mark.parametrize("family", _cpu.families)
def test_a_familys_arguments_are_the_same_in_cpp_and_triton(family: str) -> None:
    """Compare csrc/params.h, which serves CPU and CUDA, with kernels/<family>.py."""
    compiled = re.findall(r"arg\d+: ([^,)]+)", getattr(_cpu, family).__doc__)
    parameters = inspect.signature(getattr(triton_backend, family)).parameters.values()
    launcher = [p.annotation for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert [*map(kind, compiled)] == [*map(kind, launcher)]
    assert hasattr(cuda, family) or cuda.missing(), "llama_fast._cuda is older: build it again"
