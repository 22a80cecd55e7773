"""Tests of perplexity and of the distance from another model, as a function and as a command."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import llama_fast as lf
from llama_fast.cli import main
from llama_fast.perplexity import perplexity

from .support.checkpoints import hf_logits, hf_model, save
from .support.llama3 import byte_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread", "threads")

TEXT = "The quick brown fox jumps over the lazy dog, and over it again. " * 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = save(hf_model(), tmp_path_factory.mktemp("checkpoint"))
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def test_it_is_the_definition(checkpoint: Path) -> None:
    """Compute perplexity, divergence and equal top tokens from whole logits in fp64: two windows,
    and a last one of a single token, which predicts nothing."""
    torch.manual_seed(0)
    hf, other = hf_model().double(), hf_model().double()
    tokens = torch.randint(320, (101,))
    model = lf.Llama.from_pretrained(checkpoint, torch.float32)
    assert torch.equal(model.weights.embedding.double(), hf.model.embed_tokens.weight)
    save(other.float(), checkpoint / "other")
    against = lf.Llama.from_pretrained(checkpoint / "other", torch.float32)
    windows = tokens[:100].view(2, 50)
    ours, theirs = (hf_logits(m, windows)[:, :-1].log_softmax(-1) for m in (hf, other.double()))
    losses = -ours.gather(2, windows[:, 1:, None])
    seen: list[int] = []
    got = perplexity(model, tokens.tolist(), against, context=50, on_tokens=seen.append)
    assert got.tokens == 98 == seen[-1]
    assert got.perplexity == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    error = losses.std(correction=0).item() / math.sqrt(98)
    assert got.standard_error == pytest.approx(got.perplexity * error, rel=1e-4)
    assert got.against is not None
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    assert got.against.mean_kl == pytest.approx(kl, rel=1e-4)
    assert got.against.same_top == (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    swapped = perplexity(against, tokens.tolist(), model, context=50)
    assert swapped.against is not None and swapped.against.perplexity == got.perplexity
    assert got.against.perplexity == swapped.perplexity != got.perplexity


def test_an_fp8_cache_takes_part(checkpoint: Path) -> None:
    model = lf.Llama.from_pretrained(checkpoint, torch.float32)
    tokens = torch.randint(320, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    plain, cached = (perplexity(model, tokens, model, kv_cache=kind) for kind in (None, "fp8"))
    assert plain.against is not None and cached.against is not None
    assert plain.against.mean_kl < 1e-8 < 1e-5 < cached.against.mean_kl


def test_an_fp8_cache_has_the_checkpoints_scales(checkpoint: Path) -> None:
    """Scales that overflow every key and value must show."""
    model = lf.Llama.from_pretrained(checkpoint, torch.float32)
    tokens = torch.randint(320, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    measured = perplexity(model, tokens, kv_cache="fp8")
    tiny = torch.full((model.config.num_hidden_layers, 1), 1e-6)
    weights = dataclasses.replace(model.weights, k_scale=tiny, v_scale=tiny)
    stored = perplexity(lf.Llama(model.config, weights), tokens, kv_cache="fp8")
    assert stored.perplexity != measured.perplexity


def test_bad_arguments(checkpoint: Path) -> None:
    model = lf.Llama.from_pretrained(checkpoint)
    for tokens, options, message in (
        ([1], {}, "tokens: got 1, want at least 2"),
        ([1, 2], {"context": 1}, "context: got 1, want 2 to the model's 131072"),
        ([1, 2], {"context": 131073}, "context: got 131073"),
        ([1, 2], {"kv_cache": "int8"}, "kv_cache: got 'int8', want None or 'fp8'"),
    ):
        with pytest.raises(ValueError, match=message):
            perplexity(model, tokens, **options)
    wide = lf.Llama.from_config(lf.LlamaConfig(321, 64, 96, 1, 4, 2, 16))
    with pytest.raises(ValueError, match="against: got a vocabulary of 321, want the model's, 320"):
        perplexity(model, [1, 2], wide)


def run(checkpoint: Path, text: Path, *options: str) -> int:
    argv = ["perplexity", "--model", str(checkpoint), "--text", str(text), "--threads", "1"]
    return main([*argv, *options])


def test_the_command_prints_what_the_function_returns(
    checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--quantize", "fp8", "--context", "64", "--tokens", "150", "--against", "float32")
    assert run(checkpoint, text, *options, "--json") == 0
    out, err = capsys.readouterr()
    got = json.loads(out)
    assert err == ""
    tokens = byte_tokenizer()(TEXT)["input_ids"][:150]
    expected = perplexity(
        lf.Llama.from_pretrained(checkpoint, quantize="fp8"),
        tokens,
        lf.Llama.from_pretrained(checkpoint, torch.float32),
        context=64,
    )
    assert expected.against is not None
    assert got.pop("settings") == {
        "model": str(checkpoint),
        "dtype": "bfloat16",
        "quantize": "fp8",
        "kv_cache": None,
        "text": str(text),
        "against": "float32",
        "context": 64,
    }
    assert got == expected._asdict() | {"against": expected.against._asdict()}
    assert run(checkpoint, text, *options) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert f"perplexity {expected.perplexity:.3f} +- " in first and "147 tokens" in first
    assert f"against float32: perplexity {expected.against.perplexity:.3f} " in second
    assert run(checkpoint, text, "--tokens", "30", "--against", str(checkpoint)) == 0
    assert "mean KL 0.00000 nats a token, same top token 100.0%" in capsys.readouterr().out


def test_failures_are_one_line(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latin, other = tmp_path / "latin.txt", tmp_path / "other"
    latin.write_bytes(b"caf\xe9")
    byte_tokenizer().save_pretrained(other)
    edited = (other / "tokenizer.json").read_text().replace('"e":68', '"e":69,"f":68')
    (other / "tokenizer.json").write_text(edited)
    for arguments, message in (
        ((checkpoint, tmp_path / "none"), "No such file"),
        ((checkpoint, latin), "latin.txt: not valid UTF-8 at byte 3"),
        ((checkpoint, text, "--context", "1"), "context: got 1"),
        ((checkpoint, text, "--against", str(tmp_path / "none")), "none: not a folder"),
    ):
        assert run(*arguments) == 1
        out, err = capsys.readouterr()
        assert out == "" and message in err and len(err.splitlines()) == 1, err
