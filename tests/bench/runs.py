"""Runs of the benchmark suite: the options of a tiny one, and an invented one with every part."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

TINY = ["--quick", "--model", "tiny", "--peers", "none"]
Bench = Callable[..., tuple[int, dict[str, Any]]]  # the type of the fixture `bench`


def seconds(median: float, ours: float) -> dict[str, Any]:
    log = {"log": math.log(median / ours), "error": 0.01}
    return {
        "median": median,
        "p10": median,
        "p90": median,
        "rounds": 5,
        "passes": [median],
        "ratio": log,
    }


def op(name: str, shape: str, times: dict[str, float], limit: str = "copy") -> dict[str, Any]:
    ours = 1e-3
    return {
        "op": name,
        "shape": shape,
        "axes": {},
        "unit": "GB/s",
        "bytes": 4e6,
        "flops": 8e6,
        "rate": 4.0,
        "limit": limit,
        "limit_rate": 5.0,
        "of_limit": 0.8,
        "times": times,
        "targets": {"limit": 0.9},
        "met": {"limit": False},
        "error": 1e-3,
        "errors": {"ours": 1e-3, "eager": 2e-3, "llama.cpp Q8_0": 0.03},
        "eager_error": 2e-3,
        "wrong": False,
        "seconds": {
            "ours": {"median": ours},
            **{n: seconds(x * ours, ours) for n, x in times.items()},
        },
    }


def job(name: str, tokens: int, whose: str) -> dict[str, Any]:
    times = {"bf16": 2.0, "transformers": 4.0} if whose == "FP8" else {"FP8": 0.5}
    took = {"FP8": {"median": 1.0}, "bf16": {"median": 2.0}, "transformers": {"median": 4.0}}
    return {
        "op": name,
        "shape": whose,
        "ours": whose,
        "tokens_per_s": float(tokens),
        "limit": "read",
        "of_limit": 0.9,
        "times": times,
        "targets": {},
        "met": {},
        "all_layers_tokens_per_s": tokens / 8,
        "seconds": took,
    }


def example() -> dict[str, Any]:
    """Return a small run that has every part."""
    return {
        "schema": 2,
        "environment": {
            "cpu": "a CPU",
            "threads": 2,
            "isa": "avx2",
            "torch": "2.13.0",
            "gpu": None,
            "commit": "abc",
        },
        "options": {"model": "8b", "tp": 1, "dtype": "bf16", "level": "default"},
        "peers": {"llama.cpp": "0.3"},
        "complete": True,
        "ops": [
            op("rms_norm", "1 x 4096", {"eager": 8.0, "torch.compile": 0.5}),
            op("rms_norm", "16 x 4096", {"eager": 9.0, "torch.compile": 0.99}),
            op("linear", "M=1, 8 x 4", {"F.linear": 2.0, "llama.cpp Q8_0": 3.0}, "read"),
        ],
        "end_to_end": {
            "what": "two layers",
            "rows": [
                job(name, 16, whose)
                for name in ("tg16 @ d512", "tg16 @ d4096")
                for whose in ("bf16", "FP8")
            ],
            "logits": {"FP8": 0.01, "transformers": 0.002},
            "memory": {"FP8": {"weights_gib": 1.0, "prompt_gib": 0.25}},
        },
        "scaling": {
            "curves": [
                {
                    "name": "prefill attention",
                    "what": "4/1 x 128",
                    "axis": "tokens",
                    "lines": {
                        "ours": {
                            "points": [
                                {"size": n, "seconds": 1e-9 * n**2, "bytes": 1024.0 * n}
                                for n in (1024, 2048, 4096)
                            ],
                            "seconds_fit": FIT,
                            "bytes_fit": {**FIT, "exponent": 1.0},
                        }
                    },
                    "linear_memory": {
                        "linear": True,
                        "to": 4096,
                        "from": 2048,
                        "bytes_per_token": [1024.0, 1024.0],
                    },
                }
            ]
        },
    }


FIT = {"exponent": 2.0, "error": 0.01, "local": 2.0, "start": 1024, "points": 3}
