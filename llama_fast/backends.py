"""Which backend serves which op on which device, and why.

"cpu" is the compiled extension, "reference" eager PyTorch. "triton" and "cuda" are names that this
version knows but does not hold; asking for one is an error, never a quiet substitute.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import NamedTuple

from . import _cpu

BACKENDS = ("reference", "cpu", "triton", "cuda")
DEVICES = ("cpu", "cuda")
OPS = (
    "rms_norm",
    "add_rms_norm",
    "rms_norm_fp8",
    "silu_and_mul",
    "silu_and_mul_fp8",
    "apply_rope",
    "apply_rope_and_append",
    "attention",
    "attention_with_kvcache",
    "quantize_fp8",
    "fp8_gemm",
    "fp8_linear",
    "linear",
    "pack_weight",
)
_SERVES = {"reference": DEVICES, "cpu": ("cpu",)}  # what this version holds
_DEFAULT = {"cpu": "cpu", "cuda": "reference"}


class Choice(NamedTuple):
    backend: str
    why: str


class BackendTable(dict[str, dict[str, Choice]]):
    """backends()["rms_norm"]["cpu"] is a Choice; str() is a table to paste."""

    def __str__(self) -> str:
        rows = [("op", "device", "backend", "why")]
        rows += [
            (op, dev, *choice) for op, by_dev in self.items() for dev, choice in by_dev.items()
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        )


def _validate(backend: str, op: str | None, source: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{source}: got backend {backend!r}, want one of {', '.join(BACKENDS)}")
    if op is not None and op not in OPS:
        raise ValueError(f"{source}: got op {op!r}, want one of {', '.join(OPS)}")
    if backend not in _SERVES:
        raise NotImplementedError(
            f"{source}: the {backend} backend is not in this version of llama_fast; "
            f"it has {', '.join(_SERVES)}"
        )


def _from_environment() -> dict[str, str]:
    """LLAMA_FAST_BACKEND=reference, or =attention=reference,rms_norm=cpu."""
    chosen: dict[str, str] = {}
    for part in filter(None, os.environ.get("LLAMA_FAST_BACKEND", "").split(",")):
        op, _, backend = part.strip().rpartition("=")
        _validate(backend, op or None, "LLAMA_FAST_BACKEND")
        chosen.update(dict.fromkeys([op] if op else OPS, backend))
    return chosen


_environment = _from_environment()
if _isa := os.environ.get("LLAMA_FAST_CPU_ISA"):
    _cpu.set_isa(_isa)
_override: ContextVar[Mapping[str, str]] = ContextVar("llama_fast_backend", default=_environment)


@contextlib.contextmanager
def use_backend(backend: str, op: str | None = None) -> Iterator[None]:
    """Within the block, op (None: every op) runs on the named backend, in this thread or task.

    Raises ValueError for an unknown name and NotImplementedError for a backend that this version
    does not hold. A backend that cannot serve a tensor's device raises ValueError at the call.
    """
    _validate(backend, op, "use_backend")
    chosen = {**_override.get(), **dict.fromkeys([op] if op else OPS, backend)}
    token = _override.set(chosen)
    try:
        yield
    finally:
        _override.reset(token)


def choose(op: str, device: str) -> str:
    """The backend that serves op on a device type now."""
    backend = _override.get().get(op)
    if backend is None:
        if device == "cuda":
            _warn_eager_on_cuda()
        return _DEFAULT.get(device, "reference")
    if device not in _SERVES[backend]:
        raise ValueError(f"{op}: the {backend} backend cannot serve tensors on {device}")
    return backend


_warned = False


def _warn_eager_on_cuda() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "llama_fast has no GPU kernels in this version: CUDA tensors run in eager PyTorch",
            stacklevel=4,
        )


def backends() -> BackendTable:
    """For every op and device type: the backend that serves it now, and why."""
    table = BackendTable()
    for op in OPS:
        table[op] = {}
        for device in DEVICES:
            if op in _override.get():
                backend = _override.get()[op]
                why = "LLAMA_FAST_BACKEND" if _override.get() is _environment else "use_backend"
            elif device == "cpu":
                backend, why = "cpu", f"compiled kernels, {_cpu.isa()}"
            else:
                backend, why = "reference", "no GPU kernels in this version: eager PyTorch"
            if device not in _SERVES[backend]:
                why += f"; raises: cannot serve tensors on {device}"
            table[op][device] = Choice(backend, why)
    return table
