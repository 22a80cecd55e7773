"""Conversations on the command line: their options, and answers with tool calls as they come."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..messages import check_messages, check_tools, parse_json, parse_tool_calls

Messages = list[dict[str, Any]]


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--system", metavar="TEXT", help="a system message before the others")
    add("--messages", metavar="FILE", help="a conversation to continue: JSON, {role, content} each")
    add("--tools", metavar="FILE", help="functions that the model may call: JSON schemas")


def read(args: argparse.Namespace) -> tuple[Messages, Messages | None]:
    """Return the messages and tools that the options name. Raises OSError, TypeError or ValueError
    that names the file."""
    tools = None if args.tools is None else check_tools(_read(args.tools), args.tools)
    messages = [] if args.messages is None else check_messages(_read(args.messages), args.messages)
    if args.system is not None:
        if messages and messages[0]["role"] == "system":
            raise ValueError(f"--system: {args.messages} has a system message already")
        messages.insert(0, {"role": "system", "content": args.system})
    return messages, tools


def _read(file: str) -> Any:
    try:
        return parse_json(file, Path(file).expanduser().read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not valid UTF-8 at byte {error.start}") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{file}: is a folder; want a JSON file") from None


class Answer:
    """Show the text of an answer as it comes, but what may be a tool call only when it is whole and
    turns out to be none."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None], tools: bool) -> None:
        """tools: whether the model may call any; without, every text is an ordinary one."""
        from ..text import TextStreamer

        self.ids: list[int] = []
        self.shown = ""
        self._tokenizer, self._show, self._tools = tokenizer, show, tools
        self._streamer = TextStreamer(
            tokenizer, self._text, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        self._tag = tokenizer.convert_tokens_to_ids("<|python_tag|>") if tools else None
        self._held = ""
        self._holds: bool | None = None if tools else False  # None: nothing but spaces has come

    def put(self, token: int) -> None:
        self.ids.append(token)
        if token == self._tag:
            self._holds = True
        self._streamer.put(token)

    def end(self) -> Messages:
        """Show what was held back, or return it as tool calls."""
        self._streamer.end()
        calls = parse_tool_calls(self._tokenizer.decode(self.ids)) if self._tools else []
        if self._held and not calls:
            self._holds = False
            self._text("")
        return calls

    def _text(self, text: str) -> None:
        self._held += text
        if self._holds is None and self._held.strip():
            self._holds = self._held.lstrip()[0] in "{["
        if self._holds is False:
            self.shown += self._held
            self._show(self._held)
            self._held = ""
