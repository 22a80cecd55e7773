"""Run the whole 8B preset once (`--whole`): 32 layers of random weights in FP8."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import torch

import llama_fast as lf

from ..timing import CPU
from . import models


def run(say: Callable[[str], None], steps: int = 16, device: torch.device = CPU) -> dict[str, Any]:
    """Measure prefill, decode and peak memory."""
    config = lf.LlamaConfig.llama_3_1_8b()
    start = time.perf_counter()
    model = lf.Llama.from_config(config, quantize="fp8_all", device=device)
    made = time.perf_counter() - start
    say(f"8B preset, {config.num_hidden_layers} layers, FP8 random weights made in {made:.0f} s")
    prompt = models.prompt(config, models.PREFILL).to(device)
    cache = lf.KVCache(config, models.PREFILL + steps + 1, 1, device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    start = time.perf_counter()
    with torch.inference_mode():
        logits = model.logits(model.hidden(prompt, cache=cache, last=True))
        wait()
        prefill = time.perf_counter() - start
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            logits = model(logits[:, -1:].argmax(-1), cache=cache)
            wait()
            seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
    found = {
        "init_s": made,
        "prefill_tokens_per_s": models.PREFILL / prefill,
        "decode_tokens_per_s": 1 / sorted(seconds)[steps // 2],
        "peak_gib": peak,
    }
    say(
        f"prefill {models.PREFILL}: {found['prefill_tokens_per_s']:.1f} tokens/s   decode: "
        f"{found['decode_tokens_per_s']:.2f} tokens/s   peak memory {peak:.1f} GiB"
    )
    return found
