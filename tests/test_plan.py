"""Tests of the planner: its bytes against real allocations, its times against sums worked out by
hand, and what the command prints."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama_fast import KVCache, Llama, LlamaConfig
from llama_fast.bench import limits_table
from llama_fast.checkpoint.quantize import quantize_checkpoint
from llama_fast.checkpoint.weights import RECIPES
from llama_fast.cli import main
from llama_fast.generation import sampling
from llama_fast.parallel import Group
from llama_fast.plan import roofline
from llama_fast.plan.capacity import Plan, plan, sizes
from llama_fast.plan.gpus import GPUS, NETWORK, Gpu, named
from llama_fast.plan.memory import GIB, SAMPLING, Rank
from llama_fast.plan.roofline import Time
from llama_fast.reference import FP8_DTYPE

from .support.checkpoints import hf_model, save, write_fp8

SMALL = LlamaConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=2048,
)
MODELS = {
    "8b": LlamaConfig.llama_3_1_8b(),
    "70b": LlamaConfig.llama_3_1_70b(),
    "405b": LlamaConfig.llama_3_1_405b(),
}
UNIT = Gpu("unit", memory=1.0, bandwidth=1.0, bf16=1.0, fp8=2.0, link=1.0, latency=0.0)


# ---- memory, against real allocations ----


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantize", [None, *RECIPES])
def test_weights_are_those_of_a_model(quantize: str | None, tied: bool) -> None:
    config = replace(SMALL, tie_word_embeddings=tied)
    model = Llama.from_config(config, quantize=quantize, device="cpu")
    assert Rank(config, quantize=quantize).weights.nbytes == model.weights.nbytes


@pytest.mark.parametrize("quantize", [None, *RECIPES])
@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_a_rank_is_the_largest_of_them(gpus: int, quantize: str | None) -> None:
    """The ranks' parts of the vocabulary differ; with 8, they repeat the key/value heads."""
    config = replace(SMALL, vocab_size=64 * 7)
    rank = Rank(config, gpus, quantize, "fp8")
    models = [
        Llama.from_config(config, quantize=quantize, device="cpu", tp=Group(i, gpus))
        for i in range(gpus)
    ]
    assert rank.weights.nbytes == max(model.weights.nbytes for model in models)
    for model in models:
        cache = KVCache(model.config, 300, 2, dtype=FP8_DTYPE, device="cpu")
        held = cache.k.nbytes + cache.v.nbytes
        assert rank.cache_bytes(300, 2) == held + cache.k_scale.nbytes + cache.v_scale.nbytes


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("context", [1, 128, 129, 1000])
@pytest.mark.parametrize("kv_cache", [None, "fp8"])
def test_a_cache_is_that_of_generate(kv_cache: str | None, context: int, batch: int) -> None:
    """Sequences take whole blocks, and an FP8 cache has scales."""
    dtype = FP8_DTYPE if kv_cache else torch.bfloat16
    cache = KVCache(SMALL, context, batch, dtype=dtype, device="cpu")
    tensors = (cache.k, cache.v, cache.k_scale, cache.v_scale)
    held = sum(t.nbytes for t in tensors if t is not None)
    assert Rank(SMALL, kv_cache=kv_cache).cache_bytes(context, batch) == held


class Live(TorchDispatchMode):
    """Count the bytes of tensors made inside the block: those alive, and the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {self._key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and self._key(t) not in (given | self._sizes.keys()):
                storage = t.untyped_storage()
                self._sizes[self._key(t)] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, self._key(t))
        self.peak = max(self.peak, self.now)
        return out

    @staticmethod
    def _key(t: torch.Tensor) -> int:
        return t.untyped_storage()._cdata

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="silu_and_mul"),
        pytest.param({"intermediate_size": 256, "num_attention_heads": 4}, id="down"),
        pytest.param({"intermediate_size": 128, "num_attention_heads": 32}, id="attention"),
    ],
)
def test_activations_of_a_prefill_chunk(changes: dict[str, int], one_thread: None) -> None:
    """Measure the peak of a chunk where each step of a layer needs the most. Positions and slots
    come on top, 16 bytes a token. So does the embedding's output where a caller keeps its
    arguments: in Python 3.10, and once torch.compile has run in the process."""
    config, tokens = replace(SMALL, **changes), 512
    model = Llama.from_config(config, device="cpu")
    cache = KVCache(config, tokens, device="cpu")
    model.rope.upto(tokens)  # made by the first pass, and counted apart
    ids = torch.randint(0, config.vocab_size, (1, tokens))
    with torch.inference_mode(), Live() as live:
        model.hidden(ids, cache=cache, last=True)
    wanted = Rank(config).activation_bytes * tokens
    kept = 2 * config.hidden_size * tokens
    assert wanted <= live.peak <= wanted + kept + 17 * tokens


@pytest.mark.parametrize("batch", [1, 3])
def test_sampling_takes_so_many_bytes_a_logit(batch: int) -> None:
    vocab = 50_000
    logits, u = torch.randn(batch, vocab), torch.rand(batch, dtype=torch.float64)
    peaks = []
    for settings in ((0.6, 0.9, 0), (0.6, 1.0, 0), (0.6, 0.9, 40), (0.0, 1.0, 0)):
        with torch.inference_mode(), Live() as live:
            sampling.sample_rows(logits, u, *settings)
        peaks.append(live.peak / batch / vocab)
    assert max(peaks) == pytest.approx(SAMPLING, rel=0.01)


def test_what_else_a_model_holds() -> None:
    memory = Rank(SMALL).memory(1024, 3)
    assert memory["rope table"] == Llama.from_config(SMALL, device="cpu").rope.upto(1024).nbytes
    # A batch of 3 is padded to 4; the head's output and fp32 logits.
    assert memory["logits"] == 4 * 512 * (2 + 4 + SAMPLING)
    assert memory["activations"] == (1024 + 4) * Rank(SMALL).activation_bytes
    assert memory["reserve"] == 1 * GIB and Rank(SMALL, 2).memory(1024, 3)["reserve"] == 2 * GIB


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("8b", 8_030_261_248), ("70b", 70_553_706_496), ("405b", 405_853_388_800)],
)
def test_ranks_share_the_weights(name: str, parameters: int) -> None:
    """The parameters are those of Meta's checkpoints. All but the norms is divided, the vocabulary
    in panels of 64 rows."""
    config = MODELS[name]
    assert Rank(config).weights.nbytes == 2 * parameters
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    tables = 2 * 128256 * config.hidden_size  # the embedding and the head
    for gpus in (1, 2, 4, 8):
        rows = 64 * math.ceil(128256 / 64 / gpus)
        wanted = (parameters - norms - tables) // gpus + norms + 2 * rows * config.hidden_size
        assert Rank(config, gpus).weights.nbytes == 2 * wanted


@pytest.mark.parametrize("quantize", RECIPES)
def test_stages_share_the_layers(quantize: str) -> None:
    """The first one has the embedding and no head; cache and layers are halves."""
    one, two = (Rank(MODELS["405b"], 8 * n, quantize, stages=n) for n in (1, 2))
    embedding, head = one.weights.embedding.nbytes, one.weights.head.nbytes
    norm = one.weights.norm.nbytes
    assert 2 * (two.weight_bytes - embedding - norm) == one.weight_bytes - embedding - head - norm
    p = plan(MODELS["405b"], GPUS["h100"], quantize=quantize, stages=2)
    assert p.possible() == [2, 4, 8, 16, 32] and p.rank.gpus == p.fewest_gpus == 8
    assert 2 * two.cache_bytes(8192, 3) == one.cache_bytes(8192, 3)
    gpu = replace(UNIT, link=1000.0)
    steps = [roofline.decode(rank, gpu, 8192, 3) for rank in (one, two)]
    assert steps[0][:2] == steps[1][:2]  # a step visits both stages
    hop = 2 * 3 * 16384 / (NETWORK * 1e9) + 10e-6
    assert steps[1].all_reduce == pytest.approx(steps[0].all_reduce + hop)
    # Four chunks take two stages five turns of half the time.
    prompts = [roofline.prefill(rank, gpu, 4 * 8192) for rank in (one, two)]
    assert prompts[1].compute == pytest.approx(prompts[0].compute * 5 / 8)


def test_keys_and_values_are_repeated_beyond_their_heads() -> None:
    eight, sixteen = (Rank(MODELS["405b"], n) for n in (8, 16))
    assert sixteen.cache_bytes(8192, 2) == eight.cache_bytes(8192, 2)
    heads = 2 * 128 * 16384 * 126  # parameters of a key and a value head
    again = heads + 253 * 16384 + 2 * (2 * 8064 - 16064) * 16384  # norms; panels of the vocabulary
    assert 2 * sixteen.weights.nbytes - eight.weights.nbytes == 2 * again


# ---- what is known of the models ----


def test_405b_in_fp8_fits_8_h100_and_16_bits_do_not() -> None:
    """Meta: the FP8 405B runs on one node of 8 H100, for which 16 bits are too large."""
    config = MODELS["405b"]
    for recipe in RECIPES:
        assert plan(config, GPUS["h100"], 8, context=8192, quantize=recipe).fits
    assert not plan(config, GPUS["h100"], 8, context=1).fits
    assert plan(config, GPUS["h100"], 16, context=8192).fits
    assert plan(config, GPUS["h100"], context=8192).rank.gpus == 16


def test_70b_in_16_bits_leaves_7_gib_of_an_h200() -> None:
    memory = Rank(MODELS["70b"]).memory(1, 1)
    left = GPUS["h200"].memory - (memory["weights"] + memory["reserve"]) / GIB
    assert 7 <= left < 8


def test_caches_of_the_family() -> None:
    """128, 320 and 504 KiB a token."""
    kib = [Rank(config).cache_bytes(128, 1) / 128 / 1024 for config in MODELS.values()]
    assert kib == [128, 320, 504]


# ---- what fits ----


@pytest.mark.parametrize("gpu", ["h100", "l40s"])
@pytest.mark.parametrize("kv_cache", [None, "fp8"])
def test_the_largest_that_fit(gpu: str, kv_cache: str | None) -> None:
    p = plan(MODELS["70b"], GPUS[gpu], 4, context=4096, batch=16, quantize="fp8", kv_cache=kv_cache)
    assert 4096 < p.max_context < 131072 and p.max_batch > 16
    assert replace(p, context=p.max_context).fits and replace(p, batch=p.max_batch).fits
    assert not replace(p, context=p.max_context + 1).fits
    assert not replace(p, batch=p.max_batch + 1).fits


def test_no_context_beyond_the_models() -> None:
    assert plan(MODELS["8b"], GPUS["h200"]).max_context == 131072
    none = plan(MODELS["405b"], GPUS["rtx-4090"], 8)
    assert (none.max_context, none.max_batch, none.fewest_gpus, none.fits) == (0, 0, None, False)


def changed(p: Plan, option: str) -> Plan:
    """Return the plan with an option of Plan.others()."""
    words = option.split()
    for name, value in zip(words[::2], words[1::2], strict=True):
        field = name.removeprefix("--").replace("-", "_")
        new: Any = int(value) if value.isdigit() else value
        on_plan = field in ("context", "batch")
        p = replace(p, **{field: new}) if on_plan else p.with_(**{field: new})
    return p


@pytest.mark.parametrize(
    ("name", "gpu", "gpus", "context", "batch", "options"),
    [
        ("405b", "h100", 8, 8192, 1, "--quantize fp8_ffn, --gpus 16"),
        ("8b", "l40s", 1, 131072, 8, "--gpus 4, --context 28160, --batch 1"),
        ("70b", "rtx-4090", 2, 131072, 1, "--gpus 16"),
        (
            "405b",
            "a100-40",
            8,
            131072,
            8,
            "--quantize fp8 --kv-cache fp8 --gpus 16 --context 50304",
        ),
        ("405b", "rtx-4090", 16, 131072, 8, ""),
    ],
)
def test_what_would_fit(
    name: str, gpu: str, gpus: int, context: int, batch: int, options: str
) -> None:
    p = plan(MODELS[name], GPUS[gpu], gpus, context=context, batch=batch)
    assert not p.fits
    others = p.others()
    assert set(filter(None, options.split(", "))) <= set(others), others
    assert bool(others) == bool(options)
    assert all(changed(p, option).fits for option in others)


# ---- the roofline ----


def test_the_time_of_a_step() -> None:
    """8B in 16 bits on an H100: every weight but the embedding, and the cache."""
    p = plan(MODELS["8b"], GPUS["h100"], context=8192, batch=4)
    weights = 2 * (8_030_261_248 - 128256 * 4096)
    cache = 4 * 8192 * 128 * 1024
    assert p.decode.memory == pytest.approx((weights + cache) / 3.35e12)
    flops = 4 * (2 * (weights / 2 - 65 * 4096) + 4 * 32 * 4096 * 8192)  # norms are no products
    assert p.decode.compute == pytest.approx(flops / 989e12)
    assert p.decode.bound == "memory" and p.decode.seconds == p.decode.memory


def test_a_tied_embedding_is_read_whole() -> None:
    """As the head it takes part in every pass; without a tie only single rows are read."""
    tied, untied = (replace(SMALL, tie_word_embeddings=tie) for tie in (True, False))
    moved = [roofline.decode(Rank(c), UNIT, 100, 1).memory for c in (tied, untied)]
    assert moved[0] == moved[1]
    cache = 100 * Rank(SMALL).token_bytes(3)
    assert moved[0] == pytest.approx((Rank(tied).weights.nbytes + cache) / 1e12)


def test_the_time_of_a_prompt() -> None:
    p = plan(MODELS["8b"], GPUS["h100"], context=20_000)
    layers = 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)
    attention = 4 * 32 * 4096 * 20_000 * 20_001 / 2
    spared = 4096 * 4096 + 3 * 4096 * 14336  # of the last layer, for all tokens but one
    flops = 2 * (20_000 * layers - 19_999 * spared) + 2 * 4096 * 128256 + attention
    assert p.prefill.compute == pytest.approx(flops / 989e12)
    keys = (8192 + 16384 + 20_000 + 20_000) * 128 * 1024  # three chunks read, one write
    weights = 3 * 2 * (8_030_261_248 - 128256 * 4096)
    assert p.prefill.memory == pytest.approx((keys + weights) / 3.35e12)
    assert p.prefill.bound == "compute" and p.prefill.all_reduce == 0


def test_fp8_products_need_fp8_units() -> None:
    def compute(gpu: str, quantize: str | None) -> float:
        rank = Rank(MODELS["8b"], quantize=quantize)
        return roofline.prefill(rank, GPUS[gpu], 1024).compute

    assert compute("h100", "fp8") < 0.6 * compute("h100", None)
    assert compute("a100-80", "fp8") == compute("a100-80", None)


def test_all_reduces_of_a_step() -> None:
    """Two a layer and one of the embedding, of 16-bit rows; gathered logits, half of one."""
    gpu = replace(UNIT, link=1000.0, latency=1e-6)
    rank = Rank(MODELS["405b"], 8)
    rows = gpu.all_reduce(2.0 * 3 * 16384, 8)
    logits = gpu.all_reduce(1.0 * 3 * 128256, 8)
    assert roofline.decode(rank, gpu, 100, 3).all_reduce == pytest.approx(253 * rows + logits)
    slow = plan(MODELS["405b"], replace(GPUS["h200"], link=1e-3), 8, quantize="fp8")
    assert slow.decode.bound == slow.prefill.bound == "all-reduce"
    assert Time(1.0, 2.0, 0.5).seconds == 2.5 and Time(3.0, 2.0, 0.5).bound == "compute"


def test_all_reduce_formulas() -> None:
    gpu = replace(UNIT, link=100.0, latency=1e-6)
    assert gpu.all_reduce(1e9, 1) == 0
    ring = 2 * 7 / 8 * 1e9 / 100e9  # its traffic, in two steps
    assert gpu.all_reduce(1e9, 8) == pytest.approx(ring + 2e-6)
    assert gpu.all_reduce(1e4, 8) == pytest.approx(7 * 1e4 / 100e9 + 1e-6)  # one step
    # Two nodes: an eighth goes through each adapter.
    between = 1e9 / 8 / (NETWORK * 1e9) + 10e-6
    assert gpu.all_reduce(1e9, 16) == pytest.approx(ring + 2e-6 + between)


def test_one_table_of_gpus() -> None:
    assert limits_table.GPUS is GPUS
    for name, gpu in GPUS.items():
        assert name == gpu.name.lower() == named(gpu.name).name.lower()


# ---- errors ----


def test_a_number_of_gpus_that_does_not_divide() -> None:
    assert sizes(MODELS["70b"]) == [1, 2, 4, 8, 16]
    with pytest.raises(ValueError, match="gpus: got 3, .* 1, 2, 4, 8, 16, 32, 64"):
        plan(MODELS["70b"], GPUS["h100"], 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 131073}, "context: got 131073, want 1 to 131072 of the model's positions"),
        ({"context": 0}, "context: got 0, want 1 to 131072"),
        ({"batch": 0}, "batch: got 0, want 1 to"),
        ({"stages": 33}, "stages: got 33, want 1 to 32 of the model's layers"),
        ({"stages": 2, "gpus": 3}, "gpus: got 3, .* in each of 2 stages: 2, 4, 8"),
        ({"quantize": "int4"}, "quantize: got 'int4', want None or one of fp8"),
        ({"kv_cache": "int8"}, "kv_cache: got 'int8', want None or 'fp8'"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(MODELS["8b"], GPUS["h100"], **changes).memory  # noqa: B018


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h900", "gpu: got 'h900', want one of a100-40, .*, mi300x, or numbers"),
        ("memory=96", "gpu: got 'memory=96', want also bandwidth, bf16"),
        ("memory=96,bandwidth=x,bf16=1", "gpu: got 'bandwidth=x', want NAME=NUMBER"),
        ("memory=nan,bandwidth=1,bf16=1", "gpu: got 'memory=nan'"),
        ("memory=-1,bandwidth=1,bf16=1", "gpu: got 'memory=-1'"),
        ("memory=9,bandwidth=1,bf16=1,link=0", "gpu: got 'link=0'"),
        ("name=1,memory=96", "gpu: got 'name=1'"),
    ],
)
def test_bad_gpus(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        named(text)


# ---- the command ----


def out(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    assert main(["plan", *argv]) == code
    return capsys.readouterr().out


LARGE = ("--model", "405b", "--gpus", "8", "--context", "131072", "--batch", "4")


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(out(capsys, *LARGE, "--quantize", "fp8").split())
    for wanted in (
        "405b on 8 x H200: fp8 weights, 16-bit cache, 4 x 131,072 tokens",
        "weights 47.77 GiB",
        "KV cache 31.50 GiB",
        "of 139.72 GiB fits, 57.2",
        "largest context with batch 4: 131,072 tokens",
        "largest batch with 131,072 tokens: 11 sequences",
        "fewest GPUs that hold this: 8",
        "bound by compute",
        "bound by memory",
    ):
        assert wanted in text, text


def test_report_of_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    text = out(capsys, *LARGE, "--gpu", "h100", code=1)
    assert "does not fit: 50.08 GiB a GPU are missing; any of these would fit: --quant" in text
    assert "2 nodes" in out(capsys, "--model", "405b", "--gpu", "h100")


def test_json_has_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    [found] = json.loads(out(capsys, *LARGE, "--kv-cache", "fp8", "--json"))
    p = plan(MODELS["405b"], GPUS["h200"], 8, context=131072, batch=4, kv_cache="fp8")
    assert found["memory"] == p.memory and found["free"] == p.free and found["fits"]
    assert found["decode"]["seconds"] == p.decode.seconds and found["decode"]["bound"] == "memory"


def test_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "bars.svg"
    text = out(capsys, "--gpu", "H100", "--quantize", "fp8", "--plot", str(path))
    rows = [line.split()[:2] for line in text.splitlines()]
    assert [row for row in rows if row[:1] and row[0] in MODELS] == [
        ["8b", "1"],
        ["70b", "1"],
        ["405b", "8"],
    ]
    svg = path.read_text()
    assert all(f"<!-- {label} -->" in svg for label in ("weights", "KV cache", "H100, 79.1 GiB"))


def test_picture_of_one_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bar for each number of GPUs; the same figures give the same bytes."""
    for name in ("a.svg", "b.svg", "c.png"):
        out(capsys, "--model", "8b", "--plot", str(tmp_path / name))
    svg = (tmp_path / "a.svg").read_text()
    assert all(f"<!-- {n} -->" in svg for n in ("1 GPU", "2 GPUs", "4 GPUs", "8 GPUs"))
    assert svg == (tmp_path / "b.svg").read_text()


def test_picture_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plan", "--model", "8b", "--plot", str(tmp_path / "x.svg")]) == 1
    error = capsys.readouterr().err
    assert "--plot: " in error and "pip install 'llama_fast[bench]'" in error


def test_docs_show_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
    blocks = re.findall(r"```\n\$ llama-fast (plan .*)\n((?:.|\n)*?)```", text)
    assert len(blocks) > 3
    for command, shown in blocks:
        main(shlex.split(command))
        assert capsys.readouterr().out == shown, command


def test_a_folder_and_a_gpu_of_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 1024}
    fields |= {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2}
    fields |= {"max_position_embeddings": 2048}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    gpu = "memory=8,bandwidth=0.5,bf16=10"
    argv = ("--model", str(tmp_path), "--gpu", gpu, "--context", "2048", "--json")
    [found] = json.loads(out(capsys, *argv))
    assert found["memory"]["weights"] == Rank(SMALL).weights.nbytes
    assert found["gpu"]["bandwidth"] == 0.5 and found["gpu"]["fp8"] == 0


def test_a_folder_in_fp8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plan what loading takes: by row with the head in 16 bits or FP8, Meta's form, and blocks."""
    source = save(hf_model(), tmp_path / "in")
    for recipe in RECIPES:
        folder = tmp_path / recipe
        quantize_checkpoint(source, folder, recipe)
        [found] = json.loads(out(capsys, "--model", str(folder), "--json"))
        assert found["memory"]["weights"] == Llama.from_pretrained(folder).weights.nbytes
    for inner, heads in ((320, 2), (512, 8)):  # parts begin within blocks, and with them
        changes = {"intermediate_size": inner, "num_key_value_heads": heads}
        model = hf_model(hidden_size=256, head_dim=32, **changes)
        folder = save(model, tmp_path / f"blocks{inner}")
        fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        write_fp8(folder, "block_2d", "weight_scale_inv", lambda name: "lm_head" not in name, **fp8)
        [found] = json.loads(out(capsys, "--model", str(folder), "--json"))
        assert found["memory"]["weights"] == Llama.from_pretrained(folder).weights.nbytes
    assert "weights as stored, in FP8" in out(capsys, "--model", str(folder))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--model", "9b"), "--model: got '9b', want 8b, 70b, 405b, a Hugging Face folder"),
        (("--model", "8b", "--plot", "x.pdf"), "--plot: got x.pdf, want a name that ends in"),
        (("--gpus", "5"), "gpus: got 5, want one that divides the model: 1, 2, 4"),
    ],
)
def test_bad_options(
    argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *argv]) == 1
    assert message in capsys.readouterr().err
