"""The router's HTTP to instances: answers come out whole however they are cut, and what is no HTTP is said to be none."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggworker.router.upstream import Broken, Reply, Unreachable, Upstreams, _Connection, _Turns
from tests.wires import cut

SIZES = st.lists(st.integers(1, 30), min_size=1)
BODIES = st.lists(st.binary(max_size=50), max_size=6)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"


class Transport:
    """What a connection does to its socket."""

    def __init__(self) -> None:
        self.aborted = self.paused = False
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def get_extra_info(self, _: str) -> None:
        return None


def connection() -> tuple[_Connection, Transport, list[_Connection]]:
    idle: list[_Connection] = []
    made, transport = _Connection(idle, _Turns()), Transport()
    made.connection_made(transport)  # type: ignore[arg-type]
    return made, transport, idle


def read(whole: bytes, sizes: list[int], *, closes: bool = False) -> tuple[bytes, bool]:
    """The body of one answer, and whether its connection can be used again."""

    async def run() -> tuple[bytes, bool]:
        made, transport, idle = connection()
        reply = made.ask(b"GET / HTTP/1.1\r\n\r\n")
        for piece in cut(whole, sizes):
            made.data_received(piece)
        if closes:
            made.connection_lost(None)
        await reply.head()
        return await reply.read(), idle == [made] and not transport.aborted

    return asyncio.run(run())


@given(BODIES, SIZES, st.booleans())
def test_chunks(pieces: list[bytes], sizes: list[int], trailers: bool) -> None:
    body = b"".join(b"%x;a=b\r\n%b\r\n" % (len(p), p) for p in pieces if p)
    end = b"0\r\nX-Trailer: 1\r\n\r\n" if trailers else b"0\r\n\r\n"
    whole = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + body + end
    assert read(whole, sizes) == (b"".join(pieces), True)


@given(st.binary(max_size=200), SIZES, st.booleans())
def test_length(body: bytes, sizes: list[int], close: bool) -> None:
    said = b"Connection: close\r\n" if close else b""
    whole = b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + said + b"content-length: %d\r\n\r\n" % len(body) + body
    assert read(whole, sizes) == (body, not close)


@given(st.binary(max_size=200), SIZES)
def test_until_the_connection_ends(body: bytes, sizes: list[int]) -> None:
    assert read(HEAD + b"\r\n" + body, sizes, closes=True) == (body, False)


@pytest.mark.parametrize(
    "whole",
    [
        b"",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        HEAD,
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: 3\r\n\r\nab",
        HEAD + b"Content-Length: 1\r\n\r\nab",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n",
        b"a" * 70_000,
    ],
)
def test_what_is_no_answer_is_broken(whole: bytes) -> None:
    with pytest.raises(Broken):
        read(whole, [len(whole) or 1], closes=True)


def test_what_nobody_asked_for_ends_the_connection() -> None:
    made, transport, _ = connection()
    made.data_received(b"hello")
    assert transport.aborted


def test_a_sinks_own_fault_reaches_who_waits() -> None:
    async def run() -> None:
        made, transport, _ = connection()
        reply = made.ask(b"")
        made.data_received(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")

        def sink(_: bytes) -> None:
            raise KeyError("its own")

        waits = asyncio.ensure_future(reply.stream(sink))
        await asyncio.sleep(0)
        made.data_received(b"1\r\na\r\n")
        with pytest.raises(KeyError):
            await waits
        assert transport.aborted

    asyncio.run(run())


def test_a_stream_leaves_nothing_to_the_garbage_collector() -> None:
    def knowing(reply: Reply) -> Callable[[bytes], None]:
        return lambda _: reply.resume()

    async def run() -> None:
        made, _, _ = connection()
        reply = made.ask(b"")
        made.data_received(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        gone, waits = weakref.ref(reply), asyncio.ensure_future(reply.stream(knowing(reply)))
        await asyncio.sleep(0)
        made.data_received(b"1\r\na\r\n0\r\n\r\n")
        await waits
        del reply, waits
        assert gone() is None

    gc.disable()
    try:
        asyncio.run(run())
    finally:
        gc.enable()


def streams(turns: _Turns, count: int) -> tuple[list[_Connection], list[int], list[asyncio.Task[None]]]:
    """So many streams that have begun, where it is noted which of them was served, and who waits for their ends."""
    made, served, waits = [], list[int](), []
    for k in range(count):
        connection = _Connection([], turns)
        connection.connection_made(Transport())  # type: ignore[arg-type]
        reply = connection.ask(b"")
        connection.data_received(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        made.append(connection)
        waits.append(asyncio.create_task(reply.stream(lambda _, k=k: served.append(k))))  # type: ignore[misc]
    return made, served, waits


def test_streams_take_turns_and_what_is_new_waits_for_a_few_of_them() -> None:
    async def run() -> None:
        made, served, _waits = streams(_Turns(), 30)
        await asyncio.sleep(0)
        for connection in (*made, *made):
            connection.data_received(b"1\r\na\r\n")
        assert not served
        seen = [0]
        while len(served) < len(made):
            await asyncio.sleep(0)
            seen.append(len(served))
        assert max(after - before for before, after in pairwise(seen)) == 4
        assert served == list(range(30))  # two pieces that waited together are passed on together

    asyncio.run(run())


def test_what_waits_for_its_turn_is_not_lost_with_the_connection() -> None:
    async def run() -> None:
        (made,), served, (waits,) = streams(_Turns(), 1)
        await asyncio.sleep(0)
        made.data_received(b"1\r\na\r\n")
        made.connection_lost(None)
        with pytest.raises(Broken):
            await waits
        assert served == [0]

    asyncio.run(run())


# ------------------------------------------------------------------------------------------- over sockets

Handle = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def server(handle: Handle) -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await handle(reader, writer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as made:
        yield f"http://127.0.0.1:{made.sockets[0].getsockname()[1]}"


def over_sockets(handle: Handle, test: Callable[[Upstreams, str], Awaitable[Any]]) -> None:
    async def run() -> None:
        upstreams = Upstreams(1.0, "me")
        async with asyncio.timeout(20), server(handle) as url:
            try:
                await test(upstreams, url)
            finally:
                upstreams.close()

    asyncio.run(run())


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    asked = await reader.readuntil(b"\r\n\r\n")
    writer.write(HEAD + b"Content-Length: 2\r\n\r\nok")
    return asked


def test_a_connection_is_used_again_and_one_that_was_closed_meanwhile_costs_nothing() -> None:
    connections = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        for _ in range(2):
            assert b"X-Router: me" in await answer(reader, writer)
        if connections == 1:
            await reader.readuntil(b"\r\n\r\n")  # closed with the question on its way

    async def test(upstreams: Upstreams, url: str) -> None:
        for asked, wanted in ((1, 1), (2, 1), (3, 2)):
            reply = await upstreams.get(url, "/")
            assert await reply.read() == b"ok"
            reply.close()
            assert connections == wanted, asked

    over_sockets(handle, test)


def test_an_answer_that_nobody_wants_is_cut() -> None:
    ended = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
        assert not await reader.read()
        ended.set()

    async def test(upstreams: Upstreams, url: str) -> None:
        reply = await upstreams.get(url, "/")
        assert await reply.piece() == b"a"
        reply.close()
        with contextlib.suppress(ConnectionError):
            await ended.wait()

    over_sockets(handle, test)


def test_nobody_there() -> None:
    async def test(upstreams: Upstreams, url: str) -> None:
        with pytest.raises(Unreachable):
            await upstreams.get("http://127.0.0.1:1", "/")

    over_sockets(lambda *_: asyncio.sleep(0), test)
