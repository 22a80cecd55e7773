"""Llama.generate: arguments, chunked prefill, and the plain loop of batched decoding."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import decode, sampling
from . import graphs as cuda_graphs
from . import speculate as speculation
from .cache import KVCache
from .protocol import Model

PREFILL_CHUNK = 512  # tokens: bounds activations for any length of prompt


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 256,
    temperature: float = 0.6,
    top_p: float = 0.9,
    top_k: int = 0,
    seed: int | None = None,
    stop_ids: Sequence[int] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    graphs: bool | None = None,
    speculate: str | Model | None = None,
    draft_tokens: int = speculation.DRAFT_TOKENS,
    on_pass: Callable[[int, int], None] | None = None,
    kv_cache: str | None = None,
) -> list[list[int]]:
    """Return the new ids of each prompt, a list of token ids that includes BOS if wanted.

    A sequence ends after max_new_tokens, or with the first of stop_ids, which is kept as the last
    id, as in transformers. stop_ids None: those of the checkpoint; (): none. temperature, top_p,
    top_k: see sampling.sample. on_token(index of the prompt, id) is called for each new token.
    graphs: whether decoding replays CUDA graphs; None: on a GPU. The model then keeps the cache and
    the graphs for its next call, until model.decoders.clear().

    speculate: the source of up to draft_tokens (1 to 16) proposals that a pass of the model
    verifies: "lookup", the tokens that followed the last ones earlier in the text, or a smaller
    model of the same vocabulary, dtype and device. It changes neither the tokens, greedy or
    sampled, nor the order of on_token's calls (speculate.py has the exception on GPUs), and pauses
    when it costs time. on_pass(proposed, accepted) is called after each pass. On a GPU speculation
    runs the plain loop, one launch a kernel.

    kv_cache: "fp8" holds keys and values in e4m3, half the bytes of a 16-bit cache, with the
    checkpoint's scales for each layer and head. If it has none, KVCache.measure computes them from
    the first prompt's first chunk, so the other prompts' results depend on that prompt. A draft
    model's cache has the model's dtype.

    With tensor parallelism every rank calls this with the same arguments, and gets the same tokens;
    on_token and on_pass are called on each rank. Without a seed rank 0's is used.

    A prompt's result does not depend on the others: it has its own random stream, derived from the
    seed, its tokens and, for repeated prompts, the number of the repetition.

    Raises ValueError for an empty prompt, an id outside the vocabulary, a prompt that with
    max_new_tokens exceeds the model's positions, logits that are NaN, graphs on a CPU or with
    speculate, draft_tokens out of range, and a draft model that does not fit; TypeError for another
    type of speculate.
    """
    with model.tp.together() as check:
        _check_count("max_new_tokens", max_new_tokens)
        sampling.check(temperature, top_p, top_k)
        if seed is not None:
            _check_count("seed", seed)
        if graphs is not None and not isinstance(graphs, bool):
            raise TypeError(f"graphs: got {type(graphs).__name__}, want a bool or None")
        cannot = cuda_graphs.cannot_capture(model.device) or model.tp.cannot_capture()
        if graphs and cannot:
            raise ValueError(f"graphs: got True, but {cannot}")
        decode.check_kv_cache(kv_cache)
        speculation.check(model, speculate, draft_tokens)
        if graphs and speculate is not None:
            raise ValueError("graphs: got True, but speculate launches each kernel on its own")
        stops = frozenset(
            _ids("stop_ids", model.config.eos_token_id if stop_ids is None else stop_ids)
        )
        checked = [
            check_prompt(i, prompt, model, max_new_tokens) for i, prompt in enumerate(prompts)
        ]
        how = speculate if isinstance(speculate, str) else type(speculate).__name__
        check(
            prompts=checked,
            max_new_tokens=max_new_tokens,
            stop_ids=stops,
            sampling=(temperature, top_p, top_k, seed),
            graphs=graphs,
            speculate=(how, draft_tokens),
            kv_cache=kv_cache,
        )
    new: list[list[int]] = [[] for _ in checked]
    if not checked or max_new_tokens == 0:
        return new
    if seed is None:  # drawn by torch's generator, so that torch.manual_seed applies
        seed = model.tp.exchange(int(torch.randint(2**62, (), device="cpu")))[0]
    generators = _generators(checked, seed)

    def is_last(token: int, count: int) -> bool:
        return token in stops or count == max_new_tokens

    def emit(i: int, token: int) -> bool:
        """Store a token of sequence i, and return whether the sequence continues."""
        if token < 0:
            raise _no_token(i, len(new[i]), "logits: none is a finite maximum")
        new[i].append(token)
        if on_token is not None:
            on_token(i, token)
        return not is_last(token, len(new[i]))

    if speculate is None and _runs_ahead(model.device):
        settings = decode.Settings(temperature, top_p, top_k)
        u = None
        if temperature:
            kind: Any = {"dtype": torch.float64, "device": "cpu"}
            u = torch.stack([torch.rand(max_new_tokens, generator=g, **kind) for g in generators])
        capture = None if graphs is False or cannot else cuda_graphs.CudaGraph
        decode.run(model, checked, max_new_tokens, settings, u, emit, capture, kv_cache)
        return new

    lengths = [len(prompt) + max_new_tokens for prompt in checked]
    cache = decode.new_cache(model, lengths, kv_cache)
    texts = [list(prompt) for prompt in checked]  # with the sampled tokens
    pending: list[deque[int | ValueError]] = [deque() for _ in checked]  # not yet emitted
    going, unfinished = [True] * len(checked), list(range(len(checked)))
    proposer = speculation.proposer(
        speculate, texts, lengths, generators, (temperature, top_p, top_k)
    )
    pace = speculation.Pace(proposer, len(checked), draft_tokens, share=model.tp.exchange)

    def accept(i: int, logits: torch.Tensor, proposal: Sequence[int]) -> int:
        """Sample after the last token and after each proposal that equals the token sampled
        before it. Return the number of equal proposals."""
        accepted = 0
        for row, guess in zip(logits, [*proposal, -1], strict=True):
            try:
                token = sampling.sample(row, temperature, top_p, top_k, generators[i])
            except ValueError as error:
                pending[i].append(_no_token(i, len(texts[i]) - len(checked[i]), str(error)))
                going[i] = False
                return accepted
            texts[i].append(token)
            pending[i].append(token)
            accepted += token == guess
            if is_last(token, len(texts[i]) - len(checked[i])):
                cache.release(i)
                going[i] = False
                return accepted
            if token != guess:
                break
        cache.select([i]).truncate([len(texts[i]) - 1])
        return accepted

    def send(i: int) -> None:
        token = pending[i].popleft()
        if isinstance(token, ValueError):
            raise token
        if not emit(i, token):
            unfinished.remove(i)

    for i, prompt in enumerate(checked):
        accept(i, _prefill(model, prompt, cache.select([i]))[None], [])
        send(i)
    while active := [i for i in unfinished if going[i]]:
        room = [lengths[i] - len(texts[i]) - 1 for i in active]
        proposals = pace.propose(active, room)
        runs = [[texts[i][-1], *proposal] for i, proposal in zip(active, proposals, strict=True)]
        logits = speculation.extend(model, cache.select(active), runs).split([*map(len, runs)])
        accepted = [accept(*each) for each in zip(active, logits, proposals, strict=True)]
        pace.passed(active, proposals, accepted)
        if on_pass is not None:
            on_pass(sum(map(len, proposals)), sum(accepted))
        # Send one token of each sequence in turn while all have one: this order does not depend on
        # the number of accepted proposals.
        while unfinished and all(pending[i] for i in unfinished):
            for i in list(unfinished):
                send(i)
    return new


def _runs_ahead(device: torch.device) -> bool:
    """Return whether the device computes while the host continues."""
    return device.type == "cuda"


def _no_token(i: int, index: int, why: str) -> ValueError:
    return ValueError(f"prompt {i}, new token {index}: {why}")


def _prefill(model: Model, prompt: list[int], cache: KVCache) -> torch.Tensor:
    """Fill the cache of one sequence, and return logits [vocab] after its last token."""
    for start in range(0, len(prompt), PREFILL_CHUNK):
        chunk = torch.tensor([prompt[start : start + PREFILL_CHUNK]], device=model.device)
        hidden = model.hidden(chunk, cache=cache, last=True)
    return model.logits(hidden[:, -1])[0]


def _generators(prompts: list[list[int]], seed: int) -> list[torch.Generator]:
    """Return a host generator per prompt, so that a seed means the same on every device."""
    seen: Counter[tuple[int, ...]] = Counter()
    generators = []
    for prompt in map(tuple, prompts):
        key = f"{seed} {seen[prompt]} ".encode() + array("q", prompt).tobytes()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        stream = int.from_bytes(digest, "little", signed=True)
        generators.append(torch.Generator().manual_seed(stream))
        seen[prompt] += 1
    return generators


def check_prompt(index: int, prompt: Any, model: Model, max_new_tokens: int = 0) -> list[int]:
    """Return a prompt's ids. Raises TypeError or ValueError if they don't fit the model."""
    ids, vocab = _ids(f"prompt {index}", prompt), model.config.vocab_size
    if not ids:
        raise ValueError(f"prompt {index}: is empty; want at least one token id, such as BOS")
    for token in ids:
        if not 0 <= token < vocab:
            raise ValueError(f"prompt {index}: got id {token}, want 0 to {vocab - 1}")
    limit = model.config.max_position_embeddings
    if len(ids) + max_new_tokens > limit:
        new = f" and max_new_tokens={max_new_tokens}" if max_new_tokens > 0 else ""
        raise ValueError(
            f"prompt {index}: {len(ids)} tokens{new} exceed the model's {limit} positions"
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
