"""The queue before the instances: first come, first served, bounded in length and in time."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable

from disaggworker.router.errors import NoInstance, QueueFull
from disaggworker.router.fleet import Fleet, Instance
from disaggworker.router.request import Request

_REMEMBERED = 64  # first tokens, of which the rate is taken
_RECENT_S = 30.0
_LONGEST_S = 60  # no client is sent away for longer
_UNKNOWN_S = 5  # where no first token has come lately


class Admission:
    """Accepted requests that no prefill has answered yet; those that find no instance wait here for one."""

    def __init__(self, fleet: Fleet, max_queued: int, timeout_s: float) -> None:
        self._fleet, self._max_queued, self._timeout_s = fleet, max_queued, timeout_s
        self._changed = asyncio.Event()
        self._served_s: deque[float] = deque(maxlen=_REMEMBERED)  # when the latest first tokens came
        self.queued = 0

    def enter(self) -> None:
        """Raises QueueFull."""
        if self.queued >= self._max_queued:
            wait_s = self.wait_s(asyncio.get_running_loop().time())
            raise QueueFull(
                f"{self.queued} requests wait for their first token; try again in {wait_s} s", wait_s
            )
        self.queued += 1

    def leave(self, *, served: bool) -> None:
        """Its first token is here (`served`), or it ended without one."""
        self.queued -= 1
        if served:
            self._served_s.append(asyncio.get_running_loop().time())

    def wait_s(self, now_s: float) -> int:
        """Whole seconds in which those who wait get their first tokens, at the rate of the latest ones."""
        while self._served_s and now_s - self._served_s[0] > _RECENT_S:
            self._served_s.popleft()
        if not self._served_s:
            return _UNKNOWN_S
        # A burst that came just now is no rate: it is taken over a second at least.
        per_s = len(self._served_s) / max(1.0, now_s - self._served_s[0])
        return min(_LONGEST_S, max(1, math.ceil(self.queued / per_s)))

    def wake(self) -> None:
        """The fleet has changed: all who wait look again, in the order in which they came."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def prefill(self, request: Request, goes_on: Callable[[Instance], bool] | None = None) -> Instance:
        """A prefill instance for it whose key some decode has. Raises NoInstance when none comes up in time.

        `goes_on`: the answer was begun; where it can go on.
        """
        clock = asyncio.get_running_loop().time
        deadline_s = clock() + self._timeout_s
        while True:
            now_s = clock()
            found = self._fleet.prefill(now_s, request, goes_on)
            if found is not None:
                return found
            if now_s >= deadline_s:
                why = self._fleet.lacking() or "every instance failed lately"
                if goes_on is not None:
                    why = "no instance where the answer could go on, of the pairing key where it was begun, is ready"
                raise NoInstance(f"{why}; waited {self._timeout_s:g} s")
            until_s = min(deadline_s, self._fleet.next_chance_s(now_s) or deadline_s)
            try:
                async with asyncio.timeout_at(until_s):
                    await self._changed.wait()
            except TimeoutError:
                continue
