"""The engine's loop without a model and in virtual time: a runner whose tokens depend on every cell that attention would read.

A cell of a KV block holds a hash of its token and of the cell before it, read through the sequence's block table. So a block
that another sequence wrote into, a missing block or a wrong place changes every token after it, and `answer` says what is right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from disaggworker.engine.engine import Engine, Event
from disaggworker.engine.runner import Computed, Pending, Runner
from disaggworker.engine.scheduler import Scheduler
from disaggworker.engine.sequence import Sampling
from disaggworker.engine.sequence import Sequence as Seq
from disaggworker.engine.step import Step
from disaggworker.kv.blocks import BLOCK_TOKENS
from disaggworker.pace import Pace

VOCABULARY = 97
GREEDY = Sampling(temperature=0.0, ignore_eos=True)


def hashed(before: int, token: int) -> int:
    """What a cell holds."""
    return (before * 6364136223846793005 + token * 1442695040888963407 + 1) % 2**61


def cells(tokens: Sequence[int]) -> list[int]:
    """What the cells of these tokens hold."""
    found = []
    before = 0
    for token in tokens:
        before = hashed(before, token)
        found.append(before)
    return found


def answer(prompt: Sequence[int], count: int) -> list[int]:
    """The right tokens."""
    before, found = cells(prompt)[-1], []
    for _ in range(count):
        found.append(before % VOCABULARY)
        before = hashed(before, found[-1])
    return found


class Cells:
    """The runner and its pool in one."""

    stages = 1

    def __init__(self) -> None:
        self.on_ready = lambda: None
        self.cells: dict[tuple[int, int], int] = {}
        self.steps: list[Step] = []

    @property
    def pool(self) -> Cells:
        return self

    def write(self, blocks: Sequence[int], frames: Sequence[int]) -> None:
        """What was pulled, one number a token."""
        for at, value in enumerate(frames):
            self.cells[blocks[at // BLOCK_TOKENS], at % BLOCK_TOKENS] = value

    def read(self, blocks: Sequence[int], at: int) -> int:
        """The cell of a token; 0 before the first."""
        return self.cells[blocks[at // BLOCK_TOKENS], at % BLOCK_TOKENS] if at >= 0 else 0

    def begin(self, step: Step) -> Pending:
        """As `Runner.begin`."""
        self.steps.append(step)
        tokens = iter(step.tokens)
        last = []
        for start, count, table in zip(step.starts, step.counts, step.blocks, strict=True):
            before = self.read(table, start - 1)
            for at in range(start, start + count):
                before = hashed(before, next(tokens))
                self.cells[table[at // BLOCK_TOKENS], at % BLOCK_TOKENS] = before
            last.append(before % VOCABULARY)
        assert next(tokens, None) is None
        return Computed(torch.nn.functional.one_hot(torch.tensor(last)[step.answers], VOCABULARY).float())


@dataclasses.dataclass
class Said:
    """What one sequence got, and when."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    times_s: list[float] = dataclasses.field(default_factory=list)
    finish: str | None = None


class Bench:
    """One engine, its clock and what it said."""

    def __init__(self, scheduler: Scheduler, pace: Pace | None = None) -> None:
        self.now = 0.0
        self.said: dict[Seq, Said] = {}
        self.held: list[Seq] = []
        self.runner = Cells()
        self.engine = Engine(
            cast(Runner, self.runner), scheduler, frozenset(), pace, self._sink, clock=lambda: self.now
        )
        self.engine.hold = self.held.append
        self.scheduler = scheduler

    def _sink(self, events: list[Event]) -> None:
        for sequence, token, finish in events:
            said = self.said[sequence]
            assert said.finish is None
            said.tokens.append(token.id)
            said.times_s.append(self.now)
            said.finish = finish

    def submit(self, prompt: list[int], tokens: int, **more: Any) -> Seq:
        """Queue a request now."""
        sequence = Seq(prompt, GREEDY, tokens, lambda _token, _finish: None, **more)
        self.said[sequence] = Said()
        self.engine.submit(sequence)
        return sequence

    def until(self, end: float, each: Callable[[], None] = lambda: None) -> None:
        """Let the time pass up to `end`; `each` is called after every look."""
        while True:
            wanted = self.engine.turn(self.now)
            each()
            if wanted is None or wanted > end:
                break
            self.now = max(self.now, wanted)
        if end < float("inf"):
            self.now = end
