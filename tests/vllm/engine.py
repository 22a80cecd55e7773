"""Serve one model with vLLM in a process of its own: python -m tests.vllm.engine < job.json.

A process per model, since vLLM keeps state, and whether the plugin is on is decided once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
MARK = "RESULT "


class Served(NamedTuple):
    tokens: list[list[int]]  # of each prompt, the new ones
    logprobs: list[list[float]]  # of each prompt's tokens but the first
    norms: list[str]  # what vLLM calls for rms_norm, in order
    again: list[list[int]]  # tokens, once more: full blocks of the prompts are in the prefix cache
    cached: list[int]  # of each prompt's tokens, how many were


def environment(plugin: bool, **variables: str) -> dict[str, str]:
    """Return the environment of a vLLM that uses 2 threads, in one process, and no network."""
    return {
        **os.environ,
        "LLAMA_FAST_VLLM": "1" if plugin else "0",
        "OMP_NUM_THREADS": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **variables,
    }


def serve(
    model: Path, prompts: list[list[int]], *, plugin: bool = True, tokens: int = 16, **options: Any
) -> Served:
    """Return what vLLM's LLM class generates greedily. options: LLM's."""
    job = {"model": str(model), "prompts": prompts, "tokens": tokens, "options": options}
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm.engine"],
        input=json.dumps(job),
        env=environment(plugin),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        log = f"{done.stdout}{done.stderr}"[-6000:]
        raise AssertionError(f"vLLM ended with code {done.returncode}:\n{log}")
    return Served(**json.loads(lines[-1].removeprefix(MARK)))


def main() -> None:
    from vllm import LLM, SamplingParams, ir

    job = json.load(sys.stdin)
    defaults = {"max_model_len": 512, "kv_cache_memory_bytes": 128 << 20, "max_num_seqs": 8}
    llm = LLM(job["model"], **{**defaults, **job["options"]})
    greedy = {"temperature": 0, "max_tokens": job["tokens"], "ignore_eos": True}
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    outputs = llm.generate(prompts, SamplingParams(**greedy, prompt_logprobs=0), use_tqdm=False)
    logprobs = [
        [
            at[token].logprob
            for at, token in zip(o.prompt_logprobs[1:], o.prompt_token_ids[1:], strict=True)
        ]
        for o in outputs
    ]
    again = llm.generate(prompts, SamplingParams(**greedy), use_tqdm=False)
    result = {
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "logprobs": logprobs,
        "norms": ir.ops.rms_norm.get_priority(),
        "again": [list(o.outputs[0].token_ids) for o in again],
        "cached": [o.num_cached_tokens for o in again],
    }
    print(MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
