"""Conversations on the command line: their options and files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..messages import check_messages, check_tools, parse_json
from .common import read_text

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
    return parse_json(file, read_text(Path(file).expanduser()))
