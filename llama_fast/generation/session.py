"""A conversation over one KV cache: each answer reads only what is new in the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

from . import decode
from .arguments import check_prompt
from .generate import generate
from .protocol import Model

SHORTEST = 2048  # tokens of the first cache


class Session:
    """The tokens that a cache holds, of which generate() keeps those that its prompt begins with.

    The cache grows with the conversation, up to the model's positions. kv_cache: see
    generate.generate; measured scales are those of the conversation's first tokens, until clear().
    """

    def __init__(self, model: Model, kv_cache: str | None = None) -> None:
        decode.check_kv_cache(kv_cache)
        self._model, self._kv_cache = model, kv_cache
        self._capacity = min(SHORTEST, model.config.max_position_embeddings)
        self._cache = decode.new_cache(model, self._capacity, kv_cache)
        self.ids: list[int] = []  # in the cache
        self.kept = 0  # tokens of the last prompt that were in the cache

    def clear(self) -> None:
        """Forget the conversation."""
        self._cache.clear()
        self.ids = []

    def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int = 256,
        on_token: Callable[[int, int], Any] | None = None,
        **options: Any,
    ) -> list[int]:
        """Return the new ids after prompt, the whole conversation's ids, as generate.generate does
        for a list of one prompt; options are its arguments. After an exception, such as
        KeyboardInterrupt, the cache keeps what the model has read."""
        ids, cache = check_prompt(0, prompt, self._model.config, max_new_tokens), self._cache
        same = zip(self.ids, ids[:-1], strict=False)  # logits need the last token read again
        self.kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], same))
        need = len(ids) + max_new_tokens
        if need > self._capacity:
            most = self._model.config.max_position_embeddings
            self._capacity = min(max(need, 2 * self._capacity), most)
            cache.grow(self._capacity)
        cache.truncate([self.kept])
        new: list[int] = []

        def emit(index: int, token: int) -> Any:
            new.append(token)
            return None if on_token is None else on_token(index, token)

        try:
            generate(self._model, [ids], max_new_tokens, on_token=emit, cache=cache, **options)
        finally:
            self.ids = [*ids, *new][: cache.seqlens[0]]
            cache.truncate([len(self.ids)])
        return new
