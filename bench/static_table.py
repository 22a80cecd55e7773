"""The static table that `python -m bench.static --write` leaves beside this file."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("static_table.json")


@dataclass(frozen=True)
class Resident:
    """A kernel's first configuration on sm_90; what is not known is left out."""

    blocks: int = 1  # that one multiprocessor holds
    shared: int = 0  # bytes a block
    constants: dict[str, int] = field(default_factory=dict)

    def in_flight(self, loaded: int) -> float:
        """Bytes on their way per block: its pipeline's buffers, or what its registers wait for.
        Enough, where the kernel is not known."""
        return max(self.shared, loaded) if self.constants else math.inf


@functools.cache
def rows() -> list[dict[str, Any]]:
    """Empty where no table was made."""
    return json.loads(PATH.read_text())["rows"] if PATH.exists() else []


def save(content: dict[str, Any]) -> None:
    """Of all that was compiled, what resident() is asked for."""
    kept = [r for r in content["rows"] if r["arch"] == "sm_90" and r["config_index"] == 0]
    names = ("op", "kernel", "cases", "config", "config_index", "arch", "facts", "occupancy")
    small = [{name: row[name] for name in names} for row in kept]
    for row in small:
        unread = ("reductions", "arithmetic")
        row["facts"] = {k: v for k, v in (row["facts"] or {}).items() if k not in unread}
    PATH.write_text(json.dumps({"triton": content["triton"], "rows": small}, indent=1) + "\n")
    rows.cache_clear()


def resident(kernel: str, case: str) -> Resident:
    """For a kernel in one of static_cases' calls."""
    for row in rows():
        wanted = (row["arch"], row["kernel"], row["config_index"]) == ("sm_90", kernel, 0)
        if wanted and case in row["cases"] and row["facts"]:
            parts = (part.split("=") for part in row["config"].split())
            constants = {name: int(value) for name, value in parts}
            return Resident(row["occupancy"]["blocks"], row["facts"]["shared"], constants)
    return Resident()
