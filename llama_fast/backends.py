"""Which backend serves which op on which device, and why.

"cpu" is the compiled extension, "triton" the kernels of kernels/, "cuda" those of csrc/cuda,
"reference" eager PyTorch. Asking for one that this machine lacks is an error, never a quiet
substitute. A CUDA kernel becomes a default once a committed report shows it right and fastest on
that GPU (bench/results); until then Triton serves.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from . import _cpu, cpu, cuda

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
# What has no kernel of ours on a GPU, and what serves it there.
_TORCH_ON_CUDA = {
    "linear": "a plain 16-bit product: PyTorch's own (cuBLAS)",
    "pack_weight": "the packed layout is for CPUs",
}
_ON_GPU = tuple(op for op in OPS if op not in _TORCH_ON_CUDA)
_SERVES = {"reference": OPS, "cpu": OPS, "triton": _ON_GPU, "cuda": _ON_GPU}
_OLDEST_SM = 80  # bf16 matrix instructions, cp.async


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


@functools.lru_cache
def _no_triton() -> str | None:
    """Why the triton backend cannot be had, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'triton>=3.6')"
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 6):
        return f"triton {triton.__version__} is installed, and the kernels need 3.6 or newer"
    return None


def _interpreted() -> bool:
    """Triton's interpreter runs kernels on CPU tensors: for tests, slowly."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y")


@functools.lru_cache
def _no_chip(index: int) -> str | None:
    """Why the kernels cannot run on a GPU, or None."""
    major, minor = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and 10 * major + minor < _OLDEST_SM:
        return f"sm_{major}{minor} is older than sm_{_OLDEST_SM}"
    return None


def _validate(backend: str, op: str | None, source: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{source}: got backend {backend!r}, want one of {', '.join(BACKENDS)}")
    if op is not None and op not in OPS:
        raise ValueError(f"{source}: got op {op!r}, want one of {', '.join(OPS)}")
    if op is not None and op not in _SERVES[backend]:
        raise NotImplementedError(
            f"{source}: the {backend} backend has no {op}: {_TORCH_ON_CUDA[op]}"
        )
    missing = None
    if backend in ("triton", "cuda"):
        missing = _no_triton() if backend == "triton" else cuda.missing()
    if missing:
        raise NotImplementedError(f"{source}: {missing}")


def _expand(backend: str, op: str | None) -> dict[str, str]:
    """Every op that the backend holds, or the one named."""
    return dict.fromkeys([op] if op else _SERVES[backend], backend)


def _from_environment() -> dict[str, str]:
    """LLAMA_FAST_BACKEND=reference, or =attention=reference,rms_norm=cpu."""
    chosen: dict[str, str] = {}
    for part in filter(None, os.environ.get("LLAMA_FAST_BACKEND", "").split(",")):
        op, _, backend = part.strip().rpartition("=")
        _validate(backend, op or None, "LLAMA_FAST_BACKEND")
        chosen.update(_expand(backend, op or None))
    return chosen


_environment = _from_environment()
if _isa := os.environ.get("LLAMA_FAST_CPU_ISA"):
    _cpu.set_isa(_isa)
_override: ContextVar[Mapping[str, str]] = ContextVar("llama_fast_backend", default=_environment)


@contextlib.contextmanager
def use_backend(backend: str, op: str | None = None) -> Iterator[None]:
    """Within the block, op (None: every op that the backend holds) runs on the named backend, in
    this thread or task.

    Raises ValueError for an unknown name and NotImplementedError for a backend that this version
    or machine does not hold. A backend that cannot serve a tensor's device raises ValueError at the
    call. "triton" serves CPU tensors only under TRITON_INTERPRET=1, Triton's interpreter.
    """
    _validate(backend, op, "use_backend")
    token = _override.set({**_override.get(), **_expand(backend, op)})
    try:
        yield
    finally:
        _override.reset(token)


def _cannot(backend: str, device: str, index: int | None) -> str | None:
    """Why a backend cannot serve a device, or None. index None: no particular GPU."""
    if backend == "cpu" and device != "cpu":
        return f"cannot serve tensors on {device}"
    if backend == "triton" and device == "cpu" and not _interpreted():
        return "cannot serve tensors on cpu (TRITON_INTERPRET=1 interprets, slowly)"
    if backend == "cuda" and device == "cpu" and not cuda.EMULATED:
        return "cannot serve tensors on cpu"
    if backend in ("triton", "cuda") and device == "cuda" and index is not None:
        return _no_chip(index)
    return None


def _default(op: str, device: str, index: int | None) -> Choice:
    if device == "cpu":
        return Choice("cpu", f"compiled kernels, {_cpu.isa()}")
    if device != "cuda":
        return Choice("reference", f"no kernels for {device}: eager PyTorch")
    if op in _TORCH_ON_CUDA:
        return Choice("reference", _TORCH_ON_CUDA[op])
    missing = _no_triton() or (_no_chip(index) if index is not None else None)
    if missing:
        return Choice("reference", f"eager PyTorch: {missing}")
    return Choice("triton", "Triton kernels, the default on GPUs; not yet measured on hardware")


def choose(op: str, device: torch.device) -> str:
    """The backend that serves op on a device now."""
    kind, index = device.type, device.index
    backend = _override.get().get(op)
    if backend is None:
        choice = _default(op, kind, index)
        if choice.backend == "reference" and kind == "cuda" and op not in _TORCH_ON_CUDA:
            _warn_once(choice.why)
        return choice.backend
    if why := _cannot(backend, kind, index):
        raise ValueError(f"{op}: the {backend} backend {why}")
    return backend


def kernels(op: str, device: torch.device) -> Any:
    """The module whose functions launch op's kernels on a device, or None: eager PyTorch."""
    backend = choose(op, device)
    if backend == "reference":
        return None
    if backend == "cpu":
        return cpu
    if backend == "cuda":
        return cuda
    from . import triton_backend

    return triton_backend


@functools.lru_cache
def _warn_once(why: str) -> None:
    warnings.warn(f"llama_fast: CUDA tensors run in {why}", stacklevel=5)


def asked_for() -> frozenset[tuple[str, str]]:
    """What use_backend and the environment ask for now: what was captured under one answer does
    not hold under another."""
    return frozenset(_override.get().items())


def backends() -> BackendTable:
    """For every op and device type: the backend that serves it now, and why."""
    gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
    table = BackendTable()
    for op in OPS:
        table[op] = {}
        for device in DEVICES:
            index = gpu if device == "cuda" else None
            if op in _override.get():
                backend = _override.get()[op]
                why = "LLAMA_FAST_BACKEND" if _override.get() is _environment else "use_backend"
                if cannot := _cannot(backend, device, index):
                    why += f"; raises: {cannot}"
            else:
                backend, why = _default(op, device, index)
            table[op][device] = Choice(backend, why)
    return table
