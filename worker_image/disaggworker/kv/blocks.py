"""Who owns which KV block, and what may be in it. Counting only: no tensor, no thread, no clock."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

BLOCK_TOKENS = 16


def blocks_for(tokens: int) -> int:
    """Blocks that hold that many tokens."""
    return -(-tokens // BLOCK_TOKENS)


def chain(keys: list[bytes], tokens: Sequence[int]) -> None:
    """Add the keys of the next full blocks: `tokens` follow those that `keys` stand for.

    A block's key is a hash of its tokens and of the key before it, so that equal keys mean equal prefixes: keys and values
    depend on all tokens before them. Cryptographic, for a client who could make two prefixes collide would be answered
    from another's.
    """
    for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
        data = array("q", tokens[end - BLOCK_TOKENS : end]).tobytes()
        keys.append(hashlib.blake2b(data, digest_size=16, key=keys[-1] if keys else b"").digest())


@dataclasses.dataclass
class Allocation:
    """Blocks of one sequence, in order of its tokens. `generation` is never used twice."""

    generation: int
    blocks: list[int]
    found: int  # of the blocks, so many were there already, filled
    kept: int  # so many of them are full and known by their key, or would be if another block were not


class BlockManager:
    """Blocks `0 … total - 1`, each owned by one sequence or more, or free; low numbers go first, so that a pool that grows
    stays small.

    With `cache`, a full block stays known by its key: while it is owned others may own it too, and when nobody does it is
    free, but goes last, the longest unused first. Nobody writes into a block that is known.

    It never takes a block away from an owner: preemption is the scheduler's.
    """

    def __init__(self, total: int, *, cache: bool = False) -> None:
        self.total, self.cache = total, cache
        self._empty = list(range(total - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # known and owned by nobody, longest unused first
        self._known: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}  # the same the other way round
        self._owners = [0] * total
        self._owned: dict[int, Allocation] = {}
        self._next = 1

    @property
    def free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._empty) + len(self._idle)

    def known(self, keys: Iterable[bytes]) -> int:
        """How many blocks the longest known prefix has."""
        return sum(1 for _ in itertools.takewhile(self._known.__contains__, keys))

    def allocate(self, count: int, keys: Sequence[bytes] = (), *, spare: int = 0) -> Allocation | None:
        """That many blocks, the first of them those known by `keys`; None if fewer than `spare` would stay free."""
        found = [self._known[key] for key in keys[: self.known(keys)]]
        taken = count - len(found) + sum(block in self._idle for block in found)
        if taken > self.free - spare:
            return None
        for block in found:
            self._idle.pop(block, None)
            self._owners[block] += 1
        blocks = found + [self._new() for _ in range(count - len(found))]
        allocation = Allocation(self._next, blocks, len(found), len(found))
        self._next += 1
        self._owned[allocation.generation] = allocation
        return allocation

    def grow(self, allocation: Allocation) -> bool:
        """One block more; False if none is free."""
        if not self.free:
            return False
        allocation.blocks.append(self._new())
        return True

    def keep(self, allocation: Allocation, keys: Sequence[bytes]) -> None:
        """The blocks that `keys` stand for are full: they may be found from now on."""
        for at in range(allocation.kept, len(keys)):
            block, key = allocation.blocks[at], keys[at]
            if key not in self._known:
                self._known[key] = block
                self._keys[block] = key
        allocation.kept = max(allocation.kept, len(keys))

    def release(self, allocation: Allocation) -> None:
        """Give the blocks back. Raises `KeyError` if they were given back before."""
        del self._owned[allocation.generation]
        # The last go first: what begins alike is worth more than how it went on, and is no use without it.
        for block in reversed(allocation.blocks):
            self._owners[block] -= 1
            if self._owners[block]:
                continue
            if block in self._keys:
                self._idle[block] = None
            else:
                self._empty.append(block)

    def check_integrity(self) -> None:
        """Every block is empty, idle or owned; as often as it has owners; known by one key. Raises `AssertionError`."""
        owners = Counter(block for a in self._owned.values() for block in a.blocks)
        if [owners[block] for block in range(self.total)] != self._owners:
            raise AssertionError(f"{owners.total()} owners of blocks are not the {sum(self._owners)} counted")
        if sorted([*self._empty, *self._idle, *owners]) != list(range(self.total)):
            raise AssertionError(
                f"{len(self._empty)} empty, {len(self._idle)} idle and {len(owners)} owned blocks are not {self.total}"
            )
        if self._keys != {block: key for key, block in self._known.items()}:
            raise AssertionError(f"{len(self._keys)} blocks are known by {len(self._known)} keys")
        if not self._idle.keys() <= self._keys.keys() or not self._keys.keys().isdisjoint(self._empty):
            raise AssertionError("an idle block is not known, or an empty one is")

    def _new(self) -> int:
        """An empty block, else the idle one that was not used for longest, forgotten; owned once."""
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._known[self._keys.pop(block)]
        self._owners[block] = 1
        return block
