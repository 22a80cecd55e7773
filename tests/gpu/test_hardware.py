"""Tests of every op that only a GPU can show: graphs, streams, devices, empty launches, races."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import llama_fast as lf
from llama_fast import reference

from ..support.op_examples import OPS, example, registered_arguments, tensors

pytestmark = pytest.mark.gpu

ON_GPU = [op for op in OPS if op not in ("linear", "pack_weight")]
ops = pytest.mark.parametrize("op", ON_GPU)
RACE_REPEATS = 250  # as many as FlashAttention's test for the missing barrier of its issue 2229


def arguments(op: str, device: str = "cuda") -> dict[str, Any]:
    torch.manual_seed(0)
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in example(op).items()}


def copies(values: dict[str, Any]) -> dict[str, Any]:
    return {n: v.clone() if isinstance(v, Tensor) else v for n, v in values.items()}


def run(op: str, values: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return op's result and its inputs after the call (apply_rope_and_append writes caches)."""
    results = tensors(getattr(lf, op)(**values))
    return (*results, *(v for v in values.values() if isinstance(v, Tensor)))


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(
        torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in zip(a, b, strict=True)
    )


@ops
def test_matches_the_reference(op: str) -> None:
    values = arguments(op)
    twin_values = copies(values)
    ours = run(op, values)
    twin = tensors(getattr(reference, op)(**twin_values))
    inputs = (v for v in twin_values.values() if isinstance(v, Tensor))
    for a, b in zip(ours, (*twin, *inputs), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-2, atol=1e-2)


@ops
def test_graph_capture_and_replay(op: str) -> None:
    """Capture with one set of values and replay with another. The graph reads its static inputs."""
    static, fresh = arguments(op), arguments(op)
    for name, value in fresh.items():
        if isinstance(value, Tensor) and value.is_floating_point() and name != "table":
            value.copy_(value.float().flip(0).to(value.dtype))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            run(op, copies(static))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = run(op, static)
    expected = run(op, copies(fresh))
    for name, value in fresh.items():
        if isinstance(value, Tensor):
            static[name].copy_(value)
    for t in captured[: len(captured) - sum(isinstance(v, Tensor) for v in static.values())]:
        t.view(torch.uint8).fill_(0x7F)
    graph.replay()
    torch.cuda.synchronize()
    assert same(captured, expected)


@ops
def test_f18_side_stream_waits_for_its_own_producer(op: str) -> None:
    """Write the inputs late, on a side stream. A kernel on any other stream reads garbage."""
    values, late = arguments(op), arguments(op)
    expected = run(op, copies(values))
    for value in late.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            value.view(torch.uint8).fill_(0x7F)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # cycles: about 30 ms
        for name, value in values.items():
            if isinstance(value, Tensor):
                late[name].copy_(value)
        result = run(op, late)
    side.synchronize()
    assert same(result, expected)


@ops
def test_f17_the_tensors_device_not_the_current_one(op: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(0):
        result = run(op, arguments(op, "cuda:1"))
    expected = run(op, arguments(op, "cuda:0"))
    assert all(t.device.index == 1 for t in result)
    assert same(tuple(t.cpu() for t in result), tuple(t.cpu() for t in expected))


@ops
def test_f12_empty_launch_leaves_no_error(op: str) -> None:
    """Launch a grid of zero blocks. An error would show here or at the next call."""
    values = arguments(op)
    rows = values.get("q", values.get("x", values.get("gate_up", values.get("a"))))
    first = next(n for n, v in values.items() if v is rows)
    per_row = ("residual", "k", "v", "positions", "slots", "scale_a")
    if op not in ("attention", "attention_with_kvcache"):
        for name in (first, *(n for n in per_row if n in values)):
            values[name] = values[name][:0]
    else:
        values["q"] = values["q"][:, :0]
    assert run(op, values)[0].numel() == 0
    torch.cuda.synchronize()
    run(op, arguments(op))
    torch.cuda.synchronize()


@ops
def test_f42_f43_the_same_bits_every_time(op: str) -> None:
    """Repeat each op. A missing barrier, or scratch that is freed too early, changes the result."""
    values = arguments(op)
    expected = run(op, copies(values))
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for i in range(RACE_REPEATS):
        with torch.cuda.stream(streams[i % len(streams)]):
            result = run(op, copies(values))
            noise = torch.full((1 << 16,), float("nan"), device="cuda")  # reuses freed scratch
            del noise
            if i % 10 == 0:
                streams[i % len(streams)].synchronize()
                assert same(result, expected), f"run {i}"
    torch.cuda.synchronize()


@ops
def test_compiles_without_a_graph_break(op: str) -> None:
    values = arguments(op)
    fixed = {n: v for n, v in values.items() if not isinstance(v, Tensor)}
    names = [n for n, v in values.items() if isinstance(v, Tensor)]
    expected = run(op, copies(values))
    compiled = torch.compile(
        lambda *t: getattr(lf, op)(**dict(zip(names, t, strict=True)), **fixed), fullgraph=True
    )
    with torch.inference_mode():
        result = tensors(compiled(*(values[n] for n in names)))
    assert same(result, expected[: len(result)])


@ops
def test_f40_fake_version_on_cuda(op: str) -> None:
    overload, values = registered_arguments(op)
    values = tuple(v.cuda() if isinstance(v, Tensor) else v for v in values)
    torch.library.opcheck(overload, values, test_utils="test_faketensor")
