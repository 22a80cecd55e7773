"""A pytest plugin: a line of JSON as a test starts and as it ends, so that a run cut short leaves
its results.

python -m pytest -p bench.pytest_results, with LLAMA_FAST_RESULTS naming the file.
"""

from __future__ import annotations

import json
import os
from typing import Any


def pytest_runtest_logstart(nodeid: str) -> None:
    _add({"test": nodeid, "outcome": "started"})  # and if nothing follows, it was running


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        _add(
            {
                "test": report.nodeid,
                "outcome": report.outcome if report.when == "call" or report.skipped else "error",
                "seconds": round(report.duration, 3),
                "why": why[-1500:],
            }
        )


def _add(line: dict[str, Any]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # the controller hears of it as well
        return
    with open(os.environ["LLAMA_FAST_RESULTS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
