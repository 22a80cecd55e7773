"""Tests of wrong input to the commands: one line that names the option, no traceback, no wait."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast import cli
from llama_fast.generation import speculate

from .test_cli import checkpoint as checkpoint
from .test_cli import failure, generate

pytestmark = pytest.mark.usefixtures("threads")

BAD = (
    "abc", "", " ", "-1", "0", "nan", "inf", "1e999", "1.5", "9" * 5000, "9999999999", "100000",
    "\udcff", "--x", "ＩＩ", "a\nb", "/dev/null/x", "/proc/self/mem", __file__,
)  # fmt: skip
REQUIRED = {
    "generate": ["--model", "nowhere", "--prompt", "x"],
    "perplexity": ["--model", "nowhere", "--text", __file__],
    "quantize": ["nowhere", "out"],
    "tune": [],
    "env": [],
}
# What says nothing to a user, or speaks of Python.
RAW = re.compile(r"\[Errno|invalid \w+ value|NoneType|unpack|overflow|Traceback|object|_positive")


def options() -> Iterator[tuple[str, str]]:
    """Yield every command with each of its options and positional arguments that take a value."""
    (commands,) = (action for action in cli._parser()._actions if isinstance(action.choices, dict))
    for name, parser in commands.choices.items():
        for action in parser._actions:
            takes = action.nargs is None and not isinstance(action, argparse._SubParsersAction)
            if takes and name in REQUIRED:
                yield name, action.option_strings[0] if action.option_strings else action.dest


def argv(command: str, option: str, value: str) -> list[str]:
    required = list(REQUIRED[command])
    if option in required:
        at = required.index(option)
        required[at : at + 2] = []
    if not option.startswith("-"):
        required[option == "target"] = value
        return [command, *required]
    return [command, *required, f"{option}={value}"]


def test_every_command_is_swept() -> None:
    swept = {command for command, _ in options()}
    assert swept >= {"generate", "perplexity", "quantize", "tune"} and len(list(options())) > 30


@pytest.mark.skipif(torch.cuda.is_available(), reason="tune would run")
@pytest.mark.parametrize(("command", "option"), list(options()), ids=" ".join)
def test_bad_values_are_refused_in_one_line(
    command: str,
    option: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where the value itself is fine, the checkpoint "nowhere" is refused."""
    monkeypatch.chdir(tmp_path)
    for value in BAD:
        try:
            code: Any = cli.main(argv(command, option, value))
        except SystemExit as exit_:
            code = exit_.code
        assert code in (1, 2), value[:40]
        line = failure(capsys)
        assert len(line) < 1000 and not RAW.search(line), line[:1000]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--threads", "--tp", "--op", "--model", "--dtype", "--device"])
def test_the_benchmarks_bad_values(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    for value in set(BAD) - {"", " ", "\udcff"}:  # pytest's stderr is strict
        try:
            code: Any = cli.main(["bench", "--list", f"{option}={value}"])
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        assert code == 2 and out == "" and err.startswith("bench: --"), err[:200]
        assert err.count("\n") == 1 and len(err) < 1000 and not RAW.search(err), err[:200]


def test_the_parser_knows_the_librarys_limits() -> None:
    (commands,) = (action for action in cli._parser()._actions if isinstance(action.choices, dict))
    (option,) = (a for a in commands.choices["generate"]._actions if a.dest == "draft_tokens")
    assert callable(option.type) and option.type(str(speculate.MOST_DRAFT_TOKENS))
    with pytest.raises(argparse.ArgumentTypeError, match="from 1 to 16"):
        option.type(str(speculate.MOST_DRAFT_TOKENS + 1))


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["fly"], ["generate", "--help"], ["generate", "--threads", "x"]],
    ids=" ".join,
)
def test_usage_needs_no_torch(
    arguments: list[str], run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    code = (
        "import sys\nfrom llama_fast.cli import main\n"
        f"try: main({arguments})\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'rich'} & {*sys.modules}"
    )
    run_python(code)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "9999999"], "2 tokens and max_new_tokens=9999999 exceed the model's"),
        (["--speculate", "OTHER"], "draft model of vocab_size 300, want the model's"),
        (["--speculate", "SHORT"], "the draft model has 8 positions, want 10"),
        (["--device", "cuda:999"], "--device: got cuda:999, which this machine lacks"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt: No such file or directory"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_refused_before_weights_are_loaded(
    checkpoint: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("llama_fast.pretrained.load", None)
    config = json.loads((checkpoint / "config.json").read_text())
    for name, change in (
        ("OTHER", {"vocab_size": 300}),
        ("SHORT", {"max_position_embeddings": 8}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | change))
    monkeypatch.chdir(tmp_path)
    assert generate(checkpoint, "--prompt", "x", *options) == 1
    assert message in failure(capsys)


def test_an_empty_prompt_is_refused_before_weights_are_loaded(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llama_fast.pretrained.load", None)
    monkeypatch.setattr("llama_fast.chat.encode_prompt", lambda *_: [])
    assert generate(checkpoint, "--prompt", "") == 1
    assert "prompt 0: is empty" in failure(capsys)


# ---- a process ----


def shell(line: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f'"$0" -m llama_fast {line}', sys.executable]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_closed_streams() -> None:
    done = shell("generate --model x --prompt - <&-")
    assert (done.returncode, done.stderr) == (1, "llama-fast: error: stdin: is closed\n")
    done = shell("generate --model x --prompt x >&-")
    assert (done.returncode, done.stderr) == (1, "llama-fast: error: stdout: is closed\n")
    done = shell("generate --model x --prompt - <&- 2>&-")
    assert (done.returncode, done.stdout) == (1, "")
    done = shell("generate --model x --prompt - <&- >&- 2>&-")
    assert done.returncode == 1


def test_no_file_gets_a_closed_streams_descriptor(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    code = """
import os, sys
os.close(0)
sys.stdin = None
from llama_fast.cli import main
try: main(["--version"])
except SystemExit: pass
assert open(os.devnull).fileno() > 2"""
    run_python(code)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["env"]) == 1
    assert failure(capsys) == "llama-fast: error: No space left on device"


def test_a_wrong_environment_is_one_line(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    code = "import sys; from llama_fast.cli import main; sys.exit(main(['env']))"
    done = run_python(code, check=False, LLAMA_FAST_BACKEND="foo")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("llama-fast: error: LLAMA_FAST_BACKEND: got backend 'foo', want")


def test_ctrl_c_while_torch_is_imported(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    code = """
import sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == "torch":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
from llama_fast.cli import main
sys.exit(main(["env"]))"""
    done = run_python(code, check=False)
    assert (done.returncode, done.stderr) == (130, "llama-fast: interrupted\n")
