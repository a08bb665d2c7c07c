"""What instances say of their load, heard by one long answer from each: others' requests, which the router cannot count itself.

A worker writes a line when something changed, at most every 50 ms and at least once a second. One that falls silent is unknown
(`Instance.lost`), not idle. An engine that has no such door is never heard, and the router's own counts are all there is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

import msgspec

from disaggserve.protocol import Load
from disaggserve.wire import VERSION
from disaggworker.router.fleet import Fleet, Instance
from disaggworker.router.upstream import Broken, UpstreamError, Upstreams

log = logging.getLogger(__name__)

SILENCE_S = 3.0
_BACKOFF_FIRST_S, _BACKOFF_MOST_S = 0.05, 2.0
_NO_SUCH_DOOR = (404, 405, 501)

_decode = msgspec.json.Decoder(Load).decode


class Loads:
    """Listens to every instance of the latest view. `update` after the fleet's own."""

    def __init__(self, fleet: Fleet, upstreams: Upstreams) -> None:
        self._fleet, self._upstreams = fleet, upstreams
        self._tasks: dict[str, tuple[Instance, asyncio.Task[None]]] = {}

    def update(self) -> None:
        known = {i.seen.uid: i for i in self._fleet.instances() if i.known}
        for uid in self._tasks.keys() - known.keys():
            gone, task = self._tasks.pop(uid)
            task.cancel()
            self._upstreams.forget(gone.seen.url)
        for uid in known.keys() - self._tasks.keys():
            instance = known[uid]
            instance.lost = True  # until it has been asked
            self._tasks[uid] = instance, asyncio.create_task(self._listen(instance), name=f"load of {uid}")

    def close(self) -> None:
        for _, task in self._tasks.values():
            task.cancel()
        self._tasks.clear()

    async def _listen(self, instance: Instance) -> None:
        backoff_s = _BACKOFF_FIRST_S
        while True:
            before = instance.others
            try:
                if not await self._hear(instance):
                    instance.lost = False
                    return
                why = "it ended its answer"
            except TimeoutError:
                why = f"nothing was heard for {SILENCE_S:g} s"
            except (UpstreamError, msgspec.DecodeError) as error:
                why = str(error)
            if instance.others is not before:
                backoff_s = _BACKOFF_FIRST_S
                log.info("the load of %s is unknown: %s", instance, why)
            instance.lost = True
            await asyncio.sleep(backoff_s)
            backoff_s = min(_BACKOFF_MOST_S, 2 * backoff_s)

    async def _hear(self, instance: Instance) -> bool:
        """To the end of one answer; False where this one says nothing that can be understood, and never will."""
        clock, rest = asyncio.get_running_loop().time, b""

        def take(piece: bytes) -> None:
            nonlocal rest
            *lines, rest = (rest + piece).split(b"\n")
            if lines:
                load = _decode(lines[-1])
                if load.version != VERSION:
                    raise _OtherVersion
                instance.others, instance.lost = load, False
                silence.reschedule(clock() + SILENCE_S)

        async with asyncio.timeout(SILENCE_S) as silence:
            with contextlib.closing(await self._upstreams.get(instance.seen.url, "/load")) as reply:
                if reply.status in _NO_SUCH_DOOR:
                    return False
                if reply.status != 200:
                    raise Broken(f"it answered {reply.status}")
                if reply.headers.get(b"content-type") != b"application/x-ndjson":
                    return False  # vLLM has something else behind a door of this name
                try:
                    await reply.stream(take)
                except _OtherVersion:
                    return False
        return True


class _OtherVersion(Exception):
    pass
