"""The engine's loop: with stages the next step begins before the last one's logits have come; no wake-up is lost."""

from __future__ import annotations

import dataclasses
import threading
from typing import cast

import pytest

from disaggworker.engine.sequence import Sampling, Sequence, Token

torch = pytest.importorskip("torch")


@dataclasses.dataclass
class Late:
    """A pending step, ready when the test says so: row i answers `10 + i`."""

    rows: int
    ready: bool = False

    def logits(self) -> torch.Tensor:
        assert self.ready, "the engine waits where it could go on"
        return torch.nn.functional.one_hot(torch.arange(10, 10 + self.rows), 32).float()


class Stages:
    """A runner of two stages that notes what was begun."""

    stages = 2
    pool = None

    def __init__(self) -> None:
        self.begun: list[tuple[list[int], Late]] = []
        self.on_ready = lambda: None

    def begin(self, step) -> Late:
        self.begun.append((step.tokens, Late(len(step.answers))))
        return self.begun[-1][1]


def test_a_step_per_stage_is_in_flight() -> None:
    from disaggworker.engine.engine import Engine
    from disaggworker.engine.runner import Runner
    from disaggworker.engine.scheduler import Scheduler
    from disaggworker.kv.blocks import BlockManager

    runner, events = Stages(), []
    scheduler = Scheduler(BlockManager(8), batch_tokens=4, lanes=2)
    engine = Engine(cast(Runner, runner), scheduler, frozenset(), None, events.extend, clock=lambda: 0.0)
    first, second = (
        Sequence([n] * 4, Sampling(temperature=0.0), max_tokens=2, on_token=lambda _t, _f: None)
        for n in (1, 2)
    )
    engine.submit(first)
    engine.submit(second)
    while engine.turn(0.0) is not None:
        pass
    # Both prompts are on their way, and there is no third stage.
    assert [tokens for tokens, _ in runner.begun] == [[1] * 4, [2] * 4]
    assert not events
    runner.begun[0][1].ready = True
    while engine.turn(0.0) is not None:
        pass
    # The first goes on while the second is still on its way.
    assert events == [(first, Token(10), None)]
    assert [tokens for tokens, _ in runner.begun[2:]] == [[10]]
    runner.begun[2][1].ready = True
    runner.begun[1][1].ready = True
    while engine.turn(0.0) is not None:
        pass
    # Each is reported once, whichever came first.
    assert [(s, finish) for s, _, finish in events[1:]] == [(second, None), (first, "length")]
    runner.begun[3][1].ready = True
    engine.turn(0.0)
    assert events[-1] == (second, Token(10), "length")
    scheduler.blocks.check_integrity()
    assert scheduler.blocks.free == 8


@pytest.mark.parametrize("what", ["close", "logits"])
def test_what_is_posted_just_before_a_turn_is_not_slept_over(what: str) -> None:
    from disaggworker.engine.engine import Engine
    from disaggworker.engine.runner import Runner
    from disaggworker.engine.scheduler import Scheduler
    from disaggworker.kv.blocks import BlockManager

    runner, ended = Stages(), threading.Event()

    def clock() -> float:
        """Read last before a turn: what comes now is in the inbox when the turn begins, and the engine is not waiting."""
        if what == "close" and not runner.begun:
            engine.close()
        elif what == "logits" and runner.begun and not runner.begun[0][1].ready:
            runner.begun[0][1].ready = True
            runner.on_ready()
        return 0.0

    def sink(_: object) -> None:
        engine.close()

    scheduler = Scheduler(BlockManager(8), batch_tokens=4, lanes=2)
    engine = Engine(cast(Runner, runner), scheduler, frozenset(), None, sink, clock=clock)
    if what == "logits":
        engine.submit(
            Sequence([1] * 4, Sampling(temperature=0.0), max_tokens=1, on_token=lambda _t, _f: None)
        )

    def run() -> None:
        engine.run()
        ended.set()

    threading.Thread(target=run, daemon=True).start()
    assert ended.wait(10)
