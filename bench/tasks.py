"""Runs one part of a GPU report: task after task, the file on disk written after each.

A part is a process of its own. A kernel that faults takes its process's GPU context along: the
process leaves with BROKEN, and the next one goes on after the task that was running.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .files import BROKEN, read, unreached, write
from .gpu_case import Unsupported

Rows = list[dict[str, Any]]


class Store:
    """DIR/<part>.json: rows, and what became of the tasks that have none."""

    def __init__(self, path: Path, environment: Mapping[str, Any], resume: bool) -> None:
        self.path = path
        self.content: dict[str, Any] = (read(path) if resume else None) or {
            "part": path.stem,
            "environment": dict(environment),
            "complete": False,
            "running": None,
            "rows": [],
            "skipped": {},  # task -> why
            "failed": {},  # task -> error
            "planned": [],
            "done": [],
        }

    def save(self, **changes: Any) -> None:
        self.content.update(changes)
        write(self.path, self.content)


def run(
    store: Store,
    tasks: Mapping[str, Callable[[], Rows]],
    deadline: float,
    say: Callable[[dict[str, Any]], None],
    clock: Callable[[], float] = time.time,
) -> None:
    """deadline: on the clock; a task that has begun is finished."""
    content = store.content
    content["planned"] = list(tasks)
    for name in unreached(content):
        if clock() >= deadline:
            break
        store.save(running=name)
        try:
            rows = tasks[name]()
        except Unsupported as why:
            content["skipped"][name] = str(why)
        except KeyboardInterrupt:
            store.save()
            raise
        except Exception as error:
            _fail(store, name, error)
        else:
            content["rows"] += rows
            content["done"].append(name)
            for row in rows:
                say(row)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    store.save(running=None, complete=not unreached(content))


def _fail(store: Store, name: str, error: Exception) -> None:
    trace = traceback.format_exception(error)
    store.content["failed"][name] = "".join(trace)[-2000:]
    print(f"FAILED {name}: {''.join(trace[-1:]).strip()[:300]}", flush=True)
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:  # every call fails from here on
        store.save(running=None)
        os._exit(BROKEN)
