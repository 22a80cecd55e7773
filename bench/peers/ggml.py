"""Run llama.cpp's tensor library through its C API: one graph for each case, computed repeatedly.

Activations are fp32, as everywhere in llama.cpp; weights and caches have the types of its models. A
failed assertion there aborts the process, so shapes are checked here first.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..timing import Run
from . import Ops, Unsupported
from .gguf_file import q8_0

F32, F16, Q8_0, BF16 = 0, 1, 8, 30  # ggml_type
PAD = 64  # a mask's rows are a multiple of it in older versions and forks
OVERHEAD = 1 << 20  # bytes: the tensors' headers and the graph


class _InitParams(ctypes.Structure):
    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


_P, _F, _I = ctypes.c_void_p, ctypes.c_float, ctypes.c_int
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "init": (_P, [_InitParams]),
    "free": (None, [_P]),
    "new_tensor": (_P, [_P, _I, _I, ctypes.POINTER(ctypes.c_int64)]),
    "get_data": (_P, [_P]),
    "mul_mat": (_P, [_P, _P, _P]),
    "mul": (_P, [_P, _P, _P]),
    "add": (_P, [_P, _P, _P]),
    "rms_norm": (_P, [_P, _P, _F]),
    "swiglu": (_P, [_P, _P]),
    "permute": (_P, [_P, _P, _I, _I, _I, _I]),
    "flash_attn_ext": (_P, [_P, _P, _P, _P, _P, _F, _F, _F]),
    "new_graph": (_P, [_P]),
    "build_forward_expand": (None, [_P, _P]),
    "backend_graph_compute": (_I, [_P, _P]),
    "backend_cpu_init": (_P, []),
    "backend_cpu_set_n_threads": (None, [_P, _I]),
}


class Library(NamedTuple):
    """The library of llama.cpp or of a fork."""

    name: str
    package: str
    load: Callable[[], list[ctypes.CDLL]]  # the shared libraries that export the functions


@cache
def _functions(library: Library) -> dict[str, Any]:
    libraries, found = library.load(), {}
    for name, (result, arguments) in _FUNCTIONS.items():
        f = next((f for lib in libraries if (f := getattr(lib, f"ggml_{name}", None))), None)
        if f is None:
            raise Unsupported(f"this version of {library.package} exports no ggml_{name}")
        f.restype, f.argtypes = result, arguments
        found[name] = f
    return found


@cache
def _backend(library: Library, threads: int) -> Any:
    f = _functions(library)
    backend = f["backend_cpu_init"]()
    f["backend_cpu_set_n_threads"](backend, threads)
    return backend


class Graph:
    """Tensors and one graph over them, in their own memory of `size` bytes of data."""

    def __init__(self, library: Library, size: float) -> None:
        self._f = _functions(library)
        self._context = self._f["init"](_InitParams(int(size) + OVERHEAD, None, False))
        if not self._context:
            raise Unsupported(f"ggml has no {size:.0f} bytes")
        self._backend = _backend(library, torch.get_num_threads())

    def __del__(self) -> None:
        self._f["free"](self._context)

    def tensor(self, t: Tensor, kind: int = F32) -> Any:
        """Copy t as that type; ggml's sizes are t's in reverse order."""
        sizes = (ctypes.c_int64 * t.dim())(*t.shape[::-1])
        new = self._f["new_tensor"](self._context, kind, t.dim(), sizes)
        plain = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
        data = q8_0(t) if kind == Q8_0 else t.to(plain[kind]).contiguous()
        ctypes.memmove(self._f["get_data"](new), data.data_ptr(), data.nbytes)
        return new

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: self._f[name](self._context, *arguments)

    def run(self, out: Any, *shape: int) -> Run:
        """Return a run that computes out, an fp32 tensor, as a torch tensor of that shape."""
        graph = self.new_graph()
        self._f["build_forward_expand"](graph, out)
        memory = (ctypes.c_float * math.prod(shape)).from_address(self._f["get_data"](out))
        result = torch.frombuffer(memory, dtype=torch.float32).view(shape)
        compute, backend = self._f["backend_graph_compute"], self._backend

        def run(_: int, alive: Graph = self) -> Tensor:
            if compute(backend, graph):
                raise RuntimeError("ggml did not compute its graph")
            return result

        return run


def ops(library: Library) -> Ops:
    name = library.name

    def product(x: Tensor, weights: list[Tensor], kind: int, label: str) -> dict[str, Run]:
        (m, k), n = x.shape, weights[0].shape[0]
        if kind == Q8_0 and k % 32:
            raise Unsupported(f"K = {k} does not divide into blocks of 32")
        runs = []
        for weight in weights:
            g = Graph(library, 2 * n * k + 4 * m * (k + n))
            runs.append(g.run(g.mul_mat(g.tensor(weight, kind), g.tensor(x)), m, n))
        return {f"{name} {label}": lambda i: runs[i % len(runs)](i)}

    def norm(
        x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> dict[str, Run]:
        """Return a run of the norm of x, or of the sum if there is a residual."""
        g = Graph(library, 24 * x.numel())
        total = g.tensor(x) if residual is None else g.add(g.tensor(x), g.tensor(residual))
        normed = g.mul(g.rms_norm(total, eps), g.tensor(weight))
        return {f"{name} fp32": g.run(normed, *x.shape)}

    def silu_and_mul(gate_up: Tensor) -> dict[str, Run]:
        rows, width = gate_up.shape
        g = Graph(library, 6 * gate_up.numel())
        return {f"{name} fp32": g.run(g.swiglu(g.tensor(gate_up)), rows, width // 2)}

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Run:
        """Return a run for q [B, Sq, H, D], k and v [B, Sk, Hkv, D]; mask [Sq, Sk] is added to the
        scores."""
        size = 8 * q.numel() + 4 * k.numel() + (0 if mask is None else 2 * mask.numel())
        g = Graph(library, size)
        kinds = ((q, F32), (k, F16), (v, F16))
        heads_out = [g.permute(g.tensor(t, kind), 0, 2, 1, 3) for t, kind in kinds]
        added = None if mask is None else g.tensor(mask, F16)
        out = g.flash_attn_ext(*heads_out, added, q.shape[-1] ** -0.5, 0.0, 0.0)
        return g.run(out, *q.shape)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Run]:
        queries, keys = q.shape[1], k.shape[1]
        hidden = torch.ones(-queries % PAD + queries, keys).triu(1 + keys - queries).bool()
        mask = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))
        return {f"{name}, fp16 K and V": attend(q, k, v, mask)}

    def attention_with_kvcache(
        q: Tensor, k_caches: list[Tensor], v_caches: list[Tensor], cache_seqlens: Tensor
    ) -> dict[str, Run]:
        if q.shape[1] != 1 or (cache_seqlens != k_caches[0].shape[1]).any():
            raise Unsupported(f"without a mask {name} takes one query and a full cache")
        runs = [attend(q, k, v) for k, v in zip(k_caches, v_caches, strict=True)]
        return {f"{name}, fp16 K and V": lambda i: runs[i % len(runs)](i)}

    return {
        "rms_norm": norm,
        "add_rms_norm": norm,
        "silu_and_mul": silu_and_mul,
        "attention": attention,
        "attention_with_kvcache": attention_with_kvcache,
        "fp8_linear": lambda **inputs: product(**inputs, kind=Q8_0, label="Q8_0"),
        "linear": lambda **inputs: product(**inputs, kind=BF16, label="bf16"),
    }
