"""Tests of bench/peers: which peers are installed, and that a peer's model is the same model. Tests
of a peer that is not installed are skipped by name."""

from __future__ import annotations

import copy
import ctypes
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import llama_fast as lf
from llama_fast import reference
from llama_fast.bench import peers
from llama_fast.bench.peers import gguf_file, ik_llamacpp, in_transformers, llamacpp
from llama_fast.bench.peers.in_transformers import exchanged
from llama_fast.bench.peers.peer import Unsupported

CPU = torch.device("cpu")
CONTEXT, STEPS = 48, 3


def error(got: Tensor, exact: Tensor) -> float:
    """Return max |got - exact| / max |exact|."""
    return ((got.double() - exact.double()).abs().max() / exact.double().abs().max()).item()


@pytest.fixture(scope="module")
def hf() -> Any:
    """Return a model of two layers with grouped heads and rotary scaling that starts within the
    context. Its weights hold bf16 values; it computes in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=160,
        max_position_embeddings=512,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        std = 1.0 if "embed" in name else p.shape[-1] ** -0.5
        p.data.normal_(1.0 if p.dim() == 1 else 0.0, std, generator=generator)
        p.data = p.data.bfloat16().float()
    return model


@pytest.fixture(scope="module")
def unscaled(hf: Any) -> Any:
    """Return the same weights with plain rotary embedding."""
    config = copy.deepcopy(hf.config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    model = type(hf)(config).eval()
    model.load_state_dict(hf.state_dict())
    return model


@pytest.fixture(scope="module")
def tokens(hf: Any) -> Tensor:
    """Return ids [1, CONTEXT + STEPS]. They repeat the end of the context, as decode's runs do."""
    context = torch.randint(hf.config.vocab_size, (1, CONTEXT), generator=torch.manual_seed(1))
    return torch.cat((context, context[:, -1:].expand(1, STEPS)), 1)


@pytest.fixture(scope="module")
def exact(hf: Any, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        return hf(tokens).logits


# Which peers are installed.


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def test_absent_peers_are_skipped_with_the_command_that_installs_them(no_peers: None) -> None:
    found, skipped = peers.wanted(None, "cuda")
    assert found == []
    assert skipped.keys() == peers.PEERS.keys()
    assert skipped["torchao"] == "torchao is not installed: pip install 'llama_fast[peers]'"
    assert "flash-attn --no-build-isolation" in skipped["flash-attn"]
    assert skipped["llama.cpp"] == "runs on cpu only, not on cuda"


def test_a_peer_asked_for_by_name_is_required(no_peers: None) -> None:
    with pytest.raises(ValueError, match=r"peer torchao: torchao is not installed: pip install"):
        peers.wanted(["torchao"], "cpu")
    with pytest.raises(ValueError, match=r"peer flashinfer: runs on cuda only, not on cpu"):
        peers.wanted(["flashinfer"], "cpu")


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"got vllm, want some of llama\.cpp, ik_llama\.cpp, "):
        peers.wanted(["torchao", "vllm"], "cpu")


def test_only_those_asked_for_in_the_order_of_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99.0")
    found, skipped = peers.wanted(["torchao", "llama.cpp"], "cpu")
    assert [p.name for p in found] == ["llama.cpp", "torchao"]
    assert skipped == {}


def test_too_old_a_version_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace())
    peer = peers.PEERS["llama.cpp"]
    for version, fits in (("0.3.9", False), ("0.3.36", True), ("0.3.100+cpu", True)):
        monkeypatch.setattr("importlib.metadata.version", lambda name, v=version: v)
        assert (peer.missing() is None) == fits, version


def test_asking_imports_no_peer() -> None:
    before = set(sys.modules)
    peers.wanted(None, "cpu")
    modules = {m for p in peers.PEERS.values() for m in p.modules}
    assert not modules & (set(sys.modules) - before)


def test_a_peers_model_is_refused_where_it_cannot_run() -> None:
    for name, device in (("openvino", "cuda"), ("liger-kernel", "cpu")):
        with pytest.raises(Unsupported, match=f"{name} is driven on c"):
            peers.PEERS[name].models(None, torch.device(device))


# The same model.


def test_rows_are_permuted_so_that_neighbors_rotate_together() -> None:
    weight = torch.arange(8.0)[:, None]  # two heads of four rows
    moved = gguf_file.interleaved(weight, heads=2)
    assert moved.flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_moved_rows_under_interleaved_rotation_score_as_before() -> None:
    heads, head_dim, hidden = 2, 16, 24
    x = torch.randn(7, hidden, dtype=torch.float64)
    table, positions = lf.rope_table(1e4, 64, head_dim=head_dim), torch.arange(7) * 5
    w = torch.randn(2, heads * head_dim, hidden, dtype=torch.float64)

    def scores(wq: Tensor, wk: Tensor, interleaved: bool) -> Tensor:
        q, k = ((x @ t.t()).view(7, heads, head_dim) for t in (wq, wk))
        q, k = reference.apply_rope(q, k, positions, table, interleaved=interleaved)
        return torch.einsum("qhd,khd->hqk", q, k)

    moved = [gguf_file.interleaved(t, heads) for t in w]
    assert_close(scores(*moved, interleaved=True), scores(*w, interleaved=False))


def test_what_the_file_holds(hf: Any, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    streamed = gguf_file.write(tmp_path / "model.gguf", hf, "BF16")
    linears = [m.weight for m in hf.modules() if isinstance(m, torch.nn.Linear)]
    assert streamed == 2 * sum(w.numel() for w in linears)
    read = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(read) == 3 + 1 + 9 * 2
    down = read["blk.1.ffn_down.weight"]
    assert down.tensor_type == gguf.GGMLQuantizationType.BF16
    assert down.shape.tolist() == [192, 128]
    bits = torch.from_numpy(down.data.copy()).view(torch.bfloat16).view(128, 192)
    assert torch.equal(bits.float(), hf.model.layers[1].mlp.down_proj.weight)
    factors = read["rope_freqs.weight"].data
    assert factors[0] == 1 and factors[-1] == 8


def test_rows_that_do_not_divide_into_blocks_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=8,
    )
    with pytest.raises(ValueError, match=r"rows of 48 do not divide into blocks of 32"):
        gguf_file.write(tmp_path / "model.gguf", LlamaForCausalLM(config), "Q8_0")


def test_q8_0_is_the_gguf_packages() -> None:
    quants = pytest.importorskip("gguf.quants")
    t = torch.randn(6, 96)
    t[0] = 0  # a block of zeros
    t[1, :32] = torch.arange(-16, 16) * 0.5 * 2**-3  # halves
    t[1, 5] = 127 * 2**-3
    want = quants.quantize(t.numpy(), quants.GGMLQuantizationType.Q8_0)
    assert torch.equal(gguf_file.q8_0(t), torch.from_numpy(want))


def check_model(model: peers.ModelPeer, tokens: Tensor, exact: Tensor, allowed: float) -> None:
    context = tokens[:, :CONTEXT]
    logits = model.logits(tokens)
    assert logits.dtype == torch.float32 and logits.shape == exact.shape
    assert error(logits, exact) < allowed, model.label
    prefill = model.extend(context[:, :0], context)
    extend = model.extend(context[:, :-2], context[:, -2:])
    decode = model.decode(context, STEPS)
    for i in range(2):  # the second run finds what the first left behind
        assert error(prefill(i).float(), exact[:, CONTEXT - 1]) < allowed, model.label
        assert error(extend(i).float(), exact[:, CONTEXT - 1]) < allowed, model.label
        assert error(decode(i).float(), exact[:, -1]) < allowed, model.label
    decode = model.decode(context[:, :-2], STEPS)  # decode also continues what extend began
    first = decode(0).float().clone()
    assert error(extend(0).float(), exact[:, CONTEXT - 1]) < allowed, model.label
    assert error(decode(1).float(), first) < allowed, model.label


# Measured: 0.017 and 0.003, 0.018 and 0.0005, 0.016 and 0.007. Q8_0 and int8 round each weight to
# 1/254 of the largest in its block or row; OpenVINO also rounds its cache to u8.
MODELS = {
    "llama.cpp": {"llama.cpp Q8_0": 0.03, "llama.cpp bf16": 0.006},
    "ik_llama.cpp": {"ik_llama.cpp Q8_0": 0.03, "ik_llama.cpp bf16": 0.006},
    "openvino": {"openvino int8": 0.03, "openvino bf16": 0.015},
    "transformers + llama_fast": {
        "transformers + llama_fast": 0.015,
        "transformers + llama_fast FP8": 0.06,
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_a_peers_model_agrees_with_transformers_in_fp32(
    hf: Any, unscaled: Any, tokens: Tensor, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in peers.PEERS[name].modules:
        pytest.importorskip(module)
    adapter = importlib.import_module(f"llama_fast.bench.peers.{peers.PEERS[name].adapter}")
    for module in (adapter, llamacpp):
        monkeypatch.setattr(module, "CHUNK", 20, raising=False)  # the context in several pieces
    hf = unscaled if name == "ik_llama.cpp" else hf
    with torch.inference_mode():
        exact = hf(tokens).logits
    labels = []
    for model in peers.PEERS[name].models(copy.deepcopy(hf).bfloat16(), CPU):
        labels.append(model.label)
        check_model(model, tokens, exact, MODELS[name][model.label])
        assert model.weight_bytes() > 0
        model.close()
    assert labels == [*MODELS[name]]


def test_ik_llama_cpp_refuses_what_it_would_ignore(hf: Any) -> None:
    with pytest.raises(Unsupported, match="rotary scaling"):
        ik_llamacpp.models(hf, CPU)


class StandIn:
    """Replace ik_llama.cpp's bindings, in the calls that are made. A token's logits depend on its
    position, its id and the number of tokens that it sees."""

    class llama_batch(ctypes.Structure):
        _fields_ = [
            ("n_tokens", ctypes.c_int32),
            ("token", ctypes.POINTER(ctypes.c_int32)),
            ("logits", ctypes.POINTER(ctypes.c_int8)),
            ("all_pos_0", ctypes.c_int32),
            ("all_pos_1", ctypes.c_int32),
        ]

    def __init__(self) -> None:
        self.caches: list[set[int]] = []  # positions
        self.found, self.freed = np.zeros((0, 3), np.float32), 0

    def llama_model_default_params(self) -> Any:
        return _structure(n_gpu_layers=9, use_mmap=True)

    def llama_context_default_params(self) -> Any:
        return _structure(
            **dict.fromkeys(("n_ctx", "n_batch", "n_ubatch", "n_threads", "n_threads_batch"), 0),
            flash_attn=False,
        )

    def llama_model_load_from_file(self, path: bytes, params: Any) -> int:
        assert (params.n_gpu_layers, params.use_mmap) == (0, False)
        return 1

    def llama_init_from_model(self, model: int, params: Any) -> int:
        assert params.flash_attn and params.n_threads == torch.get_num_threads()
        self.caches.append(set())
        return len(self.caches)

    def llama_kv_cache_seq_rm(self, context: int, sequence: int, begin: int, end: int) -> bool:
        assert (sequence, end) == (0, -1)
        self.caches[context - 1] = {p for p in self.caches[context - 1] if p < begin}
        return True

    def llama_decode(self, context: int, batch: Any) -> int:
        assert batch.all_pos_1 == 1
        cache, rows = self.caches[context - 1], []
        for i in range(batch.n_tokens):
            position = batch.all_pos_0 + i
            assert position not in cache
            cache.add(position)
            rows.append((position, batch.token[i], len(cache)))
        self.found = np.array(rows if batch.logits else rows[-1:], np.float32)
        return 0

    def llama_get_logits(self, context: int) -> Any:
        return self.found.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    def llama_free(self, context: int) -> None:
        self.freed += 1

    llama_free_model = llama_free


def _structure(**values: int) -> Any:
    fields = [(name, ctypes.c_int32) for name in values]
    return type("params", (ctypes.Structure,), {"_fields_": fields})(*values.values())


def test_ik_llama_cpp_gets_each_batchs_position(monkeypatch: pytest.MonkeyPatch) -> None:
    library = StandIn()
    monkeypatch.setattr(ik_llamacpp, "_bindings", lambda: library)
    monkeypatch.setattr(gguf_file, "write", lambda *_: 7)
    monkeypatch.setattr(llamacpp, "CHUNK", 4)  # the context comes in several pieces
    hf = SimpleNamespace(config=SimpleNamespace(vocab_size=3))
    model = ik_llamacpp.Model("ik_llama.cpp Q8_0", hf, "Q8_0")
    tokens = torch.arange(20, 29)[None]
    want = torch.tensor([[p, 20 + p, p + 1] for p in range(9)]).float()
    assert torch.equal(model.logits(tokens)[0], want)
    prefill = model.extend(tokens[:, :0], tokens)
    extend = model.extend(tokens[:, :7], tokens[:, 7:])
    decode = model.decode(tokens[:, :7], steps=3)
    for i in range(2):  # the second run finds what the first left behind
        assert prefill(i).tolist() == [[8, 28, 9]]
        assert extend(i).tolist() == [[8, 28, 9]]
        assert decode(i).tolist() == [[9, 26, 10]]
    assert model.weight_bytes() == 7
    model.close()
    assert library.freed == len(library.caches) + 1


def test_transformers_with_parts_exchanged(
    hf: Any, tokens: Tensor, exact: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_transformers, "CHUNK", 20)
    changed: list[Any] = []
    model = exchanged("as it is", hf, changed.append)
    assert changed[0] is not hf
    check_model(model, tokens, exact, 1e-5)
    linears = [m.weight for m in hf.modules() if isinstance(m, torch.nn.Linear)]
    assert model.weight_bytes() == sum(w.nbytes for w in linears)


# The same ops.


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def cases() -> Iterator[tuple[str, dict[str, Any], Any, float]]:
    """Yield op, inputs, what run(i) should return, and the error allowed."""
    x, residual, weight = randn(6, 128), randn(6, 128), randn(128)
    wide, eps = weight.float(), 1e-5
    norm = {"x": x, "weight": weight, "eps": eps}
    yield "rms_norm", norm, lambda _: reference.rms_norm(x.float(), wide, eps), 1e-5
    added = x.float() + residual.float()
    yield (
        "add_rms_norm",
        {**norm, "residual": residual},
        lambda _: reference.rms_norm(added, wide, eps),
        1e-5,
    )
    yield "silu_and_mul", {"gate_up": x}, lambda _: reference.silu_and_mul(x.float()), 1e-5
    weights = [randn(96, 128) for _ in range(2)]
    for op, allowed in (("linear", 1e-5), ("fp8_linear", 0.02)):
        yield (
            op,
            {"x": x, "weights": weights},
            lambda i: x.float() @ weights[i % 2].float().t(),
            allowed,
        )
    q, k, v = randn(1, 40, 8, 32), randn(1, 40, 2, 32), randn(1, 40, 2, 32)
    yield (
        "attention",
        {"q": q, "k": k, "v": v},
        lambda _: reference.attention(q.float(), k.float(), v.float()),
        0.005,
    )
    one, ks, vs = randn(2, 1, 8, 32), *([randn(2, 40, 2, 32) for _ in range(2)] for _ in "kv")
    yield (
        "attention_with_kvcache",
        {"q": one, "k_caches": ks, "v_caches": vs, "cache_seqlens": torch.tensor([40, 40])},
        lambda i: reference.attention(one.float(), ks[i % 2].float(), vs[i % 2].float()),
        0.005,
    )


@pytest.mark.parametrize("name", ("llama.cpp", "ik_llama.cpp"))
@pytest.mark.parametrize(
    "op, inputs, wanted, allowed", list(cases()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_llama_cpps_ops_agree_with_ours(
    op: str, inputs: dict[str, Any], wanted: Any, allowed: float, name: str
) -> None:
    for module in peers.PEERS[name].modules:
        pytest.importorskip(module)
    (run,) = peers.PEERS[name].ops(op, inputs).values()
    for i in range(3):
        assert error(run(i), wanted(i)) < allowed


def test_an_op_that_a_peer_lacks_is_not_run() -> None:
    pytest.importorskip("llama_cpp")
    assert peers.PEERS["llama.cpp"].ops("apply_rope", {}) == {}


# What only a GPU can run. These tests check that the arguments mean what the peer's interface says.


def test_flashinfers_pages_are_the_contiguous_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace plan and run with a stand-in that follows their documented meaning page by page."""
    from llama_fast.bench.peers import flash_infer

    class Wrapper:
        def __init__(self, workspace: Tensor, layout: str, use_tensor_cores: bool) -> None:
            assert layout == "NHD"

        def plan(
            self,
            indptr: Tensor,
            indices: Tensor,
            last: Tensor,
            heads: int,
            kv_heads: int,
            head_dim: int,
            page: int,
            *,
            q_data_type: torch.dtype,
            kv_data_type: torch.dtype,
        ) -> None:
            assert {t.dtype for t in (indptr, indices, last)} == {torch.int32}
            assert (heads, kv_heads, head_dim) == (8, 2, 32)
            self.lengths = [
                (b - a - 1) * page + n
                for a, b, n in zip(indptr[:-1], indptr[1:], last, strict=True)
            ]
            self.pages = [indices[a:b].long() for a, b in zip(indptr[:-1], indptr[1:], strict=True)]

        def run(self, q: Tensor, paged: tuple[Tensor, Tensor]) -> Tensor:
            out = []
            for b, (pages, length) in enumerate(zip(self.pages, self.lengths, strict=True)):
                k, v = (t[pages].flatten(0, 1)[None, :length] for t in paged)
                out.append(reference.attention(q[b : b + 1, None], k, v)[:, 0])
            return torch.cat(out)

    library = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper)
    monkeypatch.setattr(flash_infer, "_library", lambda: library)
    q, lengths = torch.randn(2, 1, 8, 32), torch.tensor([17, 48], dtype=torch.int32)
    ks, vs = ([torch.randn(2, 48, 2, 32) for _ in range(3)] for _ in "kv")
    inputs = {"q": q, "k_caches": ks, "v_caches": vs, "cache_seqlens": lengths}
    runs = flash_infer.attention_with_kvcache(inputs)
    assert len(runs) == 2
    for run in runs.values():
        for i in range(4):
            want = reference.attention_with_kvcache(q, ks[i % 3], vs[i % 3], lengths)
            assert_close(run(i), want[:, 0])


def test_flash_attn_is_called_causal_with_the_rounds_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_fast.bench.peers import flash_attention

    library = ModuleType("flash_attn")
    library.flash_attn_func = reference.attention  # type: ignore[attr-defined]
    library.flash_attn_with_kvcache = reference.attention_with_kvcache  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", library)
    q, k, v = torch.randn(1, 9, 4, 16), torch.randn(1, 9, 2, 16), torch.randn(1, 9, 2, 16)
    (run,) = flash_attention.attention({"q": q, "k": k, "v": v}).values()
    assert_close(run(0), reference.attention(q, k, v))
    ks, vs = ([torch.randn(1, 9, 2, 16) for _ in range(2)] for _ in "kv")
    lengths = torch.tensor([7], dtype=torch.int32)
    inputs = {"q": q[:, :1], "k_caches": ks, "v_caches": vs, "cache_seqlens": lengths}
    (run,) = flash_attention.attention_with_kvcache(inputs).values()
    for i in range(3):
        want = reference.attention_with_kvcache(q[:, :1], ks[i % 2], vs[i % 2], lengths)
        assert_close(run(i), want)
