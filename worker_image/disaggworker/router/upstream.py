"""HTTP/1.1 to the instances: POSTs over connections that are kept for the next one.

A stream is thousands of small pieces, and aiohttp's client spends a reader, a future and a task's turn on each; here a piece
goes from the socket to its sink by calls alone (what that saves: benchmarks/README.md), when its stream's turn has come.

What it does not do: TLS, redirects, compression, pipelining. What is no HTTP/1.1 ends the connection, and the answer with `Broken`.

UpstreamError
├── Unreachable   no connection came about: the instance never saw the request
└── Broken        the connection ended, or went wrong, before the answer's end
"""

from __future__ import annotations

import asyncio
import socket
from collections import defaultdict, deque
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

_KEEPALIVE_S = (
    4.0  # below the shortest of the engines' own (uvicorn's 5 s): a POST on a closed connection is lost
)
_HEAD_BYTES = 64 * 1024
_AT_ONCE = 4  # streams that are served before the sockets are looked at again: some 0.1 ms
# There is no time limit on answers, so TCP itself must find out that a node is gone: 25 s.
_TCP_KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))

Sink = Callable[[bytes], None]


def _nowhere(_: bytes) -> None:
    pass


class UpstreamError(Exception):
    """One sentence on what became of the connection."""


class Unreachable(UpstreamError):
    pass


class Broken(UpstreamError):
    pass


class Reply:
    """An instance's answer: its status at once, its body by `read` or `stream`; `close` in any case, and in the end."""

    def __init__(self, connection: _Connection) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self._connection = connection
        self._early: list[bytes] = []  # the body before somebody wants it
        self._sink: Sink = self._early.append
        self._ended = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def read(self) -> bytes:
        """The whole body. Raises Broken."""
        while not self._ended:
            await self._wait()
        if self._error:
            raise self._error
        return b"".join(self._early)

    async def piece(self) -> bytes:
        """What has come of the body since the last time; nothing only at its end. Raises Broken."""
        while not self._early and not self._ended:
            await self._wait()
        if self._error:
            raise self._error
        out = b"".join(self._early)
        self._early.clear()
        return out

    async def stream(self, sink: Sink) -> None:
        """Until the body's end: `sink` gets its pieces as they come. Raises Broken, and whatever `sink` raises."""
        if self._early:
            sink(b"".join(self._early))
            self._early.clear()
        if not self._ended:
            self._connection.takes_turns()
        self._sink = sink
        try:
            while not self._ended:
                await self._wait()
        finally:
            # A sink knows its reply, as a rule: of a ring, all of the request would wait for the garbage collector, and every
            # stream for it.
            self._sink = _nowhere
        if self._error:
            raise self._error

    def pause(self) -> None:
        """Take nothing from the socket until `resume`: whom it goes to is slow."""
        if not self._ended:
            self._connection.pause(True)

    def resume(self) -> None:
        if not self._ended:
            self._connection.pause(False)

    def close(self) -> None:
        """A connection whose answer has not ended is cut: so the instance learns that nobody listens."""
        if not self._ended:
            self._connection.transport.abort()

    async def head(self) -> None:
        """Until the status is known. Raises Broken."""
        while not self.status and not self._ended:
            await self._wait()
        if not self.status:
            raise self._error or Broken("the connection ended before an answer")

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    # ------------------------------------------------------------------------------------- from the connection

    def begin(self, status: int, headers: dict[bytes, bytes]) -> None:
        self.status, self.headers = status, headers
        self._wake()

    def take(self, piece: bytes) -> None:
        self._sink(piece)
        if self._early:
            self._wake()

    def end(self, error: Exception | None = None) -> None:
        if not self._ended:
            self._ended, self._error = True, error
            self._wake()

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)


class _Turns:
    """Streams of which a piece is here, first come, first served, a few and then whatever else is to be done.

    Many streams' pieces come in one look at the sockets. A new request, or the answer that has its first token, does not wait
    until all of them are passed on: at each of its steps it waits for a few at most.
    """

    def __init__(self) -> None:
        self._waiting: deque[_Connection] = deque()

    def add(self, connection: _Connection) -> None:
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._some)
        self._waiting.append(connection)

    def _some(self) -> None:
        for _ in range(min(_AT_ONCE, len(self._waiting))):
            self._waiting.popleft().turn()
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._some)


class _Connection(asyncio.Protocol):
    """One connection, one answer at a time. `_parse` is what the next bytes are for."""

    transport: asyncio.Transport

    def __init__(self, idle: list[_Connection], turns: _Turns) -> None:
        self._idle, self._turns = idle, turns
        self._takes_turns = False
        self._waiting = b""  # for its turn
        self._reply: Reply | None = None
        self._rest = b""
        self._left = 0  # bytes of a body of known length
        self._keep = self._paused = False
        self._parse = self._head
        self.lost = False
        self.idle_since_s = 0.0
        self.heard = False  # a byte has come since the request went out

    def ask(self, request: bytes) -> Reply:
        self._reply = reply = Reply(self)
        self._rest, self._parse, self.heard, self._takes_turns = b"", self._head, False, False
        self.transport.write(request)
        return reply

    def takes_turns(self) -> None:
        """Until the answer's end: the rest of it is in no hurry."""
        self._takes_turns = True

    def pause(self, pause: bool) -> None:
        if pause != self._paused:
            self._paused = pause
            (self.transport.pause_reading if pause else self.transport.resume_reading)()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass
        made = transport.get_extra_info("socket")
        if made is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _TCP_KEEPALIVE:
                if hasattr(socket, option):
                    made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def data_received(self, data: bytes) -> None:
        if self._reply is None:
            self.transport.abort()  # said without being asked: whose answer would it be?
            return
        self.heard = True
        if not self._takes_turns:
            self._feed(data)
            return
        if not self._waiting:
            self._turns.add(self)
        self._waiting += data

    def turn(self) -> None:
        data, self._waiting = self._waiting, b""
        if data and self._reply is not None:
            self._feed(data)

    def _feed(self, data: bytes) -> None:
        try:
            self._parse(data)
        except Exception as error:
            # Not HTTP, or the sink's own: either way the one who waits is told.
            self._fail(error if not isinstance(error, ValueError) else Broken(f"that is no HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self.turn()
        if self in self._idle:
            self._idle.remove(self)
        if self._parse == self._until_close and exc is None:
            self._end()
        else:
            self._fail(Broken(str(exc) if exc else "the connection ended before the answer did"))

    def _fail(self, error: Exception) -> None:
        reply, self._reply = self._reply, None
        self.transport.abort()
        if reply:
            reply.end(error)

    def _end(self) -> None:
        reply, self._reply = self._reply, None
        # One that is cut has not been lost yet.
        if self._keep and not self.lost and not self._rest and not self.transport.is_closing():
            self.pause(False)
            self.idle_since_s = asyncio.get_running_loop().time()
            self._idle.append(self)
        else:
            self.transport.abort()
        if reply:
            reply.end()

    # ------------------------------------------------------------------------------------- parsing

    def _head(self, data: bytes) -> None:
        self._rest += data
        head, found, rest = self._rest.partition(b"\r\n\r\n")
        if not found:
            if len(self._rest) > _HEAD_BYTES:
                raise ValueError(f"more than {_HEAD_BYTES} bytes of headers")
            return
        first, *lines = head.split(b"\r\n")
        version, _, status = first.partition(b" ")
        if version not in (b"HTTP/1.1", b"HTTP/1.0"):
            raise ValueError(f"it begins with {first[:40]!r}")
        headers = {}
        for line in lines:
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip()
        code = int(status[:3])
        self._rest = b""
        if 100 <= code < 200:
            self._head(rest)
            return
        self._keep = version == b"HTTP/1.1" and headers.get(b"connection", b"").lower() != b"close"
        if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
            self._parse = self._chunks
        elif code in (204, 304):
            self._parse, self._left = self._length, 0
        elif b"content-length" in headers:
            self._parse, self._left = self._length, int(headers[b"content-length"])
            if self._left < 0:
                raise ValueError("a Content-Length below 0")
        else:
            self._parse, self._keep = self._until_close, False
        assert self._reply
        self._reply.begin(code, headers)
        if rest or self._parse == self._length:
            self._parse(rest)

    def _length(self, data: bytes) -> None:
        if len(data) > self._left:
            raise ValueError("more bytes than Content-Length says")
        self._left -= len(data)
        if data and self._reply:
            self._reply.take(data)
        if not self._left:
            self._end()

    def _until_close(self, data: bytes) -> None:
        if self._reply:
            self._reply.take(data)

    def _chunks(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        line = data.find(b"\r\n")
        if line > 0 and data[:line].isalnum() and 0 < int(data[:line], 16) == len(data) - line - 4:
            self._rest = b""
            if self._reply:
                self._reply.take(data[line + 2 : -2])  # one chunk and nothing else, as nearly always
            return
        pieces, at, last = [], 0, False
        while True:
            line = data.find(b"\r\n", at)
            if line < 0:
                break
            size = int(data[at:line].partition(b";")[0], 16)
            if size < 0:
                raise ValueError("a chunk of a size below 0")
            end = line + 2 + size
            if not size:
                # Trailers, if any, end with an empty line; so does the body without them.
                stop = data.find(b"\r\n\r\n", line)
                last, at = stop >= 0, stop + 4 if stop >= 0 else at
                break
            if len(data) < end + 2:
                break
            pieces.append(data[line + 2 : end])
            at = end + 2
        self._rest = data[at:]
        if pieces and self._reply:
            self._reply.take(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if last:
            self._end()


class Upstreams:
    """Connections to all instances; one per process. `named` goes with every request: who asks (`X-Router`)."""

    def __init__(self, connect_timeout_s: float, named: str) -> None:
        self._connect_timeout_s, self._named = connect_timeout_s, named
        self._idle: defaultdict[str, list[_Connection]] = defaultdict(list)
        self._turns = _Turns()

    async def get(self, url: str, path: str) -> Reply:
        """As `post`."""
        return await self._ask(url, f"GET {path} HTTP/1.1\r\n{self._headers(url)}\r\n".encode())

    async def post(self, url: str, path: str, body: bytes, id: str = "", *, once: bool = False) -> Reply:
        """The answer, as soon as its status is known. Raises UpstreamError.

        `id` and `path` must be fit for a header; they are the caller's to check. `once`: what must not come twice is not sent
        again on a new connection when a kept one breaks.
        """
        head = (
            f"POST {path} HTTP/1.1\r\n{self._headers(url)}Content-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nX-Request-Id: {id}\r\n\r\n"
        )
        return await self._ask(url, head.encode() + body, once=once)

    def _headers(self, url: str) -> str:
        host = url.removeprefix("http://")
        return f"Host: {host}\r\nAccept-Encoding: identity\r\nX-Router: {self._named}\r\n"

    async def _ask(self, url: str, request: bytes, *, once: bool = False) -> Reply:
        while True:
            connection = self._take(url)
            used = connection is not None
            connection = connection or await self._connect(url)
            reply = connection.ask(request)
            try:
                await reply.head()
                return reply
            except Broken:
                if used and not connection.heard and not once:
                    continue  # it was closed while nobody used it: that says nothing about the instance
                raise
            except BaseException:
                reply.close()
                raise

    def close(self) -> None:
        for connections in self._idle.values():
            for connection in list(connections):
                connection.transport.abort()

    def forget(self, url: str) -> None:
        """The instance is gone for good."""
        for connection in self._idle.pop(url, ()):
            connection.transport.abort()

    def _take(self, url: str) -> _Connection | None:
        now_s, idle = asyncio.get_running_loop().time(), self._idle[url]
        while idle:
            connection = idle.pop()
            if now_s - connection.idle_since_s < _KEEPALIVE_S:
                return connection
            connection.transport.abort()
        return None

    async def _connect(self, url: str) -> _Connection:
        loop, at, idle = asyncio.get_running_loop(), urlsplit(url), self._idle[url]
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: _Connection(idle, self._turns), at.hostname or "", at.port or 80
                )
        except TimeoutError:
            raise Unreachable(f"no connection to {url} within {self._connect_timeout_s:g} s") from None
        except OSError as error:
            raise Unreachable(f"no connection to {url}: {error}") from error
        return connection
