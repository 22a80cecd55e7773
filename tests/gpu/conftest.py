"""Fixtures for the GPU kernels' tests. They run on the GPU if there is one, otherwise on the CPU,
in Triton's interpreter or in the CUDA emulator (`make emulate`).

LLAMA_FAST_TEST_BACKEND is triton (the default) or cuda. The mark `gpu` is for what only hardware
can show: graphs, streams, races, memory past 2^31 elements. The mark `triton` is for Triton's own
kernels: their configurations and launches.
"""

from __future__ import annotations

import contextlib
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton.runtime.jit import KernelInterface

import llama_fast as lf
from llama_fast import cuda, dispatch
from llama_fast.kernels import common

from ..support import decode_attention
from . import interpreter
from .other_device import OtherDevice

if common.INTERPRETED:
    interpreter.install()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


BACKEND = os.environ.get("LLAMA_FAST_TEST_BACKEND", "triton")

# The tests that compute-sanitizer runs (sanitize.py): a small case of each op and of each path of
# its kernels. TMA and wgmma serve head_dim 64 and 128, and K a multiple of 16, on sm_90.
SANITIZED = {
    "test_rms_norm.py::test_matches_eager": ("64-torch.bfloat16", "20001-torch.bfloat16"),
    "test_rms_norm.py::test_f29_f31_offsets_and_strides": ("769",),
    "test_activation.py::test_matches_eager": ("257-torch.bfloat16", "16500-torch.bfloat16"),
    "test_activation.py::test_f29_f30_f31_strides_offsets_and_canaries": ("93",),
    "test_rope.py::test_f29_f30_f31_offsets_strides_and_canaries": ("80-halves", "128-pairs"),
    "test_rope.py::test_f04_append_into_one_pool": ("torch.bfloat16-(9, 40, 8, 128)-halves",),
    "test_rope.py::test_append_to_an_fp8_cache": ("pairs-scale a head",),
    "test_quantize.py::test_bitwise": tuple(
        f"(130, 129)-{granularity}-torch.bfloat16"
        for granularity in ("tensor", "row", "block", "block_2d")
    ),
    "test_attention.py::test_head_dims": (
        "64-bfloat16",
        "128-bfloat16",
        "72-bfloat16",
        "128-float32",
    ),
    "test_attention.py::test_f09_lengths_that_no_block_divides": ("257x257-bfloat16",),
    "test_attention_masks.py::test_f10_packed_sequences_with_empty_ones": (
        "tma-True",
        "pointers-True",
    ),
    "test_decode_attention.py::test_f09_lengths_that_no_block_divides": (
        "contiguous-bfloat16",
        "paged-bfloat16",
        "paged-float32",
    ),
    "test_decode_attention.py::test_speculative_decoding_and_chunked_prefill": (
        "causal-30_queries-bfloat16",
    ),
    "test_decode_attention.py::test_f13_f31_forced_splits_of_strided_queries": (
        "torch.bfloat16-7",
    ),
    "test_fp8_cache.py::test_fp8_cache": ("torch.bfloat16-1", "torch.bfloat16-20"),
    "test_fp8_gemm.py::test_on_every_chip": ("at hand-33", "at hand-65"),
    "test_fp8_gemm.py::test_integers_are_exact": (
        "17-257-129-row-row",
        "130-257-144-row-row",
        "130-257-144-block-block_2d",
    ),
    "test_fp8_gemm.py::test_16_bit_activations": ("1-96-769-torch.bfloat16",),
}


# Tests of offsets past 2^31 elements, by the number of their fault: on a GPU up to 11 GB each. The
# mark `large` lets a run with many workers give them one. (Not an xdist_group: xdist 3.8 appends it
# to a name that pytest 9.2 no longer reads, and spreads them all the same.)
LARGE = re.compile(r"test_f0[12356]_")
KEPT = 2 << 30  # bytes of a GPU's memory that a worker may hold between two tests

collected: dict[str, list[str]] = {}  # every test, in the form of SANITIZED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu/" not in item.nodeid:
            continue
        name, _, parameters = item.nodeid.partition("tests/gpu/")[2].partition("[")
        collected.setdefault(name, []).append(parameters[:-1])
        if parameters[:-1] in SANITIZED.get(name, ()):
            item.add_marker("sanitize")
        if LARGE.match(item.name):
            item.add_marker("large")


def give_back() -> None:
    """Return memory that a test left in the caching allocator, for the other workers."""
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > KEPT:
        torch.cuda.empty_cache()


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that launches a Triton kernel although it tests another backend."""

    def refuse(kernel: Any, grid: Any) -> None:
        pytest.fail(f"a test of {BACKEND} launched the Triton kernel {kernel.__name__}")

    monkeypatch.setattr(KernelInterface, "__getitem__", refuse)


@pytest.fixture(autouse=True)
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    if BACKEND != "triton":
        if request.node.get_closest_marker("triton"):
            pytest.skip("tests Triton kernels")
        request.getfixturevalue("no_triton")
    if not torch.cuda.is_available():
        request.getfixturevalue("one_thread")  # the kernels run on one anyway
    if BACKEND == "cuda" and cuda.EMULATED:
        # Each test has its own order of threads, so that a failure repeats.
        from llama_fast import _cuda_emulated

        _cuda_emulated.set_seed(zlib.crc32(request.node.nodeid.encode()))
    here = contextlib.nullcontext() if torch.cuda.is_available() else OtherDevice()
    with lf.use_backend(BACKEND), here:
        yield
    give_back()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill memory from torch.empty with NaN: outputs and workspaces."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def lengths(device: torch.device) -> Any:
    """Return a function that makes int32 tensors on the device."""
    return lambda *n: torch.tensor(n, dtype=torch.int32, device=device)


@pytest.fixture
def make(device: torch.device) -> Any:
    """Return support.decode_attention.make for the device."""
    return lambda *arguments: tuple(t.to(device) for t in decode_attention.make(*arguments))


def launcher(op: str) -> Any:
    """Return the module that launches op, for outputs and lengths that the op would refuse."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return dispatch.kernels(op, torch.empty(0, device=device))


@pytest.fixture(autouse=True)
def gpu_context() -> Iterator[None]:
    """End the process if the GPU context is lost. A faulting kernel takes the context with it, and
    every later test would fail. pytest-xdist blames the running test and starts another process."""
    yield
    if torch.cuda.is_available() and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(70)
