"""Measure the forward pass of Llama 3.1 with our kernels against eager transformers and all peers.

All have the same random weights, of 8B's true shapes: on a CPU up to four layers and a vocabulary
of 32,000, so that bf16, FP8, the fp32 reference and the peers' files fit in memory together; on a
GPU as many layers as fit. Figures for all of 8B are extrapolated by bytes or flops and are marked
as such; `--whole` runs the whole 8B preset in FP8.

Names are llama-bench's: pp512 is a prompt of 512 tokens into an empty cache, tg128 is 128 tokens
generated one by one, "@ d16384" means that 16384 tokens are in the cache already, and "B8" means
eight sequences at once. GPU times are the host's and include launch gaps, most of the cost of an
eager decode.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import llama_fast as lf

from ..cases import relative_error
from ..peers import ModelPeer
from ..peers.in_transformers import Transformers, attention
from ..results.files import Record
from ..timing import CPU, UNBOUND, Limit, Run, Speed, Timing, clock, figures, joined, limits, part
from ..timing.clock import measure
from ..timing.events import waited
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


@dataclass
class Asked:
    """The options of a run, and the record of its figures."""

    level: str
    device: torch.device = CPU
    speed: Speed = UNBOUND
    peers: Sequence[Any] = ()
    passes: int = 1  # through all jobs, see timing/clock.py
    wants: Callable[[str], bool] = lambda name: True  # whether a baseline is wanted
    record: Record = field(default_factory=Record)

    def sizes(self) -> Sizes:
        memory = free_memory(self.device)
        if self.device.type == "cpu":
            # Bytes per weight: transformers 2 and the fp32 reference 4; ours 2 and 1; each peer 3,
            # in two forms. All of them are in memory at once.
            sizes, each = jobs.plan(self.level, self.speed), 9 + 3 * len(self.peers)
            config = models.fitting(sizes.config, memory - CPU_RESERVE, each)
            return replace(sizes, config=config)
        # The fp32 reference is gone before ours and the peers, 2 bytes each, are made.
        each = max(6, 5 + 2 * len(self.peers))
        return jobs.on_gpu(self.level, memory - RESERVE, each)


def run(asked: Asked, times: int | None = None) -> dict[str, Any]:
    """Measure every job with ours in FP8 and bf16, transformers and the peers, and the logits'
    errors. times: the number of passes; None: asked.passes."""
    begun, sizes, device, record = time.perf_counter(), asked.sizes(), asked.device, asked.record
    config, slow = sizes.config, asked.speed.bf16_is_slow
    what = f"8B shapes, {config.num_hidden_layers} layers, vocab {config.vocab_size}"
    record.say(f"end to end: {what}, making")
    hf = models.transformers_model(config, device)
    longest = max(CHECKED, *(j.depth + j.tokens for j in sizes.jobs))
    prompt = models.prompt(config, longest, max(j.batch for j in sizes.jobs)).to(device)
    first = prompt[:1, : sizes.checked]
    # Made first: beside the others it might not fit.
    wide = Transformers("transformers fp32", models.transformers_model(config, device, hf))
    exact = wide.logits(first)
    ours = models.same_weights(hf)
    lineup = Lineup(asked, prompt, sizes.part, ours, {**ours})
    for label, implementation in (("transformers", "sdpa"), ("transformers eager", "eager")):
        # transformers' eager attention, which repeats K and V for every head, is for a full run.
        if asked.wants(label) and (implementation == "sdpa" or asked.level == "full"):
            around = partial(attention, hf, implementation)
            lineup.running[label] = Transformers(label, hf, around)
    for peer in asked.peers:
        try:
            for model in peer.models(hf, device):
                lineup.running[model.label] = model
                record.say(f"  {model.label} loaded")
        except Exception as error:  # a peer that fails loses only its own columns
            record.skip(f"end to end: {peer.name}", f"{type(error).__name__}: {error}")
    baseline = f"transformers, sdpa, bf16{' and fp32' * slow}"
    found: dict[str, Any] = {"what": f"{what}, random weights; baseline: {baseline}", "rows": []}
    try:
        with torch.inference_mode():
            logits = lineup.each("logits", lambda model: model.logits(first))
            found["logits"] = {name: relative_error(x, exact) for name, x in logits.items()}
            if slow and asked.wants(wide.label):
                lineup.running[wide.label] = wide
            del wide
            record.say(f"  models made in {time.perf_counter() - begun:.0f} s")
            # Before the jobs: memory that they keep, such as a cache, would not be counted.
            most = max(job.tokens for job in sizes.jobs if job.kind == "pp")
            found["memory"] = dict(lineup.each("memory", partial(lineup.memory, most)).values())
            for name in ("limit",) if device.type == "cpu" else ("limit", "limit FP8"):
                fp8 = name.endswith("FP8")
                limit = limits.compute(torch.bfloat16, device, asked.speed, fp8)
                lineup.limits[name] = limit
            within = ALL - (time.perf_counter() - begun)
            if asked.level == "full" or device.type != "cpu":
                within = float("inf")
            rows: dict[Job, list[dict[str, Any]]] = {}
            for job, timings in _passes(asked, sizes, times or asked.passes, lineup.runs, within):
                rows[job] = lineup.rows(job, timings)
                every = [r for rs in rows.values() for r in rs]
                found["rows"] = [{**r, "errors": found["logits"]} for r in every]
                record.say(f"  {job.name} measured")
                record.keep(end_to_end=found)
    finally:
        for model in lineup.running.values():
            model.close()
    return found


def _passes(
    asked: Asked, sizes: Sizes, times: int, make: Callable[[Job], dict[str, Run]], within: float
) -> Iterator[tuple[Job, dict[str, Timing]]]:
    """Measure each job once per pass, and yield it with all its timings so far. within: see
    clock.passes."""
    runs: dict[Job, dict[str, Run]] = {}
    taken: dict[Job, list[dict[str, Timing]]] = {job: [] for job in sizes.jobs}
    for _ in clock.passes(times, within):
        for job in sizes.jobs:
            if job not in runs:
                runs[job] = {name: waited(run, asked.device) for name, run in make(job).items()}
            budget = BUDGETS[asked.level]
            taken[job].append(measure(runs[job], budget, asked.passes, sizes.rounds))
            yield job, joined(taken[job])


@dataclass
class Lineup:
    """The models that run, by label, and the limits beside them."""

    asked: Asked
    prompt: Tensor  # [B, longest]
    part: int  # n: transformers in bf16 reads an nth of a prompt
    ours: dict[str, models.Ours]
    running: dict[str, ModelPeer]
    limits: dict[str, Limit] = field(default_factory=dict)  # of prompts

    def _lost(self, what: str, name: str, error: Exception) -> None:
        if name in self.ours:
            raise error
        self.asked.record.skip(f"{what}: {name}", f"{type(error).__name__}: {error}")

    def each(self, what: str, ask: Callable[[ModelPeer], Any]) -> dict[str, Any]:
        """Call `ask` with every model. A model that is not ours and fails is dropped."""
        found = {}
        for name, model in list(self.running.items()):
            try:
                found[name] = ask(model)
            except Exception as error:
                self._lost(what, name, error)
                self.running.pop(name).close()
        return found

    def memory(self, tokens: int, model: ModelPeer) -> tuple[str, dict[str, float]]:
        """Return the model's label, the GiB of its weights, and the further GiB at a prompt's peak,
        its cache included."""
        n = self.part if model.label == "transformers" else 1
        prompt = self.prompt[:1, : tokens // n]
        with peak_memory(prompt.device) as peak:
            model.extend(prompt[:, :0], prompt)(0)
        gib = {"weights_gib": model.weight_bytes() / 2**30, "prompt_gib": peak.bytes / 2**30}
        return part(model.label, lambda _: None, n)[0], gib

    def runs(self, job: Job) -> dict[str, Run]:
        """Make the runs of every model and the limits; a model reads a job's context here."""
        # Generation needs at least one token to start from.
        context = self.prompt[: job.batch, : max(job.depth, 1 if job.kind == "tg" else 0)]
        tokens = self.prompt[: job.batch, job.depth :][:, : job.tokens]
        runs: dict[str, Run] = {}
        for name, model in self.running.items():
            if name == "transformers eager" and job.depth > 4096:
                why = "its scores would be larger than all weights"
                self.asked.record.skip(f"{job.name}: {name}", why)
                continue
            n = self.part if name == "transformers" and job.kind == "pp" else 1
            try:
                if job.kind == "tg":
                    label, run = name, model.decode(context, job.tokens)
                else:
                    these = tokens[:, : job.tokens // n]
                    label, run = part(name, model.extend(context, these), n)
                if name not in self.ours and not name.startswith("transformers"):
                    run(0)
                runs[label] = run
            except Exception as error:
                self._lost(job.name, name, error)
        if job.kind == "pp":
            return {**runs, **{name: limit.run for name, limit in self.limits.items()}}
        return {**runs, **{f"limit {n}": _read_weights(o.model) for n, o in self.ours.items()}}

    def rows(self, job: Job, timings: dict[str, Timing]) -> list[dict[str, Any]]:
        """Make a row for each of our models, with the others' times. "all_layers_tokens_per_s" is
        extrapolated."""
        rows = []
        for name, model in self.ours.items():
            config = model.model.config
            if job.kind == "pp":
                key = f"limit {name}" if f"limit {name}" in self.limits else "limit"
                limit = self.limits[key]
                flops = models.prefill_flops(config, job.tokens, job.depth)
                fastest, limit_name = timings[key].median * flops / limit.work, limit.name
                whole = flops / models.prefill_flops(whole_config(config), job.tokens, job.depth)
            else:
                weights = model.weight_bytes()
                read = (weights + _cache_bytes(config, job)) / weights
                fastest = timings[f"limit {name}"].median * job.tokens * read
                limit_name, whole = "read", _bytes_share(config)
            seconds, tokens = timings[name].median, job.tokens * job.batch
            others = {n: t for n, t in timings.items() if n != name and not n.startswith("limit")}
            times = {n: t.median / seconds for n, t in others.items()}
            targets = TARGETS.get(job.name, {}) if name == "FP8" else {}
            targets = {n: wanted for n, wanted in targets.items() if n in times}
            row = {
                "op": job.name,
                "shape": name,
                "ours": name,
                "tokens_per_s": tokens / seconds,
                "rate": tokens / seconds,
                "unit": "tokens/s",
                "ms_per_token": 1e3 * seconds / tokens,
                "limit": limit_name,
                "of_limit": fastest / seconds,
                "times": times,
                "targets": targets,
                "met": {k: times[k] >= v for k, v in targets.items()},
                "seconds": figures(timings, name),
                "siblings": [other for other in self.ours if other != name],
                "all_layers_tokens_per_s": tokens / seconds * whole,
            }
            rows.append(row)
        return rows


def _read_weights(model: lf.Llama) -> Run:
    """Return a run that reads the weights that each decoded token needs."""

    def run(_: int) -> None:
        for w in models.linears(model):
            limits.read_once(w)

    return run


def _cache_bytes(config: lf.LlamaConfig, job: Job) -> float:
    """Estimate the bytes of keys and values that a step reads."""
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    return job.batch * job.depth * float(token)


def whole_config(config: lf.LlamaConfig) -> lf.LlamaConfig:
    """Return the config with all of 8B's layers and its vocabulary."""
    full = lf.LlamaConfig.llama_3_1_8b()
    return replace(config, num_hidden_layers=full.num_hidden_layers, vocab_size=full.vocab_size)


def _bytes_share(config: lf.LlamaConfig) -> float:
    """Return the bytes that a token reads of this model's weights as a share of all of 8B's."""

    def elements(c: lf.LlamaConfig) -> float:
        layer = models.prefill_flops(replace(c, num_hidden_layers=1), 1, 0)
        head = 2.0 * c.hidden_size * c.vocab_size
        return c.num_hidden_layers * (layer - head) + head

    return elements(config) / elements(whole_config(config))
