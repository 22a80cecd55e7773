"""Log probabilities of given texts: Llama.logprobs, and the logits behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import sampling
from .arguments import check_prompt
from .decode import check_kv_cache, new_cache
from .generate import PREFILL_CHUNK
from .protocol import Model

HEAD_ROWS = 128  # tokens: their logits are 66 MB in fp32 with Llama 3.1's vocabulary


class Scored(NamedTuple):
    """Consecutive predictions, and the tokens that followed."""

    runs: list[tuple[int, int]]  # index of a prompt, and how many of the rows are its next ones
    targets: Tensor  # int64 [rows], the tokens that followed
    logits: Tensor  # fp32 [rows, vocab], at most HEAD_ROWS rows

    def logprobs(self) -> Tensor:
        """Return the targets' log probabilities, fp32 [rows]."""
        return sampling.logprobs(self.logits, self.targets)


def logprobs(model: Model, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the natural logarithms of each prompt's tokens' probabilities, given the tokens before
    them: fp32 [len - 1] on the model's device.

    prompts: lists of token ids of any lengths up to one more than the model's positions. Short ones
    are computed together and long ones in chunks, so that neither a whole prompt's logits nor its
    activations are in memory. Raises ValueError for an empty or longer prompt, and for an id
    outside the vocabulary.
    """
    parts: list[list[Tensor]] = [[] for _ in prompts]
    for scored in score(model, prompts):
        counts = [count for _, count in scored.runs]
        for (i, _), values in zip(scored.runs, scored.logprobs().split(counts), strict=True):
            parts[i].append(values)
    none = torch.empty(0, dtype=torch.float32, device=model.device)
    return [torch.cat([none, *values]) for values in parts]


@torch.inference_mode()
def score(
    model: Model,
    prompts: Sequence[Sequence[int]],
    first: Sequence[int] | None = None,
    *,
    kv_cache: str | None = None,
) -> Iterator[Scored]:
    """Yield the predictions of each prompt's tokens from index first on (None: from 1), a prompt's
    in order, the shortest prompts first. kv_cache: as for generate; an FP8 cache whose scales the
    checkpoint lacks measures them on the first tokens of each batch.
    """
    check_kv_cache(kv_cache)
    # -1: the last token is not read.
    texts = [check_prompt(i, prompt, model.config, -1) for i, prompt in enumerate(prompts)]
    starts = [1] * len(texts) if first is None else list(first)
    for batch in _batches([len(text) for text in texts]):
        longest = len(texts[batch[-1]]) - 1
        # Padding follows the text, so it does not change a causal model's predictions.
        padded = torch.zeros(len(batch), longest + 1, dtype=torch.int64, device="cpu")
        wanted = torch.zeros(len(batch), longest, dtype=torch.bool, device="cpu")
        for row, i in enumerate(batch):
            padded[row, : len(texts[i])] = torch.tensor(texts[i], device="cpu")
            wanted[row, starts[i] - 1 : len(texts[i]) - 1] = True
        tokens, targets = padded[:, :-1], padded[:, 1:]
        cache = None
        if kv_cache is not None or longest > PREFILL_CHUNK:
            cache = new_cache(model, max(longest, 1), kv_cache, len(batch))
        for start in range(0, longest, PREFILL_CHUNK):
            here = slice(start, start + PREFILL_CHUNK)
            hidden = model.hidden(tokens[:, here].to(model.device), cache=cache)
            rows = wanted[:, here].nonzero()
            for piece in rows.split(HEAD_ROWS):
                row, column = piece.unbind(1)
                owners, counts = row.unique_consecutive(return_counts=True)
                yield Scored(
                    [(batch[r], n) for r, n in zip(owners.tolist(), counts.tolist(), strict=True)],
                    targets[row, start + column].to(model.device),
                    model.logits(hidden[row.to(model.device), column.to(model.device)]),
                )


def _batches(lengths: list[int]) -> Iterator[list[int]]:
    """Yield indices by length, at most PREFILL_CHUNK tokens together with their padding."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * (lengths[i] - 1) > PREFILL_CHUNK:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
