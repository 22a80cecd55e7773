"""Prompts to token ids, with transformers' tokenizer and chat template.

A user's text is data: "<|eot_id|>" in a message must not become the control token that ends a turn.
A chat template is a downloaded program, and must not reach Python.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def load_tokenizer(path: str | Path) -> Any:
    """Load a checkpoint's fast tokenizer with transformers, without running code from its folder.

    Raises ImportError if transformers is missing, OSError or ValueError if the tokenizer is.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ImportError("text needs transformers: pip install 'llama_fast[hf]'") from None
    folder = Path(path)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: not a folder; want a checkpoint's")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of many types, with one meaning for a user
        raise ValueError(f"{folder}: no tokenizer that transformers can load: {error}") from None
    if not tokenizer.is_fast:
        raise ValueError(f"{folder}: want a fast tokenizer (tokenizer.json)")
    return tokenizer


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Encode a prompt for a base model. BOS is added; control tokens in the text are recognized."""
    return tokenizer(_utf8(prompt))["input_ids"]


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Encode messages of {"role", "content"} by the chat template, up to the assistant's answer.

    Only the template's own text becomes control tokens. Each content passes through the template
    between two random marks; the text between them is then encoded as plain characters, special
    tokens included. Contents are stripped first, as in Meta's format. Raises ValueError for a
    template that fails, tries to reach Python, or splits a content.
    """
    mark = secrets.token_hex(16)
    opened, closed = f"[{mark}", f"{mark}]"
    marked = [{**m, "content": f"{opened}{_utf8(m['content']).strip()}{closed}"} for m in messages]
    try:
        text = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
    except ImportError:
        raise ImportError("chat templates need jinja2: pip install 'llama_fast[hf]'") from None
    except Exception as error:  # a template is a program and may raise anything
        raise ValueError(f"chat template: {type(error).__name__}: {error}") from None
    ids: list[int] = []
    # Odd pieces are contents. A template that splits one leaves a mark in another piece.
    pieces = re.split(re.escape(opened) + "(.*?)" + re.escape(closed), text, flags=re.DOTALL)
    for i, piece in enumerate(pieces):
        if mark in piece:
            raise ValueError("chat template: splits messages, so their text cannot be found")
        ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=i % 2 == 1).input_ids
    return ids


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("prompt: not valid UTF-8") from None
    return text
