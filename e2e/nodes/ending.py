"""When a pod has to end: one order, which later orders can only make more urgent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any


class Ending:
    """Not ordered yet, or ordered with a deadline after which processes are killed."""

    def __init__(self) -> None:
        self._ordered = asyncio.Event()
        self._kill_at_s = float("inf")
        self._hurry: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def ordered(self) -> bool:
        return self._ordered.is_set()

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; infinite before an order, never negative."""
        return max(0.0, self._kill_at_s - asyncio.get_running_loop().time())

    def order(self, grace_s: float) -> None:
        """End within `grace_s` from now, or sooner if that was said before."""
        at_s = asyncio.get_running_loop().time() + grace_s
        if at_s < self._kill_at_s:
            self._kill_at_s = at_s
            hurry, self._hurry = self._hurry, asyncio.get_running_loop().create_future()
            hurry.set_result(None)
        self._ordered.set()

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the order, or for so long; whether it has come."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ordered.wait()
        except TimeoutError:
            pass
        return self.ordered

    async def unless_ordered(self, work: Callable[[], Awaitable[Any]]) -> bool:
        """Do `work`, dropping it when the order comes; whether it was done. What it raises goes through."""

        async def run() -> None:
            await work()

        task, order = asyncio.create_task(run()), asyncio.create_task(self._ordered.wait())
        try:
            await asyncio.wait({task, order}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
                return True
            return False
        finally:
            await _cancel(task, order)

    async def until_deadline(self, work: Awaitable[Any], at_least_s: float = 0.0) -> bool:
        """Await `work` until the deadline, which may move closer, but for at least `at_least_s`; whether it was
        done in time. Unfinished work is cancelled."""
        loop = asyncio.get_running_loop()
        earliest_s = loop.time() + at_least_s
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                left_s = max(self.left_s, earliest_s - loop.time())
                if left_s <= 0:
                    return False
                bound = None if left_s == float("inf") else left_s
                await asyncio.wait({task, self._hurry}, timeout=bound, return_when=asyncio.FIRST_COMPLETED)
            task.result()
            return True
        finally:
            await _cancel(task)


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
