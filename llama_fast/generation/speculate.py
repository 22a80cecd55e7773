"""Speculative decoding: a cheap proposer guesses the next tokens, and one pass of the model
verifies them.

The model samples after every proposal, with the random number that plain decoding would use there,
and accepts proposals while they equal its samples. So the tokens are those of plain decoding if a
row's bits do not depend on the number of rows. That holds on every CPU, since a pass has at most 31
rows (amx.py). On a GPU, linears with 16-bit weights may decide a tie in the last bits differently.

Up to a point verifying uses compute that decoding leaves idle. Passes are timed, and as many tokens
are proposed as give the most tokens a second.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import LlamaConfig
from .cache import KVCache, host, upload
from .protocol import Model
from .sampling import Sampler

MOST_DRAFT_TOKENS = 16
DRAFT_TOKENS = 15  # at most; Pace chooses the number
NGRAMS = (16, 8, 4, 3, 2)  # tokens that a lookup compares, longest first
CHUNK = 512  # tokens of a text that a draft model reads at a time
PLAIN_PASSES = 2  # timed before the first proposals, and one more every REFRESH passes
REFRESH = 64
MOST_ROWS = 31  # of a pass: from 32 a CPU with AMX may give other bits (amx.py)
MEASURED = 5  # last passes with as many rows; the fastest counts
ROW = 1.05  # time factor of one more row until it is measured
PRIOR = 0.5, 2.0  # initial counts: right, of proposed
MEMORY = 0.9  # weight of a proposal relative to the next one
SHORTEST_PAUSE, LONGEST_PAUSE = 16, 64  # passes; doubles while proposals do not pay


def check(model: Model, speculate: Any, draft_tokens: Any) -> None:
    """Raise ValueError or TypeError for arguments that generate cannot speculate with."""
    check_draft_tokens(draft_tokens)
    if isinstance(speculate, Model):
        check_draft(speculate.config, model.config, 0)
        pairs: tuple[tuple[str, Any, Any], ...] = (
            ("dtype", speculate.dtype, model.dtype),
            ("device", speculate.device, model.device),
        )
        for name, got, want in pairs:
            _want_same(name, got, want)
        if speculate.tp.size not in (1, model.tp.size):
            raise ValueError(
                f"speculate: got a draft model on {speculate.tp.size} ranks, want 1 or the "
                f"model's, {model.tp.size}"
            )
    elif isinstance(speculate, str):
        if speculate != "lookup":
            raise ValueError(f"speculate: got {speculate!r}, want 'lookup', a draft model or None")
    elif speculate is not None:
        got = type(speculate).__name__
        raise TypeError(f"speculate: got {got}, want 'lookup', a draft model (Llama) or None")


def check_draft(draft: LlamaConfig, model: LlamaConfig, longest: int) -> None:
    """Raise ValueError if a draft model does not fit the model, or texts of longest tokens."""
    _want_same("vocab_size", draft.vocab_size, model.vocab_size)
    if longest > draft.max_position_embeddings:
        raise ValueError(
            f"speculate: the draft model has {draft.max_position_embeddings} positions, "
            f"want {longest}, the longest prompt with max_new_tokens"
        )


def _want_same(name: str, got: Any, want: Any) -> None:
    if got != want:
        raise ValueError(f"speculate: got a draft model of {name} {got}, want the model's, {want}")


def check_draft_tokens(draft_tokens: Any) -> None:
    count = isinstance(draft_tokens, int) and not isinstance(draft_tokens, bool)
    if not count or not 1 <= draft_tokens <= MOST_DRAFT_TOKENS:
        raise ValueError(f"draft_tokens: got {draft_tokens!r}, want 1 to {MOST_DRAFT_TOKENS}")


@torch.inference_mode()
def extend(model: Model, cache: KVCache, runs: Sequence[Sequence[int]]) -> Tensor:
    """Append runs[i], at least one token, to each sequence; return logits [all tokens, vocab].

    Every token is a row with a single query. Attention with several queries a sequence would read
    the cache once for all of them, but gives other bits: it splits the keys by the last query's
    length, and uses prefill's tiles from 48 rows a kv head. At 4096 tokens of context and 8 rows
    the pass takes the same time.
    """
    counts = [len(run) for run in runs]
    tokens = host([[token] for run in runs for token in run])
    tokens = upload(tokens, model.device)
    if len(tokens) == len(runs):
        return model(tokens, cache=cache)[:, 0]
    append = cache.append(counts)
    hidden = model.forward(model.embed(tokens), append.positions, cache, append)
    cache.advance(counts)
    return model.logits(hidden[:, 0])


# ---- proposers ----


class Proposer(Protocol):
    def __call__(self, wanted: dict[int, int]) -> dict[int, list[int]]:
        """Return up to wanted[i] tokens to follow the text of each sequence i in wanted."""


def proposer(
    speculate: str | Model | None,
    texts: list[list[int]],
    lengths: Sequence[int],
    samplers: Sequence[Sampler],
) -> Proposer | None:
    """Return the proposer. texts: each sequence's tokens, which generate extends. lengths: final
    lengths of the texts."""
    if speculate is None:
        return None
    if isinstance(speculate, str):
        return Lookup(texts)
    return Draft(speculate, texts, lengths, samplers)


class Lookup:
    """Propose the tokens that followed the last earlier occurrence of the text's last tokens."""

    def __init__(self, texts: list[list[int]]) -> None:
        self._texts = texts
        # An n-gram's hash -> its end. A collision costs a wrong proposal.
        self._after: list[dict[int, int]] = [{} for _ in texts]
        self._seen = [1] * len(texts)  # n-grams that end before this are in it

    def __call__(self, wanted: dict[int, int]) -> dict[int, list[int]]:
        return {i: self._propose(i, count) for i, count in wanted.items()}

    def _propose(self, i: int, count: int) -> list[int]:
        text, after = self._texts[i], self._after[i]
        for end in range(self._seen[i], len(text)):  # not the text's own end
            for n in NGRAMS:
                if n <= end:
                    after[hash(tuple(text[end - n : end]))] = end
        self._seen[i] = len(text)
        for n in NGRAMS:
            start = after.get(hash(tuple(text[-n:]))) if n <= len(text) else None
            if start is not None:
                period = text[start:]  # repeated if shorter than the proposal
                return [period[j % len(period)] for j in range(count)]
        return []


class Draft:
    """Propose a smaller model's tokens, sampled with the random numbers the model will draw."""

    def __init__(
        self,
        model: Model,
        texts: list[list[int]],
        lengths: Sequence[int],
        samplers: Sequence[Sampler],
    ) -> None:
        check_draft(model.config, model.config, max(lengths))
        self._model, self._texts, self._samplers = model, texts, samplers
        self._cache = KVCache(model.config, lengths, dtype=model.dtype, device=model.device)
        self._last = [(0, list[int]())] * len(texts)  # the last proposals, after their start

    def __call__(self, wanted: dict[int, int]) -> dict[int, list[int]]:
        runs = {i: self._missing(i) for i in wanted}
        proposals: dict[int, list[int]] = {i: [] for i in wanted}
        samplers = {i: self._samplers[i].copy() for i in wanted}
        while runs:
            logits = extend(self._model, self._cache.select(list(runs)), list(runs.values()))
            last = host([len(run) for run in runs.values()]).cumsum(0) - 1
            going = {}
            for i, row in zip(runs, logits[last.to(logits.device)], strict=True):
                try:
                    token = samplers[i](row)
                except ValueError:  # the draft's logits are invalid: no proposal
                    continue
                proposals[i].append(token)
                if len(proposals[i]) < wanted[i]:
                    going[i] = [token]
            runs = going
        for i, proposal in proposals.items():
            self._last[i] = len(self._texts[i]), proposal
        return proposals

    def _missing(self, i: int) -> list[int]:
        """Drop rejected proposals from the cache; return the text's last tokens, which it lacks."""
        text, cache, (right, proposal) = self._texts[i], self._cache.select([i]), self._last[i]
        for token, guess in zip(text[right:], proposal, strict=False):
            if token != guess:
                break
            right += 1
        cache.truncate([min(cache.seqlens[0], right, len(text) - 1)])
        while len(text) - cache.seqlens[0] > MOST_DRAFT_TOKENS:
            start = cache.seqlens[0]
            chunk = host([text[start : min(start + CHUNK, len(text) - 1)]])
            self._model.hidden(upload(chunk, self._model.device), cache=cache, last=True)
        return text[cache.seqlens[0] :]


# ---- pace ----


class _Sequence:
    """How often a sequence's recent proposals were right."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.right, self.checked = PRIOR
        self.rest, self.pause = 0, SHORTEST_PAUSE  # passes
        self.trying = False  # whether the next proposal is the first after a pause

    def chances(self, room: int) -> list[float]:
        """Return the probability that each of the next proposals, and all before it, is right."""
        chance = self.right / self.checked
        return [chance**n for n in range(1, min(room, self.most) + 1)]

    def learn(self, proposed: int, accepted: int) -> None:
        if self.trying:
            if not accepted:
                return self.stop()
            self.trying = False
            self.right, self.checked = PRIOR
        for i in range(min(accepted + 1, proposed)):
            self.right = MEMORY * self.right + (i < accepted)
            self.checked = MEMORY * self.checked + 1

    def stop(self) -> None:
        self.rest, self.pause = self.pause, min(2 * self.pause, LONGEST_PAUSE)
        self.trying = True


class Pace:
    """Choose how many tokens to propose: as many as give the most tokens a second, from the times
    of passes by rows and from how often proposals were right. A sequence for which no proposal pays
    pauses, and then tries one.
    """

    def __init__(
        self,
        proposer: Proposer | None,
        sequences: int,
        most: int,
        clock: Callable[[], float] = time.perf_counter,
        share: Callable[[float], list[float]] = lambda seconds: [seconds],
    ) -> None:
        """share: return every rank's seconds. All count rank 0's, so as to propose alike."""
        self._proposer, self._clock, self._share = proposer, clock, share
        self._sequences = [_Sequence(most) for _ in range(sequences)]
        self._seconds: dict[int, deque[float]] = {}  # of the last passes, by rows
        self._since = 0  # passes since the last plain one

    def propose(self, active: Sequence[int], room: Sequence[int]) -> list[list[int]]:
        """Return at most room[i] tokens for each active sequence, and start timing a pass."""
        self._start = self._clock()
        if self._proposer is None:
            return [[]] * len(active)
        plain = self._seconds.get(len(active), ())
        known = len(plain) >= PLAIN_PASSES and self._since < REFRESH
        wanted = self._counts(active, room) if known else Counter[int]()
        proposals = self._proposer(wanted) if wanted else {}
        return [proposals.get(i, []) for i in active]

    def _counts(self, active: Sequence[int], room: Sequence[int]) -> Counter[int]:
        """Return how many tokens to propose for each sequence."""
        space = max(MOST_ROWS - len(active), 0)
        counts: Counter[int] = Counter()
        chances: list[tuple[float, int]] = []
        for i, most in zip(active, room, strict=True):
            sequence = self._sequences[i]
            if sequence.rest:
                sequence.rest -= 1
            elif sequence.trying:
                counts[i] = min(most, 1, space - counts.total())
            else:
                chances += [(chance, i) for chance in sequence.chances(most)]
        chances.sort(reverse=True)
        seconds = self._times(len(active), space)[counts.total() :]
        tokens = float(len(active) + counts.total())
        best, taken = tokens / seconds[0], 0
        for n, (chance, _) in enumerate(chances[: space - counts.total()], 1):
            tokens += chance
            if tokens / seconds[n] > best:
                best, taken = tokens / seconds[n], n
        pays = Counter(i for _, i in chances[:taken])
        for i in {i for _, i in chances}:
            if i in pays:
                self._sequences[i].pause = SHORTEST_PAUSE
            else:
                self._sequences[i].stop()
        return counts + pays

    def _times(self, rows: int, more: int) -> list[float]:
        """Return the time of passes with `rows` to `rows + more` rows, the fastest of the last few.
        With fewer than two measurements a row is assumed to add little, which a try corrects. Fewer
        rows never take longer."""
        times: list[float] = []
        for n in range(rows, rows + more + 1):
            measured = self._seconds.get(n, ())
            known = len(measured) >= PLAIN_PASSES  # a single one may have lost its core
            times.append(min(measured) if known else times[-1] * ROW)
        for n in reversed(range(more)):
            times[n] = min(times[n], times[n + 1])
        return times

    def passed(
        self, active: Sequence[int], proposals: Sequence[Sequence[int]], accepted: Sequence[int]
    ) -> None:
        """Stop timing a pass, in which accepted[i] of proposals[i] were right."""
        if self._proposer is None:
            return
        seconds = self._share(max(self._clock() - self._start, 1e-9))[0]
        total = sum(map(len, proposals))
        rows = len(active) + total
        self._seconds.setdefault(rows, deque(maxlen=MEASURED)).append(seconds)
        self._since = self._since + 1 if total else 0
        for i, proposal, count in zip(active, proposals, accepted, strict=True):
            if proposal:
                self._sequences[i].learn(len(proposal), count)
