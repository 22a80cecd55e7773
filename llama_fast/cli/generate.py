"""llama-fast generate: continue texts, or answer them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import conversation
from .common import (
    AddCommand,
    add_model_options,
    add_ranks,
    load_model,
    number,
    only_first_prints,
    positive,
    read_and_join,
    read_text,
    share,
    use_machine,
    whole,
)

_EXAMPLES = """examples:
  llama-fast generate --model Llama-3.1-8B --prompt "The capital of France is" --temperature 0
  llama-fast generate --model Llama-3.1-8B-Instruct --chat --quantize fp8 \\
      --system "Answer in one sentence." --prompt "Why is the sky blue?"
  llama-fast generate --model Llama-3.1-8B-Instruct --chat --speculate lookup --prompt - < edit.txt
  llama-fast generate --model Llama-3.1-8B --stop $'\\n' --prompt "1 + 1 =" --prompt "2 + 2 ="
  llama-fast generate --model Llama-3.1-8B-Instruct --chat --json --prompt-file question.txt
  llama-fast generate --model Llama-3.1-8B-Instruct --messages talk.json --tools functions.json
  torchrun --nproc-per-node 8 -m llama_fast generate --tp 8 --model Llama-3.1-70B --prompt "Once"

Text goes to stdout, and figures to stderr. One prompt's text appears as it is made; several prompts
are computed together, and each text appears once it and those before it are complete. --json prints
a line for each: index, text, ids, finish_reason (stop, length, interrupted), prompt_tokens,
new_tokens, seconds from the start to its last token and, with --logprobs, logprobs, with --tools,
tool_calls. Ctrl-C ends the text; the figures still follow."""


def add(command: AddCommand) -> None:
    parser = command("generate", run, "continue texts, or answer them", _EXAMPLES)
    add_model_options(parser)
    add_ranks(parser)
    add = parser.add_argument
    repeated: Any = {"dest": "prompts", "action": "append", "default": []}
    add(
        "--prompt",
        metavar="TEXT",
        help="a text, may repeat; - reads it from stdin",
        **repeated,
    )
    add("--prompt-file", type=Path, metavar="FILE", help="a text in a file, in UTF-8", **repeated)
    add("--chat", action="store_true", help="use the model's chat template, for a user's message")
    conversation.add_options(parser)
    add("--ignore-eos", action="store_true", help="do not end where the model would")
    add("--json", action="store_true", help="print a JSON object a prompt")
    add("--logprobs", action="store_true", help="print the new tokens' log probabilities")
    add("--no-graphs", action="store_true", help="on a GPU: launch each kernel separately")
    add_generation_options(parser, 256)


def add_generation_options(parser: argparse.ArgumentParser, most: int) -> None:
    """Add what generate and chat share. most: --max-new-tokens' default."""
    add = parser.add_argument
    add("--kv-cache", choices=("fp8",), help="keys and values in e4m3: half a 16-bit cache's bytes")
    add("--max-new-tokens", type=positive, default=most, metavar="N", help=f"default {most}")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may repeat",
    )
    warm = number("0 or a positive number", lambda value: value >= 0)
    add("--temperature", type=warm, default=0.6, metavar="T", help="default 0.6; 0 is greedy")
    add("--top-p", type=share, default=0.9, metavar="P", help="default 0.9")
    add("--top-k", type=whole(0), default=0, metavar="K", help="default 0: no limit")
    add("--min-p", type=share, default=0.0, metavar="P", help="default 0: no limit")
    add(
        "--repetition-penalty",
        type=number("a positive number", lambda value: value > 0),
        default=1.0,
        metavar="X",
        help="over 1: make tokens that the text has less likely; default 1",
    )
    add("--seed", type=whole(0), metavar="N", help="default: a new one each time")
    add(
        "--speculate",
        metavar="lookup|DIR",
        help="the same tokens in fewer passes: propose those that followed the last ones earlier "
        "in the text, or those of a smaller checkpoint with the same tokenizer",
    )
    add(
        "--draft-tokens",
        type=whole(1, 16),
        metavar="N",
        help="most proposed a pass; default 15",
    )


def run(args: argparse.Namespace) -> int:
    _check_usage(args)
    inputs, tp = read_and_join(args, _read)
    with tp.together():
        tokenizer, prompts, config = _encoded(args, *inputs)
    longest = max(map(len, prompts)) + args.max_new_tokens
    model, options = load_models(args, config, longest, tp)
    with only_first_prints(tp):
        return _generate(model, tokenizer, prompts, args, options)


def _read(args: argparse.Namespace) -> Any:
    """Return the texts, and the conversation's messages and tools."""
    texts = _texts(args.prompts)
    messages, tools = conversation.read(args)
    if not texts and messages[-1]["role"] == "assistant":
        raise ValueError(f"{args.messages}: ends with an answer; give a question with --prompt")
    return texts, messages, tools


def _encoded(
    args: argparse.Namespace, texts: list[str], messages: conversation.Messages, tools: Any
) -> tuple[Any, list[list[int]], Any]:
    """Return the tokenizer, the prompts' ids and the model's config."""
    from .. import chat
    from ..config import LlamaConfig
    from ..generation.arguments import check_prompt

    use_machine(args)
    # Check the texts before loading the weights, which takes long.
    tokenizer = chat.load_tokenizer(args.model, plain=not args.chat)
    if args.chat:
        talks = [[*messages, {"role": "user", "content": text}] for text in texts] or [messages]
        prompts = [chat.encode(tokenizer, talk, tools) for talk in talks]
    else:
        prompts = [chat.encode_prompt(tokenizer, text) for text in texts]
    config = LlamaConfig.from_pretrained(args.model)
    for i, prompt in enumerate(prompts):
        check_prompt(i, prompt, config, args.max_new_tokens)
    return tokenizer, prompts, config


def load_models(
    args: argparse.Namespace, config: Any, longest: int, tp: Any = None
) -> tuple[Any, dict[str, Any]]:
    """Return the model, and what add_generation_options says of how to generate. longest: tokens of
    a text, for which a draft model needs positions."""
    from ..config import LlamaConfig
    from ..generation import speculate

    if args.draft_tokens is None:
        args.draft_tokens = speculate.DRAFT_TOKENS
    drafts = args.speculate not in (None, "lookup")
    if drafts:
        speculate.check_draft(LlamaConfig.from_pretrained(args.speculate), config, longest)
    model = load_model(args, args.model, tp)
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "speculate")
    options = {name: getattr(args, name) for name in (*names, "draft_tokens")}
    if drafts:
        options["speculate"] = load_model(args, args.speculate, tp)
    return model, options


def stops(args: argparse.Namespace, tokenizer: Any) -> tuple[list[str], list[int]]:
    """Return the texts and the ids of --stop. A control token's text is not shown, so it cannot be
    found in what is: its id ends the text."""
    control = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    ids = [control[text] for text in args.stop if text in control]
    return [text for text in args.stop if text not in control], ids


def _check_usage(args: argparse.Namespace) -> None:
    args.chat = args.chat or args.messages is not None
    if not args.prompts and args.messages is None:
        args.parser.error(
            "the following arguments are required: --prompt, --prompt-file or --messages"
        )
    if args.prompts.count("-") > 1:
        args.parser.error("--prompt - reads all of stdin, so it can be given once")
    for name in ("system", "tools"):
        if getattr(args, name) is not None and not args.chat:
            args.parser.error(f"--{name} goes with --chat")
    check_usage(args)


def check_usage(args: argparse.Namespace) -> None:
    if args.draft_tokens is not None and args.speculate is None:
        args.parser.error("--draft-tokens goes with --speculate")
    if "" in args.stop:
        args.parser.error("argument --stop: got '', want a text")


def _texts(prompts: Sequence[str | Path]) -> list[str]:
    """Return the prompts' texts, without the newline that ends a file or what a pipe brings."""
    texts = []
    for prompt in prompts:
        if isinstance(prompt, Path):
            texts.append(read_text(prompt).removesuffix("\n"))
        else:
            texts.append(_stdin().removesuffix("\n") if prompt == "-" else prompt)
    return texts


def _stdin() -> str:
    if sys.stdin is None:
        raise ValueError("stdin: is closed")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin: not valid UTF-8 at byte {error.start}") from None


def _generate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    args: argparse.Namespace,
    options: dict[str, Any],
) -> int:
    """Print the texts to stdout, then a line of figures to stderr."""
    from ..chat import stop_ids
    from .answers import Answers, utf8_stdout

    utf8_stdout()
    stop, ends = stops(args, tokenizer)
    ends += [] if args.ignore_eos else stop_ids(model.config, tokenizer)
    answers = Answers(
        tokenizer,
        prompts,
        stop=stop,
        stop_ids=ends,
        max_new_tokens=args.max_new_tokens,
        as_json=args.json,
        logprobs=args.logprobs,
        tools=args.tools is not None,
    )
    passes: list[tuple[int, int]] = []
    code = 0
    try:
        model.generate(
            prompts,
            max_new_tokens=args.max_new_tokens,
            stop_ids=ends,
            on_token=answers.on_token,
            on_logprob=answers.on_logprob if args.logprobs else None,
            on_prefill=answers.on_prefill,
            graphs=False if args.no_graphs else None,
            on_pass=lambda *counts: passes.append(counts),
            kv_cache=args.kv_cache,
            **options,
        )
    except KeyboardInterrupt:
        code = 130
    finally:
        answers.stop_bar()
    answers.end(interrupted=code == 130)
    footer = answers.footer()
    if args.speculate is not None and passes:
        proposed, accepted = map(sum, zip(*passes, strict=True))
        a_pass = sum(len(answer.ids) - 1 for answer in answers.all if answer.ids) / len(passes)
        footer += f" | accepted {accepted} / {proposed} proposed, {a_pass:.2f} tokens a pass"
    print(footer, file=sys.stderr)
    return code
