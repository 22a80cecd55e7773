"""What the Triton kernels share: the chip at hand, a launch, and how a configuration is chosen.

A launcher receives tensors whose shapes are already checked and outputs that exist, and fills
the outputs. It asks its Tuner for a Config and calls launch(). Nothing here or in a kernel
synchronises with the device, so every launcher can be captured in a CUDA graph.

Nobody waits for tuning on a first call: a Tuner returns the stored choice for this GPU where there
is one (load_choices) and otherwise the first of its configurations, ordered by the kernel's own
cost model. Measuring happens only inside tuning(), which `llama-fast tune` uses.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1 at import: runs on the CPU
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
FP8_MAX: tl.constexpr = tl.constexpr(448.0)
FP8_TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)  # fp32's smallest normal number

cdiv = triton.cdiv
next_power_of_2 = triton.next_power_of_2


# ---- the chip ----


@dataclass(frozen=True)
class Chip:
    """What a configuration may depend on. Sizes in bytes; bandwidth and rates are in bench/."""

    name: str
    backend: str  # "cuda" or "hip", as Triton names them
    arch: int | str  # 90 for sm_90, "gfx942"
    sms: int
    shared_memory: int  # most that one block can have

    @property
    def has_tma(self) -> bool:
        return self.backend == "cuda" and isinstance(self.arch, int) and self.arch >= 90

    @property
    def warp_size(self) -> int:
        return 64 if self.backend == "hip" else 32

    @property
    def has_e4m3(self) -> bool:
        """Whether conversions and matrix instructions take e4m3 as torch stores it (e4m3fn)."""
        return self.backend == "cuda" and isinstance(self.arch, int) and self.arch >= 89


# For compiling without the chip (tests/static, bench/static.py).
CHIPS = {
    "sm_80": Chip("NVIDIA A100", "cuda", 80, 108, 166912),
    "sm_89": Chip("NVIDIA L40S", "cuda", 89, 142, 101376),
    "sm_90": Chip("NVIDIA H200", "cuda", 90, 132, 232448),
    "sm_100": Chip("NVIDIA B200", "cuda", 100, 148, 232448),
    "gfx942": Chip("AMD Instinct MI300X", "hip", "gfx942", 304, 65536),
}
# The interpreter runs one program after another: few "SMs" keep persistent loops short, and more
# than one exercises them.
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
    """The chip that holds t; while recording, the one recorded for."""
    if _recording is not None:
        return _recording.chip
    if t.device.type == "cuda":
        index = t.device.index
        return _device_chip(torch.cuda.current_device() if index is None else index)
    return _INTERPRETER


def programs(work: int, slots: int) -> int:
    """How many programs of a persistent grid share work items, at most slots: as few as finish in
    the same number of rounds, so that the last round is full."""
    return cdiv(work, cdiv(work, slots)) if work else 0


# ---- configurations ----


@dataclass(frozen=True)
class Config:
    """Constants that a kernel is compiled with."""

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


Key = tuple[Any, ...]  # strings, ints and bools


def key_text(key: Key) -> str:
    return ",".join(str(part) for part in key)


class Tuner:
    """Chooses among the few configurations that a kernel offers.

    configs(chip, *key) -> list of Config, the best guess first, all of which fit the chip (the
    kernel prunes by shared memory). key: what the choice depends on, such as head_dim and dtype;
    sizes in it are bucketed by the launcher, so that there are few keys.
    """

    def __init__(self, name: str, configs: Callable[..., list[Config]]) -> None:
        self.name, self.configs = name, configs
        self._lock = threading.Lock()

    def choose(self, t: Tensor, key: Key, run: Callable[[Config], object] | None = None) -> Config:
        """The configuration for tensors like t. run(config) launches once, into memory that
        nobody reads: tuning calls it many times, so it must not touch the caller's tensors that
        the kernel changes in place."""
        chip = chip_of(t)
        offered = self.configs(chip, *key)
        if not offered:
            raise ValueError(f"{self.name}: no configuration fits {chip.name} for {key_text(key)}")
        if _recording is not None:
            return _recording.offer(self.name, offered)
        if self.name in _forced:
            return _forced[self.name]
        known = _choices(chip.name).get(self.name, {}).get(key_text(key))
        if known in offered:  # else: stored by a version that offered others
            return known
        if run is None or not _tuning or INTERPRETED or torch.cuda.is_current_stream_capturing():
            return offered[0]
        with self._lock:
            known = _choices(chip.name).get(self.name, {}).get(key_text(key))
            if known in offered:  # another thread was faster
                return known
            with _on_device(t):
                best = min(offered, key=lambda config: _milliseconds(run, config))
            _choices(chip.name).setdefault(self.name, {})[key_text(key)] = best
        return best


def _milliseconds(run: Callable[[Config], object], config: Config) -> float:
    """Infinite for a configuration that does not launch here; wrong results are the tests' task."""
    try:
        times = triton.testing.do_bench(
            lambda: run(config), warmup=10, rep=40, return_mode="median"
        )
        return float(times)
    except triton.runtime.errors.OutOfResources:
        return float("inf")


_tuning = 0  # how many tuning() blocks are open
_forced: dict[str, Config] = {}


@contextlib.contextmanager
def tuning() -> Iterator[None]:
    """Within the block, a key that no choice is stored for is measured, once."""
    global _tuning
    _tuning += 1
    try:
        yield
    finally:
        _tuning -= 1


@contextlib.contextmanager
def force(name: str, config: Config) -> Iterator[None]:
    """Within the block, the Tuner of that name returns config: for testing each one alone."""
    before = _forced.get(name)
    _forced[name] = config
    try:
        yield
    finally:
        if before is None:
            _forced.pop(name, None)
        else:
            _forced[name] = before


# ---- stored choices: one JSON file a GPU ----

_folders: list[Path] = []  # where choices are read from, the last winning
_loaded: dict[str, dict[str, dict[str, Config]]] = {}


def file_name(gpu: str) -> str:
    """'NVIDIA H200' -> 'nvidia-h200.json'."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def load_choices(*folders: Path) -> None:
    """Reads each GPU's file from these folders, when that GPU is first used."""
    _folders[:] = folders
    _loaded.clear()


def save_choices(gpu: str, folder: Path) -> Path:
    """Adds this process's choices for a GPU to its file; whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(gpu)
    merged = _read_choices(path)
    for name, choices in _choices(gpu).items():
        merged.setdefault(name, {}).update(choices)
    content = {
        "gpu": gpu,
        "triton": triton.__version__,
        "choices": {
            name: {key: config.to_json() for key, config in sorted(choices.items())}
            for name, choices in sorted(merged.items())
        },
    }
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
    return path


def _choices(gpu: str) -> dict[str, dict[str, Config]]:
    if gpu not in _loaded:
        found: dict[str, dict[str, Config]] = {}
        for folder in _folders:
            for name, choices in _read_choices(folder / file_name(gpu)).items():
                found.setdefault(name, {}).update(choices)
        _loaded.setdefault(gpu, found)
    return _loaded[gpu]


def _read_choices(path: Path) -> dict[str, dict[str, Config]]:
    """A missing file holds no choices; a broken one is an error that names it."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    try:
        return {
            name: {key: Config.of(**values) for key, values in choices.items()}
            for name, choices in json.loads(text)["choices"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a file of tuned choices ({error}); delete it") from None


# ---- launching ----


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
    """What launchers would do on a chip; config_index picks among each Tuner's offers."""

    chip: Chip
    config_index: int = 0
    launches: list[Launch] = field(default_factory=list)
    offers: dict[str, list[Config]] = field(default_factory=dict)

    def offer(self, name: str, offered: list[Config]) -> Config:
        self.offers[name] = offered
        return offered[min(self.config_index, len(offered) - 1)]


_recording: Recording | None = None


@contextlib.contextmanager
def record(chip: Chip, config_index: int = 0) -> Iterator[Recording]:
    """Within the block nothing runs: launches on a chip that need not be there are listed, for
    tensors on the meta device. One thread at a time; for compiling ahead and for tests."""
    global _recording
    before, _recording = _recording, Recording(chip, config_index)
    try:
        yield _recording
    finally:
        _recording = before


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, config: Config, **constants: Any
) -> None:
    """kernel[grid](*arguments, **constants, **config's), on the device and the current stream of
    the first tensor among the arguments. A grid with a zero launches nothing: on a GPU it would
    leave an error for the next call to trip over."""
    if 0 in grid:
        return
    if _recording is not None:
        _recording.launches.append(Launch(kernel, grid, arguments, constants, config))
        return
    with _on_device(_first_tensor(arguments)):
        kernel[grid](
            *arguments,
            **constants,
            **dict(config.constants),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def _first_tensor(arguments: tuple[Any, ...]) -> Tensor:
    for argument in arguments:
        base = getattr(argument, "base", argument)  # of a TensorDescriptor
        if isinstance(base, Tensor):
            return base
    raise TypeError("launch: want a tensor among the arguments")


def _on_device(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments: make it the tensor's."""
    if t.device.type != "cuda" or t.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(t.device)
