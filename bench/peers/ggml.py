"""Run llama.cpp's tensor library through its C API: one graph for each case, computed repeatedly.

Activations are fp32, as everywhere in llama.cpp; weights and caches have the types of its models. A
failed assertion there aborts the process, so shapes are checked here first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..timing import Run
from .gguf_file import q8_0
from .peer import Inputs, Unsupported

F32, F16, Q8_0, BF16 = 0, 1, 8, 30  # ggml_type
BYTES = {F32: (1, 4), F16: (1, 2), Q8_0: (32, 34), BF16: (1, 2)}  # elements of a block, its bytes
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
    "ggml_init": (_P, [_InitParams]),
    "ggml_free": (None, [_P]),
    "ggml_new_tensor": (_P, [_P, _I, _I, ctypes.POINTER(ctypes.c_int64)]),
    "ggml_get_data": (_P, [_P]),
    "ggml_mul_mat": (_P, [_P, _P, _P]),
    "ggml_mul": (_P, [_P, _P, _P]),
    "ggml_add": (_P, [_P, _P, _P]),
    "ggml_rms_norm": (_P, [_P, _P, _F]),
    "ggml_swiglu": (_P, [_P, _P]),
    "ggml_permute": (_P, [_P, _P, _I, _I, _I, _I]),
    "ggml_flash_attn_ext": (_P, [_P, _P, _P, _P, _P, _F, _F, _F]),
    "ggml_new_graph": (_P, [_P]),
    "ggml_build_forward_expand": (None, [_P, _P]),
    "ggml_backend_graph_compute": (_I, [_P, _P]),
    "ggml_backend_cpu_init": (_P, []),
    "ggml_backend_cpu_set_n_threads": (None, [_P, _I]),
}


@dataclass(frozen=True)
class Library:
    """The library of llama.cpp or of a fork."""

    name: str
    package: str
    load: Callable[[], list[ctypes.CDLL]]  # the shared libraries that export the functions


@cache
def _functions(library: Library) -> dict[str, Any]:
    libraries, found = library.load(), {}
    for name, (result, arguments) in _FUNCTIONS.items():
        f = next((getattr(lib, name) for lib in libraries if hasattr(lib, name)), None)
        if f is None:
            raise Unsupported(f"this version of {library.package} exports no {name}")
        f.restype, f.argtypes = result, arguments
        found[name] = f
    return found


@cache
def _backend(library: Library, threads: int) -> Any:
    f = _functions(library)
    backend = f["ggml_backend_cpu_init"]()
    f["ggml_backend_cpu_set_n_threads"](backend, threads)
    return backend


class Graph:
    """Tensors and one graph over them, in their own memory of `size` bytes of data."""

    def __init__(self, library: Library, size: int) -> None:
        self._f = _functions(library)
        self._context = self._f["ggml_init"](_InitParams(size + OVERHEAD, None, False))
        if not self._context:
            raise Unsupported(f"ggml has no {size} bytes")
        self._backend = _backend(library, torch.get_num_threads())

    def __del__(self) -> None:
        self._f["ggml_free"](self._context)

    def tensor(self, t: Tensor, kind: int = F32) -> Any:
        """Copy t as that type; ggml's sizes are t's in reverse order."""
        sizes = (ctypes.c_int64 * t.dim())(*t.shape[::-1])
        new = self._f["ggml_new_tensor"](self._context, kind, t.dim(), sizes)
        data = _data(t, kind)
        ctypes.memmove(self._f["ggml_get_data"](new), data.ctypes.data, data.nbytes)
        return new

    def __getattr__(self, name: str) -> Callable[..., Any]:
        f = self._f[f"ggml_{name}"]
        return lambda *arguments: f(self._context, *arguments)

    def run(self, out: Any, shape: tuple[int, ...]) -> Run:
        """Return a run that computes out, an fp32 tensor, as a torch tensor of that shape."""
        graph = self._f["ggml_new_graph"](self._context)
        self._f["ggml_build_forward_expand"](graph, out)
        count = int(np.prod(shape))
        memory = (ctypes.c_float * count).from_address(self._f["ggml_get_data"](out))
        result = torch.frombuffer(memory, dtype=torch.float32).view(shape)
        compute, backend = self._f["ggml_backend_graph_compute"], self._backend

        def run(_: int, alive: Graph = self) -> Tensor:
            if compute(backend, graph):
                raise RuntimeError("ggml did not compute its graph")
            return result

        return run


def _data(t: Tensor, kind: int) -> np.ndarray:
    t = t.detach().contiguous()
    if kind == Q8_0:
        return q8_0(t).numpy()
    if kind == BF16:
        return t.bfloat16().view(torch.int16).numpy()
    return t.to(torch.float16 if kind == F16 else torch.float32).numpy()


def _bytes(kind: int, *shapes: tuple[int, ...]) -> int:
    block, size = BYTES[kind]
    return sum(int(np.prod(s)) // block * size + 64 for s in shapes)


def _rotating(runs: list[Run]) -> Run:
    return lambda i: runs[i % len(runs)](i)


def _product(library: Library, inputs: Inputs, kind: int, label: str) -> dict[str, Run]:
    x, weights = inputs["x"], inputs["weights"]
    m, k = x.shape
    n = weights[0].shape[0]
    if k % BYTES[kind][0]:
        raise Unsupported(f"K = {k} does not divide into blocks of {BYTES[kind][0]}")
    runs = []
    for weight in weights:
        g = Graph(library, _bytes(kind, (n, k)) + _bytes(F32, (m, k), (m, n)))
        runs.append(g.run(g.mul_mat(g.tensor(weight, kind), g.tensor(x)), (m, n)))
    return {f"{library.name} {label}": _rotating(runs)}


def fp8_linear(library: Library, inputs: Inputs) -> dict[str, Run]:
    return _product(library, inputs, Q8_0, "Q8_0")


def linear(library: Library, inputs: Inputs) -> dict[str, Run]:
    return _product(library, inputs, BF16, "bf16")


def rms_norm(library: Library, inputs: Inputs) -> dict[str, Run]:
    """Return a run of the norm of x, or of the sum if there is a residual."""
    x, residual = inputs["x"], inputs.get("residual")
    g = Graph(library, _bytes(F32, *[x.shape] * 5, (x.shape[1],)))
    total = g.tensor(x) if residual is None else g.add(g.tensor(x), g.tensor(residual))
    normed = g.mul(g.rms_norm(total, inputs["eps"]), g.tensor(inputs["weight"]))
    return {f"{library.name} fp32": g.run(normed, tuple(x.shape))}


def silu_and_mul(library: Library, inputs: Inputs) -> dict[str, Run]:
    x = inputs["gate_up"]
    rows, width = x.shape
    g = Graph(library, _bytes(F32, (rows, width), (rows, width // 2)))
    return {f"{library.name} fp32": g.run(g.swiglu(g.tensor(x)), (rows, width // 2))}


def attention(library: Library, inputs: Inputs) -> dict[str, Run]:
    q, k, v = (inputs[name] for name in "qkv")
    queries, keys = q.shape[1], k.shape[1]
    hidden = torch.ones(-queries % PAD + queries, keys).triu(1 + keys - queries).bool()
    mask = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))
    return {f"{library.name}, fp16 K and V": _attend(library, q, k, v, mask)}


def attention_with_kvcache(library: Library, inputs: Inputs) -> dict[str, Run]:
    q, ks, vs = inputs["q"], inputs["k_caches"], inputs["v_caches"]
    room = ks[0].shape[1]
    if q.shape[1] != 1 or any(n != room for n in inputs["cache_seqlens"].tolist()):
        raise Unsupported(f"without a mask {library.name} takes one query and a full cache")
    runs = [_attend(library, q, k, v, None) for k, v in zip(ks, vs, strict=True)]
    return {f"{library.name}, fp16 K and V": _rotating(runs)}


def _attend(library: Library, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Run:
    """Return a run for q [B, Sq, H, D], k and v [B, Sk, Hkv, D]; mask [Sq, Sk] is added to the
    scores."""
    g = Graph(
        library,
        _bytes(F32, q.shape, q.shape)
        + _bytes(F16, k.shape, v.shape, *([] if mask is None else [tuple(mask.shape)])),
    )
    heads_out = [g.permute(g.tensor(q), 0, 2, 1, 3)]
    heads_out += [g.permute(g.tensor(t, F16), 0, 2, 1, 3) for t in (k, v)]
    added = None if mask is None else g.tensor(mask, F16)
    out = g.flash_attn_ext(*heads_out, added, q.shape[-1] ** -0.5, 0.0, 0.0)
    return g.run(out, tuple(q.shape))


OPS: dict[str, Callable[[Library, Inputs], dict[str, Run]]] = {
    "rms_norm": rms_norm,
    "add_rms_norm": rms_norm,
    "silu_and_mul": silu_and_mul,
    "attention": attention,
    "attention_with_kvcache": attention_with_kvcache,
    "fp8_linear": fp8_linear,
    "linear": linear,
}


def ops(library: Library) -> dict[str, Callable[[Inputs], dict[str, Run]]]:
    return {op: partial(make, library) for op, make in OPS.items()}
