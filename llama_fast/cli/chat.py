"""llama-fast chat: a conversation over one KV cache."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from . import conversation
from .common import AddCommand, add_model_options
from .generate import add_generation_options, check_generation_options, load_models
from .lines import lines

_EXAMPLES = """examples:
  llama-fast chat --model Llama-3.1-8B-Instruct --quantize fp8
  llama-fast chat --model Llama-3.1-8B-Instruct --system "Answer in one sentence." --stats
  llama-fast chat --model Llama-3.1-8B-Instruct --messages talk.json --tools functions.json
  llama-fast chat --model Llama-3.1-8B-Instruct < questions.txt

A message is a line. A \\ at its end continues it on the next line, and a pasted text may have
several lines. Answers go to stdout, all else to stderr. Ctrl-C ends an answer, Ctrl-D the chat."""

_HELP = """\
/reset         forget the conversation, but not the system message
/system TEXT   set the system message; without TEXT: show it
/tool RESULT   give the result of the tool call, as text or JSON
/save FILE     write the conversation as JSON, for --messages
/stats         show figures after each answer, or stop showing them
/help          show this
/exit          end the chat, as Ctrl-D does"""

_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)


def add(command: AddCommand) -> None:
    parser = command("chat", run, "talk with a model", _EXAMPLES)
    add_model_options(parser)
    conversation.add_options(parser)
    parser.add_argument("--stats", action="store_true", help="show figures after each answer")
    add_generation_options(parser, 2048)


def run(args: argparse.Namespace) -> int:
    from .. import chat
    from ..config import LlamaConfig

    check_generation_options(args)
    if sys.stdin is None:
        raise ValueError("stdin: is closed; want messages from a terminal or a file")
    # Check the conversation before loading the weights, which takes long.
    messages, tools = conversation.read(args)
    config = LlamaConfig.from_pretrained(args.model)
    tokenizer = chat.load_tokenizer(args.model)
    asked = bool(messages) and messages[-1]["role"] not in ("system", "assistant")
    probe = messages if asked else [*messages, {"role": "user", "content": "Hi"}]
    _room(chat.encode(tokenizer, probe, tools), config.max_position_embeddings)
    for stream in (sys.stdout, sys.stderr):  # for every locale
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")
    talk, code = _Chat(args, tokenizer, messages, tools), 0
    terminal = sys.stdin.isatty()
    if terminal:
        _say("/help lists the commands, Ctrl-D ends the chat.")

    def safely(step: Any, *rest: Any) -> bool:
        """Return whether the chat continues. In a terminal an error is not the end."""
        nonlocal code
        try:
            return step(*rest)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            if args.debug or isinstance(error, BrokenPipeError):
                raise
            _say(f"error: {' '.join(str(error).split())}")
            code = 0 if terminal else 1
        except KeyboardInterrupt:
            if not terminal:
                raise
            _say("[stopped]")
        return True

    if asked:
        safely(talk.answer)
    for line in lines("> "):
        if not safely(talk.take, line):
            break
    return code


class _Chat:
    def __init__(
        self,
        args: argparse.Namespace,
        tokenizer: Any,
        messages: conversation.Messages,
        tools: conversation.Messages | None,
    ) -> None:
        from ..chat import stop_ids
        from ..generation.session import Session

        self._model, self._options = load_models(args)
        self._stops = stop_ids(self._model.config, tokenizer)
        self._session = Session(self._model, args.kv_cache)
        self._max_new_tokens, self._shows_figures = args.max_new_tokens, args.stats
        self._tokenizer, self._messages, self._tools = tokenizer, messages, tools
        self._figures = ""

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
        calls = self._messages[-1].get("tool_calls") if self._messages else None
        if not calls:
            raise ValueError("/tool: no call waits for a result")
        result: Any = text
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(text)
            result = value if isinstance(value, (dict, list)) else text
        name = calls[0]["function"]["name"]
        return self._ask({"role": "tool", "name": name, "content": result})

    def _save(self, file: str) -> None:
        if not file:
            raise ValueError("/save: want the name of a file")
        text = json.dumps(self._messages, ensure_ascii=False, indent=1)
        Path(file).expanduser().write_text(text + "\n", encoding="utf-8")
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
        answer = conversation.Answer(self._tokenizer, _show, self._tools is not None)
        times, start, stopped = list[float](), time.perf_counter(), False

        def on_token(_: int, token: int) -> None:
            times.append(time.perf_counter())
            answer.put(token)

        try:
            self._session.generate(ids, most, on_token, stop_ids=self._stops, **self._options)
        except KeyboardInterrupt:
            stopped = True
        calls = answer.end()
        if calls:
            # Llama 3.1 makes one call a turn, and its template refuses more.
            _show("\n" * bool(answer.shown) + json.dumps(calls[:1], ensure_ascii=False))
        _show("\n")
        new = len(ids) - self._session.kept
        self._figures = _line(len(ids), new, positions, start, times)
        if not answer.ids:
            _say("[stopped before the answer: the message is dropped]")
            return False
        message: dict[str, Any] = {"role": "assistant", "content": answer.shown}
        if calls:
            message["tool_calls"] = calls[:1]
            more = f" the first of {len(calls)};" if len(calls) > 1 else ""
            _say(f"[a tool call:{more} /tool RESULT gives its result]")
        self._messages.append(message)
        if stopped and not sys.stdin.isatty():
            raise KeyboardInterrupt
        if stopped:
            _say("[stopped]")
        elif answer.ids[-1] not in self._stops:
            full = most < self._max_new_tokens
            why = f"the model's {positions} positions are full" if full else "--max-new-tokens"
            _say(f"[stopped after {most} tokens: {why}]")
        if self._shows_figures:
            _say(self._figures)
        return True


def _room(ids: list[int], positions: int) -> int:
    """Return how many tokens an answer may have."""
    if len(ids) >= positions:
        raise ValueError(
            f"the conversation has {len(ids)} tokens, and the model only {positions} positions; "
            "/save FILE keeps it, and /reset starts a new one"
        )
    return positions - len(ids)


def _line(prompt: int, new: int, positions: int, start: float, times: list[float]) -> str:
    """Return the figures of an answer. The prompt's time ends with the first token."""
    parts = [f"prompt {prompt} tokens, {new} new"]
    if times:
        parts[0] += f", {new / (times[0] - start):.1f} tokens/s"
    parts.append(f"generated {len(times)} tokens")
    if len(times) > 1:
        parts[1] += f", {(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s"
    parts.append(f"{prompt + len(times)} of {positions} positions")
    return " | ".join(parts)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
