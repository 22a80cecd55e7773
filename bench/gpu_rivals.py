"""The same case on the GPU backend that does not serve it: right or wrong, and how fast.

Neither backend may cost the other its figures. A kernel that hangs or breaks its process's GPU
context is struck off for its op, and the process starts again without it.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from llama_fast import use_backend

from .baselines import REFUSALS, first_line
from .files import BROKEN
from .gpu_case import GpuCase
from .tasks import Store
from .timing import Run

PATIENCE = 20.0  # seconds for one launch; the longest takes some 10 ms


def on(backend: str, case: GpuCase) -> Run:
    """The case's own run with its op on that backend; what else the run calls stays where it is."""
    ours = case.runs["ours"]

    def run(i: int) -> object:
        with use_backend(backend, op=case.op):
            return ours(i)

    return run


def try_out(backend: str, case: GpuCase, device: torch.device, store: Store) -> dict[str, Any]:
    """{"error": ...}, or why there is none: {"skipped": not to be had} or {"failed": broken}."""
    name = f"{case.op} on {backend}"
    struck_off = store.content.setdefault("struck_off", {})
    if name in struck_off:
        return {"failed": struck_off[name]}
    try:
        if not _ends(on(backend, case), device):
            _strike_off(store, name, f"no end within {PATIENCE:.0f} s")
        with use_backend(backend, op=case.op):
            return {"error": case.error()[0]}
    except NotImplementedError as why:  # not built, or not offered
        return {"skipped": first_line(why)}
    except REFUSALS as error:
        if _broken(device):
            _strike_off(store, name, first_line(error))
        return {"failed": first_line(error)}


def _ends(run: Run, device: torch.device) -> bool:
    """Whether the device is done with run in time: a hung kernel cannot be called back."""
    run(0)
    if device.type != "cuda":
        return True
    done = torch.cuda.Event()
    done.record()
    end = time.monotonic() + PATIENCE
    while not done.query():
        if time.monotonic() > end:
            return False
        time.sleep(1e-3)
    return True


def _broken(device: torch.device) -> bool:
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _strike_off(store: Store, name: str, why: str) -> None:
    """Ends the process; the next one takes up the same task."""
    print(f"FAILED {name}: {why}", flush=True)
    store.content["struck_off"][name] = why
    store.save(running=None)
    os._exit(BROKEN)
