"""Llama.generate: arguments, chunked prefill, and the plain loop of batched decoding."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from . import decode, sampling
from . import graphs as cuda_graphs
from . import speculate as speculation
from .arguments import check_count, check_prompt, token_ids
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
    on_token: Callable[[int, int], Any] | None = None,
    graphs: bool | None = None,
    speculate: str | Model | None = None,
    draft_tokens: int = speculation.DRAFT_TOKENS,
    on_pass: Callable[[int, int], None] | None = None,
    kv_cache: str | None = None,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    on_logprob: Callable[[int, float], None] | None = None,
    on_prefill: Callable[[int, int], None] | None = None,
    cache: KVCache | None = None,
) -> list[list[int]]:
    """Return the new ids of each prompt, a list of token ids that includes BOS if wanted.

    A sequence ends after max_new_tokens, or with the first of stop_ids, which is kept as the last
    id, as in transformers. stop_ids None: those of the checkpoint; (): none. temperature, top_p,
    top_k, min_p: see sampling.sample. repetition_penalty: before that, the logits of all ids in the
    prompt and the answer are divided by it if positive and multiplied if negative, as in
    transformers.

    on_token(index of the prompt, id) is called for each new token; the sequence ends with it if the
    call returns True, as TextStreamer.put does after a stop text. on_logprob(index, natural
    logarithm of the new token's probability, before temperature and penalty, as in logprobs) is
    called before it. on_prefill(index, tokens of the prompt read so far) is called as prompts are
    read, on a GPU as their kernels are launched.

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

    cache: holds the first tokens of each prompt, not all, and room for the rest; only the others
    are read. Afterwards it holds each prompt and its new ids but the last. After an exception,
    truncate it to the tokens that on_token has received. On a GPU this runs the plain loop.

    With tensor parallelism every rank calls this with the same arguments, and gets the same tokens;
    the functions are called on each rank, and on_token must return the same on all. Without a seed
    rank 0's is used.

    A prompt's result does not depend on the others: it has its own random stream, derived from the
    seed, its tokens and, for repeated prompts, the number of the repetition.

    Raises ValueError for an empty prompt, an id outside the vocabulary, a prompt that with
    max_new_tokens exceeds the model's positions, logits that are NaN, graphs on a CPU or with
    speculate or cache, draft_tokens out of range, a draft model and a cache that do not fit;
    TypeError for another type of speculate.
    """
    with model.tp.together() as check:
        max_new_tokens = check_count("max_new_tokens", max_new_tokens)
        settings = sampling.Settings(temperature, top_p, top_k, min_p)
        sampling.check(settings, repetition_penalty)
        seed = None if seed is None else check_count("seed", seed)
        if graphs is not None and not isinstance(graphs, bool):
            raise TypeError(f"graphs: got {type(graphs).__name__}, want a bool or None")
        cannot = cuda_graphs.cannot_capture(model.device) or model.tp.cannot_capture()
        if graphs and cannot:
            raise ValueError(f"graphs: got True, but {cannot}")
        decode.check_kv_cache(kv_cache)
        speculation.check(model, speculate, draft_tokens)
        if graphs and (speculate is not None or cache is not None):
            name = "cache" if speculate is None else "speculate"
            raise ValueError(f"graphs: got True, but {name} launches each kernel on its own")
        config = model.config
        stops = frozenset(
            token_ids("stop_ids", config.eos_token_id if stop_ids is None else stop_ids)
        )
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
            got = type(prompts).__name__
            raise TypeError(f"prompts: got {got}, want a list of lists of token ids")
        checked = [
            check_prompt(i, prompt, config, max_new_tokens) for i, prompt in enumerate(prompts)
        ]
        read = _check_cache(cache, checked, max_new_tokens, kv_cache)
        how = speculate if isinstance(speculate, str) else type(speculate).__name__
        check(
            prompts=checked,
            max_new_tokens=max_new_tokens,
            stop_ids=stops,
            sampling=(settings, repetition_penalty, seed),
            graphs=graphs,
            speculate=(how, draft_tokens),
            cache=(kv_cache, read),
        )
    new: list[list[int]] = [[] for _ in checked]
    if not checked or max_new_tokens == 0:
        return new
    if seed is None:  # drawn by torch's generator, so that torch.manual_seed applies
        seed = model.tp.exchange(int(torch.randint(2**62, (), device="cpu")))[0]
    generators = _generators(checked, seed)

    def is_last(token: int, count: int) -> bool:
        return token in stops or count == max_new_tokens

    def emit(i: int, token: int, logprob: float) -> bool:
        """Store a token of sequence i, and return whether the sequence continues."""
        if token < 0:
            raise _no_token(i, len(new[i]), "logits: none is a finite maximum")
        new[i].append(token)
        if on_logprob is not None:
            on_logprob(i, logprob)
        if on_token is not None and on_token(i, token) is True:
            return False
        return not is_last(token, len(new[i]))

    if speculate is None and cache is None and _runs_ahead(model.device):
        u = None
        if temperature:
            kind: Any = {"dtype": torch.float64, "device": "cpu"}
            u = torch.stack([torch.rand(max_new_tokens, generator=g, **kind) for g in generators])
        capture = None if graphs is False or cannot else cuda_graphs.CudaGraph
        way = decode.Way(settings, repetition_penalty, on_logprob is not None)
        decode.run(model, checked, max_new_tokens, way, u, emit, capture, kv_cache, on_prefill)
        return new

    lengths = [len(prompt) + max_new_tokens for prompt in checked]
    keep = cache is not None
    cache = cache if cache is not None else decode.new_cache(model, lengths, kv_cache)
    texts = [list(prompt) for prompt in checked]  # with the sampled tokens
    samplers = [sampling.Sampler(settings, generator) for generator in generators]
    if repetition_penalty != 1:
        for sampler, prompt in zip(samplers, checked, strict=True):
            seen = sampling.seen(prompt, config.vocab_size).to(model.device)
            sampler.penalize(repetition_penalty, seen)
    pending: list[deque[tuple[int, float] | ValueError]] = [deque() for _ in checked]
    going, unfinished = [True] * len(checked), list(range(len(checked)))
    proposer = speculation.proposer(speculate, texts, lengths, samplers)
    pace = speculation.Pace(proposer, len(checked), draft_tokens, share=model.tp.exchange)

    def accept(i: int, logits: torch.Tensor, proposal: Sequence[int]) -> int:
        """Sample after the last token and after each proposal that equals the token sampled
        before it. Return the number of equal proposals."""
        accepted = 0
        for row, guess in zip(logits, [*proposal, -1], strict=True):
            try:
                token = samplers[i](row)
            except ValueError as error:
                pending[i].append(_no_token(i, len(texts[i]) - len(checked[i]), str(error)))
                going[i] = False
                break
            texts[i].append(token)
            logprob = 0.0
            if on_logprob is not None:
                ids = torch.tensor([token], device=row.device)
                logprob = float(sampling.logprobs(row[None], ids))
            pending[i].append((token, logprob))
            accepted += token == guess
            if is_last(token, len(texts[i]) - len(checked[i])):
                going[i] = False
            if token != guess or not going[i]:
                break
        if going[i] or keep:
            cache.select([i]).truncate([len(texts[i]) - 1])
        else:
            cache.release(i)
        return accepted

    def send(i: int) -> None:
        sampled = pending[i].popleft()
        if isinstance(sampled, ValueError):
            raise sampled
        if not emit(i, *sampled):
            unfinished.remove(i)
            if keep:
                cache.select([i]).truncate([len(checked[i]) + len(new[i]) - 1])
            elif going[i]:  # on_token ended it
                cache.release(i)
            going[i] = False

    for i, prompt in enumerate(checked):
        hidden = _prefill(model, i, prompt, read[i], cache.select([i]), on_prefill)
        accept(i, model.logits(hidden[:, -1]), [])
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


def _check_cache(
    cache: KVCache | None, prompts: list[list[int]], max_new_tokens: int, kv_cache: str | None
) -> list[int]:
    """Return how many tokens of each prompt the cache holds, and make room for the others."""
    if cache is None:
        return [0] * len(prompts)
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache: got {type(cache).__name__}, want a KVCache or None")
    if kv_cache is not None:
        raise ValueError(f"kv_cache: got {kv_cache!r}, want None with a cache, which has its dtype")
    if len(cache) != len(prompts):
        raise ValueError(f"cache: got {len(cache)} sequences, want one a prompt, {len(prompts)}")
    held = cache.seqlens
    for i, (count, prompt) in enumerate(zip(held, prompts, strict=True)):
        if count >= len(prompt):
            raise ValueError(
                f"cache: holds {count} tokens of prompt {i}, want fewer than its {len(prompt)}"
            )
    cache.reserve([len(prompt) + max_new_tokens for prompt in prompts])
    return held


def _runs_ahead(device: torch.device) -> bool:
    """Return whether the device computes while the host continues."""
    return device.type == "cuda"


def _no_token(i: int, index: int, why: str) -> ValueError:
    return ValueError(f"prompt {i}, new token {index}: {why}")


def _prefill(
    model: Model,
    i: int,
    prompt: list[int],
    held: int,
    cache: KVCache,
    on_prefill: Callable[[int, int], None] | None,
) -> torch.Tensor:
    """Fill the cache of sequence i, which holds the prompt's first `held` tokens, and return the
    last token's hidden state [1, 1, hidden]."""
    for start in range(held, len(prompt), PREFILL_CHUNK):
        chunk = prompt[start : start + PREFILL_CHUNK]
        tokens = torch.tensor([chunk], device=model.device)
        hidden = model.hidden(tokens, cache=cache, last=True, total=len(prompt))
        if on_prefill is not None:
            on_prefill(i, start + len(chunk))
    return hidden


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
