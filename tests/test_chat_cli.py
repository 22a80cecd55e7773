"""Tests of llama-fast chat, and of conversations and tools in generate: what is asked, shown, kept
and saved."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast import Llama, chat
from llama_fast.cli import main
from llama_fast.generation.session import Session

from .support.checkpoints import edit_json, hf_model, save
from .support.generation import draw_these
from .support.llama3 import TOOL_TEMPLATE, byte_tokenizer

pytestmark = pytest.mark.usefixtures("threads")

TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city"}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
SAID = '{"name": "weather", "parameters": {"city": "Köln"}}'


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer(TOOL_TEMPLATE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    model = hf_model(eos_token_id=tokenizer.eos_token_id, max_position_embeddings=4096)
    folder = save(model, tmp_path_factory.mktemp("chat"))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> Callable[..., None]:
    """Return says(*answers): the model computes as usual, then these texts are drawn, each with its
    end; after the last, Ctrl-C."""

    def install(*answers: str) -> None:
        ids = [i for text in answers for i in tokenizer.encode(text, add_special_tokens=False)]
        draw_these(monkeypatch, ids)

    return install


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Return a list to which each turn adds the whole conversation's ids."""
    seen: list[list[int]] = []
    generate = Session.generate

    def spy(self: Session, prompt: list[int], *rest: Any, **options: Any) -> list[int]:
        seen.append(list(prompt))
        return generate(self, prompt, *rest, **options)

    monkeypatch.setattr(Session, "generate", spy)
    return seen


@pytest.fixture
def talk(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, list[str], list[str]]]:
    """Return talk(stdin, *options): the exit code, and the lines of stdout and stderr."""

    def run(text: str | bytes, *options: str) -> tuple[int, list[str], list[str]]:
        stdin = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="latin-1"))
        code = main(["chat", "--model", str(checkpoint), "--threads", "1", *options])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


def written(file: Path, value: Any) -> str:
    file.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return str(file)


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_turns_are_a_conversation(
    talk: Any, says: Any, asked: list[list[int]], tokenizer: Any, tmp_path: Path
) -> None:
    says("Hällo!<|eot_id|>", "Fine 🦙<|eot_id|>", "Bye<|eot_id|>")
    stdin = f"Grüße\n\nHow are\\\nyou?\n/reset\nAgain\n/save {tmp_path / 'a b'}\n/exit\nnot read\n"
    code, out, err = talk(stdin, "--system", "Be kind.", "--stats")
    assert (code, out) == (0, ["Hällo!", "Fine 🦙", "Bye"])
    own, first = message("system", "Be kind."), message("user", "Grüße")
    more = [message("assistant", "Hällo!"), message("user", "How are\nyou?")]
    last = [own, message("user", "Again")]
    texts = [own, first], [own, first, *more], last
    assert asked == [chat.encode(tokenizer, text) for text in texts]
    assert json.loads((tmp_path / "a b").read_text()) == [*last, message("assistant", "Bye")]
    new = [re.match(r"prompt (\d+) tokens, (\d+) new", line) for line in err]
    counts = [(int(found[1]), int(found[2])) for found in new if found]
    read = len(asked[0]) + len("Hällo!".encode())
    assert counts[:2] == [(len(asked[0]),) * 2, (len(asked[1]), len(asked[1]) - read)]
    assert counts[2][1] == len(asked[2])  # /reset forgets


def test_the_answers_are_those_of_whole_texts(
    talk: Any, checkpoint: Path, tokenizer: Any, tmp_path: Path
) -> None:
    options = ("--temperature", "0", "--max-new-tokens", "12", "--dtype", "float32")
    _, out, err = talk(f"One\nTwo\nThree\n/save {tmp_path / 'talk'}\n", *options)
    messages = json.loads((tmp_path / "talk").read_text())
    assert [m["role"] for m in messages] == ["user", "assistant"] * 3
    model = Llama.from_pretrained(checkpoint, torch.float32)
    for at in (1, 3, 5):
        prompt = chat.encode(tokenizer, messages[:at])
        (ids,) = model.generate([prompt], 12, temperature=0)
        assert messages[at]["content"] == tokenizer.decode(ids, skip_special_tokens=True)
    assert err[0] == "[stopped after 12 tokens: --max-new-tokens]"
    # A saved conversation goes on where it was.
    kept = [*messages, message("user", "Four")]
    (ids,) = model.generate([chat.encode(tokenizer, kept)], 12, temperature=0)
    for stdin, held in (("Four\n", messages), ("", kept)):
        _, out, _ = talk(stdin, *options, "--messages", written(tmp_path / "again", held))
        assert "\n".join(out) + "\n" == tokenizer.decode(ids, skip_special_tokens=True) + "\n"


def test_tool_calls(
    talk: Any, says: Any, asked: list[list[int]], tokenizer: Any, tmp_path: Path
) -> None:
    says(f"<|python_tag|>{SAID}<|eom_id|>", "21 degrees.<|eot_id|>", "{21}<|eot_id|>")
    tools = written(tmp_path / "tools.json", [TOOL])
    stdin = '/tool 1\nWeather?\n/tool {"degrees": 21}\nIn braces!\n'
    code, out, err = talk(stdin, "--tools", tools)
    assert code == 1 and err[0] == "error: /tool: no call waits for a result"
    assert json.loads(out[0]) == [CALL] and out[1:] == ["21 degrees.", "{21}"]
    assert err[1] == "[a tool call: /tool RESULT gives its result]"
    messages = [
        message("user", "Weather?"),
        {**message("assistant", ""), "tool_calls": [CALL]},
        {**message("tool", {"degrees": 21}), "name": "weather"},
        message("assistant", "21 degrees."),
        message("user", "In braces!"),
    ]
    assert asked == [chat.encode(tokenizer, messages[:at], [TOOL]) for at in (1, 3, 5)]


def test_several_tool_calls(
    talk: Any, says: Any, asked: list[list[int]], tokenizer: Any, tmp_path: Path
) -> None:
    """All calls are kept, and the model goes on once each has its result. The template takes one
    call a message."""
    says(f"[{SAID}, {SAID}];\n{SAID}<|eom_id|>", "Done.<|eot_id|>", "Again.<|eot_id|>")
    tools, file = written(tmp_path / "tools.json", [TOOL]), tmp_path / "talk"
    stdin = f'Weather?\n/tool 21\n/tool {{"degrees": 22}}\n/save {file}\n/tool 23\n'
    code, out, err = talk(stdin, "--tools", tools)
    assert code == 0 and json.loads(out[0]) == [CALL] * 3 and out[1:] == ["Done."]
    assert err[0] == "[3 tool calls: /tool RESULT gives the result of each in turn]"
    assert err[1:3] == ["[weather is next]"] * 2

    def turn(content: Any) -> list[dict[str, Any]]:
        return [
            {**message("assistant", ""), "tool_calls": [CALL]},
            {**message("tool", content), "name": "weather"},
        ]

    turns = [*turn("21"), *turn({"degrees": 22}), *turn("23")]
    wanted = chat.encode(tokenizer, [message("user", "Weather?"), *turns], [TOOL])
    assert len(asked) == 2 and asked[1] == wanted
    saved = json.loads(file.read_text())
    assert [m["role"] for m in saved] == ["user", "assistant", "tool", "tool"]
    # Read again, it waits for the last result.
    code, out, _ = talk("/tool 23\n", "--tools", tools, "--messages", str(file))
    assert (code, out) == (0, ["Again."]) and asked[2:] == [wanted]


def test_ctrl_c_at_a_pipe_ends_the_chat(talk: Any, says: Any) -> None:
    says("Yes<|eot_id|>", "Hm")
    code, out, err = talk("One\nTwo\nThree\n")
    assert (code, out) == (130, ["Yes", "Hm"])


def test_commands(talk: Any, says: Any, asked: list[list[int]], tokenizer: Any) -> None:
    says("A<|eot_id|>", "B<|eot_id|>")
    stdin = "/help\n/save x\n/system\n/system Be brief.\n/system\n/fly\n/save\n/etc/hosts\n"
    code, out, err = talk(f"{stdin}/save /no/way/file\nHi\n")
    assert (code, out) == (1, ["A", "B"])
    help_ = "\n".join(err[:7])
    assert all(f"/{name}" in help_ for name in ("reset", "system", "tool", "save", "stats", "exit"))
    assert err[7:] == [
        "error: /save: the conversation is empty",
        "no system message",
        "Be brief.",
        "error: /fly: no such command; /help lists them",
        "error: /save: want the name of a file",
        "error: /no/way/file: No such file or directory",
    ]
    first = [message("system", "Be brief."), message("user", "/etc/hosts")]
    assert asked[0] == chat.encode(tokenizer, first)


def test_a_full_context(
    talk: Any, says: Any, asked: list[list[int]], checkpoint: Path, tmp_path: Path
) -> None:
    """A message too long is dropped; an answer ends where the positions do."""
    says("A<|eot_id|>", "b" * 4096)
    code, out, err = talk(f"Hi\n{'x' * 4096}\n{'y' * 3800}\nmore\n")
    assert code == 1 and out[0] == "A" and set(out[1]) == {"b"} and len(out) == 2
    assert re.fullmatch(
        r"error: the conversation has \d+ tokens, and the model only 4096 positions; /save FILE "
        r"keeps it, and /reset starts a new one",
        err[0],
    )
    assert len(asked[1]) + len(out[1]) == 4096
    assert err[1] == f"[stopped after {len(out[1])} tokens: the model's 4096 positions are full]"
    assert err[2].startswith("error: the conversation has") and len(asked) == 2
    held = written(tmp_path / "long", [message("user", "x" * 4096)])
    code, out, err = talk("", "--messages", held)
    assert code == 1 and "error: the conversation has" in err[0]


def test_logits_that_are_nan(
    talk: Any, monkeypatch: pytest.MonkeyPatch, asked: list[list[int]]
) -> None:
    monkeypatch.setattr(Llama, "logits", lambda self, x: torch.full((len(x), 320), torch.nan))
    code, _, err = talk("One\nTwo\n")
    assert code == 1 and len(err) == 2 and "want a finite number" in err[0]
    assert len(asked[0]) == len(asked[1])  # the first question is gone


# ---- what is refused before the weights are read ----

BAD = [
    ("messages", "{", "m: not valid JSON"),
    ("messages", {"role": "user"}, "m: got an object, want a list of messages"),
    ("messages", [], "m: is empty"),
    ("messages", [{"role": "bot", "content": "Hi"}], "m[0]: role: got 'bot', want system, user"),
    ("messages", [message("user", "a"), {"role": "user"}], "m[1]: content: missing"),
    ("messages", [message("user", "\ud800")], "not valid UTF-8"),
    ("tools", [{"type": "function"}], "m[0]: want "),
    ("tools", "nonsense", "m: not valid JSON"),
    ("tools", None, "m: No such file"),
    ("messages", b"\xff", "m: not valid UTF-8 at byte 0"),
]


@pytest.mark.parametrize("command", ["chat", "generate"])
@pytest.mark.parametrize(("option", "held", "error"), BAD, ids=[case[2][:30] for case in BAD])
def test_malformed_files(
    command: str,
    option: str,
    held: Any,
    error: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Llama, "from_pretrained", never)
    file = tmp_path / "m"
    if isinstance(held, bytes):
        file.write_bytes(held)
    elif held is not None:
        written(file, held)
    argv = [command, "--model", str(checkpoint), f"--{option}", str(file)]
    argv += ["--chat", "--prompt", "Hi"] if command == "generate" else []
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and error in err


def test_two_system_messages(talk: Any, tmp_path: Path) -> None:
    held = written(tmp_path / "m", [message("system", "a"), message("user", "b")])
    code, _, err = talk("", "--messages", held, "--system", "c")
    assert code == 1 and "--system: " in err[0] and "has a system message already" in err[0]


def test_a_template_without_tools(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json")
    tools = written(tmp_path / "tools", [TOOL])
    argv = ["generate", "--model", str(tmp_path), "--chat", "--prompt", "Hi", "--tools", tools]
    assert main(argv) == 1
    assert "tools: the model's chat template does not show them" in capsys.readouterr().err


def test_stdin_that_is_not_utf8(talk: Any, says: Any) -> None:
    says("A<|eot_id|>")
    code, out, err = talk(b"Hi\nx\xff\n")
    assert (code, out) == (1, ["A"]) and "stdin: not valid UTF-8 at byte 1 of a line" in err[0]


# ---- generate ----


def generate(checkpoint: Path, *options: str) -> int:
    return main(["generate", "--model", str(checkpoint), "--threads", "1", *options])


def test_generate_continues_a_conversation(
    checkpoint: Path,
    says: Any,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    messages = [message("user", "a"), message("assistant", "b")]
    file, seen = written(tmp_path / "m", messages), []
    whole = Llama.generate
    monkeypatch.setattr(
        Llama, "generate", lambda self, ids, **o: (seen.extend(ids), whole(self, ids, **o))[1]
    )
    assert generate(checkpoint, "--messages", file) == 1
    assert "m: ends with an answer; give a question with --prompt" in capsys.readouterr().err
    says("Hi<|eot_id|>")
    assert generate(checkpoint, "--messages", file, "--prompt", "c", "--system", "s") == 0
    assert capsys.readouterr().out == "Hi\n"
    text = [message("system", "s"), *messages, message("user", "c")]
    assert seen == [chat.encode(tokenizer, text)]
    with pytest.raises(SystemExit):
        generate(checkpoint)
    assert "--prompt-file or --messages" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (SAID, json.dumps([CALL], ensure_ascii=False)),
        (f"<|python_tag|>{SAID}<|eom_id|>", json.dumps([CALL], ensure_ascii=False)),
        (
            f"Let me see.<|python_tag|>{SAID}",
            f"Let me see.\n{json.dumps([CALL], ensure_ascii=False)}",
        ),
        ("{21} degrees<|eot_id|>", "{21} degrees"),
        (" \n{<|eot_id|>", " \n{"),
        (" It is 21.<|eot_id|>", " It is 21."),
        ("<|eot_id|>", ""),
    ],
    ids=range(7),
)
def test_generate_gives_calls_as_json(
    answer: str,
    shown: str,
    checkpoint: Path,
    says: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    says(answer)
    tools = written(tmp_path / "tools", [TOOL])
    assert generate(checkpoint, "--chat", "--prompt", "x", "--tools", tools) in (0, 130)
    assert capsys.readouterr().out == shown + "\n"


def test_without_tools_a_call_is_text(
    checkpoint: Path, says: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    says(f"{SAID}<|eot_id|>")
    assert generate(checkpoint, "--chat", "--prompt", "x") == 0
    assert capsys.readouterr().out == SAID + "\n"


# ---- a terminal ----


class Terminal:
    """llama-fast in a pseudoterminal."""

    # A session's leader owns the first terminal that it opens: Ctrl-C then reaches it.
    SCRIPT = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job may ignore it
        "os.close(os.open(os.ttyname(0), os.O_RDWR))\n"
    )
    MAIN = "from llama_fast.cli import main; sys.exit(main())"
    TORCHRUN = "from torch.distributed.run import main; sys.exit(main())"

    def __init__(self, argv: list[str], main: str = MAIN, **environment: str) -> None:
        self.master, slave = pty.openpty()
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.SCRIPT + main, *argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm", **environment},
            start_new_session=True,
        )
        os.close(slave)

    def until(self, wanted: str, after: int = 0, timeout: float = 90, again: str = "") -> str:
        """Return the text before `wanted`, which stays out of the next call's, once `after` more
        characters have come. Whenever nothing came for five seconds, send `again`: Python sees a
        Ctrl-C that comes just before readline waits only at the next key."""
        end = time.monotonic() + timeout
        while wanted not in self.text or len(self.text.partition(wanted)[2]) < after:
            assert time.monotonic() < end, f"no {wanted!r} in {self.text!r}"
            if select.select([self.master], [], [], 5)[0]:
                self.text += os.read(self.master, 65536).decode(errors="replace")
            elif again:
                self.send(again)
        before, _, self.text = self.text.partition(wanted)
        return before

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())


@pytest.mark.parametrize("processes", [1, 2])
def test_in_a_terminal(processes: int, tmp_path: Path, tokenizer: Any) -> None:
    """Ctrl-C stops an answer and keeps the chat, a paste is one message, Ctrl-D ends the chat, and
    the history outlives it: so in one process, and in two that torchrun starts."""
    model = hf_model(eos_token_id=tokenizer.eos_token_id, max_position_embeddings=65536)
    with torch.no_grad():
        model.lm_head.weight[256:] = 0  # control tokens: the answer has no end
    tokenizer.save_pretrained(save(model, tmp_path / "model"))
    argv = ["chat", "--model", str(tmp_path / "model"), "--threads", "1", "--temperature", "0"]
    argv += ["--max-new-tokens", "60000"]
    main = Terminal.MAIN
    if processes > 1:
        count, main = str(processes), Terminal.TORCHRUN
        argv = ["--nproc-per-node", count, "-m", "llama_fast", *argv, "--tp", count]
    environment = {"XDG_STATE_HOME": str(tmp_path), "PYTHONPATH": os.getcwd()}
    terminal = Terminal(argv, main, OMP_NUM_THREADS="1", **environment)
    modes = termios.tcgetattr(terminal.master)
    try:
        terminal.until("Ctrl-D ends the chat.")
        terminal.until("> ")
        terminal.send("\x1b[200~first line\nsecond line\x1b[201~\r")
        terminal.until("second line")
        terminal.until("\x1b[?2004l", after=100)  # the answer
        terminal.send("\x03")
        terminal.until("[stopped]")
        terminal.until("> ")
        terminal.send("dropped")
        terminal.until("dropped")
        terminal.send("\x03")
        if processes == 1:  # else readline clears the line
            terminal.until("> ", again="\x03")
        file = tmp_path / "talk"
        terminal.send(f"/save {file}\r")
        assert "dropped" not in terminal.until(" messages")
        terminal.until("> ")
        terminal.send("\x04")
        assert terminal.process.wait(60) == 0
        assert termios.tcgetattr(terminal.master) == modes
        messages = json.loads(file.read_text())
        assert [m["role"] for m in messages] == ["user", "assistant"]
        assert messages[0]["content"] == "first line\nsecond line" and messages[1]["content"]
        assert f"/save {file}" in (tmp_path / "llama_fast" / "chat_history").read_text()
    finally:
        if terminal.process.poll() is None:
            os.killpg(terminal.process.pid, signal.SIGKILL)
            terminal.process.wait()
        os.close(terminal.master)
