"""Run the emulator's tests on one torch thread: their tensors are tiny."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def one_torch_thread(one_thread: None) -> None:
    """Set one thread: a second, for the eager twin, doubled the tests' time on two busy cores."""
