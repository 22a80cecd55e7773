"""The GPU kernels' tests: on the GPU where there is one, else in Triton's interpreter on the CPU.

Marked `gpu` is what only hardware can show: graphs, streams, races, memory past 2^31 elements.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import llama_fast as lf


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    with lf.use_backend("triton"):
        yield
