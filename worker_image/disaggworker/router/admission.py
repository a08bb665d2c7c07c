"""The queue before the instances: first come, first served, bounded in length and in time."""

from __future__ import annotations

import asyncio

from disaggworker.router.errors import NoInstance, QueueFull
from disaggworker.router.fleet import Fleet, Instance


class Admission:
    """Accepted requests that no prefill has answered yet; those that find no instance wait here for one."""

    def __init__(self, fleet: Fleet, max_queued: int, timeout_s: float) -> None:
        self._fleet, self._max_queued, self._timeout_s = fleet, max_queued, timeout_s
        self._changed = asyncio.Event()
        self.queued = 0

    def enter(self) -> None:
        """Raises QueueFull."""
        if self.queued >= self._max_queued:
            raise QueueFull(f"{self.queued} requests wait for their first token; try again later")
        self.queued += 1

    def leave(self) -> None:
        self.queued -= 1

    def wake(self) -> None:
        """The fleet has changed: all who wait look again, in the order in which they came."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def prefill(self) -> Instance:
        """A prefill instance whose key some decode has. Raises NoInstance when none comes up in time."""
        clock = asyncio.get_running_loop().time
        deadline_s = clock() + self._timeout_s
        while True:
            now_s = clock()
            found = self._fleet.prefill(now_s)
            if found is not None:
                return found
            if now_s >= deadline_s:
                why = self._fleet.lacking() or "every instance failed lately"
                raise NoInstance(f"{why}; waited {self._timeout_s:g} s")
            until_s = min(deadline_s, self._fleet.next_chance_s(now_s) or deadline_s)
            try:
                async with asyncio.timeout_at(until_s):
                    await self._changed.wait()
            except TimeoutError:
                continue
