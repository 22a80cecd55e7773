"""llama-fast quantize: rewrite a checkpoint with FP8 weights."""

from __future__ import annotations

import argparse

from ..config import RECIPES
from .common import QUANTIZE_HELP, AddCommand, progress

_EXAMPLES = f"""examples:
  llama-fast quantize Llama-3.1-8B-Instruct Llama-3.1-8B-Instruct-FP8
  llama-fast quantize Llama-3.1-405B Llama-3.1-405B-FP8 --recipe fp8_ffn
  llama-fast quantize Llama-3.1-8B-Q8_0.gguf Llama-3.1-8B-FP8

{QUANTIZE_HELP} The output is compressed-tensors' float-quantized format, which transformers,
vLLM and llama-fast load. OUT appears only when it is complete."""


def add(command: AddCommand) -> None:
    parser = command("quantize", run, "rewrite a checkpoint with FP8 weights", _EXAMPLES)
    parser.add_argument("source", metavar="IN", help="a folder, a GGUF file or a Hub id")
    parser.add_argument("target", metavar="OUT", help="a new or empty folder")
    parser.add_argument("--recipe", choices=RECIPES, default="fp8")


def run(args: argparse.Namespace) -> int:
    from rich.progress import DownloadColumn, TransferSpeedColumn

    from ..checkpoint.quantize import quantize_checkpoint

    with progress("", DownloadColumn(), TransferSpeedColumn()) as bar:
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
