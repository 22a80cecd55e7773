"""Measure the forward pass of Llama 3.1 with our kernels against eager transformers and all peers.

All have the same random weights, of 8B's true shapes: on a CPU four layers and a vocabulary of
32,000, so that bf16, FP8, the fp32 reference and the peers' files fit in memory together; on a GPU
as many layers as fit. Figures for all of 8B are extrapolated by bytes or flops and marked so;
`--whole` runs the whole 8B preset in FP8.

Names are llama-bench's: pp512 is a prompt of 512 tokens into an empty cache, tg128 is 128 tokens
generated one by one, "@ d16384" means that so many tokens are in the cache already, and "B8" means
eight sequences at once. GPU times are the host's and include launch gaps, most of the cost of an
eager decode.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import llama_fast as lf

from ..cases import relative_error
from ..peers.in_transformers import Transformers, attention
from ..timing import CPU, Run, Timing, figures, joined, machine, part
from ..timing.clock import measure
from ..timing.events import waited
from ..timing.limits import Limit, compute, read_once
from ..timing.memory import free_memory, peak_memory
from . import jobs, models
from .jobs import ALL, CHECKED, Job, Sizes

BUDGETS = {"quick": 1.0, "default": 9.0, "full": 9.0}  # seconds of rounds of all passes
RESERVE = 12 << 30  # bytes of a GPU for caches, activations and CUDA itself
CPU_RESERVE = 1 << 30  # bytes for caches and activations

# For our FP8 weights: job -> implementation -> how many times faster ours is to be.
TARGETS = {
    "pp512": {"transformers": 1.1, "llama.cpp Q8_0": 1.8},
    "tg16 @ d512": {"transformers": 5.0, "llama.cpp Q8_0": 1.6, "llama.cpp bf16": 1.6},
    "pp8192": {"transformers": 2.5},
}


@dataclasses.dataclass
class Asked:
    """The options of a run, and functions that report its progress."""

    level: str
    device: torch.device = CPU
    speed: machine.Speed = machine.UNBOUND
    peers: Sequence[Any] = ()
    passes: int = 1  # through all jobs, see timing/clock.py
    wants: Callable[[str], bool] = lambda name: True  # whether a baseline is wanted
    skip: Callable[[str, str], None] = lambda name, why: None
    say: Callable[[str], None] = lambda text: None
    keep: Callable[[dict[str, Any]], None] = lambda found: None  # the figures after each job

    def sizes(self) -> Sizes:
        memory = free_memory(self.device)
        if self.device.type == "cpu":
            # Bytes per weight: transformers 2 and the fp32 reference 4; ours 2 and 1; each peer 3,
            # in two forms. All of them are in memory at once.
            sizes, each = jobs.plan(self.level, self.speed), 9 + 3 * len(self.peers)
            config = models.fitting(sizes.config, memory - CPU_RESERVE, each)
            return dataclasses.replace(sizes, config=config)
        # The fp32 reference is gone before ours and the peers, 2 bytes each, are made.
        each = max(6, 5 + 2 * len(self.peers))
        return jobs.on_gpu(self.level, memory - RESERVE, each)


def run(asked: Asked, times: int | None = None) -> dict[str, Any]:
    """Measure every job with ours in FP8 and bf16, transformers and the peers, and the logits'
    errors. times: the number of passes; None: asked.passes."""
    begun, sizes, device, say = time.perf_counter(), asked.sizes(), asked.device, asked.say
    config, speed = sizes.config, asked.speed
    what = f"8B shapes, {config.num_hidden_layers} layers, vocab {config.vocab_size}"
    say(f"end to end: {what}, making")
    hf = models.transformers_model(config, device)
    longest = max(CHECKED, *(j.depth + j.tokens for j in sizes.jobs))
    prompt = models.prompt(config, longest, max(j.batch for j in sizes.jobs)).to(device)
    first = prompt[:1, : sizes.checked]
    # Made first: beside the others it might not fit.
    wide = Transformers("transformers fp32", models.transformers_model(config, device, hf))
    exact = wide.logits(first)
    running: dict[str, Any] = {n: models.Ours(n, m) for n, m in models.same_weights(hf).items()}
    ours = list(running)
    for label, implementation in (("transformers", "sdpa"), ("transformers eager", "eager")):
        # transformers' eager attention, which repeats K and V for every head, is for a full run.
        if asked.wants(label) and (implementation == "sdpa" or asked.level == "full"):
            around = functools.partial(attention, hf, implementation)
            running[label] = Transformers(label, hf, around)
    for peer in asked.peers:
        try:
            for model in peer.models(hf, device):
                running[model.label] = model
                say(f"  {model.label} loaded")
        except Exception as error:  # a peer that fails loses only its own columns
            asked.skip(f"end to end: {peer.name}", f"{type(error).__name__}: {error}")
    fp32 = " and fp32" * speed.bf16_is_slow
    found: dict[str, Any] = {
        "what": f"{what}, random weights; baseline: transformers, sdpa, bf16{fp32}",
        "rows": [],
    }
    try:
        with torch.inference_mode():
            each = functools.partial(_each, running, ours, asked.skip)
            logits = each("logits", lambda model: model.logits(first))
            found["logits"] = {name: relative_error(x, exact) for name, x in logits.items()}
            if speed.bf16_is_slow and asked.wants(wide.label):
                running[wide.label] = wide
            del wide
            say(f"  models made in {time.perf_counter() - begun:.0f} s")
            # Before the jobs: memory that they keep, such as a cache, would not be counted.
            most = max(job.tokens for job in sizes.jobs if job.kind == "pp")

            def memory(name: str, model: Any) -> tuple[str, dict[str, float]]:
                n = sizes.part if name == "transformers" else 1
                label, _ = part(name, lambda _: None, n)
                return label, memory_of(model, prompt[:1, : most // n])

            found["memory"] = dict(each("memory", lambda m: memory(m.label, m)).values())
            limit = compute(torch.bfloat16, device, speed)
            fp8 = compute(torch.bfloat16, device, speed, fp8=True) if device.type != "cpu" else None
            make = functools.partial(_runs, asked, prompt, running, ours, sizes.part, limit, fp8)
            within = ALL - (time.perf_counter() - begun)
            if asked.level == "full" or device.type != "cpu":
                within = float("inf")
            rows: dict[Job, list[dict[str, Any]]] = {}
            for job, timings in _passes(asked, sizes, times or asked.passes, make, within):
                rows[job] = _rows(job, timings, running, ours, limit, fp8)
                found["rows"] = [
                    {**r, "errors": found["logits"]} for rs in rows.values() for r in rs
                ]
                say(f"  {job.name} measured")
                asked.keep(found)
    finally:
        for model in running.values():
            model.close()
    return found


def _each(
    running: dict[str, Any],
    ours: list[str],
    skip: Callable[[str, str], None],
    what: str,
    ask: Callable[[Any], Any],
) -> dict[str, Any]:
    """Call `ask` with every model. A model that is not ours and fails is dropped."""
    found = {}
    for name, model in list(running.items()):
        try:
            found[name] = ask(model)
        except Exception as error:
            if name in ours:
                raise
            skip(f"{what}: {name}", f"{type(error).__name__}: {error}")
            running.pop(name).close()
    return found


def _passes(
    asked: Asked, sizes: Sizes, times: int, make: Callable[[Job], dict[str, Run]], within: float
) -> Iterator[tuple[Job, dict[str, Timing]]]:
    """Yield each job after it was measured once more, with all of its timings. within: seconds by
    which the last pass is to end, judged by the longest pass before."""
    runs: dict[Job, dict[str, Run]] = {}
    taken: dict[Job, list[dict[str, Timing]]] = {job: [] for job in sizes.jobs}
    begun, longest = time.perf_counter(), 0.0
    for number in range(times):
        start = time.perf_counter()
        if number and longest > within - (start - begun):
            return
        for job in sizes.jobs:
            if job not in runs:
                made = make(job)
                runs[job] = {name: waited(run, asked.device) for name, run in made.items()}
            budget = BUDGETS[asked.level]
            taken[job].append(measure(runs[job], budget, asked.passes, sizes.rounds))
            yield job, joined(taken[job])
        longest = max(longest, time.perf_counter() - start)


def _runs(
    asked: Asked,
    prompt: Tensor,
    running: dict[str, Any],
    ours: list[str],
    n: int,
    limit: Limit,
    fp8: Limit | None,
    job: Job,
) -> dict[str, Run]:
    """Make the runs of every model and the limits; a model reads a job's context here. n:
    transformers in bf16 reads an nth of a prompt."""
    # Generation needs at least one token to start from.
    context = prompt[: job.batch, : max(job.depth, 1 if job.kind == "tg" else 0)]
    tokens = prompt[: job.batch, job.depth :][:, : job.tokens]
    runs: dict[str, Run] = {}
    for name, model in running.items():
        if name == "transformers eager" and job.depth > 4096:
            asked.skip(f"{job.name}: {name}", "its scores would be larger than all weights")
            continue
        try:
            if job.kind == "tg":
                label, run = name, model.decode(context, job.tokens)
            else:
                these = tokens[:, : job.tokens // n] if name == "transformers" else tokens
                label, run = part(name, model.extend(context, these), job.tokens // these.shape[1])
            if name not in ours and not name.startswith("transformers"):
                run(0)
            runs[label] = run
        except Exception as error:
            if name in ours:
                raise
            asked.skip(f"{job.name}: {name}", f"{type(error).__name__}: {error}")
    if job.kind == "pp":
        runs["limit"] = limit.run
        return runs | ({"limit FP8": fp8.run} if fp8 else {})
    for name in ours:
        runs[f"limit {name}"] = _read_weights(running[name].model)
    return runs


def _read_weights(model: lf.Llama) -> Run:
    """Return a run that reads the weights that each decoded token needs."""

    def run(_: int) -> None:
        for w in models.linears(model):
            read_once(w)

    return run


def _rows(
    job: Job,
    timings: dict[str, Timing],
    running: dict[str, Any],
    ours: list[str],
    limit: Limit,
    fp8: Limit | None,
) -> list[dict[str, Any]]:
    """Make a row for each of ours, with the others' times. "all_layers_tokens_per_s" is
    extrapolated."""
    rows = []
    for name in ours:
        model = running[name].model
        config = model.config
        targets = TARGETS.get(job.name, {}) if name == "FP8" else {}
        if job.kind == "pp":
            work = models.prefill_flops(config, job.tokens, job.depth)
            of = fp8 if fp8 and name == "FP8" else limit
            key = "limit FP8" if of is fp8 else "limit"
            fastest, limit_name = timings[key].median * work / of.work, of.name
            whole = work / models.prefill_flops(whole_config(config), job.tokens, job.depth)
        else:
            weights = sum(w.nbytes for w in models.linears(model))
            read = weights + _cache_bytes(config, job)
            fastest = timings[f"limit {name}"].median * job.tokens * read / weights
            limit_name, whole = "read", _bytes_share(config)
        row = _row(job, name, timings, limit_name, fastest, targets)
        row["siblings"] = [other for other in ours if other != name]
        row["all_layers_tokens_per_s"] = row["tokens_per_s"] * whole
        rows.append(row)
    return rows


def _row(
    job: Job,
    name: str,
    timings: dict[str, Timing],
    limit: str,
    fastest: float,
    targets: dict[str, float],
) -> dict[str, Any]:
    """Make the row of ours with that name. fastest: the seconds that the limit alone would take."""
    ours, tokens = timings[name].median, job.tokens * job.batch
    others = {n: v for n, v in timings.items() if n != name and not n.startswith("limit")}
    times = {n: v.median / ours for n, v in others.items()}
    targets = {n: wanted for n, wanted in targets.items() if n in times}
    return {
        "op": job.name,
        "shape": name,
        "ours": name,
        "tokens_per_s": tokens / ours,
        "rate": tokens / ours,
        "unit": "tokens/s",
        "ms_per_token": 1e3 * ours / tokens,
        "limit": limit,
        "of_limit": fastest / ours,
        "times": times,
        "targets": targets,
        "met": {k: times[k] >= v for k, v in targets.items()},
        "seconds": figures(timings, name),
    }


def _cache_bytes(config: lf.LlamaConfig, job: Job) -> float:
    """Estimate the bytes of keys and values that a step reads."""
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    return job.batch * job.depth * float(token)


def whole_config(config: lf.LlamaConfig) -> lf.LlamaConfig:
    """Return the config with all of 8B's layers and its vocabulary."""
    full = lf.LlamaConfig.llama_3_1_8b()
    return dataclasses.replace(
        config, num_hidden_layers=full.num_hidden_layers, vocab_size=full.vocab_size
    )


def _bytes_share(config: lf.LlamaConfig) -> float:
    """Return the bytes that a token reads of this model's weights as a share of all of 8B's."""

    def elements(c: lf.LlamaConfig) -> float:
        layer = models.prefill_flops(dataclasses.replace(c, num_hidden_layers=1), 1, 0)
        head = 2.0 * c.hidden_size * c.vocab_size
        return c.num_hidden_layers * (layer - head) + head

    return elements(config) / elements(whole_config(config))


def memory_of(model: Any, prompt: Tensor) -> dict[str, float]:
    """Return the GiB of the weights, and of a prompt's peak beside them, its cache included."""
    with peak_memory(prompt.device) as peak:
        model.extend(prompt[:, :0], prompt)(0)
    return {"weights_gib": model.weight_bytes() / 2**30, "prompt_gib": peak.bytes / 2**30}
