"""What `python -m bench` can be asked for, and what it refuses."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path

import torch

import llama_fast as lf
from llama_fast.dispatch import BACKENDS

from . import cases, peers
from .shapes import MODELS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FORWARD, FORWARD_SHAPES = "forward", ("8b", 1, "bf16")
EPILOG = """examples:
  python -m bench                          every op, then prefill and decode: under 5 minutes on
                                           2 cores, sized by what they can do (peers aside)
  python -m bench --op attention,linear    these only
  python -m bench --op forward             prefill and decode only
  python -m bench --quick                  fewer rounds, no torch.compile, no end to end
  python -m bench --full                   every size: M to 16384, contexts to 128k (35 minutes)
  python -m bench --model 405b --tp 8      the shapes of one rank of eight
  python -m bench --compare OLD.json       fails where something has become slower since
  python -m bench --kernel rms_norm=my_package.norms:fast_norm
                                           one more column: your function, called as lf.rms_norm is
  python -m bench --scaling                time and memory to 131,072 tokens, exponents fitted
  python -m bench --whole                  the whole 8B preset in FP8: tokens/s and peak memory
  python -m bench --gpu-report DIR         all about a GPU in 11 minutes (--gpu-report DIR --help)
  python -m bench --publish                README.md and docs/results.md from bench/results

exit status: 0; 1 a kernel's result was wrong; 2 bad arguments; 3 slower than in --compare's run;
130 interrupted (what was measured is kept)
"""


def parser(description: str | None) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench",
        description=description,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = p.add_argument_group("what is run")
    names = {"action": "extend", "type": _names, "metavar": "NAME"}
    what.add_argument(
        "--op",
        help="only these ops, or forward for the forward pass (repeatable, or joined by commas)",
        **names,
    )
    what.add_argument("--model", choices=MODELS, default="8b", help="whose shapes")
    what.add_argument("--tp", type=int, default=1, metavar="N", help="one rank's part of N")
    what.add_argument("--dtype", choices=DTYPES, default="bf16")
    what.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    what.add_argument("--threads", type=int, metavar="N", help="default: torch's choice")
    level = what.add_mutually_exclusive_group()
    for name, text in (("quick", "a rough answer in a minute"), ("full", "every size")):
        level.add_argument(
            f"--{name}",
            dest="level",
            action="store_const",
            const=name,
            help=text,
            default="default",
        )
    what.add_argument(
        "--allocator",
        choices=("keep", "system"),
        default="keep",
        help="keep: memory freed on the CPU is kept for the next output; system: as the C library "
        "has it, page faults in whatever is measured",
    )
    what.add_argument("--list", action="store_true", help="print the cases and leave")
    what.add_argument("--scaling", action="store_true", help="only the cost's growth with length")
    what.add_argument("--whole", action="store_true", help="only the whole 8B preset, in FP8")

    who = p.add_argument_group("who is run")
    who.add_argument("--backend", choices=BACKENDS, help="ours; default: see lf.backends()")
    who.add_argument("--baseline", help="only these of PyTorch's own; 'none'", **names)
    who.add_argument(
        "--peers", help=f"only these of {', '.join(peers.PEERS)}; 'none'; default: all", **names
    )
    who.add_argument(
        "--kernel", action="append", type=_kernel, default=[], metavar="OP=MODULE:FUNCTION"
    )

    out = p.add_argument_group("what comes out")
    out.add_argument("--json", type=Path, default=Path("bench/out/bench.json"), metavar="FILE")
    out.add_argument("--csv", type=Path, metavar="FILE", help="a row per case and implementation")
    out.add_argument("--plot", type=Path, metavar="FILE", help="default: beside the JSON file")
    out.add_argument("--no-plot", action="store_true")
    out.add_argument("--compare", type=Path, metavar="OLD.json")
    out.add_argument(
        "--publish", action="store_true", help="write the pages cut from bench/results"
    )
    return p


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _kernel(text: str) -> tuple[str, str, Callable[..., object]]:
    """OP=MODULE:FUNCTION -> the op, the function's name, the function."""
    op, _, where = text.partition("=")
    module, _, function = where.partition(":")
    if not (op and module and function):
        raise argparse.ArgumentTypeError(f"got {text!r}, want OP=MODULE:FUNCTION")
    if op not in cases.OPS:
        raise argparse.ArgumentTypeError(f"got op {op!r}, want one of {', '.join(cases.OPS)}")
    if function in ("ours", "limit", *cases.BASELINES):
        raise argparse.ArgumentTypeError(
            f"got a function called {function!r}: a column's name here"
        )
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    return op, function, found


def check(args: argparse.Namespace) -> None:
    """Raises ValueError naming the argument that cannot be."""
    known = (*cases.OPS, FORWARD)
    unknown = [op for op in args.op or () if op not in known]
    if unknown:
        raise ValueError(f"--op: got {', '.join(unknown)}, want any of {', '.join(known)}")
    shapes = (args.model, args.tp, args.dtype)
    if FORWARD in (args.op or ()) and shapes != FORWARD_SHAPES:
        got, want = (f"--model {m} --tp {n} --dtype {d}" for m, n, d in (shapes, FORWARD_SHAPES))
        raise ValueError(f"--op {FORWARD}: got {got}, want {want}")
    if args.baseline:
        unknown = [name for name in args.baseline if name not in (*cases.BASELINES, "none")]
        if unknown:
            names = ", ".join(cases.BASELINES)
            raise ValueError(f"--baseline: got {', '.join(unknown)}, want any of {names}, or none")
    for name in ("json", "csv", "plot"):
        path = getattr(args, name)
        if path is not None and path.is_dir():
            raise ValueError(f"--{name}: got a folder, {path}, want a file")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads: got {args.threads}, want at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda, and torch sees no GPU")
    if args.backend:
        try:
            with lf.use_backend(args.backend):
                pass
        except NotImplementedError as error:
            raise ValueError(f"--backend: {error}") from None
