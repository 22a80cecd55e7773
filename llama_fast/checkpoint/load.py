"""Load the model's weights from a checkpoint in Hugging Face's format.

Tensors are memory-mapped and read one at a time, fused (q, k, v; gate, up), quantized on request
and packed for the kernels. Besides the result, at most one weight is in memory. All names,
shapes and dtypes are checked against the config before the first tensor is read. A tensor-parallel
rank reads only its rows and columns.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from ..config import LlamaConfig, is_gguf
from ..ops.quantize import quantize_fp8
from ..ops.rope import rope_table
from ..parallel import Share, Span, fitting
from ..reference import FP8_BLOCK, FP8_DTYPE, dequantize_fp8
from .formats import IGNORED, KV_SCALES, Format, read_format, scale_shapes
from .shards import Entry, Shards
from .weights import Linear, Weights, assemble, stacked

_FP8 = "F8_E4M3"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
CHECKED = 8  # layers that a rank reads before it asks whether the others still do
_FLOATS = ("BF16", "F16", "F32", "F64")


def load(
    path: str | Path,
    config: LlamaConfig,
    *,
    dtype: torch.dtype,
    quantize: str | None,
    device: torch.device,
    progress: bool | None = None,
    share: Share | None = None,
    check_in: Callable[[], None] = lambda: None,
) -> Weights:
    """Load the weights. Linears stored in FP8 keep it; quantize applies to the others.

    progress: whether to show a bar on stderr; None: if stderr is a terminal. share: of one rank;
    None: all. check_in is called before the first tensor is read, and again after every CHECKED
    layers. Raises OSError for a missing file and ValueError for one that does not match the config,
    naming the tensor.
    """
    share = share or Share.of(config)
    shards, form = Shards(path), None if is_gguf(path) else read_format(Path(path))
    config = check(config, shards, form, share)
    rope_table(config, 1, device="cpu")  # raises for degenerate frequencies
    checkpoint = _Checkpoint(shards, form, dtype, device)
    steps = count()
    with _bar(config.num_hidden_layers + 2, progress) as advance:

        def done() -> None:
            advance()
            _return_freed()
            if next(steps) % CHECKED == 0:
                check_in()

        check_in()
        weights = assemble(config, checkpoint, quantize, done, share)
    layers = range(config.num_hidden_layers)
    k_scale, v_scale = (checkpoint.kv_scale(which, layers, share.kv_heads) for which in "kv")
    shards.check_unchanged()
    return replace(weights, k_scale=k_scale, v_scale=v_scale)


def check(
    config: LlamaConfig, shards: Shards, form: Format | None, share: Share | None = None
) -> LlamaConfig:
    """Check names, shapes and dtypes of all tensors, and return the config that fits them. Its
    numbers are compared with the file before anything is as long or as large as they say.

    Weights that the config ties count as tied if the file holds one of them, or two that are equal;
    an lm_head of its own is used, with a warning, as in transformers and vLLM.
    """
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_word_embeddings:
        held = [name for name in (embedding, head) if name in shards.entries]
        if len(held) == 2 and not _equal(*map(shards.read, held)):
            warnings.warn(
                f"{shards.entries[head].file}: tie_word_embeddings is true, but {head} differs "
                f"from {embedding}; used as stored",
                stacklevel=3,
            )
            config = replace(config, tie_word_embeddings=False)
        elif held:
            shards.entries[embedding] = shards.entries[held[0]]
            shards.entries.pop(head, None)
    stored = {match[1] for match in map(_LAYER.match, shards.entries) if match}
    if config.num_hidden_layers > len(stored):
        raise ValueError(
            f"num_hidden_layers: got {config.num_hidden_layers}, but {shards.path} holds the "
            f"tensors of {len(stored)} layers"
        )
    inventory = _Inventory(shards, form, fitting(config))
    assemble(config, inventory, None, share=share)
    inventory.finish()
    return config


def _return_freed() -> None:
    """Return what was freed to the system. glibc keeps temporary tensors of up to 32 MB in its
    heap: a sixth of the weights."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


class _Checkpoint:
    """The Source that reads the tensors."""

    def __init__(
        self, shards: Shards, form: Format | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._shards, self._format = shards, form
        self._dtype, self._device = dtype, device

    def tensor(self, name: str, *dims: Span) -> Tensor:
        part = self._shards.read(name, *(d.index for d in dims))
        return part.to(self._device, self._dtype, copy=True)

    def linear(self, parts: dict[str, Span], k: Span, *, fp8: bool, bound: float | None) -> Linear:
        if all(self._is_fp8(name) for name in parts):
            return self._stored_fp8(parts, k)
        rows = [len(span) for span in parts.values()]
        if not fp8:
            plain = (self._plain(name, span, k) for name, span in parts.items())
            return Linear(stacked(plain, rows, len(k), self._dtype, self._device))
        scales = []

        def quantized() -> Iterator[Tensor]:
            for name, span in parts.items():
                # From the file's dtype: rounding to the model's dtype first would round twice. From
                # whole rows: their scale does not depend on the number of ranks.
                q, scale = quantize_fp8(self._plain(name, span, Span.whole(k.of)), "row")
                scales.append(scale)
                yield q[:, k.index]

        weight = stacked(quantized(), rows, len(k), FP8_DTYPE, self._device)
        return Linear(weight, torch.cat(scales), scale_ub=bound)

    def _stored_fp8(self, parts: dict[str, Span], k: Span) -> Linear:
        """Return weights as stored, without loss, with their scales in a shape that fits all."""
        assert self._format is not None  # the inventory rejects FP8 without a format
        rows = [len(span) for span in parts.values()]
        stored = (self._shards.read(f"{n}.weight", s.index, k.index) for n, s in parts.items())
        weight = stacked(stored, rows, len(k), FP8_DTYPE, self._device)
        scales = [self._scale(name, span, k) for name, span in parts.items()]
        return Linear(
            weight, joined_scales(scales, rows, len(k)), scale_ub=self._format.activation_bound
        )

    def kv_scale(self, which: str, layers: range, heads: Span) -> Tensor | None:
        """Return K's ("k") or V's ("v") scales for an FP8 KV cache, fp32 [layers, 1 or Hkv]; None
        if a layer lacks them."""
        scales = []
        for layer in layers:
            names = (f"model.layers.{layer}.self_attn.{n.format(which)}" for n in KV_SCALES)
            name = next((n for n in names if n in self._shards.entries), None)
            if name is None or math.prod(self._shards.entries[name].shape) not in (1, heads.of):
                return None
            scale = self._read_scale(name).reshape(-1)
            scales.append(scale[heads.index] if len(scale) > 1 else scale)
        return torch.stack(scales) if len({len(s) for s in scales}) == 1 else None

    def _is_fp8(self, name: str) -> bool:
        return self._shards.entries[f"{name}.weight"].dtype == _FP8

    def _plain(self, name: str, rows: Span, cols: Span) -> Tensor:
        """Return a part of a weight in the file's 16 or 32 bits, or in fp32 if the file holds
        others."""
        weight = self._shards.read(f"{name}.weight", rows.index, cols.index).to(self._device)
        if self._is_fp8(name):
            return dequantize_fp8(weight, self._scale(name, rows, cols))
        return weight.float() if weight.dtype == torch.float64 else weight

    def _scale(self, name: str, rows: Span, cols: Span) -> Tensor:
        """Return the scale of a part of a weight, in one of the shapes that the kernels take."""
        assert self._format is not None
        scale = self._read_scale(self._format.scale(name, self._shards.entries))
        used = scale_shapes(*self._shards.entries[f"{name}.weight"].shape)
        return _cut(scale.reshape(used[tuple(scale.shape)]), rows, cols)

    def _read_scale(self, name: str) -> Tensor:
        scale = self._shards.read(name).to(self._device, torch.float32, copy=True)
        if not bool(torch.isfinite(scale).all()):
            raise ValueError(f"{self._shards.entries[name].file}: {name}: holds NaN or infinity")
        return scale


def _cut(scale: Tensor, rows: Span, cols: Span) -> Tensor:
    """Return the scale of a part of a weight, given that of the whole. Parts that begin within a
    block of rows get a scale for each row; the inventory rejects such columns."""
    if scale.shape[1] > 1:
        scale = scale[:, cols.start // FP8_BLOCK : -(-cols.stop // FP8_BLOCK)]
    if len(scale) in (1, rows.of):
        return scale if len(scale) == 1 else scale[rows.index]
    if rows.start % FP8_BLOCK:
        return scale.repeat_interleave(FP8_BLOCK, dim=0)[rows.index]
    return scale[rows.start // FP8_BLOCK : -(-rows.stop // FP8_BLOCK)]


def joined_scales(scales: list[Tensor], rows: list[int], k: int) -> Tensor:
    """Join the scales of weights [rows[i], k] that are stacked: by block if all are, and no block
    would hold rows of two weights; else by row, [sum(rows), 1] or [sum(rows), ceil(k / 128)]."""
    across = -(-k // FP8_BLOCK)
    blocks = [(-(-n // FP8_BLOCK), across) for n in rows]
    if [tuple(s.shape) for s in scales] == blocks and not any(n % FP8_BLOCK for n in rows[:-1]):
        return torch.cat(scales)
    spread = []
    for n, scale in zip(rows, scales, strict=True):
        repeats = {1: n, n: 1}.get(len(scale), FP8_BLOCK)
        by_row = scale.repeat_interleave(repeats, dim=0)[:n]
        spread.append(by_row.expand(n, max(s.shape[1] for s in scales)))
    return torch.cat(spread)


class _Inventory:
    """The Source that reads no tensor, and checks that those which assemble() requests exist."""

    def __init__(self, shards: Shards, form: Format | None, sizes: list[int]) -> None:
        """sizes: the numbers of ranks by which the model can be split."""
        self._path, self._entries, self._format = shards.path, shards.entries, form
        self._sizes = sizes
        self._seen: set[str] = set()
        self._missing: list[str] = []

    def tensor(self, name: str, *dims: Span) -> Tensor:
        self._want(name, (tuple(d.of for d in dims),), _FLOATS)
        return torch.empty(0)

    def linear(self, parts: dict[str, Span], k: Span, *, fp8: bool, bound: float | None) -> Linear:
        for name, span in parts.items():
            weight = self._want(f"{name}.weight", ((span.of, k.of),), (*_FLOATS, _FP8))
            if weight is not None and weight.dtype == _FP8:
                self._want_scale(name, weight, k)
        return Linear(torch.empty(0))

    def _want_scale(self, name: str, weight: Entry, k: Span) -> None:
        at = f"{weight.file}: {name}.weight"
        if self._format is None:
            raise ValueError(f"{at}: is FP8, but config.json has no quantization_config")
        if self._format.excludes(name):
            raise ValueError(f"{at}: is FP8, but quantization_config says it is not converted")
        shapes = scale_shapes(*weight.shape)
        scale = self._format.scale(name, self._entries)
        entry = self._want(scale, tuple(shapes), (*_FLOATS, "F8_E8M0"))
        if entry and shapes[entry.shape][1] > 1 and len(k) < k.of and len(k) % FP8_BLOCK:
            fit = (str(n) for n in self._sizes if not k.of % (n * FP8_BLOCK))
            raise ValueError(
                f"{at}: {k.of // len(k)} ranks would split blocks of {FP8_BLOCK} columns with one "
                f"scale; tp: want {' or '.join(fit) or 1}"
            )

    def _want(
        self, name: str, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[str, ...]
    ) -> Entry | None:
        self._seen.add(name)
        entry = self._entries.get(name)
        if entry is None:
            self._missing.append(name)
            return None
        if entry.shape not in shapes:
            got, want = list(entry.shape), " or ".join(str(list(s)) for s in shapes)
            raise ValueError(f"{entry.file}: {name}: got shape {got}, the config wants {want}")
        if entry.dtype not in dtypes:
            raise ValueError(
                f"{entry.file}: {name}: got dtype {entry.dtype}, want {' or '.join(dtypes)}"
            )
        return entry

    def finish(self) -> None:
        if self._missing:
            raise ValueError(_listed(f"{self._path}: the checkpoint lacks", self._missing))
        extra = [n for n in self._entries if n not in self._seen and not IGNORED.fullmatch(n)]
        if extra:
            what = f"{self._path}: the checkpoint holds what the config does not want:"
            raise ValueError(_listed(what, extra))


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(sorted(names)[:3])}{more}"


@contextmanager
def _bar(total: int, progress: bool | None) -> Iterator[Callable[[], None]]:
    """Yield a function that advances the progress bar."""
    if not (sys.stderr.isatty() if progress is None else progress):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Loading weights", total=total)
        yield lambda: bar.advance(task)
