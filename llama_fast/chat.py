"""Prompts to token ids, with transformers' tokenizer and chat template.

What a user types is data: "<|eot_id|>" in a message must not become the control token that ends a
turn, and a chat template, which is a program that came with a download, must not reach Python.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def load_tokenizer(path: str | Path) -> Any:
    """transformers' fast tokenizer of a checkpoint; never runs code that lies beside it.

    Raises ImportError where transformers is missing, OSError or ValueError where the tokenizer is.
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
    except Exception as error:  # of many kinds; all mean the same to a user
        raise ValueError(f"{folder}: no tokenizer that transformers can load: {error}") from None
    if not tokenizer.is_fast:
        raise ValueError(f"{folder}: want a fast tokenizer (tokenizer.json)")
    return tokenizer


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """For a base model: what the tokenizer makes of it, BOS and written-out control tokens too."""
    return tokenizer(_utf8(prompt))["input_ids"]


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The chat template over messages of {"role", "content"}, ending where the assistant begins.

    Only the template's own text yields control tokens. Each content travels through the template
    between two random marks; what comes out between them is encoded with every special token
    spelled out as the characters it is. Contents are stripped first, as Meta's own format does.
    Raises ValueError for a template that fails, tries to reach Python, or takes a content apart.
    """
    mark = secrets.token_hex(16)
    opened, closed = f"[{mark}", f"{mark}]"
    marked = [{**m, "content": f"{opened}{_utf8(m['content']).strip()}{closed}"} for m in messages]
    try:
        text = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
    except ImportError:
        raise ImportError("chat templates need jinja2: pip install 'llama_fast[hf]'") from None
    except Exception as error:  # a template is a program, in a sandbox: anything can come out of it
        raise ValueError(f"chat template: {type(error).__name__}: {error}") from None
    ids: list[int] = []
    # Odd pieces are contents. A template that cuts one leaves a mark in another piece.
    pieces = re.split(re.escape(opened) + "(.*?)" + re.escape(closed), text, flags=re.DOTALL)
    for i, piece in enumerate(pieces):
        if mark in piece:
            raise ValueError("chat template: takes messages apart, so their text cannot be told")
        ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=i % 2 == 1).input_ids
    return ids


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("prompt: not valid UTF-8") from None
    return text
