"""llama-fast chat: a conversation over one KV cache."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from . import conversation
from .answers import Answer, utf8_stdout
from .common import AddCommand, add_model_options, explained, use_machine
from .generate import add_generation_options, check_usage, load_models, stops
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

    check_usage(args)
    if sys.stdin is None:
        raise ValueError("stdin: is closed")
    # Check the conversation before loading the weights, which takes long.
    messages, tools = conversation.read(args)
    use_machine(args)
    config = LlamaConfig.from_pretrained(args.model)
    tokenizer = chat.load_tokenizer(args.model)
    asked = bool(messages) and messages[-1]["role"] not in ("system", "assistant")
    probe = messages if asked else [*messages, {"role": "user", "content": "Hi"}]
    ids = chat.encode(tokenizer, probe, tools)
    _room(ids, config.max_position_embeddings)
    utf8_stdout()
    models = load_models(args, config, len(ids))
    talk, code = _Chat(args, *models, tokenizer, messages, tools), 0
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
            _say(f"error: {explained(error)}")
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
        model: Any,
        options: dict[str, Any],
        tokenizer: Any,
        messages: conversation.Messages,
        tools: conversation.Messages | None,
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
        if not self._messages:
            raise ValueError("/save: the conversation is empty")
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
        answer = Answer(self._tokenizer, ids, self._stop, self._tools is not None)
        start, stopped, interrupted = time.perf_counter(), False, False

        def on_token(_: int, token: int) -> bool:
            nonlocal stopped
            stopped = answer.put(token) or token in self._ends
            _show(answer.fresh())
            return stopped

        try:
            self._session.generate(ids, most, on_token, stop_ids=self._ends, **self._options)
        except KeyboardInterrupt:
            interrupted = True
        answer.end()
        calls = len(answer.calls)
        del answer.calls[1:]  # Llama 3.1 makes one call a turn, and its template refuses more
        _show(f"{answer.fresh()}{answer.called()}\n")
        new = len(ids) - self._session.kept
        self._figures = _line(len(ids), new, positions, start, answer.times)
        if interrupted and not sys.stdin.isatty():
            raise KeyboardInterrupt
        if not answer.ids:
            _say("[stopped before the answer: the message is dropped]")
            return False
        message: dict[str, Any] = {"role": "assistant", "content": answer.text}
        if calls:
            message["tool_calls"] = answer.calls
            more = f" the first of {calls};" if calls > 1 else ""
            _say(f"[a tool call:{more} /tool RESULT gives its result]")
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
