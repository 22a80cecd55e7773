"""Which GPU backend is chosen for which shapes, from committed GPU reports: choices.json.

`python -m bench --choose` writes that file from bench/results, and nobody by hand. A backend is
chosen for a class of shapes, and a class is named here by what the host knows of a call.

What a class must never depend on is the number of rows, sequences or packed tokens, nor anything
that lies on the device: the two backends sum in different orders, and a row's or a sequence's bits
must not change with its batch. The one exception is where both backends have it already: FP8
products up to FEW rows and beyond (ops.fp8_linear). For the same reason the ops of a FAMILY are
chosen together: a fused op and its parts give the same bits, which holds within a backend only.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

PATH = Path(__file__).parent / "choices.json"
VERSION = 1
BACKENDS = ("triton", "cuda")
FEW = 64  # rows: where the FP8 kernels of both backends change
HEAD_DIM = 128  # Llama 3.1's, the one that reports measure


# ---- classes: by the arguments that library/ hands to backends.kernels ----


def _elements(x: Tensor, *_: Any) -> str | None:
    return "16-bit" if x.itemsize == 2 else None


def _attention(q: Tensor) -> str | None:
    """Packed or not: a sequence has the same bits either way."""
    return "16-bit, head_dim 128" if q.itemsize == 2 and q.shape[-1] == HEAD_DIM else None


def _cached(q: Tensor, k_cache: Tensor) -> str | None:
    """Paged or not: the layout of a cache changes no bit. A sequence's queries are its own."""
    if q.itemsize != 2 or q.shape[-1] != HEAD_DIM:
        return None
    queries = "1 query" if q.shape[1] == 1 else "several queries"
    return f"{queries}, head_dim 128{', FP8 cache' if k_cache.itemsize == 1 else ''}"


def _product(rows: int, blocks: bool) -> str:
    scales = "128x128 blocks" if blocks else "row scales"
    return f"{scales}, {'up to 64' if rows <= FEW else 'more than 64'} rows"


def _gemm(a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> str | None:
    return _product(a.shape[0], _in_blocks(scale_b)) if out_dtype.itemsize == 2 else None


def _linear(x: Tensor, weight_scale: Tensor, quantize: bool | None) -> str | None:
    if x.itemsize != 2 or quantize is False:
        return None
    return _product(math.prod(x.shape[:-1]), _in_blocks(weight_scale))


def _in_blocks(scale: Tensor) -> bool:
    return scale.dim() == 2 and scale.shape[1] > 1


_PRODUCTS = tuple(_product(rows, blocks) for blocks in (False, True) for rows in (FEW, FEW + 1))
_CACHED = tuple(
    f"{queries}, head_dim 128{cache}"
    for cache in ("", ", FP8 cache")
    for queries in ("1 query", "several queries")
)
# op -> its classes, and which of them a call belongs to; None: one that no report measures, and
# that Triton serves.
_OPS: dict[str, tuple[tuple[str, ...], Callable[..., str | None]]] = {
    **dict.fromkeys(
        (
            "rms_norm",
            "add_rms_norm",
            "rms_norm_fp8",
            "silu_and_mul",
            "silu_and_mul_fp8",
            "apply_rope",
            "apply_rope_and_append",
            "quantize_fp8",
        ),
        (("16-bit",), _elements),
    ),
    "attention": (("16-bit, head_dim 128",), _attention),
    "attention_with_kvcache": (_CACHED, _cached),
    "fp8_gemm": (_PRODUCTS, _gemm),
    "fp8_linear": (_PRODUCTS, _linear),
}
CLASSES = {op: names for op, (names, _) in _OPS.items()}
FAMILIES = (
    ("rms_norm", "add_rms_norm", "rms_norm_fp8"),
    ("silu_and_mul", "silu_and_mul_fp8"),
    ("apply_rope",),
    ("apply_rope_and_append",),
    ("quantize_fp8",),
    ("attention",),
    ("attention_with_kvcache",),
    ("fp8_gemm", "fp8_linear"),
)


def shape_class(op: str, *arguments: Any) -> str | None:
    """The class of a call, or None. arguments: what library/ hands to backends.kernels."""
    return _OPS[op][1](*arguments)


# ---- the file ----


@dataclass(frozen=True)
class Report:
    """folder: below bench/results."""

    folder: str
    gpu: str
    sm: str
    commit: str
    torch: str
    triton: str


class Entry(NamedTuple):
    """times: how many times faster the chosen backend is than the other, the geometric mean over
    the class's cases; None where speed did not decide."""

    backend: str
    times: float | None
    why: str
    reports: tuple[Report, ...]


@dataclass(frozen=True)
class Choices:
    """by_chip["sm_90"]["attention"] maps a class to what was chosen for it."""

    by_chip: Mapping[str, Mapping[str, Mapping[str, Entry]]]


@functools.lru_cache
def load(path: Path = PATH) -> Choices:
    """Raises ValueError, with what is wrong and where, for anything but what --choose writes."""
    try:
        return _parse(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the installation is broken") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error!r}; {_AGAIN}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {_AGAIN}") from None


_AGAIN = "`python -m bench --choose` writes it anew"


def _parse(content: Any) -> Choices:
    if content["version"] != VERSION:
        raise ValueError(f"version: got {content['version']!r}, want {VERSION}")
    reports = {fields["folder"]: Report(**fields) for fields in content["reports"]}
    by_chip: dict[str, dict[str, dict[str, Entry]]] = {}
    for sm, by_op in content["choices"].items():
        by_chip[sm] = {op: {} for op in by_op}
        for op, item in ((op, item) for op, items in by_op.items() for item in items):
            if item["class"] in by_chip[sm][op]:
                raise ValueError(f"choices[{sm}][{op}]: got class {item['class']!r} twice")
            by_chip[sm][op][item["class"]] = _entry(sm, op, item, reports)
        for family in FAMILIES:
            _together(sm, family, by_chip[sm])
    return Choices(by_chip)


def _entry(sm: str, op: str, item: Any, reports: dict[str, Report]) -> Entry:
    where = f"choices[{sm}][{op}]"
    if op not in CLASSES:
        raise ValueError(f"{where}: got op {op!r}, want one of {', '.join(CLASSES)}")
    if item["class"] not in CLASSES[op]:
        wanted = " | ".join(CLASSES[op])
        raise ValueError(f"{where}: got class {item['class']!r}, want one of {wanted}")
    if item["backend"] not in BACKENDS:
        wanted = " or ".join(BACKENDS)
        raise ValueError(f"{where}: got backend {item['backend']!r}, want {wanted}")
    named = tuple(reports[folder] for folder in item["reports"])
    if not named or any(report.sm != sm for report in named):
        raise ValueError(f"{where}: got reports {item['reports']}, want some of {sm}")
    times = item["times"]
    if times is not None and not (isinstance(times, float) and 0 < times < math.inf):
        raise ValueError(f"{where}: got times {times!r}, want a positive number or null")
    return Entry(item["backend"], times, str(item["why"]), named)


def _together(sm: str, family: tuple[str, ...], by_op: Mapping[str, Mapping[str, Entry]]) -> None:
    """A family's ops must not be served by different backends at one class."""
    for name in CLASSES[family[0]]:
        got = {op: by_op[op][name].backend for op in family if name in by_op.get(op, {})}
        if len(set(got.values())) > 1 or ("cuda" in got.values() and len(got) < len(family)):
            raise ValueError(
                f"choices[{sm}]: got {got} for {name!r}, want one backend for {', '.join(family)}"
            )
