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
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import _cpu, amx, cpu, cuda

# The ops of each family. A family's files and kernels have its name.
FAMILIES = {
    "rms_norm": ("rms_norm", "add_rms_norm", "rms_norm_fp8"),
    "rope": ("apply_rope", "apply_rope_and_append"),
    "activation": ("silu_and_mul", "silu_and_mul_fp8"),
    "quantize": ("quantize_fp8",),
    "attention": ("attention",),
    "decode_attention": ("attention_with_kvcache",),
    "linear": ("fp8_gemm", "fp8_linear", "linear", "pack_weight"),
}
OPS = tuple(op for ops in FAMILIES.values() for op in ops)
_FAMILY_OF = {op: family for family, ops in FAMILIES.items() for op in ops}

# (family, chip, class of shapes) -> (backend, folder of bench/results whose report shows it right
# and fastest). shape_class() defines the classes. A family's ops are chosen together: a fused op
# and its parts give the same bits, but only within one backend.
CHOICES: dict[tuple[str, str, str], tuple[str, str]] = {}


class Backend(Protocol):
    """The kernels of a device, one function per family. Arguments are already checked. Outputs come
    first and are allocated and contiguous. No function waits for the device."""

    def rms_norm(
        self,
        out: Tensor,  # [rows, hidden] or x's shape; e4m3 if scale is given
        x: Tensor,  # [rows, hidden]
        weight: Tensor,  # [hidden]
        eps: float,
        residual: Tensor | None,  # [rows, hidden]
        residual_out: Tensor | None,  # receives x + residual
        scale: Tensor | None,  # fp32 [rows, 1]
        scale_ub: float | None,
        /,
    ) -> None: ...

    def activation(
        self,
        out: Tensor,  # [rows, width]; e4m3 if scale is given
        gate_up: Tensor,  # [rows, 2 * width]
        scale: Tensor | None,  # fp32 [rows, 1]
        scale_ub: float | None,
        /,
    ) -> None: ...

    def quantize(
        self,
        q: Tensor,  # e4m3 [rows, cols]
        scale: Tensor,  # fp32
        x: Tensor,  # [rows, cols]
        granularity: str,
        scale_ub: float | None,
        /,
    ) -> None: ...

    def rope(
        self,
        q_out: Tensor,  # [T, H, D]
        k_out: Tensor | None,  # [T, Hkv, D]; None: k and v go to the caches
        q: Tensor,
        k: Tensor,
        positions: Tensor,  # [T]
        table: Tensor,  # fp32 [max_positions, D]
        interleaved: bool,
        v: Tensor | None,
        k_cache: Tensor | None,  # [blocks, block_size, Hkv, D]
        v_cache: Tensor | None,
        slots: Tensor | None,  # [T]
        k_scale: Tensor | None,  # fp32 [1] or [Hkv]
        v_scale: Tensor | None,
        /,
    ) -> None: ...

    def attention(
        self,
        out: Tensor,  # [B, Sq, H, D], or packed [total, H, D]
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        softmax_scale: float,
        cu_seqlens_q: Tensor | None,  # int32 [B + 1]
        cu_seqlens_k: Tensor | None,
        /,
    ) -> None: ...

    def decode_attention(
        self,
        out: Tensor,  # [B, Sq, H, D]
        q: Tensor,
        k_cache: Tensor,  # [B, S, Hkv, D], or with block_table [blocks, block_size, Hkv, D]
        v_cache: Tensor,
        cache_seqlens: Tensor,  # int32 [B]
        block_table: Tensor | None,  # int32 [B, n]
        causal: bool,
        softmax_scale: float,
        num_splits: int,
        k_scale: Tensor | None,  # fp32 [1] or [Hkv]
        v_scale: Tensor | None,
        /,
    ) -> None: ...

    def linear(
        self,
        out: Tensor,  # [M, N]
        x: Tensor,  # [M, K]
        weight: Tensor,  # [N, K]; cpu: or packed
        bias: Tensor | None,  # [N]
        x_scale: Tensor | None,  # fp8_gemm
        weight_scale: Tensor | None,  # fp8_gemm and fp8_linear
        /,
    ) -> None: ...

    def prefers_fp8_activations(self, x: Tensor, /) -> bool:
        """Return what quantize_activation=None means for fp8_linear on x's device, for every number
        of rows: a row's result must not depend on the batch."""


BACKENDS = ("reference", "cpu", "triton", "cuda")
DEVICES = ("cpu", "cuda")
# Ops without a GPU kernel of ours, and what serves them there.
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
    """Return the named op, or every op of the backend, mapped to the backend."""
    return dict.fromkeys([op] if op else _SERVES[backend], backend)


def _from_environment() -> dict[str, str]:
    """Parse LLAMA_FAST_BACKEND: reference, or attention=reference,rms_norm=cpu."""
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
    """Run op (None: every op of the backend) on the named backend within the block, in this thread
    or task.

    Raises ValueError for an unknown name and NotImplementedError for a backend that this version
    or machine lacks. A call raises ValueError if the backend cannot serve its tensors' device.
    "triton" serves CPU tensors only under TRITON_INTERPRET=1, Triton's interpreter.
    """
    _validate(backend, op, "use_backend")
    token = _override.set({**_override.get(), **_expand(backend, op)})
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
    """choice is for the table. by_class[its class] serves a call, or else otherwise does."""

    choice: Choice
    otherwise: str
    by_class: Mapping[str, str]


@functools.lru_cache
def _on_gpu(op: str, index: int | None) -> _Served:
    """Return what serves op on a GPU. index None: no particular GPU."""
    if op in _TORCH_ON_CUDA:
        return _Served(Choice("reference", _TORCH_ON_CUDA[op]), "reference", {})
    missing = _no_triton() or (_no_chip(index) if index is not None else None)
    if missing:
        return _Served(Choice("reference", f"eager PyTorch: {missing}"), "reference", {})
    chip = _chip(index) if index is not None else None
    entries = {c: e for (f, sm, c), e in CHOICES.items() if (f, sm) == (_FAMILY_OF[op], chip)}
    if not entries:
        why = "Triton kernels, the default on GPUs; not yet measured on hardware"
        return _Served(Choice("triton", why), "triton", {})
    shown = "; ".join(f"{b} for {c} (bench/results/{r})" for c, (b, r) in entries.items())
    why = f"measured: {shown}; other shapes: triton"
    unbuilt = cuda.missing() or ("cuda is emulated on the CPU" if cuda.EMULATED else None)
    taken = {name: backend for name, (backend, _) in entries.items()}
    if unbuilt and "cuda" in taken.values():
        return _Served(Choice("triton", f"Triton kernels: {unbuilt}; {why}"), "triton", {})
    return _Served(Choice(", ".join(sorted({*taken.values()})), why), "triton", taken)


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
    family = _FAMILY_OF[op]
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
    choice, otherwise, by_class = _on_gpu(op, index)
    if otherwise == "reference" and op not in _TORCH_ON_CUDA:
        _warn_once(choice.why)
    if by_class and arguments:
        return by_class.get(shape_class(op, *arguments) or "", otherwise)
    return otherwise


def kernels(op: str, x: Tensor, *shape: Any) -> Backend | None:
    """Return the backend that launches op's kernels for x, or None for eager PyTorch.

    shape: the other arguments that decide the class of shapes. A call on a CPU ignores them.
    """
    if x.is_cpu and op not in _override.get():
        return cpu
    backend = choose(op, x.device, x, *shape)
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
