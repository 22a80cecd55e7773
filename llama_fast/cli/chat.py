"""llama-fast chat: a conversation over one KV cache."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoint.output import ends_by_exception
from ..messages import waiting
from ..torchrun import PeerError, launched
from . import conversation
from .answers import Answer, figures, show, utf8_stdout
from .common import (
    AddCommand,
    add_model_options,
    add_ranks,
    explained,
    only_first_prints,
    read_and_join,
    use_machine,
)
from .generate import add_generation_options, check_usage, load_models, stops
from .lines import ctrl_c_is_a_character, lines, typed_ctrl_c

_EXAMPLES = """examples:
  llama-fast chat --model Llama-3.1-8B-Instruct --quantize fp8
  llama-fast chat --model Llama-3.1-8B-Instruct --system "Answer in one sentence." --stats
  llama-fast chat --model Llama-3.1-8B-Instruct --messages talk.json --tools functions.json
  llama-fast chat --model Llama-3.1-8B-Instruct < questions.txt
  torchrun --nproc-per-node 8 -m llama_fast chat --tp 8 --model Llama-3.1-70B-Instruct

A message is a line. A \\ at its end continues it on the next line, and a pasted text may have
several lines. Answers go to stdout, all else to stderr. Ctrl-C ends an answer, Ctrl-D the chat."""

_HELP = """\
/reset         forget the conversation, but not the system message
/system TEXT   set the system message; without TEXT: show it
/tool RESULT   give the result of the next tool call, as text or JSON
/save FILE     write the conversation as JSON, for --messages
/stats         show figures after each answer, or stop showing them
/help          show this
/exit          end the chat, as Ctrl-D does"""

_PATIENCE = 7 * 86400.0  # seconds that the other processes wait for a line
_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)


def add(command: AddCommand) -> None:
    parser = command("chat", run, "talk with a model", _EXAMPLES)
    add_model_options(parser)
    add_ranks(parser)
    conversation.add_options(parser)
    parser.add_argument("--stats", action="store_true", help="show figures after each answer")
    add_generation_options(parser, 2048)


def run(args: argparse.Namespace) -> int:
    from .. import chat
    from ..config import LlamaConfig

    check_usage(args)
    (messages, tools, terminal), tp = read_and_join(args, _read, timeout=_PATIENCE)
    with tp.together():
        use_machine(args)
        # Check the conversation before loading the weights, which takes long.
        config = LlamaConfig.from_pretrained(args.model)
        tokenizer = chat.load_tokenizer(args.model)
        asked = bool(messages) and messages[-1]["role"] not in ("system", "assistant")
        asked = asked and not waiting(messages)
        probe = messages if asked else [*messages, {"role": "user", "content": "Hi"}]
        ids = chat.encode(tokenizer, probe, tools)
        _room(ids, config.max_position_embeddings)
    utf8_stdout()
    models = load_models(args, config, len(ids), tp)
    talk, code = _Chat(args, *models, tokenizer, messages, tools, terminal), 0
    # Of several processes, one alone may fail in another way, while the others wait for it.
    caught: tuple[type[Exception], ...] = (TypeError, ValueError)
    caught += (OSError, RuntimeError) if tp.size == 1 else (PeerError,) * (tp.rank > 0)

    def safely(step: Any, *rest: Any) -> bool:
        """Return whether the chat continues. In a terminal an error is not the end."""
        nonlocal code
        try:
            return step(*rest)
        except caught as error:
            if args.debug or isinstance(error, BrokenPipeError):
                raise
            _say(f"error: {explained(error)}")
            code = 0 if terminal else 1
        except KeyboardInterrupt:
            if not talk.survives_signals:
                raise
            _say("[stopped]")
        return True

    with contextlib.ExitStack() as stack:
        stack.enter_context(only_first_prints(tp))
        if talk.takes_keys:
            stack.enter_context(ends_by_exception())  # the terminal needs its modes back
            stack.enter_context(ctrl_c_is_a_character())
        if terminal:
            _say("/help lists the commands, Ctrl-D ends the chat.")
        if asked:
            safely(talk.answer)
        for line in _lines(tp):
            if not safely(talk.take, line):
                break
    return code


def _read(args: argparse.Namespace) -> Any:
    """Return the conversation's messages and tools, and whether stdin is a terminal."""
    if sys.stdin is None:
        raise ValueError("stdin: is closed")
    return *conversation.read(args), sys.stdin.isatty()


def _lines(tp: Any) -> Iterator[str]:
    """Yield the first process's lines in all of them."""
    own = lines("> ") if tp.rank == 0 else iter(())
    while True:
        with tp.together():
            line = next(own, None)
        line = tp.exchange(line)[0]
        if line is None:
            return
        yield line


class _Chat:
    def __init__(
        self,
        args: argparse.Namespace,
        model: Any,
        options: dict[str, Any],
        tokenizer: Any,
        messages: conversation.Messages,
        tools: conversation.Messages | None,
        terminal: bool,
    ) -> None:
        from ..chat import stop_ids
        from ..generation.session import Session

        self._model, self._options = model, options
        self._stop, self._ends = stops(args, tokenizer)
        self._ends += stop_ids(model.config, tokenizer)
        self._session = Session(model, args.kv_cache)
        self._max_new_tokens, self._shows_figures = args.max_new_tokens, args.stats
        self._tokenizer, self._messages, self._tools = tokenizer, messages, tools
        self._figures = ""
        # torchrun's processes are not in the terminal's foreground, so that Ctrl-C's signal would
        # reach torchrun alone, which would end them.
        self.takes_keys = terminal and launched() is not None and model.tp.rank == 0
        self.survives_signals = terminal and launched() is None

    def take(self, line: str) -> bool:
        """Run a command, or answer a message. Return whether the chat continues."""
        if not line.strip():
            return True
        match = _COMMAND.fullmatch(line.strip())
        if match is None:
            return self._ask({"role": "user", "content": line})
        name, text = match[1], match[2] or ""
        if name in ("exit", "quit"):
            return False
        if name == "help":
            _say(_HELP)
        elif name == "reset":
            self._messages = self._own()
            self._session.clear()
        elif name == "system":
            self._system(text)
        elif name == "tool":
            return self._tool(text)
        elif name == "save":
            self._save(text)
        elif name == "stats":
            self._shows_figures = not self._shows_figures
            _say(self._figures if self._shows_figures else "no figures")
        else:
            raise ValueError(f"/{name}: no such command; /help lists them")
        return True

    def _own(self) -> conversation.Messages:
        """Return the system message, if there is one."""
        return [message for message in self._messages[:1] if message["role"] == "system"]

    def _system(self, text: str) -> None:
        own = self._own()
        if text:
            self._messages[: len(own)] = [{"role": "system", "content": text}]
        else:
            _say(own[0]["content"] if own else "no system message")

    def _tool(self, text: str) -> bool:
        calls = waiting(self._messages)
        if not calls:
            raise ValueError("/tool: no call waits for a result")
        result: Any = text
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(text)
            result = value if isinstance(value, (dict, list)) else text
        message = {"role": "tool", "name": calls[0], "content": result}
        if len(calls) == 1:
            return self._ask(message)
        self._messages.append(message)
        _say(f"[{calls[1]} is next]")
        return True

    def _save(self, file: str) -> None:
        if not file:
            raise ValueError("/save: want the name of a file")
        if not self._messages:
            raise ValueError("/save: the conversation is empty")
        text = json.dumps(self._messages, ensure_ascii=False, indent=1)
        if self._model.tp.rank == 0:
            try:
                Path(file).expanduser().write_text(text + "\n", encoding="utf-8")
            except OSError as error:
                raise ValueError(explained(error)) from None
        _say(f"{file}: {len(self._messages)} messages")

    def _ask(self, message: dict[str, Any]) -> bool:
        """Answer a message, which is dropped if that fails."""
        before = list(self._messages)
        self._messages.append(message)
        try:
            answered = self.answer()
        except BaseException:
            self._messages = before
            raise
        if not answered:
            self._messages = before
        return True

    def answer(self) -> bool:
        """Show the answer to the conversation and add it, as far as it comes before Ctrl-C. Return
        False if nothing came."""
        from ..chat import encode

        ids = encode(self._tokenizer, self._messages, self._tools)
        positions = self._model.config.max_position_embeddings
        most = min(self._max_new_tokens, _room(ids, positions))
        answer = Answer(self._tokenizer, ids, self._stop, self._tools is not None)
        start, stopped, interrupted, signaled = time.perf_counter(), False, False, False

        def on_token(_: int, token: int) -> bool:
            nonlocal stopped, interrupted
            stopped = answer.put(token) or token in self._ends
            show(answer.fresh())
            interrupted = self._model.tp.exchange(typed())[0]
            return stopped or interrupted

        try:
            with typed_ctrl_c() if self.takes_keys else _no_keys() as typed:
                self._session.generate(ids, most, on_token, stop_ids=self._ends, **self._options)
        except KeyboardInterrupt:
            interrupted = signaled = True
        answer.end()
        show(f"{answer.fresh()}{answer.called()}\n")
        new = len(ids) - self._session.kept
        prompt, used = f"prompt {len(ids)} tokens, {new} new", len(ids) + len(answer.times)
        rest = f"{used} of {positions} positions"
        self._figures = figures(prompt, new, start, [answer.times], rest)
        if signaled and not self.survives_signals:
            raise KeyboardInterrupt
        if not answer.ids:
            _say("[stopped before the answer: the message is dropped]")
            return False
        message: dict[str, Any] = {"role": "assistant", "content": answer.text}
        if answer.calls:
            message["tool_calls"] = answer.calls
            calls, each = len(answer.calls), "the result of each in turn"
            one = "[a tool call: /tool RESULT gives its result]"
            _say(one if calls == 1 else f"[{calls} tool calls: /tool RESULT gives {each}]")
        self._messages.append(message)
        if interrupted:
            _say("[stopped]")
        elif not stopped:
            full = most < self._max_new_tokens
            why = f"the model's {positions} positions are full" if full else "--max-new-tokens"
            _say(f"[stopped after {most} tokens: {why}]")
        if self._shows_figures:
            _say(self._figures)
        return True


def _no_keys() -> Any:
    return contextlib.nullcontext(lambda: False)


def _room(ids: list[int], positions: int) -> int:
    """Return how many tokens an answer may have."""
    if len(ids) >= positions:
        raise ValueError(
            f"the conversation has {len(ids)} tokens, and the model only {positions} positions; "
            "/save FILE keeps it, and /reset starts a new one"
        )
    return positions - len(ids)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
