"""llama-fast perplexity: measure how well a model predicts a text, and what quantizing costs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .common import (
    QUANTIZE_HELP,
    AddCommand,
    add_model_options,
    add_ranks,
    load_model,
    only_first_prints,
    positive,
    progress,
    ranks,
    read_text,
    use_machine,
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
    add_ranks(parser)
    add = parser.add_argument
    add("--text", required=True, metavar="FILE", help="a UTF-8 file; white space counts")
    add("--against", metavar="DTYPE|DIR", help="bfloat16, float16, float32, or a checkpoint")
    add("--context", type=positive, metavar="N", help="tokens a window; default 2048 or the most")
    add("--tokens", type=positive, metavar="N", help="tokens of the text to read; default all")
    add("--kv-cache", choices=("fp8",), help="keys and values in e4m3, as generate has them")
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from rich.progress import MofNCompleteColumn

    from .. import chat
    from ..perplexity import CONTEXT, perplexity

    tp = ranks(args)
    path = args.model if args.against in (None, *_DTYPES) else args.against
    with tp.together():
        text = read_text(Path(args.text))
        use_machine(args)
        ids = chat.encode_prompt(chat.load_tokenizer(args.model), text)
        if path != args.model and chat.encode_prompt(chat.load_tokenizer(path), text) != ids:
            raise ValueError(f"--against: {path} has another tokenizer than {args.model}")
    other = None
    if args.against is not None:
        dtype = args.against if args.against in _DTYPES else args.dtype
        other = load_model(args, path, tp, dtype=dtype, quantize=None)
    model = load_model(args, args.model, tp)
    ids = ids[: args.tokens]
    context = args.context or min(CONTEXT, model.config.max_position_embeddings)
    with only_first_prints(tp), progress("", MofNCompleteColumn()) as bar:
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
