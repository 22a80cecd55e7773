"""Which backend serves which op on which device, and why.

"cpu" is the compiled extension, "triton" the kernels of kernels/, "cuda" those of csrc/cuda,
"reference" eager PyTorch. A request for a backend that this machine lacks is an error; no other
backend replaces it. On a GPU the default is Triton, with the exceptions of CHOICES.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _cpu, amx, cpu, cuda

# op -> family, which is the name of its files and kernels. ops/__init__.py adds all of them.
OPS: dict[str, str] = {}

# (family, chip, class of shapes) -> (backend, folder of bench/results whose report shows it right
# and fastest). shape_class() defines the classes. A family's ops are chosen together: a fused op
# and its parts give the same bits, but only within one backend.
CHOICES: dict[tuple[str, str, str], tuple[str, str]] = {}

BACKENDS = ("reference", "cpu", "triton", "cuda")
DEVICES = ("cpu", "cuda")
# Ops without a GPU kernel of ours, and what serves them there.
_TORCH_ON_CUDA = {
    "linear": "a plain 16-bit product: PyTorch's own (cuBLAS)",
    "pack_weight": "the packed layout is for CPUs",
}
_OLDEST_SM = 80  # bf16 matrix instructions, cp.async


class Choice(NamedTuple):
    backend: str
    why: str


class BackendTable(dict[str, dict[str, Choice]]):
    """The result of backends(): table["rms_norm"]["cpu"] is a Choice; str() prints the table."""

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
    """Return why the triton backend is unavailable, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'triton>=3.6')"
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 6):
        return f"triton {triton.__version__} is installed, and the kernels need 3.6 or newer"
    return None


def _interpreted() -> bool:
    """Return whether Triton's interpreter runs kernels on CPU tensors: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y")


@functools.lru_cache
def _no_chip(index: int) -> str | None:
    """Return why the kernels cannot run on a GPU, or None."""
    major, minor = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and 10 * major + minor < _OLDEST_SM:
        return f"sm_{major}{minor} is older than sm_{_OLDEST_SM}"
    return None


def _validate(backend: str, op: str | None, source: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{source}: got backend {backend!r}, want one of {', '.join(BACKENDS)}")
    if op is not None and op not in OPS:
        raise ValueError(f"{source}: got op {op!r}, want one of {', '.join(OPS)}")
    if op is not None and op not in _served_by(backend):
        raise NotImplementedError(
            f"{source}: the {backend} backend has no {op}: {_TORCH_ON_CUDA[op]}"
        )
    missing = None
    if backend in ("triton", "cuda"):
        missing = _no_triton() if backend == "triton" else cuda.missing()
    if missing:
        raise NotImplementedError(f"{source}: {missing}")


def _served_by(backend: str) -> list[str]:
    return [op for op in OPS if backend in ("reference", "cpu") or op not in _TORCH_ON_CUDA]


def _expand(backend: str, op: str | None, source: str) -> dict[str, str]:
    """Return the named op, or every op of the backend, mapped to the backend, both validated."""
    _validate(backend, op, source)
    return dict.fromkeys([op] if op else _served_by(backend), backend)


def read_environment() -> None:
    """Parse LLAMA_FAST_BACKEND: reference, or attention=reference,rms_norm=cpu."""
    for part in filter(None, os.environ.get("LLAMA_FAST_BACKEND", "").split(",")):
        op, _, backend = part.strip().rpartition("=")
        _environment.update(_expand(backend, op or None, "LLAMA_FAST_BACKEND"))


_environment: dict[str, str] = {}
_override: ContextVar[Mapping[str, str]] = ContextVar("llama_fast_backend", default=_environment)


@contextlib.contextmanager
def use_backend(backend: str, op: str | None = None) -> Iterator[None]:
    """Run op (None: every op of the backend) on the named backend within the block, in this thread
    or task.

    Raises ValueError for an unknown name and NotImplementedError for a backend that this version
    or machine lacks. A call raises ValueError if the backend cannot serve its tensors' device.
    "triton" serves CPU tensors only under TRITON_INTERPRET=1, Triton's interpreter.
    """
    token = _override.set({**_override.get(), **_expand(backend, op, "use_backend")})
    try:
        yield
    finally:
        _override.reset(token)


def _cannot(backend: str, device: str, index: int | None) -> str | None:
    """Return why a backend cannot serve a device, or None. index None: no particular GPU."""
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
        why = amx.why() if amx.enabled and products else ""
        if cpu.int16 and op == "fp8_linear":
            rounds = f"rounds from {cpu.INT16_ROWS} rows on"
            why += f"; LLAMA_FAST_CPU_INT16 {rounds if _cpu.isa() == 'avx2' else 'is for avx2'}"
        return Choice("cpu", f"compiled kernels, {_cpu.isa()}{why}")
    if device != "cuda":
        return Choice("reference", f"no kernels for {device}: eager PyTorch")
    return _on_gpu(op, index).choice


class _Served(NamedTuple):
    """choice is for the table. by_class[its class] serves a call; other calls run in Triton's
    kernels, or all in eager PyTorch if that is the choice."""

    choice: Choice
    by_class: Mapping[str, str]


@functools.lru_cache
def _on_gpu(op: str, index: int | None) -> _Served:
    """Return what serves op on a GPU. index None: no particular GPU."""
    if op in _TORCH_ON_CUDA:
        return _Served(Choice("reference", _TORCH_ON_CUDA[op]), {})
    missing = _no_triton() or (_no_chip(index) if index is not None else None)
    if missing:
        return _Served(Choice("reference", f"eager PyTorch: {missing}"), {})
    chip = _chip(index) if index is not None else None
    entries = {c: e for (f, sm, c), e in CHOICES.items() if (f, sm) == (OPS[op], chip)}
    if not entries:
        why = "Triton kernels, the default on GPUs; not yet measured on hardware"
        return _Served(Choice("triton", why), {})
    shown = "; ".join(f"{b} for {c} (bench/results/{r})" for c, (b, r) in entries.items())
    why = f"measured: {shown}; other shapes: triton"
    unbuilt = cuda.missing() or ("cuda is emulated on the CPU" if cuda.EMULATED else None)
    taken = {name: backend for name, (backend, _) in entries.items()}
    if unbuilt and "cuda" in taken.values():
        return _Served(Choice("triton", f"Triton kernels: {unbuilt}; {why}"), {})
    return _Served(Choice(", ".join(sorted({*taken.values()})), why), taken)


def _chip(index: int) -> str | None:
    """Return a GPU's instruction set: H100 and H200 share choices. None for AMD, whose numbers look
    like NVIDIA's."""
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def shape_class(op: str, x: Tensor, *rest: Any) -> str | None:
    """Return the class of a call's shapes, from the arguments of kernels(); None: Triton serves it.

    A class never depends on the number of rows, sequences or packed tokens, nor on values on the
    device: backends sum in different orders, and a row's bits must not change with its batch. The
    one exception is a boundary that both backends have: FP8 products of up to 64 rows and of more.
    """
    family = OPS[op]
    if family == "linear":
        scale, setting = rest
        if (setting if op == "fp8_gemm" else x.dtype).itemsize != 2 or setting is False:
            return None
        blocks = scale.dim() == 2 and scale.shape[1] > 1
        few = math.prod(x.shape[:-1]) <= 64
        return f"{'blocks' if blocks else 'row scales'}, {'up to' if few else 'over'} 64 rows"
    if x.itemsize != 2:
        return None
    if family not in ("attention", "decode_attention"):
        return "16-bit"
    if x.shape[-1] != 128:  # Llama 3.1's head_dim, the only one that reports measure
        return None
    if family == "attention":
        return "16-bit, head_dim 128"
    queries = "1 query" if x.shape[1] == 1 else "several queries"
    return f"{queries}, head_dim 128{', FP8 cache' if rest[0].itemsize == 1 else ''}"


def choose(op: str, device: torch.device, *arguments: Any) -> str:
    """Return the backend that serves op on a device now. arguments: kernels()'s, for the class of
    shapes; none: shapes that no report measures."""
    kind, index = device.type, device.index
    backend = _override.get().get(op)
    if backend is not None:
        if why := _cannot(backend, kind, index):
            raise ValueError(f"{op}: the {backend} backend {why}")
        return backend
    if kind != "cuda":
        return "cpu" if kind == "cpu" else "reference"
    choice, by_class = _on_gpu(op, index)
    if choice.backend == "reference":
        if op not in _TORCH_ON_CUDA:
            _warn_once(choice.why)
        return "reference"
    measured = shape_class(op, *arguments) if by_class and arguments else None
    return by_class.get(measured or "", "triton")


def kernels(op: str, x: Tensor, *shape: Any) -> ModuleType | None:
    """Return the backend that launches op's kernels for x, or None for eager PyTorch.

    A backend is a module: cpu, triton_backend or cuda. It has a function for each family, whose
    arguments are those of kernels/<family>.py and of csrc/params.h, and prefers_fp8_activations(x),
    what quantize_activation=None means for fp8_linear on x's device. shape: the other arguments
    that decide the class of shapes. A call on a CPU ignores them.
    """
    if x.is_cpu and op not in _override.get():
        return cpu
    backend = choose(op, x.device, x, *shape)
    if backend == "triton":
        from . import triton_backend

        return triton_backend
    return {"reference": None, "cpu": cpu, "cuda": cuda}[backend]


@functools.lru_cache
def _warn_once(why: str) -> None:
    warnings.warn(f"llama_fast: CUDA tensors run in {why}", stacklevel=5)


def asked_for() -> frozenset[tuple[str, str]]:
    """Return the settings of use_backend and the environment. A graph captured under one setting is
    not valid under another."""
    return frozenset(_override.get().items())


def backends() -> BackendTable:
    """Return, for every op and device type, the backend that serves it now, and why."""
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
