"""The GPU kernels' tests: on the GPU where there is one, else on the CPU, in Triton's interpreter
or in the CUDA emulator (`make emulate`).

LLAMA_FAST_TEST_BACKEND: triton (the default) or cuda. Marked `gpu` is what only hardware can show:
graphs, streams, races, memory past 2^31 elements. Marked `triton` is what is about Triton's own
kernels: their configurations, their launches.
"""

from __future__ import annotations

import importlib
import os
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import llama_fast as lf
from llama_fast import cuda


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


BACKEND = os.environ.get("LLAMA_FAST_TEST_BACKEND", "triton")


@pytest.fixture(autouse=True)
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    if BACKEND != "triton" and request.node.get_closest_marker("triton"):
        pytest.skip("about Triton's kernels")
    if BACKEND == "cuda" and cuda.EMULATED:
        # Another order of threads for every test: its own, so that a failure repeats.
        from llama_fast import _cuda_emulated

        request.getfixturevalue("one_thread")  # the kernels run on one anyway
        _cuda_emulated.set_seed(zlib.crc32(request.node.nodeid.encode()))
    with lf.use_backend(BACKEND):
        yield


def launcher(op: str) -> Any:
    """The module that launches op in these tests: for outputs and lengths that the op itself would
    not pass on."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return importlib.import_module("llama_fast.backends").kernels(op, device)
