"""Choosing among the few configurations that a kernel offers, and storing the choices.

Nobody waits for tuning on a first call: a Tuner returns the stored choice for this GPU where there
is one (load_choices) and otherwise the first of its configurations, ordered by the kernel's own
cost model. Measuring happens only inside tuning(), which `llama-fast tune` uses. All of it may be
called from any thread; one thread measures at a time, and each key is measured once.
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
    """Chooses among the few configurations that a kernel offers.

    configs(chip, *key) -> list of Config, the best guess first, all of which fit the chip (the
    kernel prunes by shared memory). key: what the choice depends on, such as head_dim and dtype;
    sizes in it are bucketed by the launcher, so that there are few keys.
    """

    def __init__(self, name: str, configs: Callable[..., list[Config]]) -> None:
        self.name, self.configs = name, configs
        self._decided: dict[tuple[Chip, Key], tuple[int, Config]] = {}

    def choose(self, t: Tensor, key: Key, run: Callable[[Config], object] | None = None) -> Config:
        """The configuration for tensors like t. run(config) launches once, into memory that
        nobody reads: tuning calls it many times, so it must not touch the caller's tensors that
        the kernel changes in place."""
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
        config = known if known in offered else offered[0]  # another version may have offered it
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
        """The fastest on this GPU. Once a key and process, whatever is stored; one thread at a
        time, of all Tuners, for two that measure at once would measure each other."""
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
    """Not in the interpreter, whose times mean nothing, nor while a CUDA graph is captured."""
    return not INTERPRETED and not (t.is_cuda and torch.cuda.is_current_stream_capturing())


def _milliseconds(run: Callable[[Config], object], config: Config) -> float:
    """Infinite for a configuration that does not launch here; wrong results are the tests' task."""
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
_generation = 0  # of the choices: what Tuners remember of older ones does not count


@contextlib.contextmanager
def tuning() -> Iterator[None]:
    """Within the block, in every thread, each key that this process has not measured is measured:
    also one that a choice is stored for, which may come from another version or clock."""
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

Choices = dict[str, dict[str, Config]]  # a Tuner's name -> key_text -> its choice

_folders: list[Path] = []  # where choices are read from, the last winning
_loaded: dict[str, Choices] = {}  # a GPU's name -> what holds: read, then measured
_measured: dict[str, Choices] = {}  # by this process


def _forget() -> None:
    global _generation
    with _lock:
        _generation += 1


def file_name(gpu: str) -> str:
    """'NVIDIA H200' -> 'nvidia-h200.json'."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def load_choices(*folders: Path) -> None:
    """Reads each GPU's file from these folders, when that GPU is first used."""
    with _lock:
        _folders[:] = folders
        _loaded.clear()
        _measured.clear()
    _forget()


def save_choices(gpu: str, folder: Path) -> Path:
    """Adds what this process has measured on a GPU to its file, whole or not at all; what other
    processes add at the same time stays."""
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
