"""How time and memory grow with sequence length, context and batch: exponents, fitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def run(device: torch.device, level: str, say: Callable[[str], None]) -> dict[str, Any]:
    raise NotImplementedError
