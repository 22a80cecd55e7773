"""Run four processes at once in one folder: python -m tests.static.race compile|save FOLDER.

compile: each compiles one kernel for sm_90 with FOLDER as Triton's cache, and prints the hash of
its cubin; then four more do, from that cache. save: each adds a choice of its own to one GPU's
file. They are forked, so that they start together.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
from pathlib import Path

from llama_fast.bench.static import compiled
from llama_fast.kernels import common, tuning

from .demo_cases import launch_copy

PROCESSES = 4
_fork = multiprocessing.get_context("fork")
_start = _fork.Barrier(PROCESSES)


def compile_one(_: int) -> str:
    with common.record(common.CHIPS["sm_90"]) as recording:
        launch_copy(1)
    (launch,) = recording.launches
    _, compiler = compiled.specialize(launch, recording.chip)
    _start.wait()
    return hashlib.sha256(compiler().asm["cubin"]).hexdigest()


def save_one(index: int) -> str:
    for step in range(8):
        mine = {f"{index},{step}": common.Config.of(BLOCK=index)}
        tuning._measured["a GPU"] = {"race": mine}
        if step == 0:
            _start.wait()
        common.save_choices("a GPU", Path(sys.argv[2]))
    return str(index)


def main() -> None:
    task = {"compile": compile_one, "save": save_one}[sys.argv[1]]
    os.environ["TRITON_CACHE_DIR"] = sys.argv[2]
    for _ in range(2 if task is compile_one else 1):
        with _fork.Pool(PROCESSES) as pool:
            print("\n".join(pool.map(task, range(PROCESSES), chunksize=1)))


if __name__ == "__main__":
    main()
