"""KV over TCP: one kernel takes blocks from where they lie, the other puts them where they belong; nobody else copies them."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterable

import msgspec

from disaggserve import protocol

_CONNECT_S = 2.0
_PATIENCE_S = 10  # without a byte
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))
_SEND_BYTES = (
    1 << 19
)  # between the two kernels: what is more leaves the processor's cache before it is received
_RECEIVE_BYTES = 0  # the same where it is received; 0: the kernel finds it, up to its own limit
_CALL_BYTES = 1 << 18  # received in one call: while it lasts, the kernel lets nothing more in
_CALL_SPANS = 1024  # in one call: IOV_MAX
_PULLERS = 256  # each has a thread
_LONGEST_QUESTION = 1 << 16  # bytes

Spans = list[memoryview]


class Listener:
    """Answers questions on TCP connections, each in a thread of its own, nearly all of whose time is the kernel's."""

    def __init__(
        self, host: str, answer: Callable[[protocol.Question], Iterable[protocol.Answer | Spans]]
    ) -> None:
        """On a port that is free. `answer`: what is sent, in order; called in those threads."""
        self._answer = answer
        self._sockets: set[socket.socket] = set()
        listener = socket.create_server((host, 0))
        self.port: int = listener.getsockname()[1]
        self._start(self._listen, listener)

    def close(self) -> None:
        """Listen no longer, and hang up on everybody."""
        for each in tuple(self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # wakes its thread, which closes it

    def _start(self, work: Callable[[socket.socket], None], at: socket.socket) -> None:
        def run() -> None:
            try:
                # Whoever says nonsense, or takes nothing any more, is hung up on.
                with at, contextlib.suppress(OSError, msgspec.DecodeError):
                    work(at)
            finally:
                self._sockets.discard(at)

        self._sockets.add(at)
        threading.Thread(target=run, name="kv-stream", daemon=True).start()

    def _listen(self, listener: socket.socket) -> None:
        while True:
            puller, _ = listener.accept()
            if len(self._sockets) > _PULLERS:
                puller.close()
            else:
                self._start(self._serve, puller)

    def _serve(self, puller: socket.socket) -> None:
        _set_up(puller)
        puller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _seconds(0))  # it asks when it likes
        while True:
            for part in self._answer(protocol.question(_message(puller, _LONGEST_QUESTION))):
                if isinstance(part, list):
                    _send(puller, part, socket.MSG_MORE)
                else:
                    more = socket.MSG_MORE if isinstance(part, protocol.Granted) else 0
                    _send(puller, [_framed(part)], more)


class Stream:
    """A puller's connection to a `Listener`. Whatever it raises is an `OSError`, and the end of it."""

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port), _CONNECT_S)
        _set_up(self._socket)

    def ask(self, question: protocol.Question) -> None:
        """Send it."""
        _send(self._socket, [_framed(question)])

    def message(self, longest: int) -> bytearray:
        """The next message, if it has at most so many bytes."""
        return _message(self._socket, longest)

    def fill(self, spans: Spans) -> None:
        """Put what comes next there."""
        _receive(self._socket, spans)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


def _seconds(patience: int) -> bytes:
    """A `timeval`."""
    return struct.pack("ll", patience, 0)


def _set_up(connected: socket.socket) -> None:
    # The kernel waits: with a timeout of Python's own a call would end with what there is room for at the moment.
    connected.settimeout(None)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connected.setsockopt(socket.SOL_SOCKET, option, _seconds(_PATIENCE_S))
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
    if _RECEIVE_BYTES:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_NODELAY, 1), *_KEEPALIVE):
        connected.setsockopt(socket.IPPROTO_TCP, option, value)


def _framed(message: protocol.Question | protocol.Answer) -> memoryview:
    data = protocol.encode(message)
    return memoryview(len(data).to_bytes(4) + data)


def _message(connected: socket.socket, longest: int) -> bytearray:
    size = bytearray(4)
    _receive(connected, [memoryview(size)])
    if not 0 < (length := int.from_bytes(size)) <= longest:
        raise ConnectionError(f"its message has {length} bytes")
    data = bytearray(length)
    _receive(connected, [memoryview(data)])
    return data


def _send(connected: socket.socket, spans: Spans, flags: int = 0) -> None:
    _move(lambda some: connected.sendmsg(some, [], flags), spans, 1 << 30)


def _receive(connected: socket.socket, spans: Spans) -> None:
    _move(lambda some: connected.recvmsg_into(some)[0], spans, _CALL_BYTES)


def _move(step: Callable[[Spans], int], spans: Spans, size: int) -> None:
    """All of these bytes, some `size` at a time, of which `step` moves the first ones and says how many. Raises `OSError`."""
    longest = max(map(len, spans), default=0)
    at, most = 0, min(_CALL_SPANS, max(1, size // max(1, longest)))
    while at < len(spans):
        moved = step(spans[at : at + most])
        if not moved:
            raise ConnectionError("it hung up")
        while at < len(spans) and moved >= len(spans[at]):
            moved -= len(spans[at])
            at += 1
        if moved:
            spans[at] = spans[at][moved:]
