"""What a worker tells routers of its load: to each one, what all others have here.

A router counts its own requests itself, at once and exactly; what others sent it learns from here, 50 ms late at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping

import msgspec
from aiohttp import web

from disaggserve.protocol import Load

ROUTER = "X-Router"  # the header that names a router, in its requests and where it asks for the load
_EVERY_S, _AT_LEAST_S = 0.05, 1.0

_encode = msgspec.json.Encoder().encode


@dataclasses.dataclass(eq=False)
class _Asked:
    """One request here: whose it is, and what it holds now."""

    router: str | None
    queued_tokens: Callable[[], int]
    kv_tokens: Callable[[], int]


class Book:
    """The requests of one worker. `facts`: the fields of `Load` that are the same for every router."""

    def __init__(self, facts: Callable[[], Mapping[str, int]]) -> None:
        self._facts = facts
        self._asked: set[_Asked] = set()
        self._closed = False

    @contextlib.contextmanager
    def queued(self, request: web.Request, tokens: int) -> Iterator[None]:
        """A prompt that waits or is being computed."""
        with self._counted(_Asked(request.headers.get(ROUTER), lambda: tokens, lambda: 0)):
            yield

    @contextlib.contextmanager
    def decoding(self, request: web.Request, tokens: Callable[[], int]) -> Iterator[None]:
        """An answer that grows: `tokens` of prompt and answer so far."""
        with self._counted(_Asked(request.headers.get(ROUTER), lambda: 0, tokens)):
            yield

    @contextlib.contextmanager
    def whole(self, request: web.Request, prompt_tokens: int, made: Callable[[], int]) -> Iterator[None]:
        """Both in one place: a prompt, and from its first token (`made` says how many) an answer that grows."""
        asked = _Asked(
            request.headers.get(ROUTER),
            lambda: 0 if made() else prompt_tokens,
            lambda: prompt_tokens + made() if made() else 0,
        )
        with self._counted(asked):
            yield

    @contextlib.contextmanager
    def _counted(self, asked: _Asked) -> Iterator[None]:
        self._asked.add(asked)
        try:
            yield
        finally:
            self._asked.discard(asked)

    def of_others(self, router: str | None) -> Load:
        """The load but for this router's own requests; all of it where none is named."""
        theirs = [a for a in self._asked if a.router != router or router is None]
        return Load(
            queued_tokens=sum(a.queued_tokens() for a in theirs),
            kv_tokens=sum(a.kv_tokens() for a in theirs),
            **self._facts(),
        )

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """One JSON line whenever something changed, at most every 50 ms and at least once a second, until `close`."""
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        clock, router = asyncio.get_running_loop().time, request.headers.get(ROUTER)
        said, said_s = None, 0.0
        while not self._closed:
            load, now_s = self.of_others(router), clock()
            if load != said or now_s - said_s >= _AT_LEAST_S:
                await response.write(_encode(load) + b"\n")
                said, said_s = load, now_s
            await asyncio.sleep(_EVERY_S)
        await response.write_eof()
        return response

    def close(self) -> None:
        """End every stream: the worker ends."""
        self._closed = True
