"""What several commands share: their parsers, options of a model, progress bars."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

from ..config import RECIPES
from ..torchrun import label, launched, let_first_report

if TYPE_CHECKING:
    from rich.progress import Progress

    from ..model import Llama
    from ..parallel import Group

T = TypeVar("T")

QUANTIZE_HELP = """\
fp8 quantizes every linear layer but lm_head. fp8_all quantizes lm_head as well, which costs more:
SmolLM2's perplexity rises by 3.2 % instead of 1.1 %. fp8_ffn quantizes the feed-forward layers,
without the first and the last."""

_LONGEST = 600  # characters of an error
MOST_THREADS = max(64, 4 * (os.cpu_count() or 1))  # torch crashes if it cannot start all of them

MODEL_HELP = "a Hugging Face folder, a GGUF file, or a model of the Hub: owner/name[@revision]"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        let_first_report()
        print(f"llama-fast: error: {one_line(message)} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def one_line(message: str) -> str:
    """Return a message on one line, without the middle of what it quotes if that is long."""
    line = " ".join(message.encode(errors="backslashreplace").decode().split())
    return line if len(line) <= _LONGEST else f"{line[:300]} ... {line[-300:]}"


def explained(error: Exception) -> str:
    """Return an error's message on one line."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror:  # without "[Errno 20]"
        where = "" if error.filename is None else f"{error.filename}: "
        message = where + error.strerror
    return one_line(message) or type(error).__name__


def report(error: Exception) -> None:
    """Print an error in one line. Under torchrun the rank that failed does so first."""
    print(f"llama-fast: error: {label(error)}{explained(error)}", file=sys.stderr, flush=True)


class AddCommand(Protocol):
    def __call__(
        self, name: str, run: Callable[[argparse.Namespace], int], summary: str, examples: str
    ) -> argparse.ArgumentParser:
        """Return a new command's parser."""


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return argparse's type for a whole number in a range."""
    wanted = f"of at least {least}" if most is None else f"from {least} to {most}"

    def parse(text: str) -> int:
        number = int(text) if re.fullmatch(r"[+-]?\d{1,100}", text.strip(), re.ASCII) else None
        if number is None or number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"got {text[:40]!r}, want a whole number {wanted}")
        return number

    return parse


positive = whole(1)


def number(wanted: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    """Return argparse's type for a finite number that fits."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = float(text)
            if math.isfinite(value) and fits(value):
                return value
        raise argparse.ArgumentTypeError(f"got {text[:40]!r}, want {wanted}")

    return parse


share = number("a number from 0 to 1", lambda value: 0 <= value <= 1)


def device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"got {text[:40]!r}, want cpu, cuda or cuda:N")
    return text


def add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="DIR|ID", help=MODEL_HELP)
    add("--quantize", choices=RECIPES, help="quantize 16-bit weights while loading")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--device", type=device, metavar="NAME", help="cpu, cuda, cuda:1; default cpu")
    add("--threads", type=whole(1, MOST_THREADS), metavar="N", help="default: torch's choice")


def add_ranks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tp",
        type=positive,
        default=1,
        metavar="N",
        help="split the model among N processes: torchrun --nproc-per-node N -m llama_fast ...; "
        "on GPUs, unless --device cpu",
    )


def ranks(args: argparse.Namespace, **options: Any) -> Group:
    """Return the group of --tp processes, which torchrun must have started. options: of join."""
    started = launched()
    if args.tp != (started or 1):
        got = "was not started by torchrun" if started is None else f"is one of {started} processes"
        want = f"torchrun --nproc-per-node {args.tp} -m {args.parser.prog.replace('-', '_')}"
        args.parser.error(f"--tp: got {args.tp}, but this {got}; want {want} --tp {args.tp}")
    from .. import parallel

    return parallel.Group() if args.tp == 1 else parallel.join(device=args.device, **options)


def read_and_join(
    args: argparse.Namespace, read: Callable[[argparse.Namespace], T], **options: Any
) -> tuple[T, Group]:
    """Return what read(args) gives in the first process, whose stdin it is, and ranks(args)."""
    held: Any = read(args) if args.tp == 1 else None  # before torch is imported
    tp = ranks(args, **options)
    with tp.together():
        if tp.size > 1 and tp.rank == 0:
            held = read(args)
    return tp.exchange(held)[0], tp


@contextlib.contextmanager
def only_first_prints(tp: Group) -> Iterator[None]:
    if tp.rank == 0:
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def use_machine(args: argparse.Namespace) -> None:
    """Set the threads that add_model_options' arguments ask for, and check the device. Raises
    ValueError for a device that this machine lacks."""
    import torch

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    kind, _, index = (args.device or "cpu").partition(":")
    if kind == "cuda" and int(index or 0) >= (there := torch.cuda.device_count()):
        why = f"it has {there}" if torch.version.cuda or torch.version.hip else "torch is for CPUs"
        raise ValueError(f"--device: got {args.device}, which this machine lacks: {why}")


def load_model(
    args: argparse.Namespace, path: str, tp: Group | None = None, **options: Any
) -> Llama:
    """Load a checkpoint as add_model_options' arguments say, but for the options given here."""
    from ..model import Llama

    options = {"dtype": args.dtype, "quantize": args.quantize, "device": args.device} | options
    return Llama.from_pretrained(path, **options, tp=tp)


def read_text(path: Path) -> str:
    """Read a UTF-8 file. Raises OSError or ValueError that names it."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid UTF-8 at byte {error.start}") from None


def progress(title: str, *columns: Any) -> Progress:
    """Return a progress bar on stderr, which shows nothing if that is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TimeRemainingColumn

    return Progress(
        title,
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
