"""Run the whole 8B preset once (`--whole`): 32 layers of random weights in FP8."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import llama_fast as lf

from ..timing import CPU
from . import models


def run(say: Callable[[str], None], steps: int = 16, device: torch.device = CPU) -> dict[str, Any]:
    """Measure prefill, decode and peak memory."""

    def timed(f: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, float]:
        start = time.perf_counter()
        result = f(*args, **options)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return result, time.perf_counter() - start

    config = lf.LlamaConfig.llama_3_1_8b()
    model, made = timed(lf.Llama.from_config, config, quantize="fp8_all", device=device)
    say(f"8B preset, {config.num_hidden_layers} layers, FP8 random weights made in {made:.0f} s")
    prompt = models.prompt(config, models.PREFILL).to(device)
    cache = lf.KVCache(config, models.PREFILL + steps + 1, 1, device=device)
    seconds = []
    with torch.inference_mode():
        read = lambda: model.logits(model.hidden(prompt, cache=cache, last=True))  # noqa: E731
        logits, prefill = timed(read)
        for _ in range(steps):
            logits, took = timed(model, logits[:, -1:].argmax(-1), cache=cache)
            seconds.append(took)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
    found = {
        "init_s": made,
        "prefill_tokens_per_s": models.PREFILL / prefill,
        "decode_tokens_per_s": 1 / statistics.median_high(seconds),
        "peak_gib": peak,
    }
    say(
        f"prefill {models.PREFILL}: {found['prefill_tokens_per_s']:.1f} tokens/s   decode: "
        f"{found['decode_tokens_per_s']:.2f} tokens/s   peak memory {peak:.1f} GiB"
    )
    return found
