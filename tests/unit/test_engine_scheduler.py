"""Who the worker's scheduler admits: the rules that the simulator has too (simulate/__init__.py)."""

from __future__ import annotations

from disaggserve.simulate import serving
from disaggworker.engine.scheduler import RESERVE, Scheduler
from disaggworker.engine.sequence import Sampling, Sequence
from disaggworker.kv.blocks import BlockManager


def prompt(blocks: int) -> Sequence:
    return Sequence([0] * (16 * blocks), Sampling(), 8, lambda token, reason: None)


def decode(total: int) -> Scheduler:
    return Scheduler(BlockManager(total), may_prefill=False, may_decode=True, batch_tokens=512)


def test_one_block_of_a_hundred_stays_free_when_decode_admits() -> None:
    assert RESERVE == serving.RESERVE
    scheduler = decode(200)
    for blocks in (150, 49, 48):
        scheduler.add(prompt(blocks))
    assert [len(s.prompt) // 16 for s in scheduler.admit()] == [150]  # 49 more would leave one
    scheduler.waiting.popleft()
    assert [len(s.prompt) // 16 for s in scheduler.admit()] == [48]
    assert scheduler.blocks.free == 2


def test_who_is_alone_may_have_all() -> None:
    scheduler = decode(200)
    scheduler.add(prompt(200))
    assert len(scheduler.admit()) == 1


def test_who_was_put_back_leaves_the_reserve_too() -> None:
    scheduler = decode(200)
    scheduler.add(prompt(100))
    (running,) = scheduler.admit()
    back = prompt(99)
    scheduler.preempted.append(back)
    assert scheduler.prefill_batch() == []
    scheduler.leave(running)
    assert scheduler.prefill_batch() == [back]
