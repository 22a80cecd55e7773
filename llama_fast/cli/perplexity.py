"""llama-fast perplexity: measure how well a model predicts a text, and what quantizing costs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .common import (
    QUANTIZE_HELP,
    AddCommand,
    add_model_options,
    load_model,
    positive,
    progress,
    ranks,
)

_EXAMPLES = f"""examples:
  llama-fast perplexity --model Llama-3.1-8B --text book.txt
  llama-fast perplexity --model Llama-3.1-8B --text book.txt --quantize fp8 --against bfloat16
  llama-fast perplexity --model Llama-3.1-8B-FP8 --text book.txt --against Llama-3.1-8B --json

The text is cut into windows of --context tokens, which the model reads separately. --against
compares it with the same checkpoint in another dtype, unquantized, or with another checkpoint of
the same tokenizer; both are then in memory. Only figures of the same text, windows and tokenizer
can be compared.

{QUANTIZE_HELP}"""

_DTYPES = ("bfloat16", "float16", "float32")


def add(command: AddCommand) -> None:
    summary = "measure how well a model predicts a text"
    parser = command("perplexity", run, summary, _EXAMPLES)
    add_model_options(parser)
    add = parser.add_argument
    add("--text", required=True, metavar="FILE", help="a UTF-8 file; white space counts")
    add("--against", metavar="DTYPE|DIR", help="bfloat16, float16, float32, or a checkpoint")
    add("--context", type=positive, metavar="N", help="tokens a window; default 2048 or the most")
    add("--tokens", type=positive, metavar="N", help="tokens of the text to read; default all")
    add("--kv-cache", choices=("fp8",), help="keys and values in e4m3, as generate has them")
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    import torch
    from rich.progress import MofNCompleteColumn

    from ..perplexity import CONTEXT, perplexity

    tp = ranks(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    ids = list[int]()
    with tp.together():
        if tp.rank == 0:
            ids = _encoded(args)
    ids = tp.exchange(ids)[0]
    other = None
    if args.against is not None:
        path, dtype = args.against, args.dtype
        if args.against in _DTYPES:
            path, dtype = args.model, args.against
        other = load_model(args, path, tp, dtype=dtype, quantize=None)
    model = load_model(args, args.model, tp)
    context = args.context or min(CONTEXT, model.config.max_position_embeddings)
    with progress(MofNCompleteColumn()) as bar:
        task = bar.add_task("", total=len(ids) - -(-len(ids) // context))
        result = perplexity(
            model,
            ids,
            other,
            context=context,
            kv_cache=args.kv_cache,
            on_tokens=lambda done: bar.update(task, completed=done),
        )
    if tp.rank:
        return 0
    distance = result.against
    if args.json:
        names = ("model", "dtype", "quantize", "kv_cache", "text", "against")
        settings = {name: getattr(args, name) for name in names} | {"context": context}
        found = result._asdict() | {"against": distance and distance._asdict()}
        print(json.dumps({**found, "settings": settings}))
        return 0
    print(
        f"perplexity {result.perplexity:.3f} +- {result.standard_error:.3f} | "
        f"{result.tokens} tokens in windows of {context}"
    )
    if distance is not None:
        print(
            f"against {args.against}: perplexity {distance.perplexity:.3f} "
            f"({result.perplexity / distance.perplexity - 1:+.2%}), mean KL {distance.mean_kl:.5f} "
            f"nats a token, same top token {distance.same_top:.1%}"
        )
    return 0


def _encoded(args: argparse.Namespace) -> list[int]:
    """Return the text's ids. Raises ValueError if --against has another tokenizer."""
    from .. import chat

    try:
        text = Path(args.text).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{args.text}: not valid UTF-8 at byte {error.start}") from None
    ids = chat.encode_prompt(chat.load_tokenizer(args.model), text)
    if args.against not in (None, args.model, *_DTYPES):
        other = chat.load_tokenizer(args.against)
        if chat.encode_prompt(other, text) != ids:
            raise ValueError(f"--against: {args.against} has another tokenizer than {args.model}")
    return ids[: args.tokens]
