"""Tests of the tables that grow with the positions in use, and of rope type "dynamic" beyond the
model's first context length, against transformers."""

from __future__ import annotations

import dataclasses
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers

import llama_fast as lf
from llama_fast import KVCache, Llama, LlamaConfig, rope_tables
from llama_fast.generation import decode, generate, logprobs
from llama_fast.rope_tables import RopeTables

from ..support.checkpoints import LOGITS, hf_logits, hf_model, relative_error, save
from ..support.generation import CONFIG
from ..support.recorded_graph import RecordedGraph

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.mark.parametrize("positions", [1, 8192, 8193, 100_000, 131_072])
def test_a_table_has_the_bits_of_the_whole_one(positions: int) -> None:
    config = LlamaConfig.llama_3_1_8b()
    tables = RopeTables(config, CPU)
    tables.upto(5)
    table = tables.upto(positions)
    rows = {1: 8192, 8192: 8192, 8193: 16384}.get(positions, 131_072)
    assert len(table) == rows
    whole = lf.rope_table(config, config.max_position_embeddings)
    assert torch.equal(table, whole[:rows])
    assert tables.upto(rows) is table and len(tables.upto(1 << 40)) == 131_072


def test_a_model_of_many_positions_makes_a_small_table() -> None:
    config = dataclasses.replace(CONFIG, max_position_embeddings=1 << 40)
    model = Llama.from_config(config, dtype=torch.float32)
    tokens = torch.randint(config.vocab_size, (2, 9))
    want = Llama(CONFIG, model.weights)(tokens)
    assert torch.equal(model(tokens), want)
    model.generate([[1, 2, 3]], 3, stop_ids=())
    assert torch.equal(model(tokens, torch.arange(9)), want)
    assert len(model.rope.upto(1)) == rope_tables.FIRST_POSITIONS


def test_positions_past_the_model_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rope_tables, "FIRST_POSITIONS", 8)
    model = Llama.from_config(dataclasses.replace(CONFIG, max_position_embeddings=100))
    tokens = torch.ones(1, 3, dtype=torch.int64)
    model(tokens, torch.tensor([97, 5, 99]))
    for bad in (100, 1000, -1):
        with pytest.raises(ValueError, match=f"positions: got {bad} at index 1, want 0 to 99"):
            model(tokens, torch.tensor([0, bad, 1]))
    assert model(tokens[:, :0]).shape == (1, 0, CONFIG.vocab_size)


def test_tables_are_kept_for_the_graphs_that_read_them() -> None:
    tables = RopeTables(LlamaConfig.llama_3_1_8b(), CPU)
    first = weakref.ref(tables.upto(1))
    tables.upto(20_000)
    assert first() is not None


def test_threads_share_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = RopeTables(CONFIG, CPU)
    made: list[int] = []
    make = rope_tables.rope_table
    monkeypatch.setattr(
        rope_tables, "rope_table", lambda *a, **k: (made.append(1), make(*a, **k))[1]
    )
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: tables.upto(CONFIG.max_position_embeddings), range(8)))
    assert len(made) == 1 and len({t.data_ptr() for t in found}) == 1


@pytest.mark.usefixtures("ahead")
def test_graphs_keep_the_table_of_their_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grow the table after a graph was captured, then replay it."""
    monkeypatch.setattr(rope_tables, "FIRST_POSITIONS", 8)
    model = Llama.from_config(CONFIG)
    short, long = [[5, 6, 7]], [[1 + i % 300 for i in range(400)]]
    plain = Llama(CONFIG, model.weights)
    greedy: dict[str, Any] = {"temperature": 0.0, "stop_ids": ()}
    want = [plain.generate(p, 6, graphs=False, **greedy) for p in (short, long)]
    assert model.generate(short, 6, **greedy) == want[0]
    captured = model.rope.upto(1)
    assert len(captured) >= decode.BLOCK_SIZE  # a decoder's whole capacity, before the capture
    replays = sum(g.replays for g in RecordedGraph.made)
    model(torch.tensor(long))
    assert len(model.rope.upto(1)) > 256
    assert model.generate(short, 6, **greedy) == want[0]
    assert sum(g.replays for g in RecordedGraph.made) > replays
    assert model.generate(long, 6, **greedy) == want[1]


def test_compiled_models_grow_their_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rope_tables, "FIRST_POSITIONS", 8)
    model = Llama.from_config(CONFIG, dtype=torch.float32)
    plain = Llama(CONFIG, model.weights)
    compiled = torch.compile(model.hidden, backend="eager")
    for length in (3, 12, 70, 5):
        tokens = torch.randint(CONFIG.vocab_size, (1, length))
        assert torch.equal(compiled(tokens), plain.hidden(tokens))


# ---- rope type "dynamic" ----

FIRST = 64  # positions: of the checkpoint


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Llama]:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    hf = hf_model(rope_parameters=rope, max_position_embeddings=FIRST)
    folder = save(hf, tmp_path_factory.mktemp("dynamic"))
    return hf, Llama.from_pretrained(folder, torch.float32)


@pytest.fixture
def model(dynamic: tuple[Any, Llama]) -> Llama:
    return dynamic[1]


def fresh(hf: Any) -> Any:
    """Forget the longest text: transformers rotates shorter ones by its frequencies too."""
    rotary = hf.model.rotary_emb
    hf.model.rotary_emb = type(rotary)(hf.config)
    return hf


def test_dynamic_models_take_factor_times_the_positions(dynamic: tuple[Any, Llama]) -> None:
    assert dynamic[1].config.max_position_embeddings == 4 * FIRST


@pytest.mark.parametrize("length", [FIRST - 1, FIRST, FIRST + 1, 200, 4 * FIRST])
def test_dynamic_logits(dynamic: tuple[Any, Llama], length: int) -> None:
    hf, model = dynamic
    tokens = torch.randint(320, (1, length))
    want = hf_logits(fresh(hf), tokens)
    assert relative_error(model(tokens), want) <= LOGITS
    positions = torch.arange(length)
    assert relative_error(model(tokens, positions), want) <= LOGITS


@torch.no_grad()
def test_dynamic_logits_with_a_growing_cache(dynamic: tuple[Any, Llama]) -> None:
    """A prompt within the first length, chunks and tokens that cross it, and more beyond."""
    hf, model = dynamic
    tokens = torch.randint(320, (1, 150))
    fresh(hf)
    theirs = transformers.DynamicCache()
    ours = KVCache(model.config, 150, dtype=torch.float32)
    start = 0
    for count in (60, 3, 1, 1, 1, 20, 1, 1, 62):
        piece = tokens[:, start : start + count]
        want = hf(piece, past_key_values=theirs, use_cache=True).logits
        assert relative_error(model(piece, cache=ours), want) <= LOGITS, start
        start += count
    assert start == 150
    plain = dataclasses.replace(model.config, rope_scaling=None)
    assert relative_error(Llama(plain, model.weights)(tokens)[:, -62:], want) > 100 * LOGITS


@pytest.mark.parametrize("prompt", [50, 64, 100])
@pytest.mark.parametrize("loop", ["plain", "ahead"])
def test_dynamic_greedy_text(
    dynamic: tuple[Any, Llama],
    prompt: int,
    loop: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cross the first length while decoding, and in a prompt of several chunks."""
    if loop == "ahead":
        request.getfixturevalue("ahead")
    for module in (decode, generate):
        monkeypatch.setattr(module, "PREFILL_CHUNK", 24)
    hf, model = dynamic
    texts = [torch.randint(320, (prompt,)).tolist(), torch.randint(320, (9,)).tolist()]
    got = model.generate(texts, 40, temperature=0.0, stop_ids=())
    for text, ids in zip(texts, got, strict=True):
        want = fresh(hf).generate(
            torch.tensor([text]), max_new_tokens=40, do_sample=False, eos_token_id=None
        )
        assert ids == want[0, len(text) :].tolist()
    looked_up = model.generate(texts, 40, temperature=0.0, stop_ids=(), speculate="lookup")
    assert looked_up == got


def test_dynamic_logprobs_do_not_depend_on_other_prompts(
    dynamic: tuple[Any, Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = dynamic
    texts = [torch.randint(320, (n,)).tolist() for n in (70, 200, 90)]
    together = model.logprobs(texts)
    monkeypatch.setattr(logprobs, "PREFILL_CHUNK", 32)
    in_chunks = model.logprobs(texts)
    for i, text in enumerate(texts):
        want = model(torch.tensor([text[:-1]]))[0].log_softmax(-1)
        want = want[torch.arange(len(text) - 1), text[1:]]
        assert relative_error(together[i], want) <= LOGITS
        assert relative_error(in_chunks[i], want) <= LOGITS
