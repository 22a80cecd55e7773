"""Tests of the llama-fast command: what it prints, where, and its exit codes."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast import __version__
from llama_fast.cli import main

from .support.checkpoints import hf_model, save
from .support.generation import draw_these
from .support.llama3 import byte_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    folder = save(hf_model(eos_token_id=tokenizer.eos_token_id), tmp_path_factory.mktemp("cli"))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return says(ids): the model computes as usual, and then these tokens are drawn."""

    return lambda ids: draw_these(monkeypatch, ids)


def failure(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error, which must be one line."""
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert out == "" and len(lines) == 1 and lines[0].startswith("llama-fast: error: "), err
    return lines[0]


pytestmark = pytest.mark.usefixtures("threads")


def generate(checkpoint: Path, *options: str) -> int:
    argv = ["generate", "--model", str(checkpoint), "--max-new-tokens", "8", "--threads", "1"]
    return main([*argv, *options])


@pytest.mark.parametrize(
    "command",
    [[], ["generate"], ["chat"], ["perplexity"], ["quantize"], ["plan"], ["tune"], ["env"]],
    ids=str,
)
def test_help_has_examples(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    assert "examples:\n  llama-fast " in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"llama-fast {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["generate", "--prompt", "x"], "required: --model"),
        (["generate", "--model", "x", "--prompt", "x", "--dtype", "int4"], "invalid choice"),
        (["generate", "--model", "x", "--prompt", "x", "--threads", "0"], "want a whole number"),
        (["generate", "--model", "x", "--prompt", "x", "--top-p", "2"], "--top-p: got"),
        (["generate", "--model", "x", "--prompt", "x", "--temperature", "-1"], "--temperature"),
        (["generate", "--model", "x", "--prompt", "x", "--system", "y"], "goes with --chat"),
        (["generate", "--model", "x", "--prompt", "x", "--draft-tokens", "3"], "with --speculate"),
        (
            ["generate", "--model", "x", "--prompt", "x", "--speculate", "lookup"]
            + ["--draft-tokens", "17"],
            "from 1 to 16",
        ),
        (["quantize", "in"], "required: OUT"),
        (["tune", "--output"], "expected one argument"),
        (["env", "--everything"], "unrecognized arguments"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_and_exit_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    assert message in failure(capsys)


def test_failures_are_one_line_and_exit_1(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--model", str(tmp_path / "none"), "--prompt", "x"]) == 1
    assert "none: not a folder" in failure(capsys)
    assert main(["generate", "--model", str(tmp_path), "--prompt", "x"]) == 1
    assert "no tokenizer that transformers can load" in failure(capsys)
    assert main(["quantize", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "config.json: no such file" in failure(capsys)
    assert generate(checkpoint, "--prompt", "broken \udcff") == 1
    assert "not valid UTF-8" in failure(capsys)


def test_traceback_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["quantize", str(tmp_path), str(tmp_path / "out")]
    with pytest.raises(FileNotFoundError):
        main([*argv, "--debug"])
    monkeypatch.setenv("LLAMA_FAST_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(argv)


def test_without_transformers(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert generate(checkpoint, "--prompt", "x", "--chat") == 1
    assert "pip install 'llama_fast[hf]'" in failure(capsys)
    assert generate(checkpoint, "--prompt", "x") == 0  # a plain text needs it only for some


@pytest.mark.parametrize("options", [[], ["--chat", "--system", "Be brief."]], ids=["base", "chat"])
def test_seed_repeats(
    checkpoint: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for _ in range(2):
        assert generate(checkpoint, "--prompt", "Hello", "--seed", "7", *options) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("options", [[], ["--no-graphs"]], ids=["default", "no-graphs"])
def test_no_graphs_reaches_generate(
    checkpoint: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool | None] = []
    monkeypatch.setattr(
        "llama_fast.model.Llama.generate", lambda *_, graphs, **__: seen.append(graphs)
    )
    assert generate(checkpoint, "--prompt", "x", "--device", "cpu", *options) == 0
    assert seen == [False if options else None]


def test_speculate_gives_the_same_text_and_says_what_was_accepted(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--prompt", "abcabcabcabc", "--temperature", "0", "--max-new-tokens", "24")
    assert generate(checkpoint, *options) == 0
    plain, err = capsys.readouterr()
    assert "accepted" not in err
    for by in ("lookup", str(checkpoint)):
        assert generate(checkpoint, *options, "--speculate", by, "--draft-tokens", "3") == 0
        out, err = capsys.readouterr()
        found = re.search(
            r"accepted (\d+) / (\d+) proposed, (\d\.\d\d) tokens a pass$", err.strip()
        )
        assert out == plain and found, err
        accepted, proposed, a_pass = int(found[1]), int(found[2]), float(found[3])
        assert accepted <= proposed and 1 <= a_pass <= 4
        if by != "lookup":  # the model itself is always right
            assert accepted == proposed > 0 and a_pass > 1
    assert generate(checkpoint, "--prompt", "x", "--speculate", str(checkpoint / "none")) == 1
    assert "none/config.json: no such file" in failure(capsys)


def test_prompt_from_stdin(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "Grüße 🦙"
    for argument, stdin in ((prompt, b""), ("-", prompt.encode())):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        assert generate(checkpoint, "--prompt", argument, "--temperature", "0") == 0
        out, err = capsys.readouterr()
        assert f"prompt {1 + len(prompt.encode())} tokens" in err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    assert generate(checkpoint, "--prompt", "-") == 1
    assert "stdin: not valid UTF-8" in failure(capsys)


def test_control_tokens_are_not_shown(
    checkpoint: Path, says: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    says(byte_tokenizer().encode("Hi<|python_tag|>🦙<|eot_id|>", add_special_tokens=False))
    assert generate(checkpoint, "--chat", "--prompt", "x") == 0
    assert capsys.readouterr().out == "Hi🦙\n"


def test_ctrl_c_keeps_what_was_generated(
    checkpoint: Path, says: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    says(byte_tokenizer().encode("Hey 🦙", add_special_tokens=False)[:-1])
    assert generate(checkpoint, "--prompt", "x") == 130
    out, err = capsys.readouterr()
    assert out == "Hey \ufffd\n"
    assert "generated 7 tokens" in err and "Traceback" not in err


def with_template(folder: Path, template: str | None) -> Path:
    """Save a tokenizer without weights: every failure comes before they are read."""
    byte_tokenizer(template).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ messages.append('x') }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ raise_exception('no') }}",
        "{% if %}",
    ],
)
def test_f54_hostile_chat_template(
    tmp_path: Path, template: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(with_template(tmp_path, template), "--chat", "--prompt", "x") == 1
    assert "chat template: " in failure(capsys)


def test_chat_template_that_cuts_messages_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refuse control tokens that cannot be told from the template's own."""
    folder = with_template(tmp_path, "{{ messages[0]['content'][:-1] }}")
    assert generate(folder, "--chat", "--prompt", "<|eot_id|>x") == 1
    assert "control tokens in a message" in failure(capsys)


def test_stops_where_only_the_tokenizer_says(
    tmp_path: Path, says: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = byte_tokenizer()
    folder = save(hf_model(eos_token_id=3), tmp_path)
    (folder / "generation_config.json").unlink()
    tokenizer.save_pretrained(folder)
    says(tokenizer.encode("Hi<|eot_id|>Ho", add_special_tokens=False))
    assert generate(folder, "--prompt", "x") == 0
    assert capsys.readouterr().out == "Hi\n"


def test_no_chat_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(with_template(tmp_path, None), "--chat", "--prompt", "x") == 1
    assert "chat_template is not set" in failure(capsys)


def test_quantize(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["quantize", str(checkpoint), str(out)]) == 0
    assert "21 of 30 tensors in FP8" in capsys.readouterr().out
    assert generate(out, "--chat", "--prompt", "Hello") == 0
    capsys.readouterr()
    assert main(["quantize", str(checkpoint), str(out)]) == 1
    assert "exists already" in failure(capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_tune_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 1
    assert "tune: needs a GPU" in failure(capsys)


def test_env_says_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from llama_fast import _cpu, backends

    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for fact in (__version__, torch.__version__, _cpu.isa(), Path(_cpu.__file__).name):
        assert fact in out
    for line in str(backends()).splitlines():
        assert line in out


def test_bench_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    bench = types.ModuleType("llama_fast.bench.__main__")
    bench.main = lambda argv, prog: seen.append([prog, *argv]) or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_fast.bench", types.ModuleType("llama_fast.bench"))
    monkeypatch.setitem(sys.modules, "llama_fast.bench.__main__", bench)
    assert main(["bench", "--quick", "--help"]) == 0
    assert seen == [["llama-fast bench", "--quick", "--help"]]


def test_bench_shows_a_traceback_where_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="--op: got rms_norn"):
        main(["bench", "--debug", "--op", "rms_norn"])
    assert main(["bench", "--op", "rms_norn"]) == 2
    assert capsys.readouterr().err.startswith("bench: --op: got rms_norn, want any of rms_norm, ")


def test_without_the_benchmark_suite(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "llama_fast.bench.__main__", None)
    assert main(["bench"]) == 1
    assert "no benchmark suite" in failure(capsys)


def test_as_a_process(tmp_path: Path) -> None:
    """Run python -m llama_fast: an exit code and no traceback."""
    command = [sys.executable, "-m", "llama_fast", "quantize", str(tmp_path), "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("llama-fast: error: ") and done.stderr.count("\n") == 1
