"""Run the emulator's tests on one torch thread: their tensors are tiny."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def one_torch_thread(one_thread: None) -> None:
    """Set one thread. A second one for the eager twin doubled these tests' time on two busy
    cores."""
