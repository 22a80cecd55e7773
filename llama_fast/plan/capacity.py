"""Plan a Llama's memory and least time on GPUs, without any of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..checkpoint.formats import Format
from ..checkpoint.weights import RECIPES
from ..config import LlamaConfig
from ..generation.decode import check_kv_cache
from ..parallel import fitting
from . import roofline
from .gpus import NODE, Gpu
from .memory import GIB, Rank
from .roofline import Time

MOST = 1 << 20  # sequences in a batch


def sizes(config: LlamaConfig) -> list[int]:
    """Return the numbers of ranks that a model can be split into, on up to two nodes."""
    return [n for n in fitting(config) if n <= 2 * NODE]


@dataclass(frozen=True)
class Plan:
    rank: Rank
    gpu: Gpu
    context: int
    batch: int

    @property
    def capacity(self) -> int:
        return int(self.gpu.memory * GIB)

    @cached_property
    def memory(self) -> dict[str, int]:
        return self.rank.memory(self.context, self.batch)

    @property
    def free(self) -> int:
        """Return the bytes that are left of a GPU's memory; below 0: those that are missing."""
        return self.capacity - sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.free >= 0

    @cached_property
    def max_context(self) -> int:
        """Return the most tokens a sequence that fit with this batch; 0 if one does not."""
        most = self.rank.whole.max_position_embeddings
        return _most(lambda context: replace(self, context=context).fits, most)

    @cached_property
    def max_batch(self) -> int:
        """Return the most sequences that fit with this context; 0 if one does not."""
        return _most(lambda batch: replace(self, batch=batch).fits, MOST)

    @cached_property
    def fewest_gpus(self) -> int | None:
        """Return the smallest number of GPUs that works, or None."""
        return next((n for n in self.possible() if self.with_(gpus=n).fits), None)

    def possible(self) -> list[int]:
        """Return the numbers of GPUs on which the model can be."""
        return [n * self.rank.stages for n in sizes(self.rank.whole)]

    def with_(self, **changes: Any) -> Plan:
        """Return the plan with other fields of its rank."""
        return replace(self, rank=replace(self.rank, **changes))

    def others(self) -> list[str]:
        """Return what would fit, as options of the command line: single changes, or, if there are
        none, those of more GPUs with FP8 weights and an FP8 cache."""
        found = [f"--gpus {self.fewest_gpus}"] if self.fewest_gpus else []
        found += [f"--context {self.max_context}"] * (self.max_context > 0)
        found += [f"--batch {self.max_batch}"] * (self.max_batch > 0)
        recipes = () if self.rank.quantize or self.rank.stored else RECIPES
        options = [f"--quantize {recipe}" for recipe in recipes if self.with_(quantize=recipe).fits]
        if not self.rank.kv_cache and self.with_(kv_cache="fp8").fits:
            options.append("--kv-cache fp8")
        if found or options:
            return options + found
        recipe = self.rank.quantize or (None if self.rank.stored else "fp8")
        least = self.with_(quantize=recipe, kv_cache="fp8")
        gpus = least.fewest_gpus or self.possible()[-1]
        context = "" if least.fewest_gpus else f" --context {least.with_(gpus=gpus).max_context}"
        if context == " --context 0":
            return []
        return [f"{f'--quantize {recipe} ' * bool(recipe)}--kv-cache fp8 --gpus {gpus}{context}"]

    @cached_property
    def prefill(self) -> Time:
        return roofline.prefill(self.rank, self.gpu, self.context)

    @cached_property
    def decode(self) -> Time:
        return roofline.decode(self.rank, self.gpu, self.context, self.batch)


def plan(
    config: LlamaConfig,
    gpu: Gpu,
    gpus: int | None = None,
    *,
    context: int = 8192,
    batch: int = 1,
    quantize: str | None = None,
    kv_cache: str | None = None,
    stages: int = 1,
    stored: Format | None = None,
) -> Plan:
    """Plan `batch` sequences of `context` tokens on so many GPUs; None: the fewest that hold them,
    or else the most. quantize, kv_cache: as for Llama.from_pretrained and generate. stages: of
    pipeline parallelism, as in vLLM; gpus counts those of all stages. stored: the format of a
    checkpoint in FP8. Raises ValueError for a number of GPUs that does not divide the model, and
    for more tokens than it has positions."""
    check_kv_cache(kv_cache)
    for name, value, most in (
        ("context", context, config.max_position_embeddings),
        ("batch", batch, MOST),
        ("stages", stages, config.num_hidden_layers),
    ):
        if not 1 <= value <= most:
            of = {"context": " of the model's positions", "stages": " of the model's layers"}
            raise ValueError(f"{name}: got {value}, want 1 to {most}{of.get(name, '')}")
    found = Plan(Rank(config, stages, quantize, kv_cache, stages, stored), gpu, context, batch)
    if gpus is None:
        return found.with_(gpus=found.fewest_gpus or found.possible()[-1])
    known = [n * stages for n in fitting(config)]
    if gpus not in known:
        each = f" in each of {stages} stages" if stages > 1 else ""
        raise ValueError(
            f"gpus: got {gpus}, want one that divides the model{each}: {', '.join(map(str, known))}"
        )
    return found.with_(gpus=gpus)


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest size up to limit that fits, where all below it do; 0: none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
