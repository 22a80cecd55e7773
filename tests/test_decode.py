"""The loop that runs ahead of a GPU, on CPU tensors: the tokens of the plain loop, and a step that
a graph could hold. tests/gpu/test_model.py has the same on a GPU."""

from __future__ import annotations

import dataclasses
import gc
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import llama_fast as lf
from llama_fast import KVCache, Llama, LlamaConfig, decode, generate, sampling
from llama_fast.decode import Decoder, Settings, Size, bucket

from .recorded_graph import RecordedGraph
from .test_generate import CONFIG, prompts

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "all": {"temperature": 1.0, "top_p": 1.0, "seed": 3},
    "top-p": {"temperature": 0.8, "top_p": 0.7, "seed": 4},
    "top-k": {"temperature": 1.2, "top_p": 1.0, "top_k": 20, "seed": 5},
    "both": {"temperature": 1.2, "top_p": 0.8, "top_k": 20, "seed": 6},
}


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama.from_config(CONFIG, quantize="fp8")


@pytest.fixture(autouse=True)
def ahead(monkeypatch: pytest.MonkeyPatch, model: Llama) -> Iterator[None]:
    """CPU tensors take a GPU's way, with graphs that record."""
    monkeypatch.setattr(generate, "_runs_ahead", lambda device: True)
    monkeypatch.setattr(decode, "cannot_capture", lambda device: None)
    monkeypatch.setattr(decode, "CudaGraph", RecordedGraph)
    model.decoders.clear()
    RecordedGraph.made.clear()
    yield


def plainly(model: Llama, *args: Any, **options: Any) -> list[list[int]]:
    """By the loop for CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "_runs_ahead", lambda device: False)
        return model.generate(*args, **options)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_same_tokens_as_the_plain_loop(
    model: Llama, options: dict[str, Any], graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loop in (decode, generate):
        monkeypatch.setattr(loop, "PREFILL_CHUNK", 64)
    batch = prompts(1, 40, 127, 128, 200)  # some cross into a new block while they decode
    expected = plainly(model, batch, 12, stop_ids=(), **options)
    assert model.generate(batch, 12, stop_ids=(), graphs=graphs, **options) == expected


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("queued", [0, 1, 4])
def test_sequences_stop_on_their_own(
    model: Llama, queued: int, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each at another step, so that rows move and the batch shrinks from bucket to bucket."""
    monkeypatch.setattr(decode, "AHEAD", queued)
    batch = prompts(5, 9, 30, 4, 17)
    free = plainly(model, batch, 24, temperature=1.0, top_p=1.0, seed=5, stop_ids=())
    stops = [free[0][0], free[1][3], free[2][9], free[3][10]]  # one ends with its first token
    options = {"temperature": 1.0, "top_p": 1.0, "seed": 5, "stop_ids": stops}
    expected = plainly(model, batch, 24, **options)
    assert len({len(ids) for ids in expected}) >= 4 and min(map(len, expected)) == 1
    seen: list[tuple[int, int]] = []
    got = model.generate(
        batch, 24, graphs=graphs, on_token=lambda i, token: seen.append((i, token)), **options
    )
    assert got == expected
    in_order = [
        (i, ids[step]) for step in range(24) for i, ids in enumerate(expected) if step < len(ids)
    ]
    assert seen == in_order


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_tokens(model: Llama, count: int) -> None:
    batch = prompts(4, 130)
    options = {"temperature": 0.9, "seed": 1, "stop_ids": ()}
    assert model.generate(batch, count, **options) == plainly(model, batch, count, **options)
    steps = sum(graph.replays + graph.warm_ups for graph in RecordedGraph.made)
    assert steps == count - 1


def test_f26_a_ragged_batch_equals_singles(model: Llama) -> None:
    batch = prompts(1, 40, 3, 200, 17)
    options = {"temperature": 1.0, "seed": 7}
    together = model.generate(batch, 24, **options)
    assert together == [model.generate([prompt], 24, **options)[0] for prompt in batch]
    assert model.generate(batch[::-1], 24, **options) == together[::-1]


def test_a_token_is_emitted_before_the_next_but_one_is_computed(model: Llama) -> None:
    """Streaming: AHEAD steps of delay at most, for the first tokens as well."""
    steps: list[int] = []
    spy = Llama(model.config, model.weights)
    spy.logits = lambda hidden: (steps.append(1), model.logits(hidden))[1]  # type: ignore[method-assign]
    computed: list[int] = []
    spy.generate(
        prompts(5, 9), 6, stop_ids=(), graphs=False, on_token=lambda *_: computed.append(len(steps))
    )
    # Two first tokens, then pairs: a step computes both.
    assert computed == [2, 3, *[n for step in range(4, 8) for n in (step, step)], 7, 7]


def test_no_more_steps_than_needed(model: Llama) -> None:
    """A single sequence that stops computes AHEAD tokens that nobody sees."""
    (prompt,) = prompts(5)
    options = {"temperature": 1.0, "top_p": 1.0, "seed": 2}
    (free,) = plainly(model, [prompt], 30, stop_ids=(), **options)
    stop = next(i for i in range(5, 30) if free[i] not in free[:i])
    assert model.generate([prompt], 30, stop_ids=[free[stop]], **options) == [free[: stop + 1]]
    steps = sum(graph.replays + graph.warm_ups for graph in RecordedGraph.made)
    assert steps == stop + decode.AHEAD


def test_f44_nan_in_the_model_names_the_prompt(model: Llama) -> None:
    broken = Llama(CONFIG, dataclasses.replace(model.weights, norm=model.weights.norm * math.nan))
    for options in OPTIONS.values():
        with pytest.raises(ValueError, match="prompt 0, new token 0: logits"):
            broken.generate([[1, 2], [3]], 3, **options)


def test_f44_nan_in_one_sequence_spares_the_others(model: Llama) -> None:
    """A token whose embedding is NaN: its sequence fails, and says at which token."""
    embedding = model.weights.embedding.clone()
    embedding[7] = math.nan
    broken = Llama(CONFIG, dataclasses.replace(model.weights, embedding=embedding))
    seen: list[tuple[int, int]] = []
    batch = [[9, 8], [3, 7]]
    with pytest.raises(ValueError, match="prompt 1, new token 0: logits"):
        broken.generate(batch, 3, temperature=0, on_token=lambda *at: seen.append(at))
    assert seen == [(0, plainly(model, batch, 1, temperature=0)[0][0])]
    assert len(broken.generate([[9, 8]], 3, temperature=0, stop_ids=())[0]) == 3


# ---- what is kept between calls ----


def test_graphs_serve_the_next_call(model: Llama) -> None:
    """Other prompts, lengths, settings and seeds: the same graphs, the right tokens."""
    for lengths, options in (
        ((190, 2, 3, 4), OPTIONS["top-p"]),
        ((5, 60, 200), OPTIONS["greedy"]),
        ((100, 100, 100), OPTIONS["both"]),
        ((7,), OPTIONS["greedy"]),
        ((8,), OPTIONS["all"]),
    ):
        batch = prompts(*lengths)
        expected = plainly(model, batch, 9, stop_ids=(), **options)
        assert model.generate(batch, 9, stop_ids=(), **options) == expected
    assert len(model.decoders) == 1
    assert [graph.replays for graph in RecordedGraph.made] == [7 + 8 + 8, 7 + 8]  # 4 rows, then 1


def test_f20_a_larger_cache_drops_the_graphs_over_the_smaller(model: Llama) -> None:
    options = {"temperature": 0, "stop_ids": ()}
    sizes = []
    for lengths in ((5,), (5, 900), (6,), (7, 8, 9)):
        batch = prompts(*lengths)
        assert model.generate(batch, 6, **options) == plainly(model, batch, 6, **options)
        sizes.append(model.decoders[0].size)
    assert sizes[0] != sizes[1] == sizes[2] and sizes[3].rows == 4
    assert sizes[3].blocks >= sizes[1].blocks
    assert len(model.decoders) == 1 and len(RecordedGraph.made) == 4


def test_another_backend_has_graphs_of_its_own(model: Llama) -> None:
    batch = prompts(5)
    options = {"temperature": 0, "stop_ids": ()}
    model.generate(batch, 5, **options)
    with lf.use_backend("cpu", op="rms_norm"):
        model.generate(batch, 5, **options)
    assert len(RecordedGraph.made) == 2
    model.generate(batch, 5, **options)
    assert len(RecordedGraph.made) == 2


def test_an_error_leaves_the_decoder_usable(model: Llama) -> None:
    batch = prompts(5, 9)
    options = {"temperature": 0, "stop_ids": ()}

    def fail(i: int, token: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        model.generate(batch, 8, on_token=fail, **options)
    assert model.generate(batch, 8, **options) == plainly(model, batch, 8, **options)
    assert len(model.decoders) == 1


def test_a_call_within_a_call_has_a_decoder_of_its_own(model: Llama) -> None:
    batch = prompts(5, 9)
    options = {"temperature": 0, "stop_ids": ()}
    expected = plainly(model, batch, 8, **options)
    inner: list[list[list[int]]] = []
    outer = model.generate(
        batch, 8, on_token=lambda *_: inner.append(model.generate(batch, 8, **options)), **options
    )
    assert outer == expected and inner == [expected] * 16
    assert len(model.decoders) == 2


def test_the_model_goes_with_its_last_reference() -> None:
    """Its memory is a GPU's: no cycle may keep it until the collector comes."""
    model = Llama.from_config(CONFIG)
    model.generate(prompts(5, 6, 7), 6, temperature=0, stop_ids=())
    gone = weakref.ref(model), weakref.ref(model.decoders[0])
    gc.disable()
    try:
        del model
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


def test_sizes() -> None:
    assert [bucket(n) for n in (1, 2, 3, 5, 16, 17, 128, 129, 192, 193)] == [
        1, 2, 4, 8, 16, 32, 128, 192, 192, 256,
    ]  # fmt: skip
    assert Size.of([1, 128, 129]) == Size(4, 4, 2)
    for n in range(1, 3000):
        rounded = Size(1, n, n).rounded()
        assert n <= rounded.blocks <= max(1.25 * n, n) and rounded.blocks == rounded.width
    assert len({Size(1, n, n).rounded() for n in range(1, 4096)}) < 50


# ---- the fake graph itself, and what it must catch ----


def decoder(model: Llama, lengths: list[int]) -> Decoder:
    one = Decoder(model, Size.of([n + 20 for n in lengths]))
    one.begin([n + 20 for n in lengths], Settings(0, 1, 0), None)
    for i, prompt in enumerate(prompts(*lengths)):
        one.prefill(model, i, prompt)
    one.arrange(range(len(lengths)))
    return one


def broken(attribute: str, change: Callable[[Tensor], Tensor]) -> type[Decoder]:
    """A decoder that makes one of its tensors anew after each step."""

    class Broken(Decoder):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.cache.k.zero_(), self.cache.v.zero_()  # wrong, but the same each time

        def step(self, *args: Any) -> Any:
            result = super().step(*args)
            setattr(self, attribute, change(getattr(self, attribute)))
            return result

    return Broken


@pytest.mark.parametrize("attribute", ["_tokens", "_state", "_table"])
def test_f20_a_tensor_made_anew_is_caught(
    model: Llama, attribute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test of the tests above: tensors that move give other tokens, once a sequence has ended
    and the others change rows."""
    batch = prompts(5, 120, 130, 9)
    options = {"temperature": 1.0, "top_p": 1.0, "seed": 1}
    free = plainly(model, batch, 12, stop_ids=(), **options)
    stop = next(i for i in free[0][4:] if not any(i in ids for ids in free[1:]))
    options["stop_ids"] = [stop]
    expected = plainly(model, batch, 12, **options)
    assert list(map(len, expected)) == [free[0].index(stop) + 1, 12, 12, 12]
    assert model.generate(batch, 12, **options) == expected
    model.decoders.clear()
    monkeypatch.setattr(decode, "Decoder", broken(attribute, torch.clone))
    assert model.generate(batch, 12, graphs=False, **options) == expected
    model.decoders.clear()
    assert model.generate(batch, 12, **options) != expected


def test_a_step_that_waits_is_caught(model: Llama) -> None:
    graph = RecordedGraph("shared")
    x = torch.ones(3)
    graph.warm_up(lambda: x)
    with pytest.raises(RuntimeError, match="the host would wait"):
        graph.capture(lambda: x * x.sum().item())


def test_capture_changes_nothing_and_replays_count(model: Llama) -> None:
    one = decoder(model, [5, 60])
    fixed = [one._tokens, one._state, one._table, one.cache.k, one.cache.v]
    graph = RecordedGraph("shared")
    one.cache.k.nan_to_num_(), one.cache.v.nan_to_num_()
    graph.warm_up(lambda: one._forward(model, 2))
    before = [t.clone() for t in fixed]
    with torch.inference_mode():
        result = graph.capture(lambda: one._forward(model, 2))
    assert all(torch.equal(a, b) for a, b in zip(fixed, before, strict=True))
    graph.replay()
    assert not result.isnan().any()
    assert (one._state[:3] - before[1][:3]).tolist() == [[1, 1]] * 3


def test_empty_rows_write_nothing_and_stay_put(model: Llama) -> None:
    one = decoder(model, [5, 60, 130])  # four rows, one of them empty
    one.cache.k.fill_(1.0), one.cache.v.fill_(1.0)
    slots = one._state[1].tolist()
    assert slots[3] == -1
    one.step(model, None)
    changed = (one.cache.k[0].float() != 1).flatten(2).any(-1).flatten().nonzero()[:, 0].tolist()
    assert changed == sorted(slots[:3])
    assert one._state[:, 3].tolist() == [0, -1, 0, 0]
    assert one._state[:, 1].tolist() == [61, slots[1] + 1, 62, 1]


# ---- sampling ----


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("vocab", [1, 7, 320, 8193])
def test_rows_are_sampled_as_one_by_one(vocab: int, options: dict[str, Any]) -> None:
    logits = 4 * torch.randn(40, vocab)
    logits[::3] = logits[::3].round()  # ties
    logits[5, : vocab // 2] = -math.inf
    settings = Settings(options["temperature"], options.get("top_p", 1.0), options.get("top_k", 0))
    alone = [
        sampling.sample(row, *settings, generator=torch.Generator().manual_seed(i))
        for i, row in enumerate(logits)
    ]
    u = torch.stack(
        [
            torch.rand(1, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
            for i in range(40)
        ]
    )
    assert sampling.sample_rows(logits, u[:, 0], *settings).tolist() == alone


def test_f44_rows_that_mean_nothing_are_minus_one() -> None:
    logits = torch.randn(6, 50)
    logits[1, 3], logits[2], logits[3, 4] = math.nan, -math.inf, math.inf
    logits[4] = math.nan
    u = torch.rand(6, dtype=torch.float64)
    for options in OPTIONS.values():
        settings = Settings(
            options["temperature"], options.get("top_p", 1.0), options.get("top_k", 0)
        )
        ids = sampling.sample_rows(logits, u, *settings)
        assert ids[1:5].tolist() == [-1] * 4
        assert 0 <= int(ids[0]) < 50 and 0 <= int(ids[5]) < 50


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rows_are_sampled_the_same_in_any_batch(options: dict[str, Any]) -> None:
    logits, u = 4 * torch.randn(150, 321), torch.rand(150, dtype=torch.float64)
    settings = Settings(options["temperature"], options.get("top_p", 1.0), options.get("top_k", 0))
    together = sampling.sample_rows(logits, u, *settings)
    for rows in (slice(0, 1), slice(63, 66), slice(140, 150)):
        assert torch.equal(sampling.sample_rows(logits[rows], u[rows], *settings), together[rows])


def test_weights_have_one_sum_in_any_order() -> None:
    """So it does not matter in what pieces a device adds them up."""
    weights = sampling._weights(6 * torch.randn(128256), torch.tensor(25.0), 0.7)
    orders = [weights.flip(0), weights.view(501, 256).t().flatten(), weights.sort().values]
    assert {int(w.cumsum(0)[-1]) for w in [weights, *orders]} == {int(weights.sum())}
    flat = sampling._weights(torch.zeros(2**19 - 1), torch.tensor(0.0), 1.0)
    assert int(flat.sum()) == (2**19 - 1) * 2**44


@pytest.mark.parametrize("top_p", [0.0, 0.5, 1.0])
def test_f45_draws_at_both_ends_of_the_unit_interval(top_p: float) -> None:
    logits = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf]]).repeat(2, 1)
    u = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    ids = sampling.sample_rows(logits, u, 1.0, top_p, 0).tolist()
    assert ids == {0.0: [2, 2], 0.5: [2, 2], 1.0: [1, 2]}[top_p]


def test_one_number_at_a_time_or_all_at_once() -> None:
    """A seed gives the same tokens on a GPU, which is sent all the numbers at once."""
    at_once = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    one = torch.Generator().manual_seed(1)
    singly = [torch.rand(1, dtype=torch.float64, generator=one) for _ in range(100)]
    assert torch.equal(at_once, torch.cat(singly))


# ---- the cache ----


def test_reserved_blocks_follow_each_other_after_any_history() -> None:
    cache = KVCache(CONFIG, 64, 3, block_size=16, num_blocks=9)
    cache.select([1]).append(40), cache.select([0]).append(20), cache.select([2]).append(10)
    cache.release(1)
    cache.select([0]).append(50)
    cache.clear()
    cache.select([0, 2]).reserve([33, 64])
    first, second = cache.select([0, 2]).block_table.tolist()
    assert (first[:3], second) == ([0, 1, 2], [3, 4, 5, 6])
    assert cache.free_blocks == 2 and cache.seqlens == [0, 0, 0]


def test_f22_a_pool_smaller_than_all_sequences_need() -> None:
    cache = KVCache(CONFIG, 64, 3, block_size=16, num_blocks=5)
    with pytest.raises(ValueError, match="KV cache is full"):
        cache.reserve([32, 32, 32])
    with pytest.raises(ValueError, match="room for 64 tokens"):
        cache.select([0]).reserve([65])
    assert cache.free_blocks == 5
    cache.reserve([32, 32, 16])
    with pytest.raises(ValueError, match="num_blocks: got 0"):
        KVCache(CONFIG, 64, num_blocks=0)


def test_prefill_over_a_run_of_slots_is_prefill_over_blocks() -> None:
    """On a GPU a prompt's blocks are read as one piece of memory, by attention()."""
    model = Llama.from_config(CONFIG, dtype=torch.float32)
    tokens = torch.randint(320, (1, 300))
    caches = [KVCache(CONFIG, 300, dtype=torch.float32, block_size=32) for _ in range(2)]
    caches[1].finds_runs = True
    runs = []
    for cache in caches:
        cache.k.fill_(math.nan), cache.v.fill_(math.nan)
        chunks = [model(chunk, cache=cache) for chunk in tokens.split([64, 1, 100, 135], dim=1)]
        runs.append(torch.cat(chunks, dim=1))
    assert float((runs[0] - runs[1]).abs().max()) <= 2e-5 * float(runs[0].abs().max())
    assert caches[1].append(0).run == slice(0, 300)


def test_blocks_that_do_not_follow_each_other_are_no_run() -> None:
    cache = KVCache(CONFIG, 64, 2, block_size=16)
    cache.finds_runs = True
    cache.select([0]).append(16), cache.select([1]).append(16)
    cache.select([0]).advance(16)
    assert cache.select([0]).append(16).run is None
    assert cache.select([1]).append(10).run == slice(16, 26)
    assert cache.append(1).run is None


# ---- fused quantisation ----


def unpacked(model: Llama) -> Llama:
    """The same weights as [N, K], as on a GPU."""

    def plain(linear: Any) -> Any:
        return dataclasses.replace(linear, weight=lf.reference.unpack_weight(linear.weight))

    layers = [
        dataclasses.replace(
            layer,
            **{name: plain(getattr(layer, name)) for name in ("qkv", "output", "gate_up", "down")},
        )
        for layer in model.weights.layers
    ]
    weights = dataclasses.replace(model.weights, layers=layers, head=plain(model.weights.head))
    return Llama(model.config, weights)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("quantize", ["fp8", "fp8_ffn"])
def test_fused_quantisation_changes_no_bit(
    quantize: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norm and SwiGLU that quantise, against the separate ops that they stand for; with an
    activation bound low enough to bite."""
    from llama_fast import library, ops, weights

    monkeypatch.setattr(weights, "ACTIVATION_BOUND", 1.5)
    config = dataclasses.replace(CONFIG, num_hidden_layers=3)
    model = unpacked(Llama.from_config(config, quantize=quantize))
    tokens = torch.randint(320, (2, 9))
    called: list[str] = []
    for name in ("rms_norm_fp8", "silu_and_mul_fp8", "fp8_gemm", "quantize_fp8"):
        real = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *a, _n=name, _f=real, **k: (called.append(_n), _f(*a, **k))[1]
        )
    with lf.use_backend(backend):
        plain = model(tokens)
        assert called == []
        real_linear = ops.fp8_linear
        quantising = lambda *a, **k: real_linear(*a, **{"quantize_activation": True} | k)  # noqa: E731
        monkeypatch.setattr(ops, "fp8_linear", quantising)
        expected = model(tokens)
        assert called == [] and not torch.equal(expected, plain)
        monkeypatch.setattr(library, "prefers_fp8_activations", lambda weight: True)
        assert torch.equal(model(tokens), expected)
        norms, ffns = {"fp8": (6, 3), "fp8_ffn": (1, 1)}[quantize]
        assert called.count("rms_norm_fp8") == norms and called.count("silu_and_mul_fp8") == ffns
        assert called.count("fp8_gemm") == norms + ffns
        bounded = [
            dataclasses.replace(
                layer,
                gate_up=dataclasses.replace(layer.gate_up, scale_ub=None),
                down=dataclasses.replace(layer.down, scale_ub=None),
            )
            for layer in model.weights.layers
        ]
        unbounded = Llama(config, dataclasses.replace(model.weights, layers=bounded))
        assert torch.equal(unbounded(tokens), expected) == (quantize == "fp8")
        assert model(tokens[:, :0]).shape == (2, 0, 320)


def test_weights_in_blocks_are_left_to_fp8_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_fast import library
    from llama_fast.weights import Linear

    monkeypatch.setattr(library, "prefers_fp8_activations", lambda weight: True)
    weight = torch.zeros(256, 256).to(torch.float8_e4m3fn)
    assert Linear(weight, torch.ones(256, 1)).wants_fp8 and Linear(weight, torch.ones(1)).wants_fp8
    assert not Linear(weight, torch.ones(2, 2)).wants_fp8
    assert not Linear(weight.view(4, 128, 64, 2), torch.ones(256, 1)).wants_fp8
    assert not Linear(torch.zeros(256, 256)).wants_fp8


# ---- arguments ----


def test_graphs_need_a_gpu(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ValueError, match="graphs: got True, but the model is on cpu"):
        model.generate([[1]], 2, graphs=True)
    with pytest.raises(TypeError, match="graphs: got int"):
        model.generate([[1]], 2, graphs=1)
    assert model.generate([[1]], 2, graphs=False, temperature=0) == model.generate(
        [[1]], 2, temperature=0
    )
    assert not model.decoders


def test_f47_a_bad_id_on_a_gpu_is_nan_for_its_sequence_only() -> None:
    """What model() does where it cannot look at the ids."""
    config = LlamaConfig(320, 128, 192, 2, 8, 2, 16)
    model = Llama.from_config(config)

    class Elsewhere(Tensor):
        """CPU tensors that deny it."""

        is_cpu = False

    tokens = torch.tensor([[1, 2, 3], [4, 320, 5], [6, -1, 2**62], [319, 0, 7]])
    x = model.embed(tokens.as_subclass(Elsewhere)).as_subclass(Tensor)
    assert x.isnan().all(-1).tolist() == [
        [False] * 3,
        [False, True, False],
        [False, True, True],
        [False] * 3,
    ]
    logits = model.logits(model.forward(x, torch.arange(3).repeat(4)))
    assert logits.isnan().all(-1).tolist() == [
        [False] * 3,
        [False, True, True],
        [False, True, True],
        [False] * 3,
    ]
    assert torch.equal(logits[[0, 3]], model(tokens[[0, 3]]))
