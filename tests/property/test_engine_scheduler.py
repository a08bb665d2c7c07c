"""Whatever comes and goes, every sequence gets its right tokens, in order of arrival, and every block is given back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

from disaggworker.engine.scheduler import Scheduler
from disaggworker.engine.sequence import Sequence
from disaggworker.kv.blocks import BlockManager
from disaggworker.pace import Pace
from tests.engine_bench import Bench, answer, cells

TOTAL = 12  # blocks: a few sequences fill them

lengths = st.integers(1, 90)
prompt = st.tuples(
    st.sampled_from(["prompt", "prompt", "turn"]),
    st.integers(0, 2),
    lengths,
    st.integers(1, 40),
    st.booleans(),
)
pull = st.tuples(st.just("pull"), st.integers(0, 2), lengths, st.integers(2, 40))
goodbye = st.tuples(st.sampled_from(["abort", "release"]), st.integers(0, 30))
passing = st.tuples(st.just("pass"), st.integers(1, 6))
worlds = st.fixed_dictionaries(
    {
        "chunk": st.sampled_from([0, 0, 7, 16, 40]),
        "cache": st.sampled_from([True, True, False]),
        "lanes": st.sampled_from([1, 2]),
        "batch_tokens": st.sampled_from([32, 100]),
        "events": st.lists(st.one_of(prompt, prompt, pull, goodbye, passing), min_size=25, max_size=60),
    }
)


class World(Bench):
    """The bench, a prefill side to pull from, and what must hold at every moment."""

    def __init__(self, chunk: int, cache: bool, lanes: int, batch_tokens: int) -> None:
        blocks = BlockManager(TOTAL, cache=cache)
        scheduler = Scheduler(blocks, batch_tokens=batch_tokens, chunk=chunk, lanes=lanes)
        pace = SimpleNamespace(times=SimpleNamespace(pp=lanes), stage_s=lambda batch: 1.0)
        super().__init__(scheduler, cast(Pace, pace) if lanes > 1 else None)
        self.asked: list[tuple[Sequence, list[int]]] = []
        self.admitted: list[tuple[Sequence, list[int]]] = []

    def ask(self, kind: str, begins: int, length: int, tokens: int, hand_off: bool = False) -> None:
        """Of three families of prompts: those of one begin alike, and go on like the others'. Some are a turn of a talk: what
        was said before, and its answer."""
        family = [begins] * 16 + [place % 97 for place in range(30)] + [length] * 90
        text = family[:length]
        if kind == "turn":
            text = text[:40] + answer(text[:40], 24) + [length]
        more: dict[str, Any] = {"hand_off": hand_off}
        if kind == "pull":
            more = {"output": answer(text, 1), "on_admitted": lambda: self.admitted.append((sequence, text))}
        sequence = self.submit([0] * length if kind == "pull" else text, tokens, **more)
        self.asked.append((sequence, text))

    def look(self) -> None:
        """After every turn of the engine's loop."""
        self.scheduler.blocks.check_integrity()
        while self.admitted:
            sequence, text = self.admitted.pop()
            assert sequence.kv  # also of one that was aborted meanwhile: somebody writes here
            self.runner.write(sequence.kv.blocks, cells(text))
            self.engine.pulled(sequence, text)
        prompts = [s for s, _ in self.asked if not s.on_admitted and not s.aborted]
        begun = [bool(s.scheduled_s) for s in prompts]
        assert begun == sorted(begun, reverse=True), "a later prompt began before an earlier one"

    def turn(self) -> None:
        """One look of the loop; time passes."""
        wanted = self.engine.turn(self.now)
        self.now = max(self.now + 1e-3, wanted or 0.0)
        self.look()

    def release(self, number: int) -> None:
        """The pull of one that is held has come, or its lease has ended."""
        if number < len(self.held):
            self.engine.release(self.held.pop(number))


@settings(max_examples=60, deadline=None)
@given(worlds)
def test_every_sequence_ends_right_and_nothing_leaks(world: dict[str, Any]) -> None:
    events = world.pop("events")
    bench = World(**world)
    bench.now = 1.0
    for kind, *facts in events:
        if kind in ("prompt", "turn", "pull"):
            bench.ask(kind, *facts)
        elif kind == "abort" and facts[0] < len(bench.asked):
            sequence = bench.asked[facts[0]][0]
            if sequence not in bench.held:
                bench.engine.abort(sequence)
        elif kind == "release":
            bench.release(facts[0])
        elif kind == "pass":
            for _ in range(facts[0]):
                bench.turn()
    for _ in range(5000):
        bench.turn()
        bench.release(0)
        if bench.scheduler.blocks.free == TOTAL and not bench.engine.running + bench.engine.waiting:
            break
    for sequence, text in bench.asked:
        said = bench.said[sequence]
        before = len(answer(text, 1)) if sequence.on_admitted else 0
        expected = answer(text, sequence.max_tokens)[before:]
        if sequence.hand_off:
            expected = expected[:1]
        assert said.tokens == expected[: len(said.tokens)]
        assert sequence.aborted or said.tokens == expected
    assert (bench.scheduler.blocks.free, bench.engine.running, bench.engine.waiting) == (TOTAL, 0, 0)
    assert not bench.held
