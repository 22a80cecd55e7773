"""Load the model's weights from a checkpoint in Hugging Face's format.

Tensors are memory-mapped and read one at a time, fused (q, k, v; gate, up), quantized on request
and packed for the kernels. Besides the result, at most one fused weight is in memory. All names,
shapes and dtypes are checked against the config before the first tensor is read.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..config import LlamaConfig, read_json
from ..ops.quantize import quantize_fp8
from ..reference import FP8_BLOCK, FP8_DTYPE, dequantize_fp8
from .formats import IGNORED, Format, parse
from .shards import Entry, Shards
from .weights import Linear, Weights, assemble, packed

_FP8 = "F8_E4M3"
_FLOATS = ("BF16", "F16", "F32")


def load(
    path: str | Path,
    config: LlamaConfig,
    *,
    dtype: torch.dtype,
    quantize: str | None,
    device: torch.device,
    progress: bool | None = None,
) -> Weights:
    """Load the weights. Linears stored in FP8 stay so; quantize is for the others.

    progress: whether to show a bar on stderr; None: if stderr is a terminal. Raises OSError for a
    missing file and ValueError for one that does not match the config, naming the tensor.
    """
    shards = Shards(path)
    form = parse(read_json(Path(path) / "config.json").get("quantization_config"))
    inventory = _Inventory(shards, form)
    assemble(config, inventory, None)
    inventory.finish(tied=config.tie_word_embeddings)
    with _bar(config.num_hidden_layers + 2, progress) as advance:
        return assemble(config, _Checkpoint(shards, form, dtype, device), quantize, advance)


class _Checkpoint:
    """The Source that reads the tensors."""

    def __init__(
        self, shards: Shards, form: Format | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._shards, self._format = shards, form
        self._dtype, self._device = dtype, device

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._shards.read(name).to(self._device, self._dtype, copy=True)

    def linear(self, parts: dict[str, int], k: int, *, fp8: bool, bound: float | None) -> Linear:
        if all(self._is_fp8(name) for name in parts):
            return self._stored_fp8(parts, k)
        rows = list(parts.values())
        if not fp8:
            weight = torch.empty(sum(rows), k, dtype=self._dtype, device=self._device)
            for part, name in zip(weight.split(rows), parts, strict=True):
                part.copy_(self._plain(name))
            return Linear(packed(weight))
        q = torch.empty(sum(rows), k, dtype=FP8_DTYPE, device=self._device)
        scale = torch.empty(sum(rows), 1, device=self._device)
        pieces = zip(q.split(rows), scale.split(rows), parts, strict=True)
        for q_part, scale_part, name in pieces:
            # From the file's dtype: rounding to the model's dtype first would round twice.
            values, scales = quantize_fp8(self._plain(name), "row")
            q_part.copy_(values), scale_part.copy_(scales)
        return Linear(packed(q), scale, scale_ub=bound)

    def _stored_fp8(self, parts: dict[str, int], k: int) -> Linear:
        """Return weights as stored, with a tensor's scale repeated for its rows. If a block would
        straddle two parts, requantize them by row."""
        assert self._format is not None  # the inventory rejects FP8 without a format
        rows = list(parts.values())
        straddles = self._format.block and any(n % FP8_BLOCK for n in rows[:-1])
        q = torch.empty(sum(rows), k, dtype=FP8_DTYPE, device=self._device)
        scales = []
        for part, name in zip(q.split(rows), parts, strict=True):
            if straddles:
                values, scale = quantize_fp8(self._plain(name), "row")
            else:
                values, scale = self._shards.read(f"{name}.weight"), self._scale(name)
                if not self._format.block:
                    scale = scale.reshape(-1, 1).expand(part.shape[0], 1)
            part.copy_(values)
            scales.append(scale)
        return Linear(packed(q), torch.cat(scales), scale_ub=self._format.activation_bound)

    def _is_fp8(self, name: str) -> bool:
        return self._shards.entries[f"{name}.weight"].dtype == _FP8

    def _plain(self, name: str) -> Tensor:
        """Return a weight in the file's 16 or 32 bits, or in fp32 if the file holds FP8."""
        weight = self._shards.read(f"{name}.weight").to(self._device)
        return dequantize_fp8(weight, self._scale(name)) if self._is_fp8(name) else weight

    def _scale(self, name: str) -> Tensor:
        assert self._format is not None
        full = self._format.scale(name, self._shards.entries)
        scale = self._shards.read(full).to(self._device, torch.float32, copy=True)
        if not bool(torch.isfinite(scale).all()):
            raise ValueError(f"{self._shards.entries[full].file}: {full}: holds NaN or infinity")
        return scale


class _Inventory:
    """The Source that reads no tensor, and checks that those which assemble() requests exist."""

    def __init__(self, shards: Shards, form: Format | None) -> None:
        self._entries, self._format = shards.entries, form
        self._seen: set[str] = set()
        self._missing: list[str] = []

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self._want(name, (shape,), _FLOATS)
        return torch.empty(0)

    def linear(self, parts: dict[str, int], k: int, *, fp8: bool, bound: float | None) -> Linear:
        for name, n in parts.items():
            weight = self._want(f"{name}.weight", ((n, k),), (*_FLOATS, _FP8))
            if weight is not None and weight.dtype == _FP8:
                self._want_scale(name, weight, n, k)
        return Linear(torch.empty(0))

    def _want_scale(self, name: str, weight: Entry, n: int, k: int) -> None:
        at = f"{weight.file}: {name}.weight"
        if self._format is None:
            raise ValueError(f"{at}: is FP8, but config.json has no quantization_config")
        if self._format.excludes(name):
            raise ValueError(f"{at}: is FP8, but quantization_config says it is not converted")
        blocks = (math.ceil(n / FP8_BLOCK), math.ceil(k / FP8_BLOCK))
        shapes = (blocks,) if self._format.block else ((n, 1), (n,), (1,), (1, 1), ())
        self._want(self._format.scale(name, self._entries), shapes, _FLOATS)

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

    def finish(self, *, tied: bool) -> None:
        if self._missing:
            raise ValueError(_listed("the checkpoint lacks", self._missing))
        if tied:
            self._seen.add("lm_head.weight")
        extra = [n for n in self._entries if n not in self._seen and not IGNORED.fullmatch(n)]
        if extra:
            raise ValueError(_listed("the checkpoint holds what the config does not want:", extra))


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
