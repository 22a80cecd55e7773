"""The emulator's tests share a machine with others' threads; their own tensors are tiny."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def one_torch_thread(one_thread: None) -> None:
    """On two busy cores a second thread for the eager twin doubled these tests' time."""
