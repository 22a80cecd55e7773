"""Match regular expressions from a checkpoint, in time that its author cannot make long.

Python's re tries one way after the other, which may take exponential time. Here Python parses the
expression, and each of its parts maps the set of positions before it to the set after it. A set of
positions is an int: bit i stands for position i. The package regex, which can stop after a time, is
no help: compiling a{1000000000} takes all memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import reduce
from operator import or_
from typing import Any

try:
    from re import _constants as op  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_constants as op
    import sre_parse as parser

_MOST_PATTERNS = 200
_MOST_CHARACTERS = 500  # of an expression
_MOST_LEVELS = 50  # of groups in each other
_MOST_STEPS = 2_000_000  # of all matches together: about 1 s; ".*mlp.*" takes 80 a name
_TOO_DEEP = "too many groups in each other"
_CLASSES = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    op.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    op.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    op.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}
_CHARACTER = {
    op.ANY: lambda _, c: c != "\n",
    op.LITERAL: lambda value, c: ord(c) == value,
    op.NOT_LITERAL: lambda value, c: ord(c) != value,
    op.RANGE: lambda value, c: value[0] <= ord(c) <= value[1],
    op.CATEGORY: lambda value, c: _CLASSES[value](c),
    op.IN: lambda parts, c: _within(parts, c),
}
_BEGINNING = (op.AT_BEGINNING, op.AT_BEGINNING_STRING)
_END = (op.AT_END, op.AT_END_STRING)
_OTHERS = (op.AT, op.BRANCH, op.SUBPATTERN, op.MAX_REPEAT, op.MIN_REPEAT, op.ASSERT, op.ASSERT_NOT)


class Patterns:
    """Regular expressions, and the number of steps that their matches may still take."""

    def __init__(self, patterns: Mapping[str, str]) -> None:
        """patterns: by the names that errors give them. Raises ValueError for one that is invalid,
        too long, or beyond what match() knows."""
        if len(patterns) > _MOST_PATTERNS:
            raise ValueError(f"{len(patterns)} expressions and wildcards, want {_MOST_PATTERNS}")
        self._patterns = dict(patterns)
        self._parsed = {name: _parsed(name, pattern) for name, pattern in patterns.items()}
        self._steps = _MOST_STEPS
        self._text = ""

    def __reduce__(self) -> Any:  # Python's parts of an expression cannot be copied
        return Patterns, (self._patterns,)

    def match(self, text: str) -> bool:
        """Return whether one of them matches at the text's beginning, as re.match. Raises
        ValueError once all matches together have taken too long."""
        self._text = text
        for name, parts in self._parsed.items():
            matches = self._after(parts, 1) != 0
            if self._steps < 0:
                raise ValueError(f"{_short(name)}: takes too long to match")
            if matches:
                return True
        return False

    def _after(self, parts: Any, at: int) -> int:
        """Return the positions after parts, one behind the other, from the positions at."""
        for kind, value in parts:
            self._steps -= at.bit_count()
            if not at or self._steps < 0:
                return 0
            at = self._after_one(kind, value, at)
        return at

    def _after_one(self, kind: Any, value: Any, at: int) -> int:
        text = self._text
        if kind in _CHARACTER:
            fits = (i for i in _positions(at) if i < len(text) and _CHARACTER[kind](value, text[i]))
            return sum(2 << i for i in fits)
        if kind is op.AT:
            if value in _BEGINNING:
                return at & 1
            ends = 1 << len(text)
            if value is op.AT_END and text.endswith("\n"):
                ends |= ends >> 1
            return at & ends
        if kind is op.SUBPATTERN:
            return self._after(value[-1], at)
        if kind is op.BRANCH:
            return reduce(or_, (self._after(branch, at) for branch in value[1]))
        if kind in (op.ASSERT, op.ASSERT_NOT):
            wanted = kind is op.ASSERT
            fits = (i for i in _positions(at) if (self._after(value[1], 1 << i) != 0) == wanted)
            return sum(1 << i for i in fits)
        low, high, repeated = value
        return self._after_repeat(low, high, repeated, at)

    def _after_repeat(self, low: int, high: int, parts: Any, at: int) -> int:
        for _ in range(low):
            before, at = at, self._after(parts, at)
            if at in (before, 0):  # and so it would stay
                break
        reached = new = at
        for _ in range(high - low):
            new = self._after(parts, new) & ~reached
            if not new:
                break
            reached |= new
        return reached


def _positions(at: int) -> Iterator[int]:
    while at:
        yield (at & -at).bit_length() - 1
        at &= at - 1


def _parsed(name: str, pattern: str) -> Any:
    try:
        if len(pattern) > _MOST_CHARACTERS:
            raise ValueError(f"longer than {_MOST_CHARACTERS} characters")
        tree = parser.parse(pattern)
        if tree.state.flags & ~re.UNICODE:
            raise ValueError("flags are not supported")
        _check(tree)
        return tree
    except (re.error, OverflowError, ValueError) as error:
        raise ValueError(f"{_short(name)}: {error}") from None
    except RecursionError:
        raise ValueError(f"{_short(name)}: {_TOO_DEEP}") from None


def _check(parts: Any, level: int = 0) -> None:
    """Raise ValueError for a part that _after_one does not know."""
    if level > _MOST_LEVELS:
        raise ValueError(_TOO_DEEP)
    for kind, value in parts:
        known = kind in _CHARACTER or kind in _OTHERS
        if kind is op.AT:
            known = value in _BEGINNING + _END
        elif kind is op.SUBPATTERN:
            known = not value[1] and not value[2]  # flags
            _check(value[-1], level + 1)
        elif kind is op.BRANCH:
            for branch in value[1]:
                _check(branch, level + 1)
        elif kind in (op.ASSERT, op.ASSERT_NOT):
            known = value[0] == 1  # ahead
            _check(value[1], level + 1)
        elif kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            _check(value[-1], level + 1)
        if not known:
            raise ValueError(f"{str(kind).lower()} is not supported")


def _within(parts: Any, c: str) -> bool:
    negated = parts[0][0] is op.NEGATE
    return any(_CHARACTER[kind](value, c) for kind, value in parts[negated:]) != negated


def _short(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:77]}...")
