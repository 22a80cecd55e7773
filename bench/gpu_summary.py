"""What a GPU report says: its parts in one file, what is wrong in them, and the end of what is
printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import targets
from .files import read, unreached, write


def merge(out: Path, parts: list[str]) -> dict[str, Any]:
    """All parts in DIR/report.json, those of earlier runs included."""
    path = out / "report.json"
    found = read(path) or {"parts": {}}
    for part in parts:
        content = read(out / f"{part}.json")
        if content is not None:
            found["parts"][part] = {**content, "unreached": unreached(content)}
    rows = [row for part in found["parts"].values() for row in part.get("rows", [])]
    environments = [p["environment"] for p in found["parts"].values() if "environment" in p]
    found["environment"] = environments[-1] if environments else {}
    found["targets"] = targets.compare(rows, found["environment"].get("gpu") or "")
    write(path, found)
    for part in parts:  # once it is in the report
        (out / f"{part}.json").unlink(missing_ok=True)
    return found


def problems(found: dict[str, Any], parts: list[str]) -> list[str]:
    """What is wrong, a line each, of these parts."""
    lines = []
    for part in parts:
        content = found["parts"].get(part)
        if content is None:
            lines.append(f"{part}: did not run")
            continue
        if content.get("error"):
            lines.append(f"{part}: {content['error'].strip().splitlines()[-1]}")
        for name, error in content.get("failed", {}).items():
            lines.append(f"{part}: {name}: {error.strip().splitlines()[-1][:200]}")
        for row in content.get("rows", []):
            lines += [f"{part}: {row['op']} {row['shape']}: {what}" for what in _faults(row)]
    return lines


def _faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row, of the backend that serves and of the other one."""
    eager = f"eager's {row.get('eager_error')}"
    found = [f"WRONG, error {row.get('error')}, {eager}"] if row.get("wrong") else []
    for name, entry in row.get("backends", {}).items():
        if name != row["backend"] and entry.get("wrong"):
            found.append(f"WRONG on {name}, error {entry['error']}, {eager}")
        if "failed" in entry:
            found.append(f"failed on {name}: {entry['failed']}")
    return found


def summary(found: dict[str, Any]) -> str:
    """The end of what is printed: a screen at most."""
    env = found["environment"]
    names = ("gpu", "sm", "driver", "cuda", "torch", "triton", "sm_mhz", "max_sm_mhz", "commit")
    lines = ["", "  ".join(f"{n} {env[n]}" for n in names if env.get(n))]
    for part, content in found["parts"].items():
        counts = [f"{len(content.get('rows', []))} rows"] if "rows" in content else []
        counts += [f"{n} {what}" for what, n in content.get("counts", {}).items()]
        for key in ("failed", "skipped", "unreached"):
            if "counts" not in content and content.get(key):
                counts.append(f"{len(content[key])} {key}")
        state = "" if content.get("complete") else "  INCOMPLETE"
        lines.append(f"{part:<14}{content.get('wall_s', 0):>6.0f} s  {', '.join(counts)}{state}")
        if "what" in content:
            lines.append(f"    {content['what']}")
        for name, why in list(content.get("skipped", {}).items())[:5]:
            lines.append(f"    left out: {name}: {why[:120]}")
        if content.get("unreached"):
            names_left = ", ".join(content["unreached"])
            lines.append(f"    out of time: {names_left[:300]}")
    ops = found["parts"].get("ops", {}).get("rows", [])
    lines += targets.side_by_side(ops)
    lines += [f"growth of {what}: n^{value:.2f}" for what, value in targets.growth(found).items()]
    if any(entry["got"] is not None for entry in found["targets"]):
        lines.append(targets.table(found["targets"]))
    wrong = problems(found, list(found["parts"]))
    lines += [f"PROBLEM {line}" for line in wrong[:20]] or ["nothing was wrong"]
    return "\n".join(lines)
