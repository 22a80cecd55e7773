"""Decode tokens to text as they come, in whole characters, up to a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

_REPLACEMENT = "\ufffd"  # decoders write it for bytes that are not, or not yet, UTF-8


class TextStreamer:
    """Decode the tokens of one sequence into pieces that join to the whole text.

    tokenizer: an object with decode(ids) -> str, such as transformers' AutoTokenizer. Byte-level
    tokens split characters, so a piece is held back until its last character is complete. stop:
    texts that end the sequence, wherever tokens begin and end; the first to appear and what follows
    it are not emitted, and text that may be its beginning is held back.

        streamers = [TextStreamer(tokenizer, print, stop=["\\n\\n"]) for _ in prompts]
        model.generate(prompts, on_token=lambda i, token: streamers[i].put(token))
        for streamer in streamers:
            streamer.end()
    """

    def __init__(
        self,
        tokenizer: Any,
        on_text: Callable[[str], None],
        *,
        stop: Sequence[str] = (),
        **decode_options: Any,
    ) -> None:
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop: got {stop!r}, want a list of texts that are not empty")
        self._decode = lambda ids: tokenizer.decode(ids, **decode_options)
        self._on_text, self._stop = on_text, tuple(stop)
        self._context: list[int] = []  # the last piece: decoders treat a text's start differently
        self._pending: list[int] = []
        self._held = ""  # decoded text that may begin a stop text
        self.stopped = False  # whether a stop text has appeared

    def put(self, token: int) -> bool:
        """Take the next token, and return whether a stop text has appeared: generate then ends the
        sequence. Later tokens are ignored."""
        if not self.stopped:
            self._pending.append(token)
            text = self._piece()
            whole = text.rstrip(_REPLACEMENT)
            if whole == text or self._stop_in(whole) is not None:
                self._emit(text)
        return self.stopped

    def end(self) -> None:
        """Emit the rest, with U+FFFD for bytes that are not a complete character."""
        if not self.stopped:
            self._emit(self._piece())
        if not self.stopped and self._held:
            self._on_text(self._held)
        self._held = ""

    def _piece(self) -> str:
        known = len(self._decode(self._context)) if self._context else 0
        return self._decode(self._context + self._pending)[known:]

    def _stop_in(self, text: str) -> int | None:
        """Return where the first stop text begins in the text held back and this one."""
        found = [at for stop in self._stop if (at := (self._held + text).find(stop)) >= 0]
        return min(found, default=None)

    def _emit(self, text: str) -> None:
        if not text:
            return
        self._context, self._pending = self._pending, []
        at = self._stop_in(text)
        text, self._held = self._held + text, ""
        if at is not None:
            text, self.stopped = text[:at], True
        else:
            begun = max((_begun(text, stop) for stop in self._stop), default=0)
            text, self._held = text[: len(text) - begun], text[len(text) - begun :]
        if text:
            self._on_text(text)


def _begun(text: str, stop: str) -> int:
    """Return how many characters at the end of text are the beginning of stop."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
