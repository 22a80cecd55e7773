"""Prompts in, new tokens out: chunked prefill, batched decode without padding, stop ids."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import sampling
from .cache import KVCache

if TYPE_CHECKING:
    from .model import Llama

PREFILL_CHUNK = 512  # tokens: bounds activations, whatever the length of the prompt


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 256,
    *,
    temperature: float = 0.6,
    top_p: float = 0.9,
    top_k: int = 0,
    seed: int | None = None,
    stop_ids: Sequence[int] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The new ids of each prompt, which is a list of token ids (BOS included, where wanted).

    A sequence ends after max_new_tokens, or with the first of stop_ids, which is kept as the last
    id, as transformers does; None: those of the checkpoint; (): none. temperature, top_p, top_k:
    see sampling.sample. on_token(index of the prompt, id) is called for each token as it comes.

    A prompt's result does not depend on the others: with a seed it draws from a random stream of
    its own, made of the seed and its tokens, and, for repeated prompts, which repetition it is.

    Raises ValueError for an empty prompt, an id outside the vocabulary, a prompt that with
    max_new_tokens exceeds the model's positions, and logits that are NaN.
    """
    _check_count("max_new_tokens", max_new_tokens)
    sampling.check(temperature, top_p, top_k)
    vocab = model.config.vocab_size
    stops = frozenset(_ids("stop_ids", model.config.eos_token_id if stop_ids is None else stop_ids))
    checked = [_prompt(i, prompt, vocab, max_new_tokens, model) for i, prompt in enumerate(prompts)]
    new: list[list[int]] = [[] for _ in checked]
    if not checked or max_new_tokens == 0:
        return new
    lengths = [len(prompt) + max_new_tokens for prompt in checked]
    cache = KVCache(model.config, lengths, dtype=model.dtype, device=model.device)
    generators = _generators(checked, seed, model.device)

    def emit(i: int, logits: torch.Tensor) -> bool:
        """Samples a token of sequence i. Whether it goes on."""
        try:
            token = sampling.sample(logits, temperature, top_p, top_k, generators[i])
        except ValueError as error:
            raise ValueError(f"prompt {i}, new token {len(new[i])}: {error}") from None
        new[i].append(token)
        if on_token is not None:
            on_token(i, token)
        if token not in stops and len(new[i]) < max_new_tokens:
            return True
        cache.release(i)
        return False

    active = [
        i for i, prompt in enumerate(checked) if emit(i, _prefill(model, prompt, cache.select([i])))
    ]
    while active:
        tokens = torch.tensor([[new[i][-1]] for i in active], device=model.device)
        logits = model(tokens, cache=cache.select(active))[:, 0]
        active = [i for i, row in zip(active, logits, strict=True) if emit(i, row)]
    return new


def _prefill(model: Llama, prompt: list[int], cache: KVCache) -> torch.Tensor:
    """Fills the cache of one sequence. Logits [vocab] after the last token, and only there."""
    for start in range(0, len(prompt), PREFILL_CHUNK):
        chunk = torch.tensor([prompt[start : start + PREFILL_CHUNK]], device=model.device)
        hidden = model.hidden(chunk, cache=cache)
    return model.logits(hidden[:, -1])[0]


def _generators(
    prompts: list[list[int]], seed: int | None, device: torch.device
) -> list[torch.Generator]:
    """Without a seed, torch's own generator gives one, so that torch.manual_seed rules here too."""
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    _check_count("seed", seed)
    seen: Counter[tuple[int, ...]] = Counter()
    generators = []
    for prompt in map(tuple, prompts):
        key = f"{seed} {seen[prompt]} ".encode() + array("q", prompt).tobytes()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        stream = int.from_bytes(digest, "little", signed=True)
        generators.append(torch.Generator(device).manual_seed(stream))
        seen[prompt] += 1
    return generators


def _prompt(index: int, prompt: Any, vocab: int, max_new_tokens: int, model: Llama) -> list[int]:
    ids = _ids(f"prompt {index}", prompt)
    if not ids:
        raise ValueError(f"prompt {index}: is empty; want at least one token id, such as BOS")
    for token in ids:
        if not 0 <= token < vocab:
            raise ValueError(f"prompt {index}: got id {token}, want 0 to {vocab - 1}")
    limit = model.config.max_position_embeddings
    if len(ids) + max_new_tokens > limit:
        raise ValueError(
            f"prompt {index}: {len(ids)} tokens and max_new_tokens={max_new_tokens} exceed the "
            f"model's {limit} positions"
        )
    return ids


def _ids(name: str, ids: Any) -> list[int]:
    if isinstance(ids, torch.Tensor):
        ids = ids.tolist()
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
        raise TypeError(f"{name}: got {type(ids).__name__}, want a list of token ids")
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool):
            raise TypeError(f"{name}: got {token!r}, want a list of token ids")
    return list(ids)


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name}: got {value!r}, want an integer of at least 0")
