"""Conversations as JSON: messages, tools and tool calls, in the form of transformers' templates."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile, zip_longest
from typing import Any

ROLES = ("system", "user", "assistant", "tool", "ipython")  # ipython: Llama 3.1's name for tool
TAG = "<|python_tag|>"
_ENDS = ("<|eom_id|>", "<|eot_id|>", "<|end_of_text|>")
_BUILT_IN = re.compile(r"(\w+)\.call\((\w+)=(\"(?:[^\"\\]|\\.)*\")\)", re.DOTALL)
_BETWEEN = {*" \t\r\n;,"}


def check_messages(messages: Any, name: str = "messages") -> list[dict[str, Any]]:
    """Return a conversation in the form that chat templates read.

    A message is {"role": "system", "user", "assistant" or "tool", "content": text}. An assistant's
    may have "tool_calls" instead of content: [{"function": {"name": ..., "arguments": {...}}}], the
    arguments an object or its JSON. A tool's content is its result, a text or any JSON value but
    null. Raises TypeError or ValueError that names the message.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise TypeError(f"{name}: got {_type(messages)}, want a list of messages")
    if not messages:
        raise ValueError(f"{name}: is empty; want at least one message")
    return [_message(f"{name}[{i}]", message) for i, message in enumerate(messages)]


def _message(name: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(f"{name}: got {_type(message)}, want an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        got = repr(role) if "role" in message else "nothing"
        raise ValueError(f"{name}: role: got {got}, want {', '.join(ROLES[:3])} or {ROLES[3]}")
    out = {**message, "content": content}
    calls = out.pop("tool_calls", None)
    if calls:
        if role != "assistant":
            raise ValueError(f"{name}: tool_calls: got a {role}'s, want an assistant's")
        if isinstance(calls, (str, bytes, Mapping)) or not isinstance(calls, Sequence):
            raise TypeError(f"{name}: tool_calls: got {_type(calls)}, want a list")
        out["tool_calls"] = [_call(f"{name}: tool_calls[{i}]", c) for i, c in enumerate(calls)]
        out["content"] = content = content or ""
    if content is None:
        raise ValueError(f"{name}: content: missing")
    if not isinstance(content, str) and role not in ROLES[3:]:
        raise TypeError(f"{name}: content: got {_type(content)}, want text")
    return out


def _call(name: str, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f'{name}: want {{"function": {{"name": ..., "arguments": ...}}}}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse_json(f"{name}: arguments", arguments)
    if not isinstance(arguments, Mapping):
        raise TypeError(f"{name}: arguments: got {_type(arguments)}, want an object")
    rest = {key: value for key, value in call.items() if key not in ("name", "arguments")}
    return {"type": "function", **rest, "function": {**function, "arguments": arguments}}


def check_tools(tools: Any, name: str = "tools") -> list[dict[str, Any]] | None:
    """Return function schemas, [{"type": "function", "function": {"name": ..., "description": ...,
    "parameters": JSON schema}}], or None for None and []. Raises TypeError or ValueError that names
    the function."""
    if tools is None:
        return None
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise TypeError(f"{name}: got {_type(tools)}, want a list of functions")
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(
                f'{name}[{i}]: want {{"type": "function", "function": {{"name": ..., '
                '"description": ..., "parameters": {...}}}'
            )
        parameters = function.get("parameters", {})
        if not isinstance(parameters, Mapping):
            raise TypeError(f"{name}[{i}]: parameters: got {_type(parameters)}, want a JSON schema")
    return [dict(tool) for tool in tools] or None


def parse_tool_calls(answer: str) -> list[dict[str, Any]]:
    """Return the tool calls that an answer consists of, for its message's "tool_calls"; [] if it is
    an ordinary answer.

    answer: decoded with its control tokens. Llama 3.1 writes {"name": ..., "parameters": {...}},
    with or without <|python_tag|> before it, and several as a list or with semicolons or newlines
    between; after that tag also brave_search.call(query="...") and the like, or code, which becomes
    a call of code_interpreter with "code".
    """
    before, tag, tagged = answer.partition(TAG)
    text = (tagged if tag else before).strip()
    while text.endswith(_ENDS):
        text = text[: text.rindex("<|")].rstrip()
    try:
        calls = [_parsed(value) for value in _values(text)]
    except (ValueError, RecursionError):
        calls = []
    if not calls and tag and (built_in := _BUILT_IN.fullmatch(text)):
        query = json.loads(built_in[3], strict=False)
        calls = [{"name": built_in[1], "arguments": {built_in[2]: query}}]
    if not calls and tag and text:
        calls = [{"name": "code_interpreter", "arguments": {"code": text}}]
    return [{"type": "function", "function": call} for call in calls]


def waiting(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the calls at a conversation's end that have no result yet."""
    given = sum(1 for _ in takewhile(_is_result, reversed(messages)))
    calls = messages[-1 - given].get("tool_calls", ()) if given < len(messages) else ()
    return [call["function"]["name"] for call in calls[given:]]


def one_call_each(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a conversation in which a message has one call, followed by its result: Llama 3.1's
    template refuses several."""
    out: list[dict[str, Any]] = []
    at = 0
    while at < len(messages):
        message = dict(messages[at])
        at += 1
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            out.append(message)
            continue
        results = list(takewhile(_is_result, messages[at : at + len(calls)]))
        for call, result in zip_longest(calls, results):
            out.append({**message, "tool_calls": [call]})
            out += [] if result is None else [dict(result)]
            message["content"] = ""
        at += len(results)
    return out


def _is_result(message: Mapping[str, Any]) -> bool:
    return message["role"] in ROLES[3:]


def _values(text: str) -> Iterator[Any]:
    """Yield the JSON values of a text that holds nothing else but separators."""
    at = 0
    while at < len(text):
        value, at = json.JSONDecoder(strict=False).raw_decode(text, at)
        yield from value if isinstance(value, list) else [value]
        while text[at : at + 1] in _BETWEEN:
            at += 1


def _parsed(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        arguments = value.get("parameters", value.get("arguments"))
        if isinstance(value.get("name"), str) and isinstance(arguments, dict):
            return {"name": value["name"], "arguments": arguments}
    raise ValueError("not a call")


def parse_json(name: str, text: str) -> Any:
    """Parse JSON. Raises ValueError that names its source."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not valid JSON: {error}") from None


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", type(None): "null"}
    return names.get(type(value), type(value).__name__)
