"""What several commands share: their parsers, options of a model, progress bars."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress

    from ..model import Llama

QUANTIZE_HELP = """\
fp8 quantizes every linear layer but lm_head. fp8_all quantizes lm_head as well, which costs more:
SmolLM2's perplexity rises by 3.2 % instead of 1.1 %. fp8_ffn quantizes the feed-forward layers,
without the first and the last."""


MODEL_HELP = "a Hugging Face folder, a GGUF file, or a model of the Hub: owner/name[@revision]"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"llama-fast: error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


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
    add("--model", required=True, metavar="DIR|ID", help=MODEL_HELP)
    add("--quantize", choices=RECIPES, help="quantize 16-bit weights while loading")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1; default cpu")
    add("--threads", type=positive, metavar="N", help="default: torch's choice")


def load_model(args: argparse.Namespace, path: str, **options: Any) -> Llama:
    """Load a checkpoint as add_model_options' arguments say, but for the options given here."""
    import torch

    from ..model import Llama

    options = {"dtype": args.dtype, "quantize": args.quantize, "device": args.device} | options
    return Llama.from_pretrained(path, **options | {"dtype": getattr(torch, options["dtype"])})


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
