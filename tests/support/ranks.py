"""Run a function in several processes that torch.distributed joins, as ranks of a model.

A server process imports torch and llama_fast once and forks the ranks, which takes milliseconds;
sixteen interpreters would import for half a minute. Functions must be importable by name, from a
module that imports neither pytest nor transformers.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
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
    context.set_forkserver_preload(["llama_fast.model", __name__])
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
                    with contextlib.suppress(EOFError):
                        results[rank] = pipe.recv()  # type: ignore[union-attr]
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


# ---- jobs ----


def results(
    checkpoints: dict[str, tuple[str, str | None]],
    tokens: list[list[int]],
    new: int,
    quantize_activations: bool = False,
) -> dict[str, Any]:
    """Load each checkpoint, (folder, recipe), in fp32. Return its logits, the bytes of its weights
    and `new` greedy tokens after each row of tokens; or the error that loading raised."""
    import torch

    import llama_fast as lf
    from llama_fast import cpu

    cpu.prefers_fp8_activations = lambda x: quantize_activations
    tp, found = lf.parallel.join(), {}
    for name, (folder, quantize) in checkpoints.items():
        try:
            model = lf.Llama.from_pretrained(folder, torch.float32, quantize, tp=tp)
        except (ValueError, lf.parallel.PeerError) as error:
            found[name] = f"{type(error).__name__}: {error}"
            continue
        logits = model(torch.tensor(tokens)).numpy()
        ids = model.generate(tokens, new, temperature=0, stop_ids=()) if new else []
        found[name] = logits, model.weights.nbytes, ids
    return found


def generations(
    folder: str, draft: str, prompts: list[list[int]], options: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return the tokens of generate with each set of options, and log probabilities. Options'
    speculate is None, "lookup", or "split" or "whole" for a draft model on all ranks or on each."""
    import torch

    import llama_fast as lf
    from llama_fast.generation import generate

    tp = lf.parallel.join()
    model = lf.Llama.from_pretrained(folder, torch.float32, tp=tp)
    drafts = {
        "split": lf.Llama.from_pretrained(draft, torch.float32, tp=tp),
        "whole": lf.Llama.from_pretrained(draft, torch.float32),
    }
    found: dict[str, Any] = {}
    for name, chosen in options.items():
        if by := chosen.get("speculate"):
            chosen = chosen | {"speculate": drafts.get(by, by)}
        found[name] = model.generate(prompts, **chosen)
    generate._runs_ahead = lambda device: True  # a GPU's loop; this process ends after the job
    found["decoder"] = model.generate(prompts, **options["greedy"])
    found["logprobs"] = [t.numpy() for t in model.logprobs(prompts)]
    return found


def failures(folders: list[str], draft: str) -> dict[str, str]:
    """Make one rank, or all, fail in several ways. Return the error of each. folders: a checkpoint,
    another one, and none."""
    import torch

    import llama_fast as lf

    tp = lf.parallel.join()
    last = tp.rank == tp.size - 1

    def load(folder: str, **options: Any) -> Any:
        return lf.Llama.from_pretrained(folder, torch.float32, tp=tp, **options)

    model = load(folders[0])
    whole = lf.Llama.from_pretrained(folders[0], torch.float32)
    attempts: dict[str, Callable[[], Any]] = {
        "missing on one": lambda: load(folders[2] if last else folders[0]),
        "missing on all": lambda: load(folders[2]),
        "another on one": lambda: load(folders[1] if last else folders[0]),
        "another recipe on one": lambda: load(folders[0], quantize="fp8" if last else None),
        "bad recipe on all": lambda: load(folders[0], quantize="fp9"),
        "bad id on one": lambda: model.generate([[1, 999 if last else 2]], 2),
        "another prompt on one": lambda: model.generate([[1, 3 if last else 2]], 2),
        "another seed on one": lambda: model.generate([[1, 2]], 2, seed=int(last)),
        "a device": lambda: load(folders[0], device="meta"),
        "a draft on more ranks": lambda: whole.generate([[1]], 2, speculate=load(draft)),
        "graphs": lambda: model.generate([[1, 2]], 2, graphs=True),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "no error"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    found["still works"] = str(model.generate([[1, 2]], 2, temperature=0, stop_ids=()))
    return found


def one_dies(folder: str, how: str) -> tuple[str, float]:
    """Let the last rank end while the others compute or load. Return their error, and after how
    many seconds it came."""
    import signal

    import torch

    import llama_fast as lf

    tp = lf.parallel.join()
    model = lf.Llama.from_pretrained(folder, torch.float32, tp=tp)
    dies = tp.rank == tp.size - 1
    start = time.perf_counter()

    def on_token(index: int, token: int) -> None:
        nonlocal start
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        start = time.perf_counter()

    try:
        if how == "in generate":
            model.generate([[1, 2, 3]], 50, on_token=on_token, stop_ids=())
        elif dies:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            lf.Llama.from_pretrained(folder, torch.float32, tp=tp)
    except lf.parallel.PeerError as error:
        return str(error), time.perf_counter() - start
    return "no error", 0.0


def commands(lines: list[list[str]], stdin: str = "") -> list[tuple[int, str, str]]:
    """Run command lines of llama-fast as torchrun would start them. Return the exit code and what
    was printed, of each. stdin: of each, in the first rank."""
    import io
    import sys

    from llama_fast import parallel, torchrun
    from llama_fast.cli import main

    tp = parallel.join()
    os.environ |= {"RANK": str(tp.rank), "WORLD_SIZE": str(tp.size)}
    torchrun.FIRST = 0.1
    found = []
    for line in lines:
        out, err, code = io.StringIO(), io.StringIO(), 0
        held = stdin.encode(errors="surrogateescape") if tp.rank == 0 else b""
        sys.stdin = io.TextIOWrapper(io.BytesIO(held))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(line)
            except SystemExit as ended:
                code = int(ended.code or 0)
        found.append((code, out.getvalue(), err.getvalue()))
    return found


def peak_memory(folder: str) -> tuple[int, int]:
    """Load a checkpoint in bf16. Return the bytes of this rank's weights, and the most private
    memory that loading took, which excludes the pages of the mapped files."""
    import threading

    import llama_fast as lf

    def private() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    tp, peak, done = lf.parallel.join(), 0, threading.Event()
    load = lf.Llama.from_pretrained  # imports the modules that it needs
    lf.rms_norm(*2 * [lf.rope_table(1e4, 1, head_dim=8)[0]])  # what a first call allocates
    before = private()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, private())

    thread = threading.Thread(target=watch)
    thread.start()
    model = load(folder, tp=tp)
    done.set()
    thread.join()
    return model.weights.nbytes, max(peak, private()) - before
