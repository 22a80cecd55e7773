"""Tests of tensor parallelism, with gloo: ranks against one process that holds the whole model."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llama_fast import Llama, LlamaConfig, cpu
from llama_fast.cli import main
from llama_fast.parallel import Share, Span, fitting, vocab_sizes

from .support import ranks
from .support.checkpoints import LOGITS, edit_json, hf_model, relative_error, save, write_fp8
from .support.llama3 import byte_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent

# 64 heads on 8, as in the 70B. The vocabulary is divisible by no number of ranks. Of four ranks two
# begin within a block of 128 rows of k and v.
SHAPE = {
    "vocab_size": 333,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 32,
}
TOKENS = torch.randint(333, (2, 9), generator=torch.Generator().manual_seed(1))
NEW = 4  # tokens
FOR_EIGHT = ("plain", "tied fp8_all", "fbgemm_fp8", "block")  # more processes take longer


def thin(folder: Path, layers: int, heads: int, vocab: int) -> Path:
    """Write a checkpoint of random weights with so many layers, each narrow, in fp32."""
    hidden, inner, kv, dim = 64, 256, 8, 8
    shapes = {
        "self_attn.q_proj": (heads * dim, hidden),
        "self_attn.k_proj": (kv * dim, hidden),
        "self_attn.v_proj": (kv * dim, hidden),
        "self_attn.o_proj": (hidden, heads * dim),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    held = {
        "model.embed_tokens.weight": torch.randn(vocab, hidden),
        "model.norm.weight": torch.rand(hidden) + 0.5,
        "lm_head.weight": torch.randn(vocab, hidden) / hidden**0.5,
    }
    for i in range(layers):
        for name, (n, k) in shapes.items():
            held[f"model.layers.{i}.{name}.weight"] = torch.randn(n, k) / k**0.5
        for name in ("input_layernorm", "post_attention_layernorm"):
            held[f"model.layers.{i}.{name}.weight"] = torch.rand(hidden) + 0.5
    folder.mkdir()
    save_file(held, folder / "model.safetensors")
    config = {"model_type": "llama", "vocab_size": vocab, "hidden_size": hidden}
    config |= {"intermediate_size": inner, "num_hidden_layers": layers, "head_dim": dim}
    config |= {"num_attention_heads": heads, "num_key_value_heads": kv, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fp8(folder: Path, granularity: str, suffix: str, **config: Any) -> Path:
    torch.manual_seed(0)
    save(hf_model(**SHAPE), folder)
    write_fp8(folder, granularity, suffix, lambda name: "lm_head" not in name, **config)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str | None]]:
    at = tmp_path_factory.mktemp("parallel")
    torch.manual_seed(0)
    plain = save(hf_model(**SHAPE), at / "plain")
    torch.manual_seed(0)
    tied = save(hf_model(**SHAPE | {"vocab_size": 1100, "tie_word_embeddings": True}), at / "tied")
    by_row = fp8(at / "row", "row", "weight_scale", quant_method="fbgemm_fp8")
    edit_json(
        by_row / "config.json",
        quantization_config={"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
    )
    method = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    by_tensor = fp8(at / "tensor", "tensor", "weight_scale", **method)
    block = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    by_block = fp8(at / "block", "block_2d", "weight_scale_inv", **block)
    return {
        "plain": (str(plain), None),
        "tied": (str(tied), None),
        **{recipe: (str(plain), recipe) for recipe in ("fp8", "fp8_all", "fp8_ffn")},
        "tied fp8_all": (str(tied), "fp8_all"),
        "fbgemm_fp8": (str(by_row), None),
        "compressed-tensors": (str(by_tensor), None),
        "block": (str(by_block), None),
    }


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, tuple[str, str | None]]) -> Callable[[str], Any]:
    """Return expected(name): what one process computes."""
    kept: dict[str, Any] = {}

    def compute(name: str) -> Any:
        if name not in kept:
            folder, quantize = checkpoints[name]
            model = Llama.from_pretrained(folder, torch.float32, quantize)
            ids = model.generate(TOKENS.tolist(), NEW, temperature=0, stop_ids=())
            kept[name] = model(TOKENS), model.weights.nbytes, ids
        return kept[name]

    return compute


@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_compute_what_one_process_does(
    size: int,
    checkpoints: dict[str, tuple[str, str | None]],
    expected: Callable[[str], Any],
) -> None:
    """FP8 weights too: scales are of whole rows, so every number of ranks has the same weights."""
    chosen = {n: c for n, c in checkpoints.items() if size < 8 or n in FOR_EIGHT}
    every = ranks.run(size, ranks.results, chosen, TOKENS.tolist(), NEW)
    for name in chosen:
        if name == "block" and size == 8:
            continue
        logits, nbytes, ids = expected(name)
        for rank, found in enumerate(every):
            assert isinstance(found, dict), found
            assert relative_error(torch.from_numpy(found[name][0]), logits) <= LOGITS, (name, rank)
            assert found[name][2] == ids, (name, rank)
        assert sum(found[name][1] for found in every) < nbytes * 1.2, name  # norms are copied
        assert max(found[name][1] for found in every) < nbytes / size * 1.2, name
    if size == 8:
        for rank, found in enumerate(every):
            kind = "ValueError: " if rank == 0 else "PeerError: rank 0: ValueError: "
            assert found["block"].startswith(kind), (rank, found["block"])
            assert "8 ranks would split blocks of 128 columns" in found["block"]
            assert found["block"].endswith("tp: want 1 or 2 or 4")


def test_activations_have_a_scale_for_each_shard(
    checkpoints: dict[str, tuple[str, str | None]],
    expected: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Quantize activations too, as GPUs do. A row's scale is that of the rank's part of it where
    the input is split, never larger than the whole row's, so the error does not grow."""

    def error(logits: torch.Tensor, exact: torch.Tensor) -> float:
        return float((logits - exact).pow(2).mean().sqrt())

    names = ("fp8", "fbgemm_fp8", "block")
    chosen = {name: checkpoints[name] for name in names}
    exact = {name: expected(name)[0] for name in names}
    monkeypatch.setattr(cpu, "prefers_fp8_activations", lambda x: True)
    every = ranks.run(4, ranks.results, chosen, TOKENS.tolist(), 0, True)
    for name, (folder, quantize) in chosen.items():
        whole = error(Llama.from_pretrained(folder, torch.float32, quantize)(TOKENS), exact[name])
        for found in every:
            assert isinstance(found, dict), found
            split = error(torch.from_numpy(found[name][0]), exact[name])
            assert 0 < split < 1.2 * whole, (name, split / whole)


@pytest.mark.parametrize(
    ("layers", "heads", "size"), [(80, 64, 4), (126, 128, 2), (8, 128, 16)], ids=str
)
def test_as_deep_as_the_large_models(layers: int, heads: int, size: int, tmp_path: Path) -> None:
    """With 16 ranks each of the 8 key/value heads is on two. All 126 layers on 16 ranks agree too,
    but take half a minute on 2 cores."""
    folder = thin(tmp_path / "thin", layers, heads, 1100)
    logits = Llama.from_pretrained(folder, torch.float32)(TOKENS[:1])
    every = ranks.run(size, ranks.results, {"thin": (str(folder), None)}, TOKENS[:1].tolist(), 0)
    for found in every:
        assert isinstance(found, dict), found
        assert relative_error(torch.from_numpy(found["thin"][0]), logits) <= LOGITS


GENERATE: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.0, "seed": 3},
    "top-k": {"temperature": 0.8, "top_k": 9, "seed": 4},
    "lookup": {"temperature": 0, "speculate": "lookup", "draft_tokens": 3},
    "split draft": {"temperature": 0, "speculate": "split", "draft_tokens": 3},
    "whole draft": {"temperature": 1.0, "seed": 3, "speculate": "whole", "draft_tokens": 3},
    "fp8 cache": {"temperature": 0, "kv_cache": "fp8"},
}


@pytest.mark.parametrize("size", [2, 4])
def test_generation(size: int, checkpoints: dict[str, tuple[str, str | None]]) -> None:
    """Every way to generate, for a ragged batch: the same tokens on all ranks, those of one process
    (an FP8 cache measures its scales in each rank, for its own heads)."""
    folder = checkpoints["plain"][0]
    prompts = [([7, 8, 9, 10] * 5)[:n] for n in (18, 5)]
    options = {name: {"max_new_tokens": 16, "stop_ids": ()} | o for name, o in GENERATE.items()}
    unseeded = {"unseeded": {"max_new_tokens": 8, "temperature": 1.5}}
    every = ranks.run(size, ranks.generations, folder, folder, prompts, options | unseeded)
    model = Llama.from_pretrained(folder, torch.float32)
    for name, chosen in options.items():
        plain = {key: value for key, value in chosen.items() if key != "speculate"}
        expected = model.generate(prompts, **plain)
        for found in every:
            assert isinstance(found, dict), found
            assert found[name] == expected, name
    for found in every:
        assert found["decoder"] == every[0]["greedy"]
        assert found["unseeded"] == every[0]["unseeded"]
        for ours, theirs in zip(found["logprobs"], model.logprobs(prompts), strict=True):
            # Of the largest logit, about 10.
            assert (torch.from_numpy(ours) - theirs).abs().max() <= 20 * LOGITS


# ---- the commands ----


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rank 0 alone prints: what one process prints, or the error of the rank that failed."""
    tokenizer = byte_tokenizer()
    folder = str(save(hf_model(eos_token_id=tokenizer.eos_token_id), tmp_path / "model"))
    tokenizer.save_pretrained(folder)
    text, json_file = tmp_path / "text", tmp_path / "bench.json"
    text.write_text("The quick brown fox. " * 3)
    options = ["--model", folder, "--dtype", "float32", "--threads", "1"]
    generate = ["generate", *options, "--prompt", "Hi", "--temperature", "0"]
    generate += ["--max-new-tokens", "6"]
    perplexity = ["perplexity", *options, "--text", str(text)]
    bench = ["bench", "--device", "cpu", "--threads", "1", "--json", str(json_file)]
    bench += ["--model", "tiny"]
    expected = []
    for line in (generate, perplexity):
        assert main(line) == 0
        expected.append(capsys.readouterr().out)
    none = str(tmp_path / "none")
    lines = [
        *([*line, "--tp", "2"] for line in (generate, perplexity, bench)),
        [*generate, "--tp", "2", "--model", none],
        [*generate, "--tp", "4"],
        generate,
        [*bench, "--tp", "4"],
    ]
    first, last = ranks.run(2, ranks.commands, lines)
    assert isinstance(first, list) and isinstance(last, list), (first, last)
    codes = [code for code, *_ in first]
    assert codes == [code for code, *_ in last] == [0, 0, 0, 1, 2, 2, 2], first
    assert [out for _, out, _ in first[:2]] == expected
    assert [(out, err) for _, out, err in last[:3]] == [("", "")] * 3
    assert "tiny shapes, 2 of 2 layers, 2 ranks on cpu\n" in first[2][1]
    assert [row["weights"] for row in json.loads(json_file.read_text())["ranks"]] == ["bf16", "FP8"]
    assert first[3][2] == f"llama-fast: error: rank 0: {none}: not a folder; want a checkpoint's\n"
    assert "--tp: got 4, but this is one of 2 processes; want torchrun" in first[4][2]
    assert "--tp: got 1, but this is one of 2 processes" in first[5][2]
    assert "--tp: got 4, but torchrun started 2 processes" in first[6][2]
    with pytest.raises(SystemExit):
        main([*generate, "--tp", "2"])
    assert "this was not started by torchrun; want torchrun --nproc" in capsys.readouterr().err


def test_chat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first rank reads the lines, and all have one conversation: one process's answers, errors
    and figures. Only the first one saves it."""
    tokenizer = byte_tokenizer()
    model = hf_model(eos_token_id=tokenizer.eos_token_id, max_position_embeddings=4096)
    folder = save(model, tmp_path / "model")
    tokenizer.save_pretrained(folder)
    capsys.readouterr()  # transformers' bar
    stdin = f"Hi\n/fly\n/system Be brief.\n{'x' * 4096}\nAnd\\\nyou?\n/save {tmp_path / 'talk'}\n"
    stdin += "/save /no/way\n/exit\nnever\n"
    line = ["chat", "--model", str(folder), "--dtype", "float32", "--threads", "1"]
    line += ["--temperature", "0", "--max-new-tokens", "6", "--stop", "~"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
    assert main(line) == 1
    expected, saved = capsys.readouterr(), (tmp_path / "talk").read_text()
    (tmp_path / "talk").unlink()
    (first,), (last,) = ranks.run(2, ranks.commands, [[*line, "--tp", "2"]], stdin)
    assert first == (1, expected.out, expected.err) and last == (1, "", "")
    assert expected.err.count("error: ") == 3 and (tmp_path / "talk").read_text() == saved
    # An error in reading is one on all.
    (first,), (last,) = ranks.run(2, ranks.commands, [[*line, "--tp", "2"]], "Hi\n\udcff\n")
    assert first[0] == last[0] == 1 and "not valid UTF-8" in first[2], (first, last)


def test_torchrun(checkpoints: dict[str, tuple[str, str | None]], tmp_path: Path) -> None:
    """A script under torchrun: both ranks generate the same, and end without a trace."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, llama_fast as lf\n"
        "tp = lf.parallel.join(device='cpu')\n"
        "model = lf.Llama.from_pretrained(sys.argv[1], tp=tp)\n"
        "print(model.generate([[1, 2]], 3, temperature=0), flush=True)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += [str(script), checkpoints["plain"][0]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for _ in range(2):  # gloo aborted one of some thirty such processes at its end
        ended = subprocess.run(
            torchrun, env=environment, capture_output=True, text=True, timeout=120
        )
        if "terminate called" not in ended.stderr:
            break
    assert ended.returncode == 0, ended.stderr
    found = re.findall(r"\[\[.*?\]\]", ended.stdout)  # the ranks' lines may run into each other
    assert len(found) == 2 and found[0] == found[1], ended.stdout
    assert "terminate called" not in ended.stderr and "destroy" not in ended.stderr


# ---- memory ----


def random_fp8(folder: Path, config: LlamaConfig) -> Path:
    """Write a checkpoint with random FP8 weights, as fbgemm_fp8 has them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    held = {
        "model.embed_tokens.weight": torch.ones(config.vocab_size, hidden, dtype=torch.bfloat16),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "lm_head.weight": torch.ones(config.vocab_size, hidden, dtype=torch.bfloat16),
    }
    shapes = {"self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden)}
    shapes |= {"self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, q)}
    shapes |= {f"mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")}
    shapes |= {"mlp.down_proj": (hidden, inner)}
    for name in (f"model.layers.{i}.{n}" for i in range(config.num_hidden_layers) for n in shapes):
        shape = shapes[".".join(name.split(".")[-2:])]
        codes = torch.randint(0, 127, shape, dtype=torch.uint8)
        held[f"{name}.weight"] = codes.view(torch.float8_e4m3fn)
        held[f"{name}.weight_scale"] = torch.rand(shape[0], 1)
    for i in range(config.num_hidden_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weight = torch.ones(hidden, dtype=torch.bfloat16)
            held[f"model.layers.{i}.{norm}.weight"] = weight
    folder.mkdir()
    save_file(held, folder / "model.safetensors")
    fields = {k: v for k, v in asdict(config).items() if k not in ("rope_scaling", "eos_token_id")}
    fields |= {"model_type": "llama", "quantization_config": {"quant_method": "fbgemm_fp8"}}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.big
def test_a_rank_holds_its_share_of_the_weights(tmp_path: Path) -> None:
    """Loading takes little more private memory than the rank's weights."""
    config = LlamaConfig(4096, 4096, 14336, 3, 32, 8, 128, max_position_embeddings=4096)
    folder = random_fp8(tmp_path / "model", config)
    whole = sum(path.stat().st_size for path in folder.iterdir())
    for found in ranks.run(2, ranks.peak_memory, str(folder)):
        assert isinstance(found, tuple), found
        nbytes, peak = found
        assert nbytes < 0.51 * whole
        # 43 MB beside the weights, whatever their size: threads' stacks, the piece being packed.
        assert peak < 1.05 * nbytes + (48 << 20), (peak / nbytes, peak - nbytes)


# ---- failures ----


def test_a_failure_on_one_rank_is_one_on_all(
    checkpoints: dict[str, tuple[str, str | None]], tmp_path: Path
) -> None:
    folder, other = checkpoints["plain"][0], checkpoints["tied"][0]
    every = ranks.run(2, ranks.failures, [folder, other, str(tmp_path / "none")], folder)
    first, last = every
    assert isinstance(first, dict) and isinstance(last, dict), every
    for name, kind, text in (
        ("missing on one", "FileNotFoundError", "none/config.json: no such file"),
        ("another on one", "ValueError", "config: rank 1 got another value than rank 0"),
        ("another recipe on one", "ValueError", "quantize: rank 1 got another value"),
        ("bad id on one", "ValueError", "prompt 0: got id 999, want 0 to 332"),
        ("another prompt on one", "ValueError", "prompts: rank 1 got another value"),
        ("another seed on one", "ValueError", "sampling: rank 1 got another value"),
    ):
        assert last[name].startswith(f"{kind}: ") and text in last[name], (name, last[name])
        assert first[name] == f"PeerError: rank 1: {last[name]}", name
    for name, kind, text in (
        ("missing on all", "FileNotFoundError", "none/config.json: no such file"),
        ("bad recipe on all", "ValueError", "quantize: got 'fp9'"),
        ("a device", "ValueError", "device: got meta, want None or the group's, cpu"),
        ("graphs", "ValueError", "graphs: got True, but the model is on cpu"),
    ):
        assert first[name].startswith(f"{kind}: ") and text in first[name], (name, first[name])
        assert last[name] == f"PeerError: rank 0: {first[name]}", name
    for found in every:
        assert "got a draft model on 2 ranks, want 1" in found["a draft on more ranks"]
        assert found["still works"] == first["still works"]


@pytest.mark.parametrize("how", ["in generate", "while loading"])
def test_a_rank_that_dies_ends_the_others(
    how: str, checkpoints: dict[str, tuple[str, str | None]]
) -> None:
    *others, dead = ranks.run(4, ranks.one_dies, checkpoints["plain"][0], how)
    assert dead is None
    for found in others:
        assert isinstance(found, tuple), found
        text, seconds = found
        assert text.startswith("another rank has ended or does not answer: ") and seconds < 10


# ---- shares ----


def test_shares_cover_a_model() -> None:
    config = LlamaConfig.llama_3_1_405b()
    assert fitting(config) == [1, 2, 4, 8, 16, 32, 64, 128]
    assert fitting(LlamaConfig.llama_3_1_8b()) == [1, 2, 4, 8, 16, 32]
    shares = [Share.of(config, rank, 16) for rank in range(16)]
    assert [s.kv_heads.start for s in shares] == [i // 2 for i in range(16)]
    for name in ("heads", "inner", "vocab"):
        spans = [getattr(share, name) for share in shares]
        assert spans[0].start == 0 and spans[-1].stop == spans[-1].of
        assert all(a.stop == b.start for a, b in zip(spans, spans[1:], strict=False))
    assert {len(share.vocab) for share in shares} == {125 * 64, 126 * 64}
    assert vocab_sizes(333, 8) == [41, 42, 41, 42, 42, 41, 42, 42]
    local = shares[3].config(config)
    assert (local.num_attention_heads, local.num_key_value_heads) == (8, 1)
    assert local.intermediate_size == 53248 // 16 and local.hidden_size == config.hidden_size
    assert Span.whole(5).times(3) == Span(0, 15, 15)


@pytest.mark.parametrize("size", [0, 3, 24])
def test_a_number_that_does_not_fit_is_told_those_that_do(size: int) -> None:
    with pytest.raises(ValueError, match=r"tp: got \d+ ranks.* can be split by 1, 2, 4, 8, 16, 32"):
        Share.of(LlamaConfig.llama_3_1_70b(), 0, size)
