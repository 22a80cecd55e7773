"""A run as a table for spreadsheets: a row per case and implementation."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

COLUMNS = (
    "op",
    "shape",
    "implementation",
    "median_s",
    "p10_s",
    "p90_s",
    "rounds",
    "rate",
    "unit",
    "of_limit",
    "ours_is_times_faster",
    "error",
)


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for r in [*results["ops"], *results.get("end_to_end", {}).get("rows", [])]:
            table.writerows(_lines(r))


def _lines(r: dict[str, Any]) -> list[dict[str, Any]]:
    """The limit is no implementation: it is in of_limit."""
    ours = r["seconds"][r.get("ours", "ours")]["median"]
    lines = []
    for name, t in r["seconds"].items():
        if name.startswith("limit"):
            continue
        share = ours / t["median"]  # of ours' rate
        lines.append(
            {
                "op": r["op"],
                "shape": r["shape"],
                "implementation": name,
                "median_s": t["median"],
                "p10_s": t["p10"],
                "p90_s": t["p90"],
                "rounds": t["rounds"],
                "rate": r["rate"] * share,
                "unit": r["unit"],
                "of_limit": r["of_limit"] * share,
                "ours_is_times_faster": 1 / share,
                "error": r.get("errors", {}).get(name, ""),
            }
        )
    return lines
