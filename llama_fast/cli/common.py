"""What several commands share: their parsers, options of a model, progress bars."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from ..parallel import Group, PeerError, first_rank, join, launched

if TYPE_CHECKING:
    from rich.progress import Progress

    from ..model import Llama

FIRST = 5.0  # seconds in which another process may report a failure; torchrun then ends this one

QUANTIZE_HELP = """\
fp8 quantizes every linear layer but lm_head. fp8_all quantizes lm_head as well, which costs more:
SmolLM2's perplexity rises by 3.2 % instead of 1.1 %. fp8_ffn quantizes the feed-forward layers,
without the first and the last."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if not first_rank():  # all got the same command line
            time.sleep(FIRST)
        print(f"llama-fast: error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def report(error: Exception) -> None:
    """Print an error in one line. Under torchrun the rank that failed does so first."""
    if isinstance(error, PeerError):
        time.sleep(FIRST)
    message = " ".join(str(error).split()) or type(error).__name__
    if launched() is not None and not isinstance(error, PeerError):
        message = f"rank {os.environ['RANK']}: {message}"
    print(f"llama-fast: error: {message}", file=sys.stderr, flush=True)


class AddCommand(Protocol):
    def __call__(
        self, name: str, run: Callable[[argparse.Namespace], int], summary: str, examples: str
    ) -> argparse.ArgumentParser:
        """Return a new command's parser."""


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, want at least 1")
    return value


def add_model_options(parser: argparse.ArgumentParser) -> None:
    from ..checkpoint.weights import RECIPES

    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a Hugging Face folder, or a GGUF file")
    add("--quantize", choices=RECIPES, help="quantize 16-bit weights while loading")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1; default cpu, or with --tp the GPUs")
    add("--threads", type=positive, metavar="N", help="default: torch's choice")
    add(
        "--tp",
        type=positive,
        default=1,
        metavar="N",
        help="split the model among N processes: torchrun --nproc-per-node N -m llama_fast ...",
    )


def ranks(args: argparse.Namespace) -> Group:
    """Return the group of --tp processes, which torchrun must have started."""
    started = launched()
    if args.tp != (started or 1):
        got = "was not started by torchrun" if started is None else f"is one of {started} processes"
        want = f"torchrun --nproc-per-node {args.tp} -m {args.parser.prog.replace('-', '_')}"
        args.parser.error(f"--tp: got {args.tp}, but this {got}; want {want} --tp {args.tp}")
    return Group() if args.tp == 1 else join(device=args.device)


def load_model(args: argparse.Namespace, path: str, tp: Group, **options: Any) -> Llama:
    """Load a checkpoint as add_model_options' arguments say, but for the options given here."""
    import torch

    from ..model import Llama

    options = {"dtype": args.dtype, "quantize": args.quantize, "device": args.device} | options
    return Llama.from_pretrained(
        path, **options | {"dtype": getattr(torch, options["dtype"])}, tp=tp
    )


def progress(*columns: Any) -> Progress:
    """Return a progress bar on stderr, which shows nothing if that is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TimeRemainingColumn

    return Progress(
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
