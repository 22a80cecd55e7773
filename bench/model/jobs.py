"""What the forward pass is measured on, made smaller where the machine is too slow for it."""

from __future__ import annotations

import dataclasses

import llama_fast as lf

from ..timing import machine
from . import models

ROUNDS = 6  # at least, of all passes; FEW on a machine that would take too long
FEW = 3
BESIDE = 2  # calls besides the rounds: for the memory, and for the context of a decode
# Everything together, but for a full run: prompts, decodes, a call of a baseline of which a part is
# measured, and all of it, after which no pass is begun.
PROMPTS, DECODES, PART, ALL = 80.0, 40.0, 2.5, 130.0  # seconds
# Making the models takes as long as reading the weights so many times, about; and is to take
# MAKING seconds at most, or there are fewer layers.
READS, MAKING = 300, 60.0
LEAST = 32  # tokens of a prompt
CHECKED = 64  # tokens whose logits are held against fp32's
STREAMED = 3  # times its weights' time that transformers takes for a token, about


@dataclasses.dataclass(frozen=True)
class Job:
    """Tokens that are processed at once ("pp") or one by one ("tg"), after depth others, of each of
    batch sequences."""

    kind: str
    tokens: int
    depth: int = 0
    batch: int = 1

    @property
    def name(self) -> str:
        depth, batch = f" @ d{self.depth}" * (self.depth > 0), f", B{self.batch}" * (self.batch > 1)
        return f"{self.kind}{self.tokens}{depth}{batch}"


JOBS = {
    "quick": (Job("pp", models.PREFILL), Job("tg", 8, models.PREFILL)),
    "default": (Job("pp", models.PREFILL), Job("tg", 16, models.PREFILL)),
    "full": (
        Job("pp", models.PREFILL),
        Job("tg", 16, models.PREFILL),
        Job("tg", 128),
        Job("pp", models.PREFILL, 16384),
        Job("tg", 16, 16384),
    ),
}


_GPU = (
    *JOBS["default"],
    Job("pp", 8192),
    *(Job("tg", 16, 1024, batch) for batch in (8, 32)),
    Job("tg", 16, 8192),
)
ON_GPU = {
    "quick": JOBS["default"],
    "default": _GPU,
    "full": (*_GPU, Job("pp", 32768), Job("tg", 16, 32768)),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is run on a machine: full jobs where it is fast enough."""

    config: lf.LlamaConfig
    jobs: tuple[Job, ...]
    rounds: int = ROUNDS
    checked: int = CHECKED
    part: int = 1  # n, where transformers in bf16 is given an nth of a prompt


def on_gpu(level: str, memory: float, bytes_each: float) -> Sizes:
    """Plan for a GPU: the whole 8B, as far as it fits at so many bytes a weight."""
    config = models.fitting(lf.LlamaConfig.llama_3_1_8b(), memory, bytes_each)
    return Sizes(config, ON_GPU[level])


def plan(level: str, speed: machine.Speed) -> Sizes:
    """Plan for a CPU. A full run's jobs are never made smaller, but its slow baselines are."""
    jobs, config, slow = JOBS[level], models.shape(), speed.bf16_is_slow
    token = models.prefill_flops(config, 1)  # operations, and bytes of its weights in bf16
    if level != "full":
        layers = machine.halved(config.num_hidden_layers, READS * token / speed.read, MAKING, 1)
        config = dataclasses.replace(config, num_hidden_layers=layers)
        token = models.prefill_flops(config, 1)
    tokens = longest = max((job.tokens for job in jobs if job.kind == "pp"), default=1)
    rounds = ROUNDS
    if level != "full":
        rival = speed.fp32 if slow else speed.bf16
        prompt = token * (2 / speed.ours + 1 / rival)  # seconds of all, a token
        calls = FEW + BESIDE
        tokens = machine.halved(longest, calls * prompt * longest, PROMPTS, LEAST)
        rounds = ROUNDS if (ROUNDS + BESIDE) * prompt * tokens <= PROMPTS else FEW
        decode = token * (0.5 + 1 + STREAMED + 2 * STREAMED * slow) / speed.read

        def sized(job: Job) -> Job:
            depth, least = job.depth * tokens // longest, 2
            if job.kind == "pp":
                return Job("pp", job.tokens * tokens // longest, depth)
            steps = machine.halved(job.tokens, calls * decode * job.tokens, DECODES, least)
            return Job("tg", steps, depth)

        jobs = tuple(map(sized, jobs))
    if not slow:
        return Sizes(config, jobs, rounds)
    checked, some = (
        machine.halved(n, n * token / speed.bf16, PART, LEAST // 4) for n in (CHECKED, tokens)
    )
    return Sizes(config, jobs, rounds, checked, tokens // some)
