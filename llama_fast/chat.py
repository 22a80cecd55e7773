"""Prompts to token ids, with transformers' tokenizer and chat template.

A user's text is data: "<|eot_id|>" in a message must not become the control token that ends a turn.
A chat template is a downloaded program, and must not reach Python.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from .checkpoint.gguf_tokenizer import load_gguf_tokenizer
from .config import LlamaConfig, check_folder, is_gguf
from .files import open_regular, read_json
from .hub import resolve
from .messages import check_messages, check_tools, one_call_each
from .messages import parse_tool_calls as parse_tool_calls
from .plain_tokenizer import GENERAL, load_plain

_WORD = re.compile(r"[\w-]*")
_ENDS = ("<|eom_id|>", "<|eot_id|>")
_LOGIC = ("role", "type", "id", "tool_call_id")


def load_tokenizer(path: str | Path, *, plain: bool = False) -> Any:
    """Load a checkpoint's fast tokenizer with transformers, without running code from its folder.
    path: a folder, the id of a model on the Hub (hub.resolve), or a GGUF file, for which it is that
    of a tokenizer.json beside it, or else its own.
    plain: return a PlainTokenizer, which loads in a tenth of the time, if it gives the same ids.

    Raises ImportError if transformers is missing, OSError or ValueError if the tokenizer is.
    """
    folder = given = resolve(path, tokenizer=True)
    if is_gguf(folder):
        file, folder = folder, folder.parent
        if not (folder / "tokenizer.json").exists():
            return load_gguf_tokenizer(file)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: not a folder; want a checkpoint's")
    if folder == given:
        check_folder(folder)
    for file in folder.iterdir():  # transformers would wait for a pipe
        if file.suffix in (".json", ".jinja", ".model", ".txt"):
            open_regular(file).close()
    if not any(folder.glob("tokenizer*")):  # transformers takes seconds to import
        raise ValueError(f"{folder}: no tokenizer that transformers can load: no tokenizer.json")
    if plain and (tokenizer := load_plain(folder)) is not None:
        return tokenizer
    try:
        from transformers import PretrainedConfig
    except ImportError:
        raise ImportError("text needs transformers: pip install 'llama_fast[hf]'") from None

    # What AutoTokenizer reads of a config, by this name. transformers' own takes 1 s to import.
    light_config: Any = type("LlamaConfig", (PretrainedConfig,), {"model_type": "llama"})
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        if _is_general(folder):
            from transformers import PreTrainedTokenizerFast

            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **options)
        else:
            from transformers import AutoTokenizer

            if (folder / "config.json").exists():
                options["config"] = light_config.from_pretrained(folder, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # of many types, with one meaning for a user
        raise ValueError(f"{folder}: no tokenizer that transformers can load: {error}") from None
    if not tokenizer.is_fast:
        raise ValueError(f"{folder}: want a fast tokenizer (tokenizer.json)")
    return tokenizer


def _is_general(folder: Path) -> bool:
    """Return whether the folder names the class of tokenizers that are as tokenizer.json says.
    AutoTokenizer takes that class too, but imports all others' names first, 0.4 s."""
    file = folder / "tokenizer_config.json"
    if not file.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    named = read_json(file)
    return named.get("tokenizer_class") in GENERAL and "auto_map" not in named


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Encode a prompt for a base model. BOS is added; control tokens in the text are recognized."""
    return tokenizer(_utf8(prompt))["input_ids"]


def encode(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Encode a conversation by the chat template, up to the assistant's next answer.

    messages: see check_messages. tools: see check_tools. Returns the tokens of the rendered text,
    as transformers does, unless a message, a call's arguments, its result or a tool would add
    control tokens to the template's own. Then the text between those is encoded with
    split_special_tokens, as plain characters. A template that refuses several calls in a message,
    as Llama 3.1's does, gets each call with its result instead. Raises TypeError or ValueError for
    messages and tools that are not as they should be, and ValueError for a template that fails,
    tries to reach Python or leaves the tools out, and for control tokens that it or the tokenizer
    cannot keep inert.
    """
    messages, tools = check_messages(messages), check_tools(tools)
    try:
        text = _render(tokenizer, messages, tools)
    except ValueError:
        single = one_call_each(messages)
        if single == messages:
            raise
        messages, text = single, _render(tokenizer, single, tools)
    if tools and text == _render(tokenizer, messages, None):
        raise ValueError("tools: the model's chat template does not show them to the model")
    mark, number = secrets.token_hex(16), count()
    control = {*tokenizer.all_special_ids} | {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    control.discard(tokenizer.unk_token_id)  # unknown characters give it too
    ids = _encode(tokenizer, _utf8(text))
    own = _data((messages, tools), lambda text: text and f"{mark}{next(number)}")
    wanted = [i for i in _encode(tokenizer, _render(tokenizer, *own)) if i in control]
    if [i for i in ids if i in control] == wanted:
        return ids
    names = sorted(map(tokenizer.convert_ids_to_tokens, control), key=len, reverse=True)
    contents, controls = rf"\[{mark}.*?{mark}\]", "|".join(map(re.escape, names))
    marked = _render(tokenizer, *_data((messages, tools), lambda text: f"[{mark}{text}{mark}]"))
    ids, plain = [], ""
    # Odd pieces are data or the template's control tokens.
    for piece in re.split(f"({contents}|{controls})", marked, flags=re.DOTALL):
        if piece in names:
            ids += _encode(tokenizer, plain, split_special_tokens=True)
            ids.append(tokenizer.convert_tokens_to_ids(piece))
            plain = ""
        else:
            plain += piece.removeprefix(f"[{mark}").removesuffix(f"{mark}]")
    ids += _encode(tokenizer, plain, split_special_tokens=True)
    if mark in plain or [i for i in ids if i in control] != wanted:
        raise ValueError("prompt: control tokens in a message, which cannot be kept inert here")
    return ids


def _data(value: Any, change: Callable[[str], str]) -> Any:
    """Return a copy of messages and tools with their strings changed, keys included, but for the
    words that a template's logic reads."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            key if _WORD.fullmatch(key) else change(key): item
            if key in _LOGIC and isinstance(item, str) and _WORD.fullmatch(item)
            else _data(item, change)
            for key, item in value.items()
        }
    return [_data(item, change) for item in value] if isinstance(value, (list, tuple)) else value


def _render(tokenizer: Any, messages: Any, tools: Any) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True
        )
    except ImportError:
        raise ImportError("chat templates need jinja2: pip install 'llama_fast[hf]'") from None
    except Exception as error:  # a template is a program and may raise anything
        raise ValueError(f"chat template: {type(error).__name__}: {error}") from None


def _encode(tokenizer: Any, text: str, **options: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=False, **options).input_ids if text else []


def stop_ids(config: LlamaConfig, tokenizer: Any) -> list[int]:
    """Return the ids that end a text: the config's, the tokenizer's own, and those that end a
    message or a turn in Llama 3's formats."""
    own = {i for i, token in tokenizer.added_tokens_decoder.items() if token.content in _ENDS}
    if tokenizer.eos_token_id is not None:
        own.add(tokenizer.eos_token_id)
    return sorted({*config.eos_token_id, *own})


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("prompt: not valid UTF-8") from None
    return text
