"""Time runs in paired rounds, on the host's clock or by a GPU's events."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from . import clock, events
from .figures import Part, Run, Timing, figures, joined, part, ratio
from .limits import Limit
from .machine import UNBOUND, Speed

__all__ = ["CPU", "UNBOUND", "Limit", "Part", "Run", "Speed", "Timing"]
__all__ += ["figures", "joined", "measure", "part", "ratio"]

CPU = torch.device("cpu")


def measure(
    runs: Mapping[str, Run],
    budget: float,
    device: torch.device = CPU,
    *,
    passes: int = 1,
    least: int = clock.MIN_ROUNDS,
    copies: int = 1,
    waits: Collection[str] = (),
) -> dict[str, Timing]:
    """Time the runs in turn, round after round, for about `budget` seconds.

    passes, least: see clock.measure; copies, waits: see events.measure.
    """
    if device.type == "cpu":
        return clock.measure(runs, budget, passes, least)
    return events.measure(runs, budget / passes, copies=copies, waits=waits)
