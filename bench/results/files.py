"""Read and write runs as JSON files, and choose where they go."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def default_folder() -> Path:
    """Return the default folder of runs: bench/out of a checkout, from any working directory, else
    llama_fast_bench in the current folder."""
    return ROOT / "bench" / "out" if (ROOT / "setup.py").exists() else Path("llama_fast_bench")


def write(path: Path, results: dict[str, Any]) -> None:
    """Write atomically: an interrupt leaves the file as it was after the last case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def read(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if there is no file. Raises ValueError that names a broken file."""
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
    """Return the checkout's commit, with a + if files differ from it, else LLAMA_FAST_COMMIT."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        described = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("LLAMA_FAST_COMMIT")
    return described.stdout.strip()


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the ops' rows, then the forward pass's."""
    return [*results.get("ops", ()), *(results.get("end_to_end") or {}).get("rows", ())]


def own(row: Mapping[str, Any]) -> str:
    """Return our name among the row's seconds."""
    return str(row.get("ours", "ours"))
