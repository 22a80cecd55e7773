"""Tensor parallelism: ranks that hold one model together, on torch.distributed.

Layers are split as in Megatron-LM: q, k, v, gate and up by rows, so that a rank computes whole
heads and its part of the FFN's inner width; the output projection and down by columns, so that each
rank has a partial sum of every output, which all_reduce completes. The embedding and the head are
split by the vocabulary. Norms are on every rank.

Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053, section 3.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .config import LlamaConfig

T = TypeVar("T")

TIMEOUT = 600.0  # seconds that a rank waits for the others
VOCAB_ROWS = 64  # the kernels for CPUs read weights in panels of so many rows
# Up to so many rows a CPU adds the ranks' parts in the ranks' order, so that a row's bits do not
# depend on the other rows. gloo's all-reduce, whose order depends on the place of an element in the
# message, takes as long for one row but less time for many.
ORDERED_ROWS = 64


# ---- what a rank holds ----


@dataclass(frozen=True)
class Span:
    """Indices start to stop of a dimension of length `of`."""

    start: int
    stop: int
    of: int

    @classmethod
    def whole(cls, n: int) -> Span:
        return cls(0, n, n)

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def index(self) -> slice:
        return slice(self.start, self.stop)

    def times(self, n: int) -> Span:
        """Return the span of the elements, n for each index."""
        return Span(self.start * n, self.stop * n, self.of * n)


@dataclass(frozen=True)
class Share:
    """The part of a model that a rank holds."""

    heads: Span
    kv_heads: Span
    inner: Span  # of the FFN's width
    vocab: Span

    @classmethod
    def of(cls, config: LlamaConfig, rank: int = 0, size: int = 1) -> Share:
        """Return the share of one of `size` ranks. More ranks than key/value heads hold copies of
        them. Raises ValueError, with the sizes that fit, if the model cannot be split so."""
        if size not in (found := fitting(config)):
            raise ValueError(
                f"tp: got {size} ranks, but the model's {config.num_attention_heads} heads on "
                f"{config.num_key_value_heads} key/value heads, inner width "
                f"{config.intermediate_size} and vocabulary of {config.vocab_size} can be split "
                f"by {', '.join(map(str, found))}"
            )
        kv = config.num_key_value_heads
        return cls(
            _even(config.num_attention_heads, rank, size),
            _even(kv, rank, size) if size <= kv else _even(kv, rank * kv // size, kv),
            _even(config.intermediate_size, rank, size),
            _vocab(config.vocab_size, rank, size),
        )

    def config(self, whole: LlamaConfig) -> LlamaConfig:
        """Return the config of this share: its own heads and inner width."""
        return replace(
            whole,
            num_attention_heads=len(self.heads),
            num_key_value_heads=len(self.kv_heads),
            intermediate_size=len(self.inner),
        )


def fitting(config: LlamaConfig) -> list[int]:
    """Return the numbers of ranks by which a model can be split: those that divide its heads and
    inner width, and that divide the number of key/value heads or are a multiple of it."""
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    return [
        n
        for n in range(1, min(heads, config.vocab_size) + 1)
        if not (heads % n or config.intermediate_size % n or (kv % n and n % kv))
    ]


def vocab_sizes(vocab: int, size: int) -> list[int]:
    """Return the number of the vocabulary's rows that each rank holds."""
    return [len(_vocab(vocab, rank, size)) for rank in range(size)]


def _even(n: int, rank: int, size: int) -> Span:
    return Span(rank * n // size, (rank + 1) * n // size, n)


def _vocab(n: int, rank: int, size: int) -> Span:
    """Split whole panels of rows, if there are enough for all ranks, as evenly as possible."""
    unit = VOCAB_ROWS if n >= VOCAB_ROWS * size else 1
    panels = _even(-(-n // unit), rank, size).times(unit)
    return Span(panels.start, min(panels.stop, n), n)


# ---- the ranks ----


class PeerError(RuntimeError):
    """Another rank failed, or does not answer."""


@dataclass(frozen=True)
class Group:
    """The ranks that hold a model. By default this process alone: its methods then do nothing.

    Every rank must make the same calls in the same order, because each waits for the others.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None  # of this rank's part of the model
    process_group: Any = None  # of torch.distributed; None: its default one

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of all ranks' x [..., n], the same bits on every rank. May overwrite x.

        Up to ORDERED_ROWS rows on a CPU, the parts are added in fp32, in the order of the ranks,
        and rounded once. Otherwise NCCL or gloo adds them in the dtype of x.
        """
        if self.size == 1 or not x.numel():
            return x
        if x.is_cuda or x.numel() > ORDERED_ROWS * x.shape[-1]:
            self._call(dist.all_reduce, x)
            return x
        first, *others = self._gathered(x)
        total = first.float()
        for part in others:
            total += part
        return total.to(x.dtype)

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return all ranks' x [..., sizes[rank]], joined along the last dimension."""
        if self.size == 1:
            return x
        parts = self._gathered(F.pad(x, (0, max(sizes) - x.shape[-1])).contiguous())
        return torch.cat([part[..., :n] for part, n in zip(parts, sizes, strict=True)], -1)

    def exchange(self, value: T) -> list[T]:
        """Return every rank's value, which is pickled. Takes under a millisecond on one machine."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        self._call(dist.all_gather_object, found, value)
        return found

    @contextmanager
    def together(self) -> Iterator[Callable[..., None]]:
        """Run a block on every rank, and raise on all if it raises on one: its own error on the
        first such rank, PeerError with that error's text on the others.

        Yields check(**values), which every rank must call equally often. It raises ValueError on a
        rank whose values are not those of rank 0, and PeerError if another rank has failed, so that
        a long block need not come to its end.
        """
        if self.size == 1:
            yield lambda **values: None
            return

        def check(failure: Exception | None = None, **values: Any) -> None:
            text = None if failure is None else f"{type(failure).__name__}: {failure}"
            found = self.exchange((text, values))
            first = next((rank for rank, (text, _) in enumerate(found) if text is not None), None)
            if first is not None and first != self.rank:
                raise PeerError(f"rank {first}: {found[first][0]}")
            for name, value in values.items():
                if value != found[0][1][name]:
                    raise ValueError(
                        f"{name}: rank {self.rank} got another value than rank 0, want the same on "
                        "every rank"
                    )

        try:
            yield check
        except PeerError:  # all ranks know
            raise
        except Exception as error:
            check(error)
            raise
        check()

    def cannot_capture(self) -> str | None:
        """Return why the collectives cannot be part of a CUDA graph, or None."""
        if self.size == 1 or "nccl" in dist.get_backend_config(self.process_group):
            return None
        return "the ranks' process group does not use NCCL"

    def _gathered(self, x: Tensor) -> Tensor:
        """Return [size, *x.shape]."""
        out = x.new_empty(self.size, *x.shape)
        if x.numel():
            self._call(_all_gather_single, out.view(-1), x.view(-1))
        return out

    def _call(self, collective: Callable[..., Any], *args: Any) -> None:
        try:
            collective(*args, group=self.process_group)
        except RuntimeError as error:
            raise PeerError(f"another rank has ended or does not answer: {error}") from error


# The name since torch 2.13, which deprecates the other one.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def launched() -> int | None:
    """Return how many processes torchrun started, or None if it did not start this one."""
    size = os.environ.get("WORLD_SIZE")
    return int(size) if size and "RANK" in os.environ else None


def first_rank() -> bool:
    """Return whether this is the first of torchrun's processes, or the only one."""
    return launched() is None or os.environ["RANK"] == "0"


def join(
    process_group: Any = None,
    *,
    device: torch.device | str | None = None,
    timeout: float = TIMEOUT,
) -> Group:
    """Join the other processes that torchrun started, and return the group of all of them: with
    NCCL and the GPU of number LOCAL_RANK if torch sees GPUs, else with gloo on the CPU.

    process_group: one of torch.distributed's, to be used instead. device: this rank's; "cpu" uses
    gloo on a machine with GPUs. timeout: seconds after which a rank that waits for the others
    raises. Without torchrun and without a process group, the group is this process alone.
    """
    if not dist.is_available():
        raise NotImplementedError("tp: this build of torch has no torch.distributed")
    on = _device(device)
    if process_group is None and not dist.is_initialized():
        if launched() is None:
            return Group(device=on)
        on_gpu = on.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(on)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout)
        )
        atexit.register(_leave)
    return Group(
        dist.get_rank(process_group), dist.get_world_size(process_group), on, process_group
    )


def _leave() -> None:
    """End torch.distributed before the interpreter's end, at which gloo's threads would abort."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(device: torch.device | str | None) -> torch.device:
    """Return this process's device: of GPUs, the one of number LOCAL_RANK."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found = torch.device(device)
    if found.type != "cuda" or found.index is not None:
        return found
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= count:
        raise ValueError(
            f"device: got process {local + 1} of this machine, which has {count} GPUs; want a GPU "
            "for each process"
        )
    return torch.device("cuda", local)
