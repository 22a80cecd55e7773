"""Decode tokens to text as they come, in whole characters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_REPLACEMENT = "\ufffd"  # decoders write it for bytes that are not, or not yet, UTF-8


class TextStreamer:
    """Decode the tokens of one sequence into pieces that join to the whole text.

    tokenizer: an object with decode(ids) -> str, such as transformers' AutoTokenizer. Byte-level
    tokens split characters, so a piece is held back until its last character is complete.

        streamers = [TextStreamer(tokenizer, print) for _ in prompts]
        model.generate(prompts, on_token=lambda i, token: streamers[i].put(token))
        for streamer in streamers:
            streamer.end()
    """

    def __init__(
        self, tokenizer: Any, on_text: Callable[[str], None], **decode_options: Any
    ) -> None:
        self._decode = lambda ids: tokenizer.decode(ids, **decode_options)
        self._on_text = on_text
        self._context: list[int] = []  # the last piece: decoders treat a text's start differently
        self._pending: list[int] = []

    def put(self, token: int) -> None:
        self._pending.append(token)
        text = self._piece()
        if text and not text.endswith(_REPLACEMENT):
            self._emit(text)

    def end(self) -> None:
        """Emit the rest, with U+FFFD for bytes that are not a complete character."""
        self._emit(self._piece())

    def _piece(self) -> str:
        known = len(self._decode(self._context)) if self._context else 0
        return self._decode(self._context + self._pending)[known:]

    def _emit(self, text: str) -> None:
        if text:
            self._on_text(text)
        self._context, self._pending = self._pending, []
