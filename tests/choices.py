"""GPU reports made up for tests of what is chosen from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_fast import choices
from llama_fast.bench import choose
from llama_fast.bench.files import write

ENVIRONMENT = {
    "gpu": "NVIDIA H200",
    "sm": "sm_90",
    "commit": "abc",
    "torch": "2.13.0",
    "triton": "3.7.1",
}


def timing(median: float, spread: float = 0.01) -> dict[str, float]:
    return {"median": median, "p10": median * (1 - spread), "p90": median * (1 + spread)}


def case(
    op: str, name: str, *, triton: Any = 2e-3, cuda: Any = 1e-3, shape: str = "s"
) -> dict[str, Any]:
    """One row of a report: a number is a backend's seconds, a dict its whole entry."""
    entries = {
        backend: {"seconds": timing(found), "error": 1e-3, "wrong": False}
        if isinstance(found, float)
        else found
        for backend, found in (("triton", triton), ("cuda", cuda))
    }
    return {"op": op, "shape": shape, "class": name, "backend": "triton", "backends": entries}


def passing(**more: Any) -> dict[str, Any]:
    """One backend's part of the tests: a test of every op passed."""
    passed = {f"tests/gpu/{stem}.py::test_it": 3 for stem in set(choose.TESTS.values())}
    return {"complete": True, "passed": passed, "failed": {}, **more}


def report(*rows: dict[str, Any], environment: Any = None, tests: Any = None, **ops: Any) -> Any:
    env = {**ENVIRONMENT, **(environment or {})}
    tests = {"triton": passing(), "cuda": passing(), **(tests or {})}
    return {
        "environment": env,
        "parts": {
            **{f"tests-{name}": {"commit": env["commit"], **t} for name, t in tests.items()},
            "ops": {"environment": env, "rows": list(rows), **ops},
        },
    }


def chosen(tmp_path: Path, **reports: Any) -> dict[str, Any]:
    """What --choose makes of reports, each in the folder of its name; stored, and read again."""
    for folder, content in reports.items():
        write(tmp_path / folder / "report.json", content)
    made = choose.make(tmp_path)
    path = tmp_path / "choices.json"
    path.write_text(choose.text(made))
    choices._parse(made)
    return made
