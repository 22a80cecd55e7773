"""JSON files that are whole or not there, and what the processes of a GPU report tell each other.
Imports nothing of llama_fast, which may not be built yet."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

WRONG, BROKEN = 3, 70  # exit codes of a part: something was wrong; its GPU context is lost


def write(path: Path, results: dict[str, Any]) -> None:
    """Whole or not at all: an interrupt between two cases leaves the file of the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def read(path: Path) -> dict[str, Any] | None:
    """None for a file that is not there; a broken one is an error that names it."""
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
        described = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("LLAMA_FAST_COMMIT")
    return described.stdout.strip()


def unreached(content: dict[str, Any]) -> list[str]:
    """A part's tasks of which nothing is known."""
    settled = {*content.get("done", ()), *content.get("skipped", ()), *content.get("failed", ())}
    return [task for task in content.get("planned", ()) if task not in settled]
