"""Which hand-offs are held, of which blocks, and until when. Counting only: no socket, no tensor, no thread of its own."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(eq=False)
class Lease:
    """KV that waits to be pulled. `generation` is its blocks' allocation: blocks that were reused have another one."""

    generation: int
    blocks: NDArray[np.int64]
    tokens: list[int]
    free: Callable[[], None]
    until_s: float  # monotonic; infinite where somebody else counts


class Leases:
    """The hand-offs of one process, by name. Any thread may call; a lease ends once, by whoever is first, and never comes back.

    While somebody is in `reading`, no lease ends: what is read there is the hand-off's, or is not read at all.
    """

    def __init__(self, lease_s: float) -> None:
        """`lease_s`: seconds from each renewal to the end; infinite on a rank that rank 0 tells of the end."""
        self.lease_s = lease_s
        self.expired = 0  # that ended by time alone
        self._held: dict[str, Lease] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, handoff: object) -> bool:
        return handoff in self._held

    @property
    def blocks(self) -> int:
        """Blocks that they hold."""
        with self._lock:
            return sum(len(lease.blocks) for lease in self._held.values())

    def hold(
        self,
        handoff: str,
        generation: int,
        blocks: Sequence[int],
        tokens: list[int],
        free: Callable[[], None],
        now_s: float,
    ) -> None:
        """Keep these blocks until they are dropped or the lease ends, then call `free` once."""
        lease = Lease(generation, np.asarray(blocks, dtype=np.int64), tokens, free, now_s + self.lease_s)
        with self._lock:
            self._held[handoff] = lease

    def renew(self, handoff: str, generation: int, now_s: float) -> bool:
        """Begin the lease anew; False if it is no longer held."""
        with self.reading(handoff, generation) as lease:
            if lease:
                lease.until_s = max(lease.until_s, now_s + self.lease_s)
            return lease is not None

    @contextmanager
    def reading(self, handoff: str, generation: int) -> Iterator[Lease | None]:
        """The lease, held at least until this ends; None where it has ended or the blocks are another's by now."""
        with self._lock:
            lease = self._held.get(handoff)
            yield lease if lease and lease.generation == generation else None

    def drop(self, handoff: str) -> None:
        """End a lease now, if it still runs."""
        with self._lock:
            lease = self._held.pop(handoff, None)
        if lease:
            lease.free()

    def expire(self, now_s: float) -> None:
        """End those whose time is over."""
        with self._lock:
            ended = [name for name, lease in self._held.items() if lease.until_s < now_s]
            leases = [self._held.pop(name) for name in ended]
            self.expired += len(ended)
        for lease in leases:
            lease.free()

    @property
    def next_end_s(self) -> float:
        """When the first of them ends; infinite if none does."""
        with self._lock:
            return min((lease.until_s for lease in self._held.values()), default=math.inf)
