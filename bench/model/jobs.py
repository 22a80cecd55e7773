"""Plan the forward pass's jobs, smaller ones where the machine is too slow."""

from __future__ import annotations

from dataclasses import dataclass, replace

import llama_fast as lf

from ..timing import Speed
from ..timing.machine import halved
from . import models

ROUNDS = 6  # the least of all passes together
FEW = 3  # the same on a machine that would take too long
BESIDE = 2  # calls besides the rounds: for the memory, and for the context of a decode
# Seconds, except in a full run: all prompts, all decodes, a call of a baseline that runs a part,
# and everything, after which no pass starts.
PROMPTS, DECODES, PART, ALL = 80.0, 40.0, 2.5, 130.0
# Making the models takes about as long as READS reads of the weights. Layers are dropped if that
# exceeds MAKING seconds.
READS, MAKING = 300, 60.0
LEAST = 32  # tokens of a prompt
CHECKED = 64  # tokens whose logits are compared with fp32's
STREAMED = 3  # estimate: transformers' time for a token, over the time to read its weights


@dataclass(frozen=True)
class Job:
    """Tokens processed at once ("pp") or one by one ("tg"), after `depth` others, in each of
    `batch` sequences."""

    kind: str
    tokens: int
    depth: int = 0
    batch: int = 1

    @property
    def name(self) -> str:
        depth, batch = f" @ d{self.depth}" * (self.depth > 0), f", B{self.batch}" * (self.batch > 1)
        return f"{self.kind}{self.tokens}{depth}{batch}"


_PROMPT, _DECODE = Job("pp", models.PREFILL), Job("tg", 16, models.PREFILL)
JOBS = {
    "quick": (_PROMPT, Job("tg", 8, models.PREFILL)),
    "default": (_PROMPT, _DECODE),
    "full": (
        *(_PROMPT, _DECODE, Job("tg", 128)),
        *(Job("pp", models.PREFILL, 16384), Job("tg", 16, 16384)),
    ),
}
_BATCHES = (Job("tg", 16, 1024, 8), Job("tg", 16, 1024, 32))
_GPU = (_PROMPT, _DECODE, Job("pp", 8192), *_BATCHES, Job("tg", 16, 8192))
ON_GPU = {
    "quick": JOBS["default"],
    "default": _GPU,
    "full": (*_GPU, Job("pp", 32768), Job("tg", 16, 32768)),
}


@dataclass(frozen=True)
class Sizes:
    """The model and the jobs for a machine."""

    config: lf.LlamaConfig
    jobs: tuple[Job, ...]
    rounds: int = ROUNDS
    checked: int = CHECKED
    part: int = 1  # n: transformers in bf16 reads an nth of a prompt


def on_gpu(level: str, memory: float, bytes_each: float) -> Sizes:
    """Plan for a GPU: as many of 8B's layers as fit at so many bytes per weight."""
    config = models.fitting(lf.LlamaConfig.llama_3_1_8b(), memory, bytes_each)
    return Sizes(config, ON_GPU[level])


def plan(level: str, speed: Speed) -> Sizes:
    """Plan for a CPU. A full run keeps the jobs' sizes and only lets slow baselines run a part."""
    jobs, config, slow, rounds = JOBS[level], models.shape(), speed.bf16_is_slow, ROUNDS
    token = models.prefill_flops(config, 1)  # operations; also the bytes of its bf16 weights
    tokens = longest = max((job.tokens for job in jobs if job.kind == "pp"), default=1)
    if level != "full":
        layers = halved(config.num_hidden_layers, READS * token / speed.read, MAKING, 1)
        config = replace(config, num_hidden_layers=layers)
        token = models.prefill_flops(config, 1)
        rival = speed.fp32 if slow else speed.bf16
        prompt = token * (2 / speed.ours + 1 / rival)  # seconds per token, all models
        calls = FEW + BESIDE
        tokens = halved(longest, calls * prompt * longest, PROMPTS, LEAST)
        rounds = ROUNDS if (ROUNDS + BESIDE) * prompt * tokens <= PROMPTS else FEW
        decode = token * (0.5 + 1 + STREAMED + 2 * STREAMED * slow) / speed.read

        def sized(job: Job) -> Job:
            depth = job.depth * tokens // longest
            if job.kind == "pp":
                return Job("pp", job.tokens * tokens // longest, depth)
            return Job("tg", halved(job.tokens, calls * decode * job.tokens, DECODES, 2), depth)

        jobs = tuple(map(sized, jobs))
    if not slow:
        return Sizes(config, jobs, rounds)
    checked, some = (halved(n, n * token / speed.bf16, PART, LEAST // 4) for n in (CHECKED, tokens))
    return Sizes(config, jobs, rounds, checked, tokens // some)
