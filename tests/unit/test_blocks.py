"""Blocks that several sequences own, and blocks that nobody does but that are still known."""

from __future__ import annotations

import pytest

from disaggworker.kv.blocks import BLOCK_TOKENS, BlockManager, chain


def keys(*values: int) -> list[bytes]:
    """Of blocks that hold one value each."""
    found: list[bytes] = []
    chain(found, [v for value in values for v in [value] * BLOCK_TOKENS])
    return found


def test_a_key_stands_for_everything_before_its_block() -> None:
    grown = keys(1, 2)
    chain(grown, [3] * BLOCK_TOKENS + [4] * (BLOCK_TOKENS - 1))
    assert grown == keys(1, 2, 3)
    assert keys(1, 2)[1] != keys(3, 2)[1]


def test_a_known_block_is_shared_and_outlives_its_owners() -> None:
    blocks = BlockManager(4, cache=True)
    one = blocks.allocate(2)
    assert one
    blocks.keep(one, keys(1, 2))
    two = blocks.allocate(3, keys(1, 2, 3))
    assert two
    assert (two.blocks[:2], two.found, blocks.free) == (one.blocks, 2, 1)
    blocks.release(one)
    assert blocks.free == 1
    blocks.release(two)
    assert (blocks.free, blocks.known(keys(1, 2, 3))) == (4, 2)
    blocks.check_integrity()


def test_the_longest_unused_goes_first_and_the_end_before_the_beginning() -> None:
    blocks = BlockManager(4, cache=True)
    for value in (1, 3):
        owned = blocks.allocate(2)
        assert owned
        blocks.keep(owned, keys(value, value + 1))
        blocks.release(owned)
    again = blocks.allocate(2, keys(1, 2))  # used once more: now the other is the older
    assert again
    blocks.release(again)
    fresh = blocks.allocate(1)
    assert fresh
    assert (blocks.known(keys(1, 2)), blocks.known(keys(3, 4))) == (2, 1)
    blocks.check_integrity()


def test_what_is_found_counts_as_taken_and_only_once() -> None:
    blocks = BlockManager(4, cache=True)
    owned = blocks.allocate(2)
    assert owned
    blocks.keep(owned, keys(1, 2))
    assert blocks.allocate(4, keys(1, 2), spare=1) is None
    shared = blocks.allocate(4, keys(1, 2))
    assert shared
    blocks.release(owned)
    blocks.release(shared)
    # Idle ones are free, and stop being so when they are found.
    assert blocks.allocate(4, keys(1, 2), spare=1) is None
    assert blocks.allocate(4, keys(1, 2))
    assert blocks.free == 0
    blocks.check_integrity()


def test_two_who_computed_the_same_know_it_once() -> None:
    blocks = BlockManager(4, cache=True)
    one, two = blocks.allocate(2), blocks.allocate(2)
    assert one
    assert two
    blocks.keep(one, keys(1))
    blocks.keep(two, keys(1, 2))
    three = blocks.allocate(2, keys(1, 2))
    assert three
    assert three.blocks == [one.blocks[0], two.blocks[1]]
    blocks.release(three)
    blocks.release(one)
    blocks.release(two)
    blocks.check_integrity()


def test_blocks_are_given_back_once() -> None:
    blocks = BlockManager(2)
    owned = blocks.allocate(2)
    assert owned
    blocks.release(owned)
    with pytest.raises(KeyError):
        blocks.release(owned)
