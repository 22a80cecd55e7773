"""Tests of the decode step in a graph: what stays between calls, and what RecordedGraph catches."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import llama_fast as lf
from llama_fast import Llama
from llama_fast.generation import decode, graphs
from llama_fast.generation.decode import Decoder, Size, Way, bucket
from llama_fast.generation.sampling import Settings

from ..support.generation import CONFIG, OPTIONS, plainly, prompts
from ..support.recorded_graph import RecordedGraph

pytestmark = pytest.mark.usefixtures("one_thread", "ahead")


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama.from_config(CONFIG, quantize="fp8")


# ---- what is kept between calls ----


def test_graphs_serve_the_next_call(model: Llama) -> None:
    """Generate with other prompts, lengths, settings and seeds. The model's graphs stay; sampling
    has a graph for each batch size and kind of choice."""
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
    # Replays of: 4 rows' model and top-p; greedy; both; one row's model and greedy; all.
    replays = [graph.replays for graph in RecordedGraph.made]
    assert replays == [7 + 8 + 8, 7, 7, 7, 7 + 8, 7, 7]


def test_f20_a_larger_cache_drops_the_graphs_over_the_smaller(model: Llama) -> None:
    options = {"temperature": 0, "stop_ids": ()}
    sizes = []
    for lengths in ((5,), (5, 900), (6,), (7, 8, 9)):
        batch = prompts(*lengths)
        assert model.generate(batch, 6, **options) == plainly(model, batch, 6, **options)
        sizes.append(model.decoders[0].size)
    assert sizes[0] != sizes[1] == sizes[2] and sizes[3].rows == 4
    assert sizes[3].blocks >= sizes[1].blocks
    assert len(model.decoders) == 1 and len(RecordedGraph.made) == 4 * 2


def test_another_backend_has_graphs_of_its_own(model: Llama) -> None:
    batch = prompts(5)
    options = {"temperature": 0, "stop_ids": ()}
    model.generate(batch, 5, **options)
    with lf.use_backend("cpu", op="rms_norm"):
        model.generate(batch, 5, **options)
    assert len(RecordedGraph.made) == 2 * 2
    model.generate(batch, 5, **options)
    assert len(RecordedGraph.made) == 2 * 2


def test_new_settings_in_each_call_do_not_pile_up(
    model: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 3)
    for i in range(7):
        options = {"temperature": 1 + i / 10, "seed": 1, "stop_ids": ()}
        batch = prompts(5)
        assert model.generate(batch, 5, **options) == plainly(model, batch, 5, **options)
        assert len(model.decoders[0]._graphs) <= 3 + 2


def test_a_failed_warm_up_is_repeated(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail each graph's first call, as if compiling ran out of memory. The next generation must
    warm it up again and capture only afterwards (RecordedGraph.capture checks)."""
    warm_up = RecordedGraph.warm_up
    failures = iter((True, False, True))

    def fails(self: RecordedGraph, function: Callable[[], Tensor]) -> Tensor:
        if next(failures, False):
            raise torch.OutOfMemoryError
        return warm_up(self, function)

    monkeypatch.setattr(RecordedGraph, "warm_up", fails)
    batch = prompts(5, 9)
    options = {"temperature": 0, "stop_ids": ()}
    for _ in range(2):  # the model's graph, then the sampling's
        with pytest.raises(torch.OutOfMemoryError):
            model.generate(batch, 6, **options)
    assert model.generate(batch, 6, **options) == plainly(model, batch, 6, **options)


def test_a_step_launches_little_beside_its_graphs(
    model: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Require two launches beside the graphs: a draw for each row, and the copy of the tokens."""

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if op.name() not in (
                "aten::select.int",
                "aten::slice.Tensor",
                "aten::empty.memory_format",
            ):
                launched.append(op.name())
            return op(*args, **(kwargs or {}))

    for options in OPTIONS.values():
        model.decoders.clear()
        model.generate(prompts(5, 9), 6, **options)
        one = model.decoders[0]
        one.begin([8, 8], one._way, torch.rand(2, 8, dtype=torch.float64))
        one._sampled = 1
        one.arrange([0, 1])
        launched: list[str] = []
        with monkeypatch.context() as patch, Counted():
            patch.setattr(RecordedGraph, "replay", lambda self: None)
            one.step(model, RecordedGraph)
        assert launched == ["aten::index_select.out", "aten::copy_"]


def test_memory_is_freed_after_the_last_step(model: Llama) -> None:
    """Drop the decoder. It waits for its last step: another stream may still use its memory."""

    class Event:
        waited = False

        def synchronize(self) -> None:
            assert cache() is not None
            Event.waited = True

    model.generate(prompts(5), 3, temperature=0)
    one = model.decoders[0]
    one._free, cache = Event(), weakref.ref(one.cache)  # type: ignore[assignment]
    del one
    model.decoders.clear()
    assert Event.waited and cache() is None


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


def test_the_model_is_freed_with_its_last_reference() -> None:
    """Require that no reference cycle keeps the model: its memory is a GPU's."""
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


# ---- the recorded graph: what it must catch ----


def decoder(model: Llama, lengths: list[int]) -> Decoder:
    one = Decoder(model, Size.of([n + 20 for n in lengths]))
    one.begin([n + 20 for n in lengths], Way(Settings(0, 1, 0)), None)
    for i, prompt in enumerate(prompts(*lengths)):
        one.prefill(model, i, prompt)
    one.arrange(range(len(lengths)))
    return one


def broken(attribute: str, change: Callable[[Tensor], Tensor]) -> type[Decoder]:
    """Return a decoder that replaces one of its tensors by a new one after each step."""

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
def test_f20_a_replaced_tensor_is_caught(
    model: Llama, attribute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check RecordedGraph: moved tensors give other tokens once a sequence ends and rows change."""
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
    result = graph.capture(torch.inference_mode()(lambda: one._forward(model, 2)))
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
