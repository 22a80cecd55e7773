"""Tests of tensor parallelism, with gloo: ranks against one process that holds the whole model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llama_fast import Llama, LlamaConfig
from llama_fast.parallel import Share, Span, fitting, vocab_sizes

from .support import ranks
from .support.checkpoints import LOGITS, edit_json, hf_model, relative_error, save, write_fp8

pytestmark = pytest.mark.usefixtures("one_thread")

# 64 heads on 8, as in the 70B. The vocabulary is divisible by no number of ranks.
SHAPE = {
    "vocab_size": 333,
    "hidden_size": 64,
    "intermediate_size": 1024,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 8,
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
    by_block = fp8(at / "block", "block", "weight_scale_inv", **block)
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
