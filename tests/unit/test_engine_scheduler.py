"""Who the worker's scheduler takes: the rules that the simulator has too (simulate/__init__.py)."""

from __future__ import annotations

from typing import Any

from disaggserve.simulate import serving
from disaggworker.engine.scheduler import RESERVE, Scheduler
from disaggworker.engine.sequence import Sampling, Sequence
from disaggworker.kv.blocks import BlockManager


def prompt(tokens: int, **more: Any) -> Sequence:
    return Sequence([0] * tokens, Sampling(), 8, lambda token, reason: None, **more)


def pulled(blocks: int) -> Sequence:
    """Its first token is there, and fits the last of its blocks."""
    return prompt(16 * blocks - 1, output=[1], on_admitted=lambda: None)


def scheduler(total: int, chunk: int = 0) -> Scheduler:
    return Scheduler(BlockManager(total), batch_tokens=512, chunk=chunk)


def computed(s: Scheduler) -> list[tuple[int, int]]:
    """Prompt tokens and tokens in this step of a step's prompts, which are computed."""
    batch = s.step(0)
    for sequence, count in batch.prompts:
        sequence.computed += count
        if sequence.computed == sequence.length:
            sequence.output.append(1)
            s.join(sequence)
    return [(len(sequence.prompt), count) for sequence, count in batch.prompts]


def test_one_block_of_a_hundred_stays_free_when_decode_admits() -> None:
    assert RESERVE == serving.RESERVE
    s = scheduler(200)
    for blocks in (150, 49, 48):
        s.add(pulled(blocks))
    assert [x.length // 16 for x in s.admit()] == [150]  # 49 more would leave one
    s.waiting.popleft()
    assert [x.length // 16 for x in s.admit()] == [48]
    assert s.blocks.free == 2


def test_who_is_alone_may_have_all() -> None:
    s = scheduler(200)
    s.add(pulled(200))
    assert len(s.admit()) == 1


def test_who_was_put_back_leaves_the_reserve_too() -> None:
    s = scheduler(200)
    s.add(pulled(100))
    (running,) = s.admit()
    back = pulled(99)
    s.preempted.append(back)
    assert s.admit() == []
    assert not s.step(0)
    s.leave(running)
    assert s.admit() == []
    assert s.step(0).shares() == [(back, back.length)]


def test_whole_prompts_fill_a_step_and_a_longer_one_goes_alone() -> None:
    s = scheduler(200)
    for tokens in (100, 400, 13, 600, 5):
        s.add(prompt(tokens))
    assert [computed(s) for _ in range(3)] == [[(100, 100), (400, 400)], [(13, 13)], [(600, 600)]]
    assert computed(s) == [(5, 5)]


def test_prompts_go_before_decode_unless_they_are_cut() -> None:
    s = scheduler(200)
    s.add(prompt(20))
    computed(s)
    s.add(prompt(30))
    assert s.step(0).decodes == []
    assert len(s.step(0).decodes) == 1


def test_chunks_fill_what_decodes_leave_of_a_step() -> None:
    s = scheduler(200, chunk=32)
    for tokens in (20, 50, 7):
        s.add(prompt(tokens))
    assert computed(s) == [(20, 20), (50, 12)]
    assert computed(s) == [(50, 31)]  # one token goes to who decodes
    assert computed(s) == [(50, 7), (7, 7)]
    assert len(s.step(0).decodes) == 3


def test_no_prompt_begins_while_somebody_waits_to_decode() -> None:
    s = scheduler(100)
    s.add(pulled(60))
    (running,) = s.admit()
    s.add(pulled(60))
    s.add(prompt(20))
    assert s.admit() == []
    assert not s.step(0)
    s.leave(running)
    assert len(s.admit()) == 1
    assert computed(s) == [(20, 20)]


def test_a_prompt_that_stays_takes_its_first_decode_steps_block() -> None:
    s = scheduler(10)
    s.add(prompt(32))
    s.add(prompt(32, hand_off=True))
    s.step(0)
    assert s.blocks.free == 5


def test_what_another_has_computed_is_found_but_for_the_last_token() -> None:
    s = Scheduler(BlockManager(20, cache=True), batch_tokens=64)
    first = prompt(64)
    s.add(first)
    computed(s)
    s.computed(first)
    s.add(prompt(64))
    s.add(prompt(50))
    assert computed(s) == [(64, 16), (50, 2)]
    assert (s.looked_up, s.found) == (64 + 64 + 50, 48 + 48)
    s.blocks.check_integrity()
