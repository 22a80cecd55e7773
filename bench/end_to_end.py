"""The main job: Llama 3.1's forward pass with the kernels swapped in, against eager transformers
and every peer that is there.

All run the same random weights, of 8B's true shapes: four layers and a vocabulary of 32,000, so
that bf16, FP8, the fp32 truth and the peers' files fit beside each other. What 32 layers would take
is extrapolated by bytes or flops, and says so; `--whole` runs the whole 8B preset, in FP8.

Names as in llama-bench: pp512 is a prompt of 512 tokens into an empty cache, tg128 are 128 tokens
generated one by one, "@ d16384" means that so many tokens are in the cache already.
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
from llama_fast import _cpu

from . import machine, model_rows, models
from .case import CPU, Spec, compute_limit, relative_error
from .jobs import ALL, CHECKED, Job, Sizes, plan
from .memory import peak_memory
from .shapes import shapes, sweep
from .timing import Run, Timing, joined, measure, part

BUDGETS = {"quick": 1.0, "default": 9.0, "full": 9.0}  # seconds of rounds, of all passes

# Of our FP8 weights: job, then how many times faster than whom. TARGETS hold at that depth.
TARGETS = {
    "pp512": {"transformers": 1.1, "llama.cpp Q8_0": 1.8},
    "tg16 @ d512": {"transformers": 5.0, "llama.cpp Q8_0": 1.6, "llama.cpp bf16": 1.6},
}


def run(
    level: str,
    say: Callable[[str], None],
    peers: Sequence[Any] = (),
    wants: Callable[[str], bool] = lambda name: True,
    skip: Callable[[str, str], None] = lambda name, why: None,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
    passes: int = 1,
    times: int | None = None,
    speed: machine.Speed = machine.UNBOUND,
) -> dict[str, Any]:
    """Every job, ours in FP8 and bf16 beside transformers and the peers; and the logits' errors.

    wants: whether a baseline is asked for; skip: is told who is left out, and why; keep: is handed
    what there is after each job; passes: how often all jobs are gone through, see timing.py, of
    which `times` are wanted; speed: of the machine, by which the jobs are sized.
    """
    begun, sizes = time.perf_counter(), plan(level, speed)
    config = sizes.config
    say(f"end to end: 8B layers x {config.num_hidden_layers}, vocab {config.vocab_size}, making")
    hf = models.transformers_model(config)
    running: dict[str, Any] = {n: models.Ours(n, m) for n, m in models.same_weights(hf).items()}
    ours = list(running)
    for label, attention in (("transformers", "sdpa"), ("transformers eager", "eager")):
        # transformers' eager attention repeats K and V for every head: for a full run.
        if wants(label) and (attention == "sdpa" or level == "full"):
            running[label] = models.Transformers(hf, attention)
    for peer in peers:
        try:
            for model in peer.models(hf, config, CPU):
                running[model.label] = model
                say(f"  {model.label} loaded")
        except Exception as error:  # a peer that fails costs its own columns only
            skip(f"end to end: {peer.name}", f"{type(error).__name__}: {error}")
    prompt = models.prompt(config, max(CHECKED, *(j.depth + j.tokens for j in sizes.jobs)))
    limit = compute_limit(Spec(shapes("8b"), sweep("8b", CPU, level), torch.bfloat16, CPU, speed))
    found: dict[str, Any] = {
        "what": f"8B shapes, {config.num_hidden_layers} layers, vocab {config.vocab_size}, "
        f"random weights; baseline: transformers, sdpa, bf16{' and fp32' * speed.bf16_is_slow}",
        "rows": [],
    }
    try:
        with torch.inference_mode():
            each = functools.partial(_each, running, ours, skip)
            first = prompt[:, : sizes.checked]
            logits = each("logits", lambda model: model.logits(first))
            wide = models.Transformers(models.transformers_model(config, weights=hf))
            found["logits"] = _errors(wide, logits, first)
            if speed.bf16_is_slow and wants("transformers fp32"):
                wide.label = "transformers fp32"
                running[wide.label] = wide
            del wide
            say(f"  models made in {time.perf_counter() - begun:.0f} s")
            # Before the jobs: what they keep, a cache of that length among it, would not be seen.
            longest = max(job.tokens for job in sizes.jobs if job.kind == "pp")

            def memory(name: str, model: Any) -> tuple[str, dict[str, float]]:
                n = sizes.part if name == "transformers" else 1
                label, _ = part(name, lambda _: None, n)
                return label, memory_of(model, prompt[:, : longest // n])

            asked = each("memory", lambda model: memory(model.label, model))
            found["memory"] = dict(asked.values())
            rows: dict[Job, list[dict[str, Any]]] = {}

            def make(job: Job) -> dict[str, Run]:
                runs = _runs(job, prompt, running, ours, skip, sizes.part)
                return {**runs, "limit": limit[0]} if job.kind == "pp" else runs

            within = float("inf") if level == "full" else ALL - (time.perf_counter() - begun)
            wanted = passes if times is None else times
            for job, timings in _passes(level, sizes, passes, wanted, make, within):
                rows[job] = _rows(job, timings, running[ours[0]], ours, *limit[1:])
                found["rows"] = [
                    {**r, "errors": found["logits"]} for rs in rows.values() for r in rs
                ]
                say(f"  {job.name} measured")
                keep(found)
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
    """What is asked of every model, by name. One of somebody else's that fails runs no more."""
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
    level: str,
    sizes: Sizes,
    passes: int,
    times: int,
    make: Callable[[Job], dict[str, Run]],
    within: float,
) -> Iterator[tuple[Job, dict[str, Timing]]]:
    """A job whenever it was measured once more, with all that was measured of it. within: seconds,
    after which no pass ends, as far as the first one can tell."""
    runs: dict[Job, dict[str, Run]] = {}
    taken: dict[Job, list[dict[str, Timing]]] = {job: [] for job in sizes.jobs}
    begun, longest = time.perf_counter(), 0.0
    for number in range(times):
        start = time.perf_counter()
        if number and longest > within - (start - begun):
            return
        for job in sizes.jobs:
            if job not in runs:
                runs[job] = make(job)
            options = {"passes": passes, "least": sizes.rounds}
            taken[job].append(measure(runs[job], BUDGETS[level], **options))
            yield job, joined(taken[job])
        longest = max(longest, time.perf_counter() - start)


def _runs(
    job: Job,
    prompt: Tensor,
    running: dict[str, Any],
    ours: list[str],
    skip: Callable[[str, str], None],
    n: int = 1,
) -> dict[str, Run]:
    """Everybody's, and the limits' of decodes. n: transformers in bf16 has an nth of a prompt.
    A model that has a long context to read first reads it here."""
    # One token at least to go on from: nothing is generated from nothing.
    context = prompt[:, : max(job.depth, 1 if job.kind == "tg" else 0)]
    tokens = prompt[:, job.depth :][:, : job.tokens]
    runs: dict[str, Run] = {}
    for name, model in running.items():
        if name == "transformers eager" and job.depth > 4096:
            skip(f"{job.name}: {name}", "its scores would be larger than all of the weights")
            continue
        try:
            if job.kind == "tg":
                runs[name] = model.decode(context, job.tokens)
            else:
                these = tokens[:, : job.tokens // n] if name == "transformers" else tokens
                label, run = part(name, model.extend(context, these), job.tokens // these.shape[1])
                runs[label] = run
            if name not in ours and not isinstance(model, models.Transformers):
                runs[name](0)
        except Exception as error:
            if name in ours:
                raise
            runs.pop(name, None)
            skip(f"{job.name}: {name}", f"{type(error).__name__}: {error}")
    if job.kind == "tg":
        for name in ours:
            runs[f"limit {name}"] = _read_weights(running[name].model)
    return runs


def _rows(
    job: Job,
    timings: dict[str, Timing],
    model: models.Ours,
    ours: list[str],
    limit_flops: float,
    limit_name: str,
) -> list[dict[str, Any]]:
    """A row for each of ours; the rest are in each row's seconds."""
    rows, config = [], model.model.config
    for name in ours:
        targets = TARGETS.get(job.name, {}) if name == "FP8" else {}
        if job.kind == "pp":
            work = models.prefill_flops(config, job.tokens, job.depth)
            fastest = timings["limit"].median * work / limit_flops
            whole = work / models.prefill_flops(whole_config(config), job.tokens, job.depth)
        else:
            fastest = timings[f"limit {name}"].median * job.tokens
            whole = _bytes_share(config)
        limit = limit_name if job.kind == "pp" else "read"
        found = model_rows.row(job.name, name, timings, job.tokens, limit, fastest, targets)
        found["siblings"] = [other for other in ours if other != name]
        found["all_layers_tokens_per_s"] = found["tokens_per_s"] * whole  # extrapolated
        rows.append(found)
    return rows


def whole_config(config: lf.LlamaConfig) -> lf.LlamaConfig:
    """The same with all of 8B's layers and its vocabulary."""
    full = lf.LlamaConfig.llama_3_1_8b()
    return dataclasses.replace(
        config, num_hidden_layers=full.num_hidden_layers, vocab_size=full.vocab_size
    )


def _bytes_share(config: lf.LlamaConfig) -> float:
    """Of the weights that a token reads: this model's, of all layers'."""

    def elements(c: lf.LlamaConfig) -> float:
        layer = models.prefill_flops(dataclasses.replace(c, num_hidden_layers=1), 1, 0)
        head = 2.0 * c.hidden_size * c.vocab_size
        return c.num_hidden_layers * (layer - head) + head

    return elements(config) / elements(whole_config(config))


def memory_of(model: Any, prompt: Tensor) -> dict[str, float]:
    """GiB of weights, and what a prompt needs beside them at its peak, its cache included."""
    with peak_memory(prompt.device) as peak:
        model.extend(prompt[:, :0], prompt)(0)
    return {"weights_gib": model.weight_bytes() / 2**30, "prompt_gib": peak.bytes / 2**30}


def _errors(
    wide: models.Transformers, logits: dict[str, Tensor], tokens: Tensor
) -> dict[str, float]:
    """max |logit - exact| / max |exact| of everybody; exact: the same bf16 weights, in fp32."""
    exact = wide.logits(tokens)
    return {name: relative_error(found, exact) for name, found in logits.items()}


def _read_weights(model: lf.Llama) -> Callable[[int], None]:
    """What one token of a decode cannot do without."""

    def run(_: int) -> None:
        for w in models.linears(model):
            _cpu.read_bandwidth_probe(w.data_ptr(), w.nbytes, torch.get_num_threads())

    return run


def compare_logits(config: lf.LlamaConfig, device: torch.device) -> dict[str, float]:
    """The errors of a model of that shape, over 64 tokens."""
    hf = models.transformers_model(config, device)
    prompt = models.prompt(config, 64).to(device)
    logits = {"transformers bf16": models.Transformers(hf).logits(prompt)}
    for name, model in models.same_weights(hf).items():
        logits[f"ours {name}"] = model(prompt)
    wide = models.Transformers(models.transformers_model(config, device, weights=hf))
    return _errors(wide, logits, prompt)
