"""attn_implementation="llama_fast": each mask, on a kernel where there is one, else correctly."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from llama_fast.hf import attention, masks

from .conftest import close, prompt, tiny

NEITHER = "a mask that is neither causal nor padding"


@pytest.fixture(scope="module")
def plain() -> Any:
    return tiny()


@pytest.fixture(scope="module")
def ours(plain: Any) -> Any:
    """The same weights, with nothing but attention exchanged."""
    model = copy.deepcopy(plain)
    model.set_attn_implementation("llama_fast")
    return model


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail if scaled_dot_product_attention runs."""

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("scaled_dot_product_attention ran")

    monkeypatch.setattr(attention, "sdpa_attention_forward", refused)
    yield


def compare(
    plain: Any, ours: Any, tokens: Tensor, seen: Tensor | None = None, **inputs: Any
) -> None:
    """Compare logits, at the tokens that are seen."""
    with torch.no_grad():
        want, got = (m(tokens, **inputs).logits for m in (plain, ours))
    seen = torch.ones(tokens.shape, dtype=torch.bool) if seen is None else seen.bool()
    close(got[seen], want[seen])


def test_loads_with_it(plain: Any, ours: Any, tmp_path: Any) -> None:
    plain.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="llama_fast", dtype=torch.float32
    )
    assert loaded.config._attn_implementation == "llama_fast"
    compare(plain, loaded, prompt())


@pytest.mark.usefixtures("on_kernels")
class TestOnKernels:
    def test_none(self, plain: Any, ours: Any) -> None:
        compare(plain, ours, prompt(3, 17))

    @pytest.mark.parametrize("side", ["left", "right", "both"])
    def test_padding(self, plain: Any, ours: Any, side: str) -> None:
        mask = torch.ones(4, 9)
        mask[1, :4] = mask[2, :8] = side != "left" and side != "both"
        if side == "right":
            mask[1, 5:] = mask[2, 1:] = 0
        if side == "both":
            mask[1, 7:] = 0
        # transformers' own output for padding on the left is that of a query without keys.
        seen = torch.ones(4, 9) if side == "right" else mask
        compare(plain, ours, prompt(4), seen, attention_mask=mask)

    def test_packed_position_ids(self, plain: Any, ours: Any) -> None:
        """Sequences of 4, 1 and 4 tokens in one row, others in the second."""
        positions = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4, 5, 6]])
        compare(plain, ours, prompt(2), position_ids=positions, use_cache=False)
        with torch.no_grad():
            alone = plain(prompt(2)[:1, 5:]).logits
            packed = ours(prompt(2), position_ids=positions, use_cache=False).logits
        close(packed[:1, 5:], alone)


def boolean(name: str) -> Tensor:
    """Return a mask [2, 1, 9, 9] that no kernel computes. Each query sees itself."""
    torch.manual_seed(5)
    mask = torch.rand(2, 1, 9, 9) < 0.6
    if name == "prefix":  # bidirectional over the first 4
        mask = torch.ones(9, 9).tril().bool()[None, None].repeat(2, 1, 1, 1)
        mask[..., :4, :4] = True
    return mask | torch.eye(9, dtype=torch.bool)


@pytest.mark.parametrize("name", ["random", "prefix"])
@pytest.mark.parametrize("additive", [False, True])
def test_arbitrary(plain: Any, ours: Any, name: str, additive: bool) -> None:
    mask = boolean(name)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    attention._warn.cache_clear()
    with pytest.warns(UserWarning, match=NEITHER):
        compare(plain, ours, prompt(), attention_mask=mask)
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        compare(plain, ours, prompt(), attention_mask=mask)


def test_additive_bias(plain: Any, ours: Any) -> None:
    """A bias is no mask: its values count."""
    compare(plain, ours, prompt(), attention_mask=torch.randn(2, 1, 9, 9))


def test_hole_in_the_past(plain: Any, ours: Any) -> None:
    """What decoding after padding on the right makes."""
    mask = torch.ones(2, 9)
    mask[0, 3:5] = 0
    compare(plain, ours, prompt(), mask, attention_mask=mask)


def test_output_attentions(plain: Any, ours: Any) -> None:
    eager = copy.deepcopy(plain)
    eager.set_attn_implementation("eager")
    mask = torch.ones(2, 9)
    mask[1, :4] = 0
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers 4.57 asks for eager
        for options in ({}, {"attention_mask": mask}):
            want = eager(prompt(), output_attentions=True, **options).attentions
            got = ours(prompt(), output_attentions=True, **options).attentions
            assert len(got) == 3
            seen = options.get("attention_mask", torch.ones(2, 9)).bool()
            for a, b in zip(got, want, strict=True):
                close(a.transpose(1, 2)[seen], b.transpose(1, 2)[seen])


def test_dropout_and_training(plain: Any) -> None:
    model = copy.deepcopy(plain)
    model.set_attn_implementation("llama_fast")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    torch.manual_seed(0)
    with torch.no_grad():
        a, b = model(prompt()).logits, model(prompt()).logits
    assert not torch.equal(a, b)


@pytest.mark.parametrize(
    "ranges",
    [[[7], [7]], [[0, 7, 7], [3, 7, 7]], [[2, 5, 7], [0, 4, 7]]],
    ids=["static", "left", "both"],
)
@pytest.mark.parametrize("seqlen_q", [1, 4, 7])
def test_integer_forms_mean_their_boolean_form(ranges: list[list[int]], seqlen_q: int) -> None:
    """Against SDPA with as_boolean: on the tokens that are no padding on the left."""
    mask = torch.tensor(ranges, dtype=torch.int32)[:, None, None]
    q, k, v = torch.randn(2, 4, seqlen_q, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    as_bool = masks.as_boolean(mask, seqlen_q, 9)
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=as_bool, enable_gqa=True
    )
    got, _ = attention.attend(torch.nn.Module(), q, k, v, mask)
    seen = as_bool.any(-1)[:, 0].expand(2, seqlen_q)
    assert seen.any()
    close(got[seen], want.transpose(1, 2)[seen], 1e-5)


@pytest.mark.parametrize("d", [8, 12, 20])
def test_head_dims_of_the_ops(d: int, on_kernels: None) -> None:
    q, k = torch.randn(1, 4, 5, d), torch.randn(1, 2, 5, d)
    got, _ = attention.attend(torch.nn.Module(), q, k, k)
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k, k, is_causal=True, enable_gqa=True
    )
    close(got, want.transpose(1, 2), 1e-5)


def test_bidirectional_and_cross(plain: Any) -> None:
    """Modules that are not causal."""
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 9, 16)
    module = torch.nn.Module()
    module.is_causal = False
    got, _ = attention.attend(module, q, k, k)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    close(got, want.transpose(1, 2), 1e-5)


@pytest.mark.parametrize(
    ("q", "options", "why"),
    [
        (torch.zeros(1, 2, 3, 10), {}, "shapes"),
        (torch.zeros(1, 2, 3, 4), {}, "shapes"),
        (torch.zeros(1, 2, 3, 16).double(), {}, "tensors of torch.float64"),
        (torch.zeros(1, 2, 3, 16), {"dropout": 0.5}, "dropout"),
    ],
)
def test_says_what_no_kernel_takes(q: Tensor, options: dict[str, Any], why: str) -> None:
    attention._warn.cache_clear()
    with pytest.warns(UserWarning, match=why):
        out, _ = attention.attend(torch.nn.Module(), q, q, q, **options)
    assert out.shape == (1, 3, 2, q.shape[-1])
