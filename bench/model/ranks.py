"""Measure the forward pass of a model that is split among processes: `torchrun --nproc-per-node N
-m llama_fast bench --tp N`. Weights are random, each rank's its own. On a CPU the model has up to
four layers, and its prompt as many tokens as take a few seconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import llama_fast as lf
from llama_fast.parallel import Group, join

from ..cases.shapes import PRESETS
from ..results import files
from ..timing import machine
from ..timing.memory import free_memory
from . import models

LAYERS = 4  # on a CPU
ROUNDS = 3
PROMPT_SECONDS = 10.0
STEPS = 16  # tokens decoded one by one
RESERVE = 4 << 30  # bytes of a device for caches, activations and libraries
TINY = lf.LlamaConfig(1024, 64, 128, 2, 8, 4, 16)


def main(args: argparse.Namespace, dtype: torch.dtype) -> int:
    """Measure the model in its dtype and in FP8. Rank 0 prints, and writes the JSON file."""
    tp = join(device=args.device)
    assert tp.device is not None
    whole = PRESETS[args.model]() if args.model in PRESETS else TINY
    config, tokens = tp.exchange(_fitting(whole, tp, dtype))[0], models.PREFILL
    record = files.Record(
        args.json if tp.rank == 0 else None,
        environment=machine.environment(tp.device, files.commit()),
        options={name: getattr(args, name) for name in ("model", "tp", "dtype", "device")},
        layers=config.num_hidden_layers,
        ranks=[],
    )

    def say(text: str) -> None:
        if tp.rank == 0:
            record.say(text)

    layers = f"{config.num_hidden_layers} of {whole.num_hidden_layers} layers"
    say(f"{args.model} shapes, {layers}, {tp.size} ranks on {tp.device.type}")
    for name, quantize in ((args.dtype, None), ("FP8", "fp8_all")):
        model = lf.Llama.from_config(config, dtype=dtype, quantize=quantize, tp=tp)
        found, tokens = _measure(model, tokens)
        record.keep(ranks=[*record.results["ranks"], {"weights": name, **found}])
        say(
            f"{name:<5}{found['weight_gib']:7.2f} GiB a rank   pp{tokens} "
            f"{found['prefill_tokens_per_s']:.1f} tokens/s   tg{STEPS} @ d{tokens} "
            f"{found['decode_tokens_per_s']:.2f} tokens/s   all-reduces "
            f"{found['prefill_all_reduce']:.0%} and {found['decode_all_reduce']:.0%} of the time"
        )
        del model
    if tp.rank == 0:
        print(f"written: {args.json}")
    return 0


def _fitting(config: lf.LlamaConfig, tp: Group, dtype: torch.dtype) -> lf.LlamaConfig:
    """Return the config with as many layers as the ranks' memory holds."""
    assert tp.device is not None
    memory = free_memory(tp.device) - RESERVE
    if tp.device.type == "cuda":
        return models.fitting(config, memory * tp.size, dtype.itemsize)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", tp.size))
    fits = models.fitting(config, memory * tp.size / here, dtype.itemsize)
    return replace(fits, num_hidden_layers=min(fits.num_hidden_layers, LAYERS))


def _measure(model: lf.Llama, tokens: int) -> tuple[dict[str, Any], int]:
    """Return the figures, with a prompt of up to so many tokens, and how many it had."""
    tp, device = model.tp, model.device
    cache = lf.KVCache(model.config, tokens + STEPS, dtype=model.dtype, device=device)

    def prefill(tokens: int) -> None:
        prompt = models.prompt(model.config, tokens).to(device)
        cache.truncate([0])
        model.logits(model.hidden(prompt, cache=cache, last=True)[:, -1])

    def decode() -> None:
        token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        cache.truncate([tokens])
        for _ in range(STEPS):
            model.logits(model.hidden(token, cache=cache))

    def all_reduce(rows: int) -> Callable[[], Any]:
        x = torch.zeros(rows, model.config.hidden_size, dtype=model.dtype, device=device)
        return lambda: tp.all_reduce(x)

    prefill(1)
    first = 32
    seconds = _seconds(lambda: prefill(first), device, 1)
    while tokens > first and seconds * tokens / first > PROMPT_SECONDS:
        tokens //= 2
    tokens = tp.exchange(tokens)[0]
    read = _seconds(lambda: prefill(tokens), device)
    step = _seconds(decode, device) / STEPS
    # One after the embedding, two in a layer; the last layer's are of one row in prefill.
    times = 2 * len(model.weights.layers) + 1
    many, one = _seconds(all_reduce(tokens), device, 20), _seconds(all_reduce(1), device, 20)
    return {
        "weight_gib": max(tp.exchange(model.weights.nbytes)) / 2**30,
        "tokens": tokens,
        "prefill_tokens_per_s": tokens / read,
        "decode_tokens_per_s": 1 / step,
        "prefill_all_reduce": ((times - 2) * many + 2 * one) / read,
        "decode_all_reduce": times * one / step,
    }, tokens


def _seconds(run: Callable[[], Any], device: torch.device, rounds: int = ROUNDS) -> float:
    """Return the median time of a run."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        with torch.inference_mode():
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)
