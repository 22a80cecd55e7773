"""Tests of how many tokens speculative decoding proposes, from the times of passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llama_fast import amx
from llama_fast.generation import speculate
from llama_fast.generation.speculate import LONGEST_PAUSE, Pace


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def paced(
    right: Callable[[int], int],
    cost: float | Callable[[int], float],
    passes: int = 400,
    most: int = 7,
) -> tuple[float, list[int]]:
    """Return the speedup over plain decoding and how many tokens each pass proposed. right(pass)
    bounds how many of its proposals are accepted. cost is what each proposal, or a number of them,
    adds to the time of a plain pass, which is 1."""
    clock = Clock()
    pace = Pace(lambda wanted: {i: [0] * n for i, n in wanted.items()}, 1, most, clock)
    tokens, widths = 0, []
    for at in range(passes):
        (proposal,) = pace.propose([0], [99])
        accepted = min(right(at), len(proposal))
        clock.now += 1 + (cost(len(proposal)) if callable(cost) else cost * len(proposal))
        pace.passed([0], [proposal], [accepted])
        tokens += 1 + accepted
        widths.append(len(proposal))
    return tokens / clock.now, widths


@pytest.mark.parametrize("per_row", [0.1, 0.3, 1.0])
def test_it_pauses_where_proposals_are_wrong(per_row: float) -> None:
    speed, widths = paced(lambda _: 0, per_row)
    assert speed >= 0.97
    assert 0 < sum(widths[-2 * LONGEST_PAUSE :]) <= 3  # it still tries now and then


def test_it_proposes_more_where_proposals_are_right() -> None:
    speed, widths = paced(lambda _: 99, 0.1)
    assert widths[:2] == [0, 0] and widths[2:].count(0) == 400 // speculate.REFRESH
    assert widths.count(7) > 360 and speed > 4


def test_it_proposes_as_many_as_pay() -> None:
    """Raise the cost between 6 and 7 rows, as a kernel with tiles of 6 rows would."""
    speed, widths = paced(lambda _: 99, lambda n: 0.05 * n + 2.5 * (n > 5), most=15)
    assert widths.count(5) > 300 and speed > 0.85 * 6 / 1.25


def test_one_slow_pass_does_not_count() -> None:
    """Slow the first pass of that width, as another program could."""
    slow = iter([4.0])
    _, widths = paced(lambda _: 99, lambda n: 0.05 * n + (next(slow, 0.0) if n else 0.0))
    assert widths.count(7) > 300


def test_pauses_where_right_proposals_cost_too_much() -> None:
    """Make one token per pass right, at the cost of a pass per row."""
    assert paced(lambda at: at % 2, 1.2)[0] >= 0.95
    assert paced(lambda at: 99, 1.2)[0] >= 0.95


def test_it_comes_back_when_the_text_begins_to_repeat() -> None:
    _, widths = paced(lambda at: 99 if at > 200 else 0, 0.3)
    assert max(widths[100:200]) <= 1 and widths[201 + LONGEST_PAUSE : 300].count(7) > 20


def test_a_sequence_pauses_on_its_own() -> None:
    clock = Clock()
    pace = Pace(lambda wanted: {i: [0] * n for i, n in wanted.items()}, 2, 7, clock)
    widths: list[list[int]] = []
    for _ in range(100):
        proposals = pace.propose([0, 1], [99, 99])
        clock.now += 1 + 0.2 * sum(map(len, proposals))
        pace.passed([0, 1], proposals, [len(proposals[0]), 0])
        widths.append([len(p) for p in proposals])
    assert [sum(w[i] > 0 for w in widths[50:]) for i in (0, 1)] == pytest.approx([49, 1], abs=2)


@pytest.mark.parametrize("sequences", [2, 20, 31, 40])
def test_a_pass_has_31_rows_at_most(sequences: int) -> None:
    """Bound the rows, so that with AMX no row takes another path than it takes alone."""
    clock, active = Clock(), range(sequences)
    pace = Pace(lambda wanted: {i: [0] * n for i, n in wanted.items()}, sequences, 15, clock)
    most = 0
    for at in range(200):
        proposals = pace.propose(active, [99] * sequences)
        most = max(most, sum(map(len, proposals)))
        clock.now += 1
        pace.passed(active, proposals, [len(p) if at > 60 else 0 for p in proposals])
    assert (most > 0) == (sequences < speculate.MOST_ROWS)
    assert most <= max(speculate.MOST_ROWS - sequences, 0)
    assert speculate.MOST_ROWS < amx.LEAST_ROWS


def test_room_is_never_exceeded() -> None:
    pace = Pace(lambda wanted: {i: [0] * n for i, n in wanted.items()}, 2, 16, Clock())
    for _ in range(speculate.PLAIN_PASSES):
        pace.passed([0, 1], pace.propose([0, 1], [5, 5]), [0, 0])
    for sequence in pace._sequences:
        sequence.right = sequence.checked  # all right so far: propose as many as there is room for
    assert [len(p) for p in pace.propose([0, 1], [0, 2])] == [0, 2]
