"""The llama-fast command. A subcommand imports its modules when it runs."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from . import __version__

_EXAMPLES = """examples:
  llama-fast generate --model Llama-3.1-8B-Instruct --chat --prompt "Why is the sky blue?"
  llama-fast quantize Llama-3.1-8B-Instruct Llama-3.1-8B-Instruct-FP8
  llama-fast bench --help
  llama-fast tune
  llama-fast env

LLAMA_FAST_TRACEBACK=1 (or --debug) shows where an error came from."""

_GENERATE_EXAMPLES = """examples:
  llama-fast generate --model Llama-3.1-8B --prompt "The capital of France is" --temperature 0
  llama-fast generate --model Llama-3.1-8B-Instruct --chat --quantize fp8 \\
      --system "Answer in one sentence." --prompt "Why is the sky blue?"
  llama-fast generate --model Llama-3.1-8B-Instruct --chat --speculate lookup --prompt - < edit.txt
  llama-fast generate --model Llama-3.1-8B-Instruct --chat --prompt - < question.txt

Text goes to stdout, figures to stderr. Ctrl-C ends the text, not the figures."""

_QUANTIZE_EXAMPLES = """examples:
  llama-fast quantize Llama-3.1-8B-Instruct Llama-3.1-8B-Instruct-FP8
  llama-fast quantize Llama-3.1-405B Llama-3.1-405B-FP8 --recipe fp8_ffn

fp8 quantizes every linear layer but lm_head; fp8_ffn quantizes the feed-forward layers, without the
first and the last. The output is compressed-tensors' float-quantized format, which transformers,
vLLM and llama-fast load. OUT appears only when it is complete."""

_TUNE_EXAMPLES = """examples:
  llama-fast tune
  llama-fast tune --device cuda:1 --output llama_fast/tuned

Measures each kernel's configurations at the shapes of Llama 3.1 8B and 70B and stores the fastest
in OUTPUT/<gpu>.json. Without it the kernels use default configurations."""

_ENV_EXAMPLES = """examples:
  llama-fast env
  LLAMA_FAST_BACKEND=attention=reference llama-fast env"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"llama-fast: error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 1 for a failure, 2 for wrong usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("LLAMA_FAST_TRACEBACK") == "1"
    try:
        if arguments[:1] == ["bench"]:  # it has its own parser
            debug = debug or "--debug" in arguments
            return _bench(arguments[1:])
        args = _parser().parse_args(arguments)
        debug = debug or args.debug
        return args.run(args)
    except KeyboardInterrupt:
        print("llama-fast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader closed the pipe (`| head`). Without this, Python reports it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"llama-fast: error: {message}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
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

    generate = command("generate", _generate, "continue a text, or answer it", _GENERATE_EXAMPLES)
    add = generate.add_argument
    add("--model", required=True, metavar="DIR", help="a checkpoint in Hugging Face's format")
    add("--prompt", required=True, metavar="TEXT", help="the text; - reads it from stdin")
    add("--chat", action="store_true", help="use the model's chat template, for a user's message")
    add("--system", metavar="TEXT", help="a system message before it (with --chat)")
    add("--quantize", choices=("fp8", "fp8_ffn"), help="quantize 16-bit weights while loading")
    add("--kv-cache", choices=("fp8",), help="keys and values in e4m3: half a 16-bit cache's bytes")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--max-new-tokens", type=_positive, default=256, metavar="N", help="default 256")
    add("--temperature", type=float, default=0.6, metavar="T", help="default 0.6; 0 is greedy")
    add("--top-p", type=float, default=0.9, metavar="P", help="default 0.9")
    add("--top-k", type=int, default=0, metavar="K", help="default 0: no limit")
    add("--seed", type=int, metavar="N", help="default: a new one each time")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1; default cpu")
    add("--no-graphs", action="store_true", help="on a GPU: launch each kernel separately")
    add("--threads", type=_positive, metavar="N", help="default: torch's choice")
    add(
        "--speculate",
        metavar="lookup|DIR",
        help="the same tokens in fewer passes: propose those that followed the last ones earlier "
        "in the text, or those of a smaller checkpoint with the same tokenizer",
    )
    add("--draft-tokens", type=int, metavar="N", help="most proposed a pass, 1 to 16; default 15")

    quantize = command(
        "quantize", _quantize, "rewrite a checkpoint with FP8 weights", _QUANTIZE_EXAMPLES
    )
    quantize.add_argument("source", metavar="IN", help="a checkpoint in Hugging Face's format")
    quantize.add_argument("target", metavar="OUT", help="a new or empty folder")
    quantize.add_argument("--recipe", choices=("fp8", "fp8_ffn"), default="fp8")

    tune = command("tune", _tune, "choose the GPU kernels' configurations", _TUNE_EXAMPLES)
    tune.add_argument("--device", metavar="NAME", default="cuda", help="default cuda")
    tune.add_argument(
        "--output", metavar="DIR", help="default: $LLAMA_FAST_TUNED, or ~/.cache/llama_fast/tuned"
    )

    command("env", _env, "print what runs here and why, to paste into a report", _ENV_EXAMPLES)
    commands.add_parser("bench", help="measure the kernels against eager PyTorch")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, want at least 1")
    return value


def _generate(args: argparse.Namespace) -> int:
    import torch

    from . import chat
    from .generation import sampling, speculate
    from .model import Llama

    if args.system is not None and not args.chat:
        args.parser.error("--system goes with --chat")
    if args.draft_tokens is None:
        args.draft_tokens = speculate.DRAFT_TOKENS
    elif args.speculate is None:
        args.parser.error("--draft-tokens goes with --speculate")
    try:
        sampling.check(args.temperature, args.top_p, args.top_k)
        speculate.check_draft_tokens(args.draft_tokens)
    except (TypeError, ValueError) as error:
        args.parser.error(str(error))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    # Check the text before loading the weights, which takes long.
    prompt = _stdin() if args.prompt == "-" else args.prompt
    tokenizer = chat.load_tokenizer(args.model)
    if args.chat:
        messages = [{"role": "user", "content": prompt}]
        if args.system is not None:
            messages.insert(0, {"role": "system", "content": args.system})
        ids = chat.encode_chat(tokenizer, messages)
    else:
        ids = chat.encode_prompt(tokenizer, prompt)
    model = Llama.from_pretrained(
        args.model, getattr(torch, args.dtype), quantize=args.quantize, device=args.device
    )
    if args.speculate not in (None, "lookup"):
        args.speculate = Llama.from_pretrained(
            args.speculate, model.dtype, quantize=args.quantize, device=args.device
        )
    return _stream(model, tokenizer, ids, args)


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin: not valid UTF-8 at byte {error.start}") from None


def _stream(model: Any, tokenizer: Any, ids: list[int], args: argparse.Namespace) -> int:
    """Print text to stdout as it comes, then a line of figures to stderr."""
    from .text import TextStreamer

    if isinstance(sys.stdout, io.TextIOWrapper):  # for every locale
        sys.stdout.reconfigure(encoding="utf-8")

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    streamer = TextStreamer(
        tokenizer, show, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    times: list[float] = []

    def on_token(_: int, token: int) -> None:
        times.append(time.perf_counter())
        streamer.put(token)

    passes: list[tuple[int, int]] = []
    code = 0
    start = time.perf_counter()
    try:
        model.generate(
            [ids],
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            seed=args.seed,
            on_token=on_token,
            graphs=False if args.no_graphs else None,
            speculate=args.speculate,
            draft_tokens=args.draft_tokens,
            on_pass=lambda *counts: passes.append(counts),
            kv_cache=args.kv_cache,
        )
    except KeyboardInterrupt:
        code = 130
    streamer.end()
    show("\n")
    footer = _footer(len(ids), start, times)
    if args.speculate is not None and passes:
        proposed, accepted = map(sum, zip(*passes, strict=True))
        a_pass = (len(times) - 1) / len(passes)
        footer += f" | accepted {accepted} / {proposed} proposed, {a_pass:.2f} tokens a pass"
    print(footer, file=sys.stderr)
    return code


def _footer(prompt: int, start: float, times: list[float]) -> str:
    """Return the line of figures. The prompt's time ends with the first token."""
    parts = [f"prompt {prompt} tokens"]
    if times:
        parts[0] += f", {prompt / (times[0] - start):.1f} tokens/s"
    parts.append(f"generated {len(times)} tokens")
    if len(times) > 1:
        parts[1] += f", {(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform != "darwin":  # macOS counts bytes, Linux KiB
        peak *= 1024
    parts.append(f"peak memory {peak / 2**30:.2f} GiB")
    return " | ".join(parts)


def _quantize(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from .checkpoint.quantize import quantize_checkpoint

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    disable = not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=disable) as bar:
        task = bar.add_task("")
        summary = quantize_checkpoint(
            args.source,
            args.target,
            args.recipe,
            on_bytes=lambda done, total: bar.update(task, completed=done, total=total),
        )
    before, after = (size / 2**30 for size in (summary.bytes_before, summary.bytes_after))
    print(
        f"{args.target}: {summary.quantized} of {summary.tensors} tensors in FP8, "
        f"{before:.2f} -> {after:.2f} GiB"
    )
    return 0


def _tune(args: argparse.Namespace) -> int:
    from .tune import tune

    print(tune(args.device, args.output, lambda text: print(text, file=sys.stderr)))
    return 0


def _env(args: argparse.Namespace) -> int:
    from .env import report

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
