"""Tests of llama-fast generate: several prompts, stop texts, JSON, log probabilities, progress."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_fast import Llama
from llama_fast.cli import answers, main
from llama_fast.generation import sampling

from .support.llama3 import byte_tokenizer
from .test_cli import checkpoint as checkpoint
from .test_cli import failure, generate
from .test_cli import says as says

pytestmark = pytest.mark.usefixtures("threads")
GREEDY = ("--temperature", "0")


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return answer(texts): the model computes as usual, and each prompt gets these tokens."""

    def install(*texts: str) -> None:
        encoded = [byte_tokenizer().encode(text, add_special_tokens=False) for text in texts]
        samplers: list[Any] = []

        def draw(self: sampling.Sampler, _: Any) -> int:
            if self not in samplers:
                samplers.append(self)
            return encoded[samplers.index(self)].pop(0)

        monkeypatch.setattr(sampling.Sampler, "__call__", draw)

    return install


def objects(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_several_prompts_in_one_load(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loads: list[int] = []
    load = Llama.from_pretrained
    monkeypatch.setattr(
        Llama, "from_pretrained", lambda *a, **k: (loads.append(1), load(*a, **k))[1]
    )
    (tmp_path / "second.txt").write_text("Second: é\n\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"third\n")))
    given = ["--prompt", "First", "--prompt-file", str(tmp_path / "second.txt"), "--prompt", "-"]
    assert generate(checkpoint, *given, *GREEDY) == 0 and loads == [1]
    out, err = capsys.readouterr()
    alone = []
    for prompt in ("First", "Second: é\n", "third"):  # without the newline that ends the input
        assert generate(checkpoint, "--prompt", prompt, *GREEDY) == 0
        alone.append(capsys.readouterr().out)
    want = [f"--- {i} of 3 ---\n{text}" for i, text in enumerate(alone, 1)]
    assert out == "\n".join(want)
    tokens = 3 + sum(len(p.encode()) for p in ("First", "Second: é\n", "third"))
    assert err.startswith(f"prompt {tokens} tokens, ") and "| generated " in err


def test_the_first_token_needs_no_compiler(
    checkpoint: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """torch's takes as long to import as torch itself."""
    argv = ["generate", "--model", str(checkpoint), "--prompt", "Hi", "--chat", *GREEDY]
    code = f"import sys\nfrom llama_fast.cli import main\nassert main({argv}) == 0\n"
    run_python(f"{code}assert 'torch._dynamo' not in sys.modules")


def test_a_prompt_is_needed_and_stdin_is_read_once(capsys: pytest.CaptureFixture[str]) -> None:
    for given, message in (
        ([], "--prompt, --prompt-file or --messages"),
        (["--prompt", "-", "--prompt", "-"], "can be given once"),
        (["--prompt", "x", "--stop", ""], "argument --stop: got '', want a text"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["generate", "--model", "x", *given])
        assert message in failure(capsys)


def test_answers_are_printed_in_order_once_complete(
    checkpoint: Path, answer: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    answer("One is long.<|eot_id|>", "Two.<|eot_id|>")
    given = ["--prompt", "a", "--prompt", "b", "--max-new-tokens", "99"]
    assert generate(checkpoint, *given) == 0
    assert capsys.readouterr().out == "--- 1 of 2 ---\nOne is long.\n\n--- 2 of 2 ---\nTwo.\n"


def test_json_lines(
    checkpoint: Path, answer: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--prompt", "a", "--prompt", "bc", "--prompt", "d", "--json", "--logprobs"]
    answer("é.<|eot_id|>", "a STOP b", "0123456789")
    assert generate(checkpoint, *given, "--stop", "STOP") == 0
    found = objects(capsys)
    assert [one["index"] for one in found] == [0, 1, 2]
    assert [one["text"] for one in found] == ["é.", "a ", "01234567"]
    assert [one["finish_reason"] for one in found] == ["stop", "stop", "length"]
    assert [one["prompt_tokens"] for one in found] == [2, 3, 2]
    assert [one["new_tokens"] for one in found] == [4, 6, 8]
    for one in found:
        assert len(one["ids"]) == len(one["logprobs"]) == one["new_tokens"]
        assert all(value < 0 for value in one["logprobs"]) and one["seconds"] > 0


def test_json_after_ctrl_c(checkpoint: Path, says: Any, capsys: pytest.CaptureFixture[str]) -> None:
    says(byte_tokenizer().encode("He", add_special_tokens=False))
    assert generate(checkpoint, "--prompt", "x", "--json") == 130
    (one,) = objects(capsys)
    assert one["text"] == "He" and one["finish_reason"] == "interrupted" and "logprobs" not in one


@pytest.mark.parametrize("stop", ["l<|", "<|eot_id|>", "🦙"])
def test_the_stop_text_ends_the_generation(
    checkpoint: Path, stop: str, says: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A byte is a token here, so these texts cross tokens; a control token's text is not shown."""
    text = "all<|x" if stop == "l<|" else f"a{stop}x"
    says(byte_tokenizer().encode(text, add_special_tokens=False))
    assert generate(checkpoint, "--prompt", "x", "--stop", "no", "--stop", stop) == 0
    assert capsys.readouterr().out == ("al\n" if stop == "l<|" else "a\n")


def test_ignore_eos(checkpoint: Path, says: Any, capsys: pytest.CaptureFixture[str]) -> None:
    says(byte_tokenizer().encode("a<|eot_id|>bcdefgh", add_special_tokens=False))
    assert generate(checkpoint, "--prompt", "x", "--ignore-eos", "--json") == 0
    (one,) = objects(capsys)
    assert one["text"] == "abcdefg" and one["finish_reason"] == "length"


def test_logprobs_go_to_stderr(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--prompt", "x", "--ignore-eos", *GREEDY]
    assert generate(checkpoint, *given) == 0
    plain = capsys.readouterr().out
    assert generate(checkpoint, *given, "--logprobs") == 0
    out, err = capsys.readouterr()
    *lines, footer = err.splitlines()
    assert out == plain and len(lines) == 8 and footer.startswith("prompt ")
    assert all(float(line.split()[0]) < 0 for line in lines)


@pytest.mark.parametrize(
    ("option", "name", "value"),
    [("--min-p", "min_p", 0.25), ("--repetition-penalty", "repetition_penalty", 1.5)],
)
def test_settings_reach_generate(
    checkpoint: Path, option: str, name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    monkeypatch.setattr(Llama, "generate", lambda *_, **options: seen.append(options[name]))
    assert generate(checkpoint, "--prompt", "x") == 0
    assert generate(checkpoint, "--prompt", "x", option, str(value)) == 0
    assert seen[1] == value != seen[0]


def test_a_long_prompt_shows_its_progress(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only on a terminal, and gone before the text."""
    shown: list[tuple[int, bool]] = []
    real = answers.Answers.on_prefill

    def on_prefill(self: Any, i: int, done: int) -> None:
        real(self, i, done)
        shown.append((done, self._bar is not None and not self._bar.finished))

    monkeypatch.setattr(answers.Answers, "on_prefill", on_prefill)
    given = ["--prompt", "x" * 1100, *GREEDY]
    assert generate(checkpoint, *given) == 0
    plain, err = capsys.readouterr()
    assert shown == [(512, False), (1024, False), (1101, False)] and err.count("\n") == 1
    shown.clear()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert generate(checkpoint, *given) == 0
    out, err = capsys.readouterr()
    assert shown == [(512, True), (1024, True), (1101, False)]
    assert out == plain and "Reading the prompt" in err
