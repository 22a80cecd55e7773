"""Choose among the configurations that a kernel offers, and store the choices.

A first call does not tune: a Tuner returns the choice stored for this GPU (load_choices), else the
first of its configurations, which the kernel's cost model orders. Measuring happens only inside
tuning(), which `llama-fast tune` uses. Everything here may be called from any thread; one thread
measures at a time, and each key is measured once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from .chip import INTERPRETED, Chip, Config, chip_of, on_device, recorded

Key = tuple[Any, ...]  # strings, ints and bools


def key_text(key: Key) -> str:
    return ",".join(str(part) for part in key)


class Tuner:
    """Choose among the configurations that a kernel offers.

    configs(chip, *key) returns Configs, the best guess first, all of which fit the chip's shared
    memory. key holds what the choice depends on, such as head_dim and dtype; the launcher rounds
    sizes in it, so that there are few keys.
    """

    def __init__(self, name: str, configs: Callable[..., list[Config]]) -> None:
        self.name, self.configs = name, configs
        self._decided: dict[tuple[Chip, Key], tuple[int, Config]] = {}

    def choose(self, t: Tensor, key: Key, run: Callable[[Config], object] | None = None) -> Config:
        """Return the configuration for tensors like t. run(config) launches the kernel once;
        tuning calls it many times, so repeated calls must not change what the caller sees."""
        chip = chip_of(t)
        ordinary = recorded() is None and not _tuning and self.name not in _forced
        if ordinary:
            generation, decided = self._decided.get((chip, key), (-1, None))
            if decided is not None and generation == _generation:
                return decided
        offered = self.configs(chip, *key)
        if not offered:
            raise ValueError(f"{self.name}: no configuration fits {chip.name} for {key_text(key)}")
        if (recording := recorded()) is not None:
            return recording.offer(self.name, offered)
        if self.name in _forced:
            return _forced[self.name]
        if _tuning and run is not None and _can_measure(t):
            return self._measure(t, chip, key, offered, run)
        generation, text = _generation, key_text(key)
        known = _choices(chip.name).get(self.name, {}).get(text)
        config = known if known in offered else offered[0]  # it may be another version's
        if ordinary and not INTERPRETED:
            self._decided[chip, key] = generation, config
        return config

    def _measure(
        self,
        t: Tensor,
        chip: Chip,
        key: Key,
        offered: list[Config],
        run: Callable[[Config], object],
    ) -> Config:
        """Return the fastest on this GPU. Each process measures a key once, whatever is stored, and
        one thread at a time, since two at once would slow each other down."""
        with _measuring:
            mine = _measured.setdefault(chip.name, {}).setdefault(self.name, {})
            if key_text(key) not in mine:
                with on_device(t):
                    times = {config: _milliseconds(run, config) for config in offered}
                best = min(offered, key=lambda config: times[config])
                if times[best] == math.inf:
                    raise RuntimeError(
                        f"{self.name}: no configuration for {key_text(key)} launches on {chip.name}"
                    )
                mine[key_text(key)] = best
                _choices(chip.name).setdefault(self.name, {})[key_text(key)] = best
                _forget()
            return mine[key_text(key)]


def _can_measure(t: Tensor) -> bool:
    """Return False in the interpreter and while a CUDA graph is captured."""
    return not INTERPRETED and not (t.is_cuda and torch.cuda.is_current_stream_capturing())


def _milliseconds(run: Callable[[Config], object], config: Config) -> float:
    """Return the median time, or infinity for a configuration that does not launch here."""
    try:
        times = triton.testing.do_bench(
            lambda: run(config), warmup=10, rep=40, return_mode="median"
        )
        return float(times)
    except triton.runtime.errors.OutOfResources:
        return math.inf


_lock = threading.Lock()  # of the globals below
_measuring = threading.RLock()  # re-entered when run() asks another Tuner
_tuning = 0  # how many tuning() blocks are open
_forced: dict[str, Config] = {}
_generation = 0  # of the stored choices: Tuners drop what they remember of an older one


@contextlib.contextmanager
def tuning() -> Iterator[None]:
    """Within the block, in every thread, measure each key that this process has not measured, even
    if a choice is stored for it: that may come from another version or clock."""
    global _tuning
    with _lock:
        _tuning += 1
    try:
        yield
    finally:
        with _lock:
            _tuning -= 1


@contextlib.contextmanager
def force(name: str, config: Config) -> Iterator[None]:
    """Within the block, make the Tuner of that name return config, to test each one alone."""
    before = _forced.get(name)
    _forced[name] = config
    try:
        yield
    finally:
        if before is None:
            _forced.pop(name, None)
        else:
            _forced[name] = before


# ---- stored choices: one JSON file per GPU ----

Choices = dict[str, dict[str, Config]]  # a Tuner's name -> key_text -> its choice

_folders: list[Path] = []  # where choices are read from; the last one wins
_loaded: dict[str, Choices] = {}  # a GPU's name -> choices in force: read, then measured
_measured: dict[str, Choices] = {}  # by this process


def _forget() -> None:
    global _generation
    with _lock:
        _generation += 1


def file_name(gpu: str) -> str:
    """'NVIDIA H200' -> 'nvidia-h200.json'."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def load_choices(*folders: Path) -> None:
    """Read each GPU's file from these folders, when that GPU is first used."""
    with _lock:
        _folders[:] = folders
        _loaded.clear()
        _measured.clear()
    _forget()


def save_choices(gpu: str, folder: Path) -> Path:
    """Add what this process has measured on a GPU to its file, atomically; what other processes
    add at the same time stays."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(gpu)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        merged = _read_choices(path)
        with _measuring:
            for name, choices in _measured.get(gpu, {}).items():
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


def _choices(gpu: str) -> Choices:
    with _lock:
        if gpu not in _loaded:
            found: Choices = {}
            for folder in _folders:
                for name, choices in _read_choices(folder / file_name(gpu)).items():
                    found.setdefault(name, {}).update(choices)
            _loaded[gpu] = found
        return _loaded[gpu]


def _read_choices(path: Path) -> Choices:
    """Read a file of choices; a missing one is empty. Raises ValueError for a broken one."""
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
