"""Who owns which KV block. Counting only: no tensor, no thread, no clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

BLOCK_TOKENS = 16


def blocks_for(tokens: int) -> int:
    """Blocks that hold that many tokens."""
    return -(-tokens // BLOCK_TOKENS)


@dataclasses.dataclass
class Allocation:
    """Blocks of one sequence, in order of its tokens. `generation` is never used twice."""

    generation: int
    blocks: list[int]


class BlockManager:
    """Free and owned blocks `0 … total - 1`; low numbers go first, so that a pool that grows stays small.

    It does not know what is in a block, and it never takes one away: preemption is the scheduler's.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._owned: dict[int, Allocation] = {}
        self._next = 1

    @property
    def free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    def allocate(self, count: int) -> Allocation | None:
        """That many blocks, or None if so many are not free."""
        if count > len(self._free):
            return None
        allocation = Allocation(self._next, [self._free.pop() for _ in range(count)])
        self._next += 1
        self._owned[allocation.generation] = allocation
        return allocation

    def grow(self, allocation: Allocation) -> bool:
        """One block more; False if none is free."""
        if not self._free:
            return False
        allocation.blocks.append(self._free.pop())
        return True

    def release(self, allocation: Allocation) -> None:
        """Give the blocks back. Raises `KeyError` if they were given back before."""
        del self._owned[allocation.generation]
        self._free.extend(reversed(allocation.blocks))

    def check_integrity(self) -> None:
        """Every block is free or owned, once. Raises `AssertionError`."""
        owned: Sequence[int] = [b for a in self._owned.values() for b in a.blocks]
        if sorted([*self._free, *owned]) != list(range(self.total)):
            raise AssertionError(f"{len(self._free)} free and {len(owned)} owned blocks are not {self.total}")
