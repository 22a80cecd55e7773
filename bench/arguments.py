"""Parse and check the benchmark's command line."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import llama_fast as lf
from llama_fast.parallel import launched

from . import cases, peers
from .cases.shapes import MODELS
from .results.files import default_folder

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FORWARD, FORWARD_SHAPES = "forward", ("8b", 1, "bf16")
EPILOG = """examples:
  {prog}                          every op, then prefill and decode: about 3 minutes on 2 cores,
                                  sized by what they can do (peers aside)
  {prog} --op attention,linear    these only
  {prog} --op forward             prefill and decode only
  {prog} --quick                  fewer rounds, no torch.compile, no forward pass
  {prog} --full                   every op and size: M to 16384, contexts to 128k (35 minutes)
  {prog} --model 405b --tp 8      each op at the shapes of one rank of eight
  torchrun --nproc-per-node 8 -m llama_fast bench --model 405b --tp 8
                                  the forward pass of eight ranks together
  {prog} --backend triton,cuda    ours on the first, the others as columns
  {prog} --compare OLD.json       fails if something has become slower since
  {prog} --kernel rms_norm=my_package.norms:fast_norm
  {prog} --scaling                time and memory to 131,072 tokens, exponents fitted
  {prog} --whole                  the whole 8B preset in FP8: tokens/s and peak memory
  {prog} --whole --model 405b     one of its layers, and the whole model extrapolated
  {prog} --gpu-report DIR         build, tests and figures of a GPU (--gpu-report DIR --help)
  {prog} --publish                README.md and docs/results.md from bench/results

exit status: 0; 1 a kernel's result was wrong, or it failed; 2 bad arguments; 3 slower than in
--compare's run; 130 interrupted (the figures measured so far are kept)
"""


def parser(prog: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog=prog,
        description="Measure every op at Llama 3.1's shapes, then the forward pass, against eager "
        "PyTorch and every peer that is installed, on the device at hand.",
        epilog=EPILOG.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = p.add_argument_group("what is run")
    names: dict[str, Any] = {"action": "extend", "type": _names, "metavar": "NAME"}
    what.add_argument(
        "--op",
        help="only these ops, or forward for the forward pass (repeatable, or joined by commas)",
        **names,
    )
    what.add_argument("--case", default="", metavar="TEXT", help="only cases with this in the name")
    what.add_argument("--model", choices=MODELS, default="8b", help="the shapes to run")
    what.add_argument(
        "--tp",
        type=int,
        default=1,
        metavar="N",
        help="the ops at the shapes of one rank of N; under torchrun the forward pass of N ranks",
    )
    what.add_argument("--dtype", choices=DTYPES, default="bf16")
    what.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    what.add_argument("--threads", type=int, metavar="N", help="default: torch's choice")
    level = what.add_mutually_exclusive_group()
    for name, text in (("quick", "a rough answer in a minute"), ("full", "every op and size")):
        level.add_argument(f"--{name}", help=text, dest="level", action="store_const", const=name)
    p.set_defaults(level="default")
    what.add_argument(
        "--allocator",
        choices=("keep", "system"),
        default="keep",
        help="keep: keep freed CPU memory for the next output; system: the C library's default, "
        "whose page faults are part of the measured times",
    )
    what.add_argument("--list", action="store_true", help="print the cases and exit")
    what.add_argument("--scaling", action="store_true", help="only the growth of cost with length")
    what.add_argument(
        "--whole",
        action="store_true",
        help="only the whole 8B preset, or a layer of a larger model, in FP8",
    )

    compared = p.add_argument_group("what is compared")
    compared.add_argument(
        "--backend",
        help="the first of these is ours, the others are columns; default: see lf.backends()",
        **names,
    )
    compared.add_argument("--baseline", help="only these of PyTorch's own; 'none'", **names)
    compared.add_argument(
        "--peers", help=f"only these of {', '.join(peers.PEERS)}; 'none'; default: all", **names
    )
    compared.add_argument(
        "--kernel",
        action="append",
        type=_kernel,
        default=[],
        metavar="OP=MODULE:FUNCTION",
        help="one more column: your function, which takes the arguments of lf.OP (repeatable)",
    )

    out = p.add_argument_group("what comes out")
    file = default_folder() / "bench.json"
    out.add_argument(
        "--json",
        type=Path,
        default=file,
        metavar="FILE",
        help="all figures, rewritten after each case; default: %(default)s",
    )
    out.add_argument("--plot", type=Path, metavar="FILE", help="default: beside the JSON file")
    out.add_argument("--no-plot", action="store_true")
    out.add_argument("--targets", action="store_true", help="show each case's targets")
    out.add_argument(
        "--compare",
        type=Path,
        metavar="OLD.json",
        help="hold this run against an older one of the same machine and options; exit with 3 "
        "if a case has become more than 5 %% slower, beyond the noise",
    )
    out.add_argument("--publish", action="store_true", help="write the pages from bench/results")
    out.add_argument("--debug", action="store_true", help="show a traceback for errors")
    return p


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _kernel(text: str) -> tuple[str, str, Callable[..., object]]:
    """Parse OP=MODULE:FUNCTION; return the op, the function's name and the function."""
    op, _, where = text.partition("=")
    module, _, function = where.partition(":")
    if not (op and module and function):
        raise argparse.ArgumentTypeError(f"got {text!r}, want OP=MODULE:FUNCTION")
    if op not in cases.OPS:
        raise argparse.ArgumentTypeError(f"got op {op!r}, want one of {', '.join(cases.OPS)}")
    if function in ("ours", "limit", *cases.BASELINES):
        raise argparse.ArgumentTypeError(f"got {function!r}, which is the name of another column")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    return op, function, found


def check(args: argparse.Namespace) -> None:
    """Raise ValueError that names an invalid argument."""
    _known("--op", args.op, (*cases.OPS, FORWARD))
    _known("--baseline", args.baseline, (*cases.BASELINES, "none"))
    shapes, processes = (args.model, args.tp, args.dtype), launched()
    if processes is not None:
        if args.tp != processes:
            raise ValueError(f"--tp: got {args.tp}, but torchrun started {processes} processes")
        if {*(args.op or ())} - {FORWARD} or args.scaling or args.whole or args.compare:
            raise ValueError(f"--tp: under torchrun only the {FORWARD} pass is measured")
    elif FORWARD in (args.op or ()) and shapes != FORWARD_SHAPES:
        got, want = (f"--model {m} --tp {n} --dtype {d}" for m, n, d in (shapes, FORWARD_SHAPES))
        raise ValueError(f"--op {FORWARD}: got {got}, want {want}, or N processes of torchrun")
    for name in ("json", "plot"):
        path = getattr(args, name)
        if path is not None and path.is_dir():
            raise ValueError(f"--{name}: got a folder, {path}, want a file")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads: got {args.threads}, want at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda, and torch sees no GPU")
    for backend in args.backend or ():
        try:
            with lf.use_backend(backend):
                pass
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"--backend: {error}") from None


def _known(option: str, names: list[str] | None, known: tuple[str, ...]) -> None:
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"{option}: got {', '.join(unknown)}, want any of {', '.join(known)}")
