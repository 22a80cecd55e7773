"""llama-fast generate: continue a text, or answer it."""

from __future__ import annotations

import argparse
import io
import resource
import sys
import time
from typing import Any

from .common import AddCommand, add_model_options, load_model, positive, ranks

_EXAMPLES = """examples:
  llama-fast generate --model Llama-3.1-8B --prompt "The capital of France is" --temperature 0
  llama-fast generate --model Llama-3.1-8B-Instruct --chat --quantize fp8 \\
      --system "Answer in one sentence." --prompt "Why is the sky blue?"
  llama-fast generate --model Llama-3.1-8B-Instruct --chat --speculate lookup --prompt - < edit.txt
  llama-fast generate --model Llama-3.1-8B-Instruct --chat --prompt - < question.txt
  torchrun --nproc-per-node 8 -m llama_fast generate --tp 8 --model Llama-3.1-70B --prompt "Once"

Text goes to stdout, and figures to stderr. Ctrl-C ends the text; the figures still follow."""


def add(command: AddCommand) -> None:
    parser = command("generate", run, "continue a text, or answer it", _EXAMPLES)
    add_model_options(parser)
    add = parser.add_argument
    add("--prompt", required=True, metavar="TEXT", help="the text; - reads it from stdin")
    add("--chat", action="store_true", help="use the model's chat template, for a user's message")
    add("--system", metavar="TEXT", help="a system message before it (with --chat)")
    add("--kv-cache", choices=("fp8",), help="keys and values in e4m3: half a 16-bit cache's bytes")
    add("--max-new-tokens", type=positive, default=256, metavar="N", help="default 256")
    add("--temperature", type=float, default=0.6, metavar="T", help="default 0.6; 0 is greedy")
    add("--top-p", type=float, default=0.9, metavar="P", help="default 0.9")
    add("--top-k", type=int, default=0, metavar="K", help="default 0: no limit")
    add("--seed", type=int, metavar="N", help="default: a new one each time")
    add("--no-graphs", action="store_true", help="on a GPU: launch each kernel separately")
    add(
        "--speculate",
        metavar="lookup|DIR",
        help="the same tokens in fewer passes: propose those that followed the last ones earlier "
        "in the text, or those of a smaller checkpoint with the same tokenizer",
    )
    add("--draft-tokens", type=int, metavar="N", help="most proposed a pass, 1 to 16; default 15")


def run(args: argparse.Namespace) -> int:
    import torch

    from ..generation import sampling, speculate

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
    tp = ranks(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    # Check the text before loading the weights, which takes long. Only rank 0 reads stdin.
    tokenizer, text = None, (list[int](), list[int]())
    with tp.together():
        if tp.rank == 0:
            tokenizer, text = _encoded(args)
    ids, stops = tp.exchange(text)[0]
    model = load_model(args, args.model, tp)
    if args.speculate not in (None, "lookup"):
        args.speculate = load_model(args, args.speculate, tp)
    return _stream(model, tokenizer, ids, stops, args)


def _encoded(args: argparse.Namespace) -> tuple[Any, tuple[list[int], list[int]]]:
    """Return the tokenizer, and the ids of the prompt and of the tokens that end an answer."""
    from .. import chat
    from ..config import LlamaConfig

    prompt = _stdin() if args.prompt == "-" else args.prompt
    tokenizer = chat.load_tokenizer(args.model)
    if args.chat:
        messages = [{"role": "user", "content": prompt}]
        if args.system is not None:
            messages.insert(0, {"role": "system", "content": args.system})
        ids = chat.encode_chat(tokenizer, messages)
    else:
        ids = chat.encode_prompt(tokenizer, prompt)
    config = LlamaConfig.from_pretrained(args.model)
    return tokenizer, (ids, chat.stop_ids(config, tokenizer))


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin: not valid UTF-8 at byte {error.start}") from None


def _stream(
    model: Any, tokenizer: Any, ids: list[int], stops: list[int], args: argparse.Namespace
) -> int:
    """Print text to stdout as it comes, then a line of figures to stderr; on rank 0 only."""
    from ..text import TextStreamer

    if isinstance(sys.stdout, io.TextIOWrapper):  # for every locale
        sys.stdout.reconfigure(encoding="utf-8")

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    first = model.tp.rank == 0
    streamer = TextStreamer(
        tokenizer, show, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    times: list[float] = []

    def on_token(_: int, token: int) -> None:
        times.append(time.perf_counter())
        if first:
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
            stop_ids=stops,
            on_token=on_token,
            graphs=False if args.no_graphs else None,
            speculate=args.speculate,
            draft_tokens=args.draft_tokens,
            on_pass=lambda *counts: passes.append(counts),
            kv_cache=args.kv_cache,
        )
    except KeyboardInterrupt:
        code = 130
    if not first:
        return code
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
