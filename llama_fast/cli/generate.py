"""llama-fast generate: continue a text, or answer it."""

from __future__ import annotations

import argparse
import io
import json
import resource
import sys
import time
from typing import Any

from . import conversation
from .common import AddCommand, add_model_options, load_model, positive

_EXAMPLES = """examples:
  llama-fast generate --model Llama-3.1-8B --prompt "The capital of France is" --temperature 0
  llama-fast generate --model Llama-3.1-8B-Instruct --chat --quantize fp8 \\
      --system "Answer in one sentence." --prompt "Why is the sky blue?"
  llama-fast generate --model Llama-3.1-8B-Instruct --chat --speculate lookup --prompt - < edit.txt
  llama-fast generate --model Llama-3.1-8B-Instruct --chat --prompt - < question.txt
  llama-fast generate --model Llama-3.1-8B-Instruct --messages talk.json --tools functions.json

Text goes to stdout, and figures to stderr. Ctrl-C ends the text; the figures still follow."""


def add(command: AddCommand) -> None:
    parser = command("generate", run, "continue a text, or answer it", _EXAMPLES)
    add_model_options(parser)
    add = parser.add_argument
    add("--prompt", metavar="TEXT", help="the text; - reads it from stdin")
    add("--chat", action="store_true", help="use the model's chat template, for a user's message")
    add("--no-graphs", action="store_true", help="on a GPU: launch each kernel separately")
    conversation.add_options(parser)
    add_generation_options(parser, 256)


def add_generation_options(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    add = parser.add_argument
    add("--kv-cache", choices=("fp8",), help="keys and values in e4m3: half a 16-bit cache's bytes")
    most = f"default {max_new_tokens}"
    add("--max-new-tokens", type=positive, default=max_new_tokens, metavar="N", help=most)
    add("--temperature", type=float, default=0.6, metavar="T", help="default 0.6; 0 is greedy")
    add("--top-p", type=float, default=0.9, metavar="P", help="default 0.9")
    add("--top-k", type=int, default=0, metavar="K", help="default 0: no limit")
    add("--seed", type=int, metavar="N", help="default: a new one each time")
    add(
        "--speculate",
        metavar="lookup|DIR",
        help="the same tokens in fewer passes: propose those that followed the last ones earlier "
        "in the text, or those of a smaller checkpoint with the same tokenizer",
    )
    add("--draft-tokens", type=int, metavar="N", help="most proposed a pass, 1 to 16; default 15")


def check_generation_options(args: argparse.Namespace) -> None:
    import torch

    from ..generation import sampling, speculate

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


def load_models(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return the model, and generate's arguments from add_generation_options but for kv_cache and
    max_new_tokens."""
    model = load_model(args, args.model)
    if args.speculate not in (None, "lookup"):
        args.speculate = load_model(args, args.speculate)
    names = ("temperature", "top_p", "top_k", "seed", "speculate", "draft_tokens")
    return model, {name: getattr(args, name) for name in names}


def run(args: argparse.Namespace) -> int:
    from .. import chat

    args.chat = args.chat or args.messages is not None
    if args.prompt is None and args.messages is None:
        args.parser.error("the following arguments are required: --prompt or --messages")
    for name in ("system", "tools"):
        if getattr(args, name) is not None and not args.chat:
            args.parser.error(f"--{name} goes with --chat")
    check_generation_options(args)
    # Check the text before loading the weights, which takes long.
    prompt = _stdin() if args.prompt == "-" else args.prompt
    messages, tools = conversation.read(args)
    if prompt is not None:
        messages.append({"role": "user", "content": prompt})
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{args.messages}: ends with an answer; give a question with --prompt")
    tokenizer = chat.load_tokenizer(args.model)
    if args.chat:
        ids = chat.encode(tokenizer, messages, tools)
    else:
        ids = chat.encode_prompt(tokenizer, prompt)
    return _stream(tokenizer, ids, args)


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin: not valid UTF-8 at byte {error.start}") from None


def _stream(tokenizer: Any, ids: list[int], args: argparse.Namespace) -> int:
    """Print text to stdout as it comes, then a line of figures to stderr."""
    from ..chat import stop_ids

    model, options = load_models(args)
    if isinstance(sys.stdout, io.TextIOWrapper):  # for every locale
        sys.stdout.reconfigure(encoding="utf-8")

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    answer = conversation.Answer(tokenizer, show, args.tools is not None)
    times: list[float] = []

    def on_token(_: int, token: int) -> None:
        times.append(time.perf_counter())
        answer.put(token)

    passes: list[tuple[int, int]] = []
    code = 0
    start = time.perf_counter()
    try:
        model.generate(
            [ids],
            max_new_tokens=args.max_new_tokens,
            stop_ids=stop_ids(model.config, tokenizer),
            on_token=on_token,
            graphs=False if args.no_graphs else None,
            on_pass=lambda *counts: passes.append(counts),
            kv_cache=args.kv_cache,
            **options,
        )
    except KeyboardInterrupt:
        code = 130
    if calls := answer.end():
        show("\n" * bool(answer.shown) + json.dumps(calls, ensure_ascii=False))
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
