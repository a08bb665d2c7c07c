"""What `disaggworker profile` measures, and what it makes of measurements."""

from __future__ import annotations

import pytest

from disaggserve.latency import measurements
from disaggworker.profiling import grid
from disaggworker.profiling.grid import Cell, LeftOut, Timing


class Clockwork:
    """A door whose times are known: what a cell takes on its n-th turn."""

    context = 100

    def __init__(self, seconds: dict[Cell, list[float]]) -> None:
        self.seconds = {cell: iter(times) for cell, times in seconds.items()}
        self.order: list[Cell] = []

    def time(self, cell: Cell) -> Timing:
        self.order.append(cell)
        found = next(self.seconds[cell], None)
        if found is None:
            raise LeftOut("it is used up")
        return Timing(found, 7)


def test_a_grid_holds_what_the_context_and_the_longest_prompt_allow() -> None:
    found, said = grid.cells((1, 2, 4), (3, 16, 32, 99, 100), (98, 99), 100, 3)
    shapes = {
        phase: [(c.batch, c.length) for c in found if c.phase == phase] for phase in ("prefill", "decode")
    }
    assert shapes["prefill"] == [(1, 16), (1, 32), (1, 99), (2, 16), (2, 32), (4, 16)]
    assert shapes["decode"] == [(1, 98), (2, 98), (4, 98)]
    assert said == [
        "prompts of 100 tokens: beyond the context of 100",
        "contexts of 99 tokens: beyond the context of 100",
        "prompts of 3 tokens: each of 4 passes takes one token less",
    ]


def test_the_first_pass_does_not_count_and_means_are_taken_over_passes() -> None:
    prompts, b = [Cell("prefill", 1, n) for n in (40, 39, 38, 37)], Cell("decode", 2, 4)
    passes = zip(prompts, [90.0, 1.0, 6.0, 2.0], strict=True)
    door = Clockwork({**{cell: [seconds] for cell, seconds in passes}, b: [90.0, 3.0]})
    turns: list[None] = []
    measured, said = grid.measure(door, [prompts[0], b], 3, lambda: turns.append(None))
    assert measured == {Cell("prefill", 1, 38): Timing(3.0, 7)}
    assert said == ["decode of 2 contexts of 4 tokens: it is used up"]
    assert door.order == [prompts[0], b, prompts[1], b, prompts[2], b, prompts[3]]
    assert len(turns) == len(door.order)


def test_rows_are_what_fit_reads() -> None:
    measured = {
        Cell("prefill", 2, 8): Timing(0.25, 0),
        Cell("decode", 4, 10): Timing(0.0125, 44),
    }
    rows = measurements.read(grid.table(measured, 2, 1), "m.csv")
    assert [(r.phase, r.batch, r.tokens, r.context_tokens, r.tp, r.pp, r.seconds) for r in rows] == [
        ("prefill", 2, 16, 0, 2, 1, 0.25),
        ("decode", 4, 4, 44, 2, 1, 0.0125),
    ]


def test_decode_is_seen_only_while_all_streams_decode() -> None:
    over_http = pytest.importorskip("disaggworker.profiling.over_http")
    steps = over_http.STEPS
    # Steps of 1 s; the second stream comes 10 s later, and until it decodes the first one's steps take 5 s.
    alone = [5.0 * k for k in range(4)]
    first = alone + [20.0 + k for k in range(steps + 1)]
    second = [12.0] + [20.0 + k for k in range(steps + 1)]
    assert over_http.together([first, second[:-1]], 100) is None
    seen = over_http.together([first, second], 100)
    # Between its 5th and last token the first stream has 104 … 104 + steps − 1 tokens in the cache, the second 101 ….
    assert seen == Timing(1.0, round(104 + 101 + (steps - 1)))
