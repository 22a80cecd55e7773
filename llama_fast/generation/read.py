"""Sampled tokens on their way from the device to the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Read:
    """Sampled ids and their log probabilities, being copied to the host."""

    def __init__(self, ids: Tensor, logprobs: Tensor | None, sequences: Sequence[int]) -> None:
        """Start copying ids [B], and logprobs [B] if wanted: those of the sequences, then those of
        empty rows."""
        self._sequences = tuple(sequences)
        self._there: torch.cuda.Event | None = None
        self._ids = _to_host(ids)
        self._logprobs = None if logprobs is None else _to_host(logprobs)
        if ids.is_cuda:
            self._there = torch.cuda.Event()
            self._there.record()

    def wait(self) -> list[tuple[int, int, float]]:
        """Return sequences, ids and log probabilities; the id is -1 for invalid logits."""
        if self._there is not None:
            self._there.synchronize()
        ids = self._ids.tolist()
        logprobs = [0.0] * len(ids) if self._logprobs is None else self._logprobs.tolist()
        return list(zip(self._sequences, ids, logprobs, strict=False))


def _to_host(values: Tensor) -> Tensor:
    """Start a copy, on every device: the next step overwrites the values."""
    pin = values.is_cuda
    copy = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=pin)
    return copy.copy_(values, non_blocking=True)
