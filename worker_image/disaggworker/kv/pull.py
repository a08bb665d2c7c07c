"""The decode side of a pull: ask a prefill worker for a prompt's KV, from the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from disaggserve import protocol
from disaggworker.errors import HandoffGone, NotPaired, PeerLost, TransferError

_ANSWER_S = 10.0  # a prefill worker answers between two polls; longer means that it hangs or is cut off

_ERRORS = {"expired": HandoffGone, "pairing": NotPaired, "version": NotPaired, "malformed": TransferError}


class _Peer:
    """A DEALER socket to one prefill worker, and the questions that it has not answered."""

    def __init__(self, context: zmq.asyncio.Context, host: str, port: int) -> None:
        self.name = f"{host}:{port}"
        self.open: dict[int, asyncio.Future[tuple[protocol.Answer, list[zmq.Frame]]]] = {}
        self.lost = False
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        # A worker that is gone refuses the connection or ends it; one that is cut off stops answering heartbeats.
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6000)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_CLOSED
        )
        self._socket.connect(f"tcp://{host}:{port}")
        self._tasks = [asyncio.ensure_future(self._listen()), asyncio.ensure_future(self._watch())]

    async def ask(self, question: protocol.Question) -> tuple[protocol.Answer, list[zmq.Frame]]:
        """The answer and its raw frames. Raises `TransferError`."""
        if self.lost:
            raise self._gone()
        future: asyncio.Future[tuple[protocol.Answer, list[zmq.Frame]]] = (
            asyncio.get_running_loop().create_future()
        )
        self.open[question.ask] = future
        try:
            await self._socket.send(protocol.encode(question))
            answer, frames = await asyncio.wait_for(future, _ANSWER_S)
        except TimeoutError:
            self.lose()
            raise self._gone() from None
        finally:
            self.open.pop(question.ask, None)
        if isinstance(answer, protocol.Refused):
            raise _ERRORS[answer.code](answer.reason)
        return answer, frames

    async def _listen(self) -> None:
        while True:
            head, *frames = await self._socket.recv_multipart(copy=False)
            try:
                answer = protocol.answer(head.bytes)
            except msgspec.DecodeError:
                return self.lose()
            future = self.open.get(answer.ask)
            if future and not future.done():
                future.set_result((answer, frames))

    async def _watch(self) -> None:
        await recv_monitor_message(self._monitor)
        self.lose()

    def _gone(self) -> PeerLost:
        return PeerLost(f"The prefill worker at {self.name} does not answer on its KV port.")

    def lose(self) -> None:
        """Fail what is open; the next question needs a new peer."""
        self.lost = True
        for future in self.open.values():
            if not future.done():
                future.set_exception(self._gone())

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError, zmq.ZMQError):
                await task
        self._socket.disable_monitor()
        self._socket.close()


class KVClient:
    """Asks prefill workers. One per decode worker, used on one event loop."""

    def __init__(self, pairing_key: str) -> None:
        self._key = pairing_key
        self._context = zmq.asyncio.Context()
        self._peers: dict[tuple[str, int], _Peer] = {}
        self._numbers = itertools.count(1)

    async def renew(self, handoff: protocol.Handoff) -> None:
        """Keep the hand-off for another lease. Raises `TransferError`."""
        await self._ask(protocol.Renew, handoff)

    async def release(self, handoff: protocol.Handoff) -> None:
        """Give the hand-off up. Raises `TransferError`."""
        await self._ask(protocol.Release, handoff)

    async def pull(self, handoff: protocol.Handoff) -> tuple[protocol.Layout, list[memoryview]]:
        """The hand-off's KV. Raises `TransferError`."""
        answer, frames = await self._ask(protocol.Pull, handoff)
        if not isinstance(answer, protocol.Layout):
            raise TransferError(
                f"The prefill worker at {handoff.host}:{handoff.port} answered a pull without KV."
            )
        return answer, [frame.buffer for frame in frames]

    async def close(self) -> None:
        """Forget all peers."""
        for peer in self._peers.values():
            await peer.close()
        self._context.destroy(linger=0)

    async def _ask(self, kind: Any, handoff: protocol.Handoff) -> tuple[protocol.Answer, list[zmq.Frame]]:
        at = (handoff.host, handoff.port)
        peer = self._peers.get(at)
        if peer is None or peer.lost:
            old, peer = peer, _Peer(self._context, *at)
            self._peers[at] = peer
            if old:
                await old.close()
        question = kind(
            ask=next(self._numbers),
            handoff=handoff.handoff,
            generation=handoff.generation,
            pairing_key=self._key,
        )
        return await peer.ask(question)
