"""The llama-fast command. A subcommand imports its modules when it runs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from .. import __version__
from ..torchrun import is_first
from . import chat, generate, perplexity, plan, quantize
from .common import Parser, report

_EXAMPLES = """examples:
  llama-fast generate --model Llama-3.1-8B-Instruct --chat --prompt "Why is the sky blue?"
  llama-fast chat --model Llama-3.1-8B-Instruct
  llama-fast quantize Llama-3.1-8B-Instruct Llama-3.1-8B-Instruct-FP8
  llama-fast perplexity --model Llama-3.1-8B --text book.txt --quantize fp8 --against bfloat16
  llama-fast plan --model 405b --gpu h200 --gpus 8 --quantize fp8
  llama-fast bench --help
  llama-fast tune
  llama-fast env

LLAMA_FAST_TRACEBACK=1 (or --debug) shows where an error came from."""

_TUNE_EXAMPLES = """examples:
  llama-fast tune
  llama-fast tune --device cuda:1 --output llama_fast/tuned

Measures each kernel's configurations at the shapes of Llama 3.1 8B and 70B and stores the fastest
in OUTPUT/<gpu>.json. Without it the kernels use default configurations."""

_ENV_EXAMPLES = """examples:
  llama-fast env
  LLAMA_FAST_BACKEND=attention=reference llama-fast env"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 1 for a failure, 2 for wrong usage."""
    _open_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("LLAMA_FAST_TRACEBACK") == "1"
    try:
        if arguments[:1] == ["bench"]:  # it has its own parser
            debug = debug or "--debug" in arguments
            return _bench(arguments[1:])
        args = _parser().parse_args(arguments)
        debug = debug or args.debug
        code = args.run(args)
        sys.stdout.flush()  # here a full disk is an error; at exit it would be a traceback
        return code
    except KeyboardInterrupt:
        if is_first():
            print("llama-fast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader closed the pipe (`| head`)
        _drop_output()
        return 1
    except Exception as error:
        if debug:
            raise
        report(error)
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        return 1


def _drop_output() -> None:
    """Discard what is still to be written, or Python would report the error again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_streams() -> None:
    """Replace closed standard streams, or a file that the command opens would get their descriptors
    and receive what a library prints. Without stdout, end the command: it could show nothing."""
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor
    if "stderr" in closed:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  open until the process ends
    if "stdout" in closed:
        print("llama-fast: error: stdout: is closed", file=sys.stderr)
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="llama-fast",
        description="Llama 3.1 on fused kernels.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"llama-fast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], summary: str, examples: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.add_argument("--debug", action="store_true", help="show a traceback for errors")
        sub.set_defaults(run=run, parser=sub)
        return sub

    generate.add(command)
    chat.add(command)
    perplexity.add(command)
    quantize.add(command)
    plan.add(command)

    tune = command("tune", _tune, "choose the GPU kernels' configurations", _TUNE_EXAMPLES)
    tune.add_argument("--device", metavar="NAME", default="cuda", help="default cuda")
    tune.add_argument(
        "--output", metavar="DIR", help="default: $LLAMA_FAST_TUNED, or ~/.cache/llama_fast/tuned"
    )

    command("env", _env, "print what runs here and why, to paste into a report", _ENV_EXAMPLES)
    commands.add_parser("bench", help="measure the kernels against eager PyTorch")
    return parser


def _tune(args: argparse.Namespace) -> int:
    from ..tune import tune

    print(tune(args.device, args.output, lambda text: print(text, file=sys.stderr)))
    return 0


def _env(args: argparse.Namespace) -> int:
    from ..env import report

    print(report())
    return 0


def _bench(argv: list[str]) -> int:
    try:
        bench = importlib.import_module("llama_fast.bench.__main__")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("llama_fast.bench"):
            raise ModuleNotFoundError("this installation has no benchmark suite") from None
        raise ModuleNotFoundError(f"{error}; pip install 'llama_fast[bench]'") from None
    return bench.main(argv, prog="llama-fast bench")
