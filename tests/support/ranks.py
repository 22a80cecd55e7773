"""Run a function in several processes that torch.distributed joins, as ranks of a model.

A server process imports torch and llama_fast once and forks the ranks, which takes milliseconds;
sixteen interpreters would import for half a minute. Functions must be importable by name, from a
module that imports neither pytest nor transformers.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT = 60.0  # seconds that a rank waits for the others


def run(size: int, job: Callable[..., Any], *args: Any, seconds: float = 120.0) -> list[Any]:
    """Return what job(*args) returns on each rank, or the text of the exception that it raised;
    None for a rank that ended without either."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llama_fast", __name__])
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (theirs, Path(folder) / "store", rank, size, job, args)
            process = context.Process(target=_rank, args=arguments, daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        results: list[Any] = [None] * size
        open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
        try:
            while open_pipes:
                ready = wait(list(open_pipes), timeout=seconds)
                assert ready, f"ranks {sorted(open_pipes.values())} still run after {seconds} s"
                for pipe in ready:
                    rank = open_pipes.pop(pipe)  # type: ignore[call-overload]
                    try:
                        results[rank] = pipe.recv()  # type: ignore[union-attr]
                    except EOFError:
                        pass
        finally:
            for process in processes:
                process.kill() if open_pipes else process.join()
    return results


def _rank(
    pipe: Connection, store: Path, rank: int, size: int, job: Callable[..., Any], args: Any
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(rank)  # what ranks must agree on, they agree on themselves
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT),
    )
    try:
        result = job(*args)
    except Exception:
        result = traceback.format_exc()
    pipe.send(result)
    pipe.close()
