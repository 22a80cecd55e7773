"""Lines of a terminal, with editing and a history, or of another stdin."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

CTRL_C = "\x03"
_HISTORY = 1000  # lines


def lines(prompt: str) -> Iterator[str]:
    """Yield the lines of stdin without their newlines, joined where one ends in a backslash. Ctrl-C
    in a terminal drops the line. Raises ValueError for bytes that are not UTF-8."""
    terminal = sys.stdin.isatty()
    with _history() if terminal else contextlib.nullcontext():
        held = ""
        while True:
            try:
                line = _edited(". " if held else prompt) if terminal else _next()
            except KeyboardInterrupt:
                if not terminal:
                    raise
                print(file=sys.stderr)
                held = ""
                continue
            except EOFError:
                if terminal:
                    print(file=sys.stderr)
                if held:
                    yield held[:-1]
                return
            held += line
            if line.endswith("\\"):
                held = held[:-1] + "\n"
            else:
                yield held
                held = ""


def _edited(prompt: str) -> str:
    """Read a line with readline's editing. The prompt stays off a stdout that is no terminal, where
    readline does not work."""
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    line = input()
    if CTRL_C in line:
        raise KeyboardInterrupt
    return line


def _next() -> str:
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    try:
        return line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin: not valid UTF-8 at byte {error.start} of a line") from None


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Let input() edit lines, take a pasted text as one, and remember lines between chats."""
    try:
        import readline
    except ImportError:  # a Python built without it
        yield
        return
    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    file = state / "llama_fast" / "chat_history"
    readline.parse_and_bind("set enable-bracketed-paste on")
    readline.parse_and_bind(r'"\C-c": kill-whole-line')  # where it is a character
    readline.set_auto_history(True)
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        readline.set_history_length(_HISTORY)
        with contextlib.suppress(OSError):
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            readline.write_history_file(file)


@contextlib.contextmanager
def ctrl_c_is_a_character() -> Iterator[None]:
    """Turn off the terminal's signals, also while lines are read."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without(termios.ISIG))
        with contextlib.suppress(ImportError):
            import readline

            readline.set_pre_input_hook(lambda: _turn_off(termios.ISIG))  # it turns them on
            stack.callback(readline.set_pre_input_hook, None)
        yield


@contextlib.contextmanager
def typed_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was typed. What else is typed is lost."""
    with _without(termios.ISIG | termios.ICANON | termios.ECHO):
        fd = sys.stdin.fileno()
        yield lambda: any(select.select([fd], [], [], 0)) and CTRL_C.encode() in os.read(fd, 4096)


@contextlib.contextmanager
def _without(modes: int) -> Iterator[None]:
    before = termios.tcgetattr(sys.stdin)
    _turn_off(modes)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def _turn_off(modes: int) -> None:
    """Turn off local modes of the terminal."""
    now = termios.tcgetattr(sys.stdin)
    now[3] &= ~modes
    termios.tcsetattr(sys.stdin, termios.TCSANOW, now)
