"""A small deployment for tests whose clients block: it lives in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from e2e.dataplane import DataPlane, Member, until

T = TypeVar("T")

MODEL = "facebook/opt-13b"


class Background:
    """An event loop in a thread, for tests whose clients block."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="background", daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """What it returns, or raises."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    @contextlib.contextmanager
    def inside(self, manager: AbstractAsyncContextManager[T]) -> Iterator[T]:
        """The manager's block, entered and left over there."""
        value = self.call(manager.__aenter__())  # type: ignore[arg-type]
        try:
            yield value
        finally:
            self.call(manager.__aexit__(None, None, None))  # type: ignore[arg-type]

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Served:
    """One prefill, one decode and one router."""

    def __init__(
        self, background: Background, plane: DataPlane, prefill: Member, decode: Member, router: Member
    ) -> None:
        self.background, self.plane = background, plane
        self.prefill, self.decode, self.router = prefill, decode, router

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return self.background.call(work)

    def show_decode(self, ready: bool) -> None:
        """Without a decode instance every request waits in the queue."""

        async def show() -> None:
            self.plane.show(self.decode, ready=ready)
            for router in self.plane.alive("router"):
                await self.plane.until_sees(router, ready)

        self.call(show())

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        self.call(until(condition, what))

    def quiet(self) -> None:
        """Nothing is held anywhere any more."""
        self.call(self.plane.quiet())


@contextlib.asynccontextmanager
async def serve(background: Background, plane: DataPlane) -> AsyncIterator[Served]:
    async with plane:
        members = await asyncio.gather(plane.worker("prefill"), plane.worker("decode"), plane.router())
        await plane.until_sees(members[2])
        yield Served(background, plane, *members)
