"""Which backend serves which op on which device, and why.

"cpu" is the compiled extension, "triton" the kernels of kernels/, "cuda" those of csrc/cuda,
"reference" eager PyTorch. Asking for one that this machine lacks is an error, never a quiet
substitute. On a GPU Triton serves, but for the shapes at which a committed report (bench/results)
shows the CUDA kernels right and faster on that chip: choices.py.
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
from torch import Tensor

from . import _cpu, amx, choices, cpu, cuda

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
choices.load()  # a broken file is told now, not at the first call on a GPU
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
    if backend == "cuda" and device != ("cpu" if cuda.EMULATED else "cuda"):
        return f"cannot serve tensors on {device}{' (emulated)' if cuda.EMULATED else ''}"
    if backend in ("triton", "cuda") and device == "cuda" and index is not None:
        return _no_chip(index)
    return None


def _default(op: str, device: str, index: int | None) -> Choice:
    if device == "cpu":
        products = op in ("fp8_gemm", "fp8_linear", "linear")
        on_amx = amx.why() if amx.enabled and products else ""
        return Choice("cpu", f"compiled kernels, {_cpu.isa()}{on_amx}")
    if device != "cuda":
        return Choice("reference", f"no kernels for {device}: eager PyTorch")
    return _on_gpu(op, index).choice


class _Served(NamedTuple):
    """choice: for the table. A call is served by by_class[its class], or else by otherwise."""

    choice: Choice
    otherwise: str
    by_class: Mapping[str, str]


@functools.lru_cache
def _on_gpu(op: str, index: int | None) -> _Served:
    """index None: no particular GPU."""
    if op in _TORCH_ON_CUDA:
        return _Served(Choice("reference", _TORCH_ON_CUDA[op]), "reference", {})
    missing = _no_triton() or (_no_chip(index) if index is not None else None)
    if missing:
        return _Served(Choice("reference", f"eager PyTorch: {missing}"), "reference", {})
    by_chip = choices.load().by_chip
    chip = _chip(index) if index is not None else None
    entries = by_chip.get(chip, {}).get(op, {}) if chip else {}
    if not entries:
        others = [sm for sm, by_op in by_chip.items() if op in by_op and sm != chip]
        where = f"{chip or 'this GPU'} (but on {', '.join(others)})" if others else "hardware"
        why = f"Triton kernels, the default on GPUs; not yet measured on {where}"
        return _Served(Choice("triton", why), "triton", {})
    unbuilt = cuda.missing() or ("cuda is emulated on the CPU" if cuda.EMULATED else None)
    taken = {name: e.backend for name, e in entries.items() if e.backend == "cuda"}
    if taken and unbuilt:
        why = f"Triton kernels: {unbuilt}; {_reasons(entries)}"
        return _Served(Choice("triton", why), "triton", {})
    backend = "triton" if not taken else "cuda" if len(taken) == len(entries) else "cuda, triton"
    return _Served(Choice(backend, _reasons(entries)), "triton", taken)


def _chip(index: int) -> str | None:
    """A GPU is known by its instruction set: H100 and H200 share their choices. AMD's numbers would
    be taken for NVIDIA's."""
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def _reasons(entries: Mapping[str, choices.Entry]) -> str:
    """Every measured class with its backend, what decided, and the reports that show it."""
    parts = []
    for name, entry in entries.items():
        other = "triton" if entry.backend == "cuda" else "cuda"
        speed = f" {entry.times:.2f}x {other}" if entry.times is not None else ""
        parts.append(f"{entry.backend}{speed} for {name} ({entry.why})")
    reports = dict.fromkeys(r for entry in entries.values() for r in entry.reports)
    shown = "; ".join(f"{r.gpu} in bench/results/{r.folder}, commit {r.commit}" for r in reports)
    rest = ", other shapes: triton" if any(e.backend == "cuda" for e in entries.values()) else ""
    return f"measured on {shown}: {'; '.join(parts)}{rest}"


def choose(op: str, device: torch.device, *arguments: Any) -> str:
    """The backend that serves op on a device now. arguments: what decides its class of shapes
    (choices.shape_class), as handed to kernels(); none: shapes that nobody has measured."""
    kind, index = device.type, device.index
    backend = _override.get().get(op)
    if backend is not None:
        if why := _cannot(backend, kind, index):
            raise ValueError(f"{op}: the {backend} backend {why}")
        return backend
    if kind != "cuda":
        return "cpu" if kind == "cpu" else "reference"
    choice, otherwise, by_class = _on_gpu(op, index)
    if otherwise == "reference" and op not in _TORCH_ON_CUDA:
        _warn_once(choice.why)
    if by_class and arguments:
        name = choices.shape_class(op, *arguments)
        return by_class.get(name, otherwise) if name else otherwise
    return otherwise


def kernels(op: str, x: Tensor, *shape: Any) -> Any:
    """The module whose functions launch op's kernels for x and its like, or None: eager PyTorch.

    shape: what else decides the class of shapes. A call on a CPU pays for none of it.
    """
    device = x.device
    if device.type == "cpu" and op not in _override.get():
        return cpu
    backend = choose(op, device, x, *shape)
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
