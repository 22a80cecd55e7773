"""JSON files that are whole or not there, and where they go."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def default_folder() -> Path:
    """Where runs are written unless told otherwise: bench/out of a checkout, wherever it is run
    from, else llama_fast_bench in the current folder."""
    return ROOT / "bench" / "out" if (ROOT / "setup.py").exists() else Path("llama_fast_bench")


def write(path: Path, results: dict[str, Any]) -> None:
    """Whole or not at all: an interrupt between two cases leaves the file of the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def read(path: Path) -> dict[str, Any] | None:
    """None for a file that is not there; ValueError, which names it, for a broken one."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); delete it") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: want a JSON object; delete it")
    return found


def commit() -> str | None:
    """The checkout's, with a + when files differ from it; elsewhere what LLAMA_FAST_COMMIT says."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        described = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("LLAMA_FAST_COMMIT")
    return described.stdout.strip()


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Everything with times: the ops' rows, then the forward pass's."""
    return [*results.get("ops", ()), *(results.get("end_to_end") or {}).get("rows", ())]


def own(row: dict[str, Any]) -> str:
    """Our name among the row's seconds."""
    return str(row.get("ours", "ours"))
