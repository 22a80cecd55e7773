"""Describe chips and launches, and record launches for a chip that is not present."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1 at import: runs on the CPU


@dataclass(frozen=True)
class Chip:
    """The properties that a configuration may depend on. Bandwidths and rates are in bench/."""

    name: str
    backend: str  # "cuda" or "hip", as Triton names them
    arch: int | str  # 90 for sm_90, "gfx942"
    sms: int
    shared_memory: int  # bytes that one block can have

    @property
    def has_tma(self) -> bool:
        return self.backend == "cuda" and isinstance(self.arch, int) and self.arch >= 90

    @property
    def warp_size(self) -> int:
        return 64 if self.backend == "hip" else 32

    @property
    def has_e4m3(self) -> bool:
        """Return whether conversions and matrix instructions take torch's e4m3 (e4m3fn)."""
        return self.backend == "cuda" and isinstance(self.arch, int) and self.arch >= 89


# For compiling without the chip (tests/static, bench/static).
CHIPS = {
    "sm_80": Chip("NVIDIA A100", "cuda", 80, 108, 166912),
    "sm_89": Chip("NVIDIA L40S", "cuda", 89, 142, 101376),
    "sm_90": Chip("NVIDIA H200", "cuda", 90, 132, 232448),
    "sm_100": Chip("NVIDIA B200", "cuda", 100, 148, 232448),
    "gfx942": Chip("AMD Instinct MI300X", "hip", "gfx942", 304, 65536),
}
# The interpreter runs one program after another: 3 "SMs" keep grids small, and still make
# persistent loops of several programs.
_INTERPRETER = Chip("interpreter", "cuda", 90, 3, 232448)


@functools.lru_cache
def _device_chip(index: int) -> Chip:
    p = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch: int | str = p.gcnArchName.split(":")[0]
        return Chip(p.name, "hip", arch, p.multi_processor_count, 65536)
    shared = getattr(p, "shared_memory_per_block_optin", 101376)
    return Chip(p.name, "cuda", 10 * p.major + p.minor, p.multi_processor_count, shared)


def chip_of(t: Tensor) -> Chip:
    """Return the chip that holds t, or while recording the chip that is recorded for. Raises
    ValueError for a tensor that is not on a GPU, unless Triton interprets."""
    if (recording := recorded()) is not None:
        return recording.chip
    if t.device.type == "cuda":
        index = t.device.index
        return _device_chip(torch.cuda.current_device() if index is None else index)
    if not INTERPRETED:
        raise ValueError(
            f"got a tensor on {t.device}, want one on a GPU: Triton's kernels run there; "
            "TRITON_INTERPRET=1, set before triton is imported, interprets them on a CPU, slowly"
        )
    return _INTERPRETER


def on_device(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make t's device the current one: Triton launches there, whatever its arguments."""
    if t.device.type != "cuda" or t.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(t.device)


# ---- configurations and launches ----


@dataclass(frozen=True)
class Config:
    """The constants that a kernel is compiled with."""

    constants: tuple[tuple[str, int], ...]  # sorted: BLOCK_M, ...
    num_warps: int = 4
    num_stages: int = 2

    @classmethod
    def of(cls, num_warps: int = 4, num_stages: int = 2, **constants: int) -> Config:
        return cls(tuple(sorted(constants.items())), num_warps, num_stages)

    def __getitem__(self, name: str) -> int:
        return dict(self.constants)[name]

    def __str__(self) -> str:
        parts = [f"{k}={v}" for k, v in self.constants]
        return " ".join([*parts, f"warps={self.num_warps}", f"stages={self.num_stages}"])

    def to_json(self) -> dict[str, int]:
        return {
            **dict(self.constants),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass
class Launch:
    """A launch that was recorded instead of made."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    config: Config


@dataclass
class Recording:
    """Launches for a chip; config_index picks one of each Tuner's offered configurations."""

    chip: Chip
    config_index: int = 0
    launches: list[Launch] = field(default_factory=list)
    offers: dict[str, list[Config]] = field(default_factory=dict)

    def offer(self, name: str, offered: list[Config]) -> Config:
        if len(offered) > len(self.offers.get(name, ())):
            self.offers[name] = offered
        return offered[min(self.config_index, len(offered) - 1)]


_recording: Recording | None = None


@contextlib.contextmanager
def record(chip: Chip, config_index: int = 0) -> Iterator[Recording]:
    """Within the block, list launches instead of running them. The chip need not be present, and
    tensors are on the meta device. One thread at a time; for compiling ahead and for tests."""
    global _recording
    before, _recording = _recording, Recording(chip, config_index)
    try:
        yield _recording
    finally:
        _recording = before


def recorded() -> Recording | None:
    """Return the recording in progress, or None."""
    return _recording
