"""Read and write runs as JSON files, and choose where they go."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Record:
    """A run's figures. keep() rewrites the file, if there is one."""

    def __init__(self, path: Path | None = None, **results: Any) -> None:
        self.path, self.results = path, {"skipped": {}, "failed": {}, **results}

    def keep(self, **found: Any) -> None:
        self.results.update(found)
        if self.path:
            write(self.path, self.results)

    def skip(self, what: str, why: str) -> None:
        self.results["skipped"][what] = why

    def fail(self, what: str, why: str) -> None:
        self.results["failed"][what] = why

    def say(self, text: str) -> None:
        print(text, flush=True)


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


def read(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError that names a file that is absent or broken."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
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


def rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the ops' rows, then the forward pass's."""
    return [*results.get("ops", ()), *(results.get("end_to_end") or {}).get("rows", ())]


def name(row: Mapping[str, Any]) -> str:
    return f"{row['op']} {row['shape']}"


def own(row: Mapping[str, Any]) -> str:
    """Return our name among the row's seconds."""
    return str(row.get("ours", "ours"))
