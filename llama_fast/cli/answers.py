"""Print what generate makes: one answer as it comes, or each of several once it is complete."""

from __future__ import annotations

import io
import json
import resource
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..messages import TAG, parse_tool_calls
from ..text import TextStreamer
from .common import progress

if TYPE_CHECKING:
    from rich.progress import Progress

_SHORT = 128  # tokens: read too soon for a progress bar


class Answer:
    """One prompt's answer: its text, tokens and times. With tools, what may be a call of one is not
    text before it is whole and turns out to be none."""

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str], tools: bool = False
    ) -> None:
        self.prompt = len(prompt)
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.times: list[float] = []
        self.finish: str | None = None  # "stop", "length", or "interrupted"
        self.text = ""
        self.calls: list[dict[str, Any]] = []  # in the form of a message's tool_calls
        self._tokenizer, self._tools = tokenizer, tools
        self._tag = tokenizer.convert_tokens_to_ids(TAG) if tools else None
        self._held = ""
        self._holds: bool | None = None if tools else False  # None: no character but spaces yet
        self._shown = 0
        self._streamer = TextStreamer(
            tokenizer,
            self._add,
            stop=stop,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )

    def put(self, token: int) -> bool:
        """Take a token, and return whether a stop text ends the answer."""
        self.times.append(time.perf_counter())
        self.ids.append(token)
        if token == self._tag:
            self._holds = True
        return self._streamer.put(token)

    def end(self) -> None:
        self._streamer.end()
        if self._tools:
            self.calls = parse_tool_calls(self._tokenizer.decode(self.ids))
        if self._held and not self.calls:
            self._holds = False
            self._add("")

    def fresh(self) -> str:
        """Return the text since the last call."""
        text, self._shown = self.text[self._shown :], len(self.text)
        return text

    def called(self) -> str:
        """Return the calls as JSON, to print after the text."""
        calls = json.dumps(self.calls, ensure_ascii=False)
        return "\n" * bool(self.text) + calls if self.calls else ""

    def _add(self, text: str) -> None:
        self._held += text
        if self._holds is None and self._held.strip():
            self._holds = self._held.lstrip()[0] in "{["
        if self._holds is False:
            self.text += self._held
            self._held = ""


class Answers:
    """The answers to a batch of prompts. on_token, on_logprob and on_prefill are for generate."""

    def __init__(
        self,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        *,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        max_new_tokens: int,
        as_json: bool = False,
        logprobs: bool = False,
        tools: bool = False,
    ) -> None:
        self._tokenizer, self._stop_ids, self._most = tokenizer, stop_ids, max_new_tokens
        self._json, self._logprobs, self._tools = as_json, logprobs, tools
        self.all = [Answer(tokenizer, prompt, stop, tools) for prompt in prompts]
        self._printed = 0  # answers printed, the first ones
        self._start = time.perf_counter()
        self._read = [0] * len(prompts)
        self._total = sum(map(len, prompts))
        self._bar: Progress | None = None
        if self._total > _SHORT and sys.stderr.isatty():
            self._bar = progress("Reading the prompt" + "s" * (len(prompts) > 1))
            self._task = self._bar.add_task("", total=self._total)
            self._bar.start()

    def on_prefill(self, i: int, done: int) -> None:
        self._read[i] = done
        if self._bar is not None:
            self._bar.update(self._task, completed=sum(self._read))
        if sum(self._read) == self._total:
            self.stop_bar()

    def stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def on_logprob(self, i: int, logprob: float) -> None:
        self.all[i].logprobs.append(logprob)

    def on_token(self, i: int, token: int) -> bool:
        answer = self.all[i]
        stopped = answer.put(token)
        if stopped or token in self._stop_ids:
            answer.finish = "stop"
        elif len(answer.ids) == self._most:
            answer.finish = "length"
        if answer.finish:
            answer.end()
        self._print()
        return stopped

    def end(self, interrupted: bool = False) -> None:
        """Print what is left, after an interrupt too."""
        for answer in self.all:
            if answer.finish is None:
                answer.end()
                answer.finish = "interrupted" if interrupted else "stop"
        self._print()

    def _print(self) -> None:
        if len(self.all) == 1 and not self._json:
            (answer,) = self.all
            show(answer.fresh())
        while self._printed < len(self.all) and (answer := self.all[self._printed]).finish:
            self._printed += 1
            if self._json:
                show(json.dumps(self._object(answer), ensure_ascii=False) + "\n")
            elif len(self.all) == 1:
                show(f"{answer.called()}\n")
            else:
                between = "\n" if self._printed > 1 else ""
                text = answer.text + answer.called()
                show(f"{between}--- {self._printed} of {len(self.all)} ---\n{text}\n")
            if self._logprobs and not self._json:
                for token, logprob in zip(answer.ids, answer.logprobs, strict=True):
                    print(f"{logprob:10.4f} {self._tokenizer.decode([token])!r}", file=sys.stderr)

    def _object(self, answer: Answer) -> dict[str, Any]:
        found = {
            "index": self.all.index(answer),
            "text": answer.text,
            "ids": answer.ids,
            "finish_reason": answer.finish,
            "prompt_tokens": answer.prompt,
            "new_tokens": len(answer.ids),
            "seconds": round(((answer.times or [time.perf_counter()])[-1]) - self._start, 6),
        }
        if self._logprobs:
            found["logprobs"] = answer.logprobs
        return found | ({"tool_calls": answer.calls} if self._tools else {})

    def footer(self) -> str:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if sys.platform != "darwin":  # macOS counts bytes, Linux KiB
            peak *= 1024
        prompt, times = f"prompt {self._total} tokens", [answer.times for answer in self.all]
        memory = f"peak memory {peak / 2**30:.2f} GiB"
        return figures(prompt, self._total, self._start, times, memory)


def figures(prompt: str, read: int, start: float, times: list[list[float]], rest: str) -> str:
    """Return a line of speeds: of reading that many tokens, which ends with the last answer's first
    token, and of generating the others. `times` has those of each answer's tokens."""
    times = [of_one for of_one in times if of_one]
    new = sum(map(len, times))
    parts = [prompt, f"generated {new} tokens", rest]
    if times:
        first, last = max(t[0] for t in times), max(t[-1] for t in times)
        parts[0] += f", {read / (first - start):.1f} tokens/s"
        if new > len(times):
            parts[1] += f", {(new - len(times)) / (last - first):.1f} tokens/s"
    return " | ".join(parts)


def utf8_stdout() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # for every locale
        sys.stdout.reconfigure(encoding="utf-8")


def show(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()
