"""Fixtures for every test, and the order of files under pytest-xdist."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is first imported. Its kernels then run on CPU tensors (tests/gpu).
    os.environ.setdefault("TRITON_INTERPRET", "1")

from llama_fast import Llama, _cpu
from llama_fast.generation import generate, graphs

from .support import smollm2 as smollm2_wheel
from .support.recorded_graph import RecordedGraph

# pytest-xdist starts these first (make test): a long file that starts last keeps one core busy
# while the others idle.
LONGEST = (
    "tests/static/test_triton.py",
    "tests/static/test_cuda.py",
    "tests/test_packaging.py",
    "tests/gpu/test_model.py",
    "tests/gpu/test_decode_attention.py",
    "tests/gpu/test_quantize.py",
    "tests/gpu/test_attention.py",
    "tests/ops/test_autograd.py",
    "tests/ops/test_tuning.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        rank = {file: at for at, file in enumerate(LONGEST)}
        items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))
    gc.freeze()  # what is imported by now: each gc.collect() would take half a second to visit it
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=[named] if (named := os.environ.get("LLAMA_FAST_CPU_ISA")) else _cpu.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Set each instruction set that this machine can run, or only LLAMA_FAST_CPU_ISA."""
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest) -> Path:
    """Return a folder with SmolLM2-135M-Instruct, bf16, or skip the test."""
    return smollm2_wheel.converted(request.config.cache)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread for tiny models. With two, on a busy machine, each small op waits a
    scheduler's quantum for its other thread and takes 15 ms."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch, model: Llama) -> None:
    """Send CPU tensors of the file's `model` along the path of a GPU, with graphs that record."""
    monkeypatch.setattr(generate, "_runs_ahead", lambda device: True)
    monkeypatch.setattr(graphs, "cannot_capture", lambda device: None)
    monkeypatch.setattr(graphs, "CudaGraph", RecordedGraph)
    model.decoders.clear()
    RecordedGraph.made.clear()


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the thread count that a test changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return run_python(code, check=True, NAME=value): a new interpreter in the checkout's root."""

    def run(code: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).resolve().parent.parent,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=check,
            timeout=120,
        )

    return run
