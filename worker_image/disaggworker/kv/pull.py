"""The decode side of a pull: `Puller` fetches a hand-off's KV in a thread, `KVClient` asks for it from the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import msgspec
import numpy as np
import torch
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from disaggserve import protocol
from disaggserve.wire import VERSION
from disaggworker.errors import Corrupted, HandoffGone, NotPaired, PeerLost, TransferError
from disaggworker.kv.blocks import BLOCK_TOKENS, blocks_for
from disaggworker.kv.pool import Ints, Pool
from disaggworker.kv.serve import checksums
from disaggworker.kv.stream import Stream
from disaggworker.kv.transport import OneSided, Place, Source, ends, shifted

_ANSWER_S = 10.0  # a prefill worker answers between two polls; longer means that it hangs or is cut off
_CREDIT = 1 << 25  # bytes on their way: enough to keep two processes busy
_LONGEST_ANSWER = 1 << 16  # bytes, beside the tokens'

_ERRORS = {"expired": HandoffGone, "pairing": NotPaired, "version": NotPaired, "malformed": TransferError}
_FREED_BYTES = 24 << 20  # glibc learns from up to 32 MB
_NOW = int(zmq.NOBLOCK)
_ENDED = zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_CLOSED

Address = tuple[str, int]


def _lost(at: Address) -> PeerLost:
    return PeerLost(f"The prefill worker at {at[0]}:{at[1]} does not answer on its KV port.")


def _out_of_turn(at: Address) -> TransferError:
    return TransferError(f"The worker at {at[0]}:{at[1]} answered a pull out of turn.")


def _given_up(handoff: protocol.Handoff) -> TransferError:
    return TransferError(f"The pull of hand-off {handoff.handoff!r} was given up.")


def _dial(context: zmq.Context[Any], at: Address) -> tuple[Any, Any]:
    """A DEALER socket to a prefill worker, and the socket that tells of its end."""
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    # A worker that is gone refuses the connection or ends it; one that is cut off stops answering heartbeats.
    socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6000)
    monitor = socket.get_monitor_socket(_ENDED)
    socket.connect(f"tcp://{at[0]}:{at[1]}")
    return socket, monitor


def _read(frame: memoryview | bytearray, at: Address) -> protocol.Answer:
    """An answer of our version. Raises `TransferError`."""
    try:
        answer = protocol.answer(frame)
    except msgspec.DecodeError as e:
        raise TransferError(
            f"The worker at {at[0]}:{at[1]} answered what is no answer of ours: {e}."
        ) from None
    if answer.version != VERSION and not isinstance(answer, protocol.Refused):
        raise NotPaired(
            f"The worker at {at[0]}:{at[1]} speaks version {answer.version} of the hand-off, not {VERSION}."
        )
    return answer


# ------------------------------------------------------------------------------ in a thread


@dataclasses.dataclass(frozen=True)
class Pulled:
    """What a pull gave."""

    tokens: list[int]  # of the prompt, and of the answer where it goes on
    ways: frozenset[protocol.Way]
    kv_bytes: int


class _Line:
    """A connection to one rank of a prefill instance, and what is known of it."""

    def __init__(self, context: zmq.Context[Any], at: Address) -> None:
        self.at = at
        self.socket, self.monitor = _dial(context, at)
        self.lost = False
        self.source: tuple[protocol.Memory, Source] | None = None  # its memory, where it was opened
        self.stream: Stream | None = None
        self.unreachable: set[protocol.Way] = set()

    def hang_up(self) -> None:
        """End the stream, if there is one."""
        if self.stream:
            self.stream.close()
        self.stream = None

    def close(self) -> None:
        self.hang_up()
        if self.source:
            self.source[1].close()
        self.socket.disable_monitor()
        self.socket.close()


class _Part:
    """What one rank of the prefill instance gives to a pull."""

    def __init__(self, line: _Line, ask: int) -> None:
        self.line, self.ask = line, ask
        self.granted: protocol.Granted | None = None
        self.place = Place(range(0), range(0))
        self.cuts: deque[protocol.Cut] = deque()
        self.owed = 0  # bytes taken that the server has not been told of
        self.fresh = False  # its line's stream was opened for this pull

    @property
    def done(self) -> bool:
        return self.granted is not None and not self.cuts


def _poller(parts: Iterable[_Part]) -> zmq.Poller:
    poller = zmq.Poller()
    for part in parts:
        poller.register(part.line.socket, zmq.POLLIN)
        poller.register(part.line.monitor, zmq.POLLIN)
    return poller


class Puller:
    """Pulls into one pool, one hand-off at a time. Used by one thread at a time; it owns its sockets."""

    def __init__(
        self,
        pairing_key: str,
        pool: Pool,
        place: Place | None = None,
        *,
        ways: Sequence[OneSided] = (),
        streams: bool = False,
        checksum: bool = False,
    ) -> None:
        """`place`: what the pool is of the model, by default all. `ways`: how it can read by itself, the best first; next best,
        into a CPU, are `streams`."""
        self._key, self._pool, self._place = pairing_key, pool, place or Place.whole(pool)
        self._ways = {way.way: way for way in ways}
        self._asked: list[protocol.Way] = [*self._ways]
        if streams and pool.device.type == "cpu":
            self._asked.append("tcp")
        self._checksum = checksum
        self._context: zmq.Context[Any] = zmq.Context()
        self._lines: dict[Address, _Line] = {}
        self._asks = itertools.count(1)
        self._dtype = str(pool.dtype).removeprefix("torch.")
        # Until so much was freed at once, glibc gives what pieces came in back to the kernel, and pays for every page again.
        np.empty(_FREED_BYTES, np.uint8)

    def pull(
        self, handoff: protocol.Handoff, blocks: Sequence[int], stop: Callable[[], bool] = lambda: False
    ) -> Pulled:
        """Fill `blocks`, of this process's pool, with its part of the hand-off's KV. Raises `TransferError`.

        Where `Pulled.ways` holds a way of `OneSided` the KV is good only if the hand-off is still held afterwards: ask by
        `Renew`. When this has returned or raised nothing more is written. `stop` is looked at now and then: true ends the pull.
        """
        index = np.asarray(blocks, dtype=np.int64)
        parts = [self._begin(handoff, (handoff.host, handoff.port + rank)) for rank in range(handoff.ranks)]
        poller: zmq.Poller | None = None
        heard_s = time.monotonic()
        with torch.inference_mode():
            while not all(part.done for part in parts):
                if stop():
                    raise _given_up(handoff)
                # A poll of all is only for when there is nothing left to take.
                taken = [self._take(handoff, part, index, stop) for part in parts if not part.done]
                if any(taken):
                    heard_s = time.monotonic()
                    continue
                poller = poller or _poller(parts)
                ready = dict(poller.poll(100))
                if time.monotonic() - heard_s > _ANSWER_S:
                    late = next(part.line for part in parts if not part.done)
                    late.lost = True
                    raise _lost(late.at)
                for part in parts:
                    if part.line.monitor in ready and part.line.socket not in ready:
                        part.line.lost = True
                        if not part.done:
                            raise _lost(part.line.at)
        return self._whole(handoff, parts)

    def close(self) -> None:
        """Forget all peers."""
        for line in self._lines.values():
            line.close()
        self._context.destroy(linger=0)

    def _begin(self, handoff: protocol.Handoff, at: Address) -> _Part:
        line = self._lines.get(at)
        if line is None or line.lost or line.monitor.events & zmq.POLLIN:
            if line:
                line.close()
            line = self._lines[at] = _Line(self._context, at)
        part = _Part(line, 0)
        if line.stream is None:
            self._ask(handoff, part)
        return part

    def _ask(self, handoff: protocol.Handoff, part: _Part) -> None:
        part.line.socket.send(protocol.encode(self._question(handoff, part)))

    def _question(self, handoff: protocol.Handoff, part: _Part) -> protocol.Pull:
        part.ask = next(self._asks)
        return protocol.Pull(
            ask=part.ask,
            handoff=handoff.handoff,
            generation=handoff.generation,
            pairing_key=self._key,
            layers=ends(self._place.layers),
            heads=ends(self._place.heads),
            ways=[way for way in self._asked if way not in part.line.unreachable],
            credit=_CREDIT,
            checksum=self._checksum,
        )

    def _take(self, handoff: protocol.Handoff, part: _Part, blocks: Ints, stop: Callable[[], bool]) -> bool:
        """One message of a rank, if there is one; where it has a stream, all that is asked for."""
        if part.line.stream:
            self._receive(handoff, part, part.line.stream, blocks, stop)
            return True
        try:
            frames = [part.line.socket.recv(_NOW, copy=False)]
        except zmq.Again:
            return False
        while frames[-1].more:
            frames.append(part.line.socket.recv(copy=False))
        self._heard(handoff, part, blocks, *(frame.buffer for frame in frames))
        return True

    def _receive(
        self,
        handoff: protocol.Handoff,
        part: _Part,
        stream: Stream,
        blocks: Ints,
        stop: Callable[[], bool],
    ) -> None:
        # Asked only when it is its turn: a server hangs up on who takes nothing for long.
        line = part.line

        def said(longest: int) -> protocol.Answer:
            answer = _read(stream.message(longest), line.at)
            if isinstance(answer, protocol.Refused):
                raise _ERRORS[answer.code](answer.reason)
            return answer

        try:
            try:
                stream.ask(self._question(handoff, part))
                granted = said(_LONGEST_ANSWER + 9 * handoff.kv_tokens)  # no number has more bytes
            except OSError:
                return self._lose_stream(handoff, part)
            if not isinstance(granted, protocol.Granted) or granted.ask != part.ask:
                raise _out_of_turn(line.at)
            self._check(granted, handoff, len(blocks))
            part.place = Place(range(*granted.layers), range(*granted.heads))
            inside = part.place.within(self._place)
            for spans in self._pool.spans(inside.layers, blocks, inside.heads):
                if stop():
                    raise _given_up(handoff)
                stream.fill(spans)
            if not isinstance(said(_LONGEST_ANSWER), protocol.Done):
                raise _out_of_turn(line.at)
            self._verify(part, granted, blocks)
            part.granted = granted
        except OSError:
            raise _lost(line.at) from None
        finally:
            if part.granted is None:
                line.hang_up()  # who knows what it would bring next
        return None

    def _lose_stream(self, handoff: protocol.Handoff, part: _Part) -> None:
        """Perhaps the connection alone is gone, and may be made again; a new one that is gone is none to try again."""
        part.line.hang_up()
        if part.fresh:
            part.line.unreachable.add("tcp")
        self._ask(handoff, part)

    def _heard(
        self, handoff: protocol.Handoff, part: _Part, blocks: Ints, head: memoryview, *frames: memoryview
    ) -> None:
        line = part.line
        answer = _read(head, line.at)
        if answer.ask != part.ask:
            return None  # of a pull that was given up
        if isinstance(answer, protocol.Refused):
            raise _ERRORS[answer.code](answer.reason)
        if isinstance(answer, protocol.Stream) and "tcp" in self._asked and "tcp" not in line.unreachable:
            part.fresh = True
            try:
                line.stream = Stream(line.at[0], answer.port)
            except (OSError, OverflowError):
                self._lose_stream(handoff, part)
            return None
        if isinstance(answer, protocol.Granted) and part.granted is None:
            self._check(answer, handoff, len(blocks))
            part.place = Place(range(*answer.layers), range(*answer.heads))
            if answer.memory is not None:
                return self._read_memory(handoff, part, answer, blocks)
            unit = 2 * len(part.place.heads) * self._pool.unit
            part.cuts = deque(protocol.pieces(answer.layers, answer.blocks, unit))
            part.granted = answer
            return None
        if isinstance(answer, protocol.Piece) and part.cuts and len(frames) == 1:
            return self._write(part, answer, frames[0], blocks)
        raise _out_of_turn(line.at)

    def _check(self, granted: protocol.Granted, handoff: protocol.Handoff, blocks: int) -> None:
        pool = self._pool
        theirs = (granted.head_dim, granted.block_tokens, granted.dtype, granted.blocks)
        mine = (pool.head_dim, BLOCK_TOKENS, self._dtype, blocks)
        inside = self._place.common(granted.layers, granted.heads)
        if (
            theirs != mine
            or (
                (ends(inside.layers), ends(inside.heads)) != (granted.layers, granted.heads)
                and granted.layers[0] < granted.layers[1]
            )
            or blocks != blocks_for(handoff.kv_tokens)
            or len(granted.tokens) not in (0, handoff.kv_tokens)
        ):
            raise TransferError(
                f"The prefill worker's KV is {theirs} (head size, tokens a block, dtype, blocks) of layers {granted.layers} and heads "
                f"{granted.heads}; this worker's is {mine} of layers {ends(self._place.layers)} and heads {ends(self._place.heads)}, "
                f"for {handoff.kv_tokens} tokens."
            )

    def _write(self, part: _Part, piece: protocol.Piece, frame: memoryview, blocks: Ints) -> None:
        cut, heads = part.cuts.popleft(), shifted(part.place.heads, self._place)
        size = 2 * cut.blocks * len(heads) * self._pool.unit
        if len(frame) != len(cut.layers) * size:
            raise TransferError(f"A piece of KV has {len(frame)} bytes, not {len(cut.layers) * size}.")
        if self._checksum and zlib.crc32(frame) != piece.checksum:
            raise Corrupted("A piece of KV arrived otherwise than it was sent: its checksum does not fit.")
        data = np.frombuffer(frame, np.uint8).reshape(len(cut.layers), size)
        at = blocks[cut.first : cut.first + cut.blocks]
        for layer, bytes_ in zip(cut.layers, data, strict=True):
            self._pool.put(layer - self._place.layers.start, at, heads, bytes_)
        part.owed += len(frame)
        if part.owed >= _CREDIT // 2 and part.cuts:
            part.line.socket.send(protocol.encode(protocol.More(ask=part.ask, credit=part.owed)))
            part.owed = 0

    def _read_memory(
        self,
        handoff: protocol.Handoff,
        part: _Part,
        granted: protocol.Granted,
        blocks: Ints,
    ) -> None:
        line, memory = part.line, granted.memory
        assert memory is not None
        if len(granted.ids) != granted.blocks or not all(0 <= i < memory.blocks for i in granted.ids):
            raise TransferError("The prefill worker named blocks that its memory does not have.")
        if line.source is None or line.source[0] != memory:
            if line.source:
                line.source[1].close()
                line.source = None
            if granted.way in line.unreachable:
                raise _out_of_turn(line.at)
            try:
                line.source = memory, self._ways[granted.way].open(memory, self._pool, self._place)
            except (KeyError, TransferError):
                line.unreachable.add(granted.way)
                return self._ask(handoff, part)  # again, for the next best way
        if part.place.layers:
            line.source[1].read(np.asarray(granted.ids, dtype=np.int64), blocks, part.place)
        self._verify(part, granted, blocks)
        part.granted = granted
        return None

    def _verify(self, part: _Part, granted: protocol.Granted, blocks: Ints) -> None:
        if self._checksum and checksums(self._pool, self._place, part.place, blocks) != granted.sums:
            raise Corrupted("KV arrived otherwise than it was held: its checksum does not fit.")

    def _whole(self, handoff: protocol.Handoff, parts: list[_Part]) -> Pulled:
        """All of it is there. Raises `TransferError`."""
        if self._pool.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        mine = self._place
        if all(part.place != mine for part in parts):
            cells = {(layer, head) for p in parts for layer in p.place.layers for head in p.place.heads}
            whole = len(mine.layers) * len(mine.heads)
            if len(cells) != whole:
                raise TransferError(
                    f"The prefill instance holds {len(cells)} of the {whole} layers × KV heads that are needed."
                )
        granted = [part.granted for part in parts if part.granted]
        tokens = next((answer.tokens for answer in granted if answer.tokens), [])
        if len(tokens) != handoff.kv_tokens:
            raise TransferError("The prefill instance did not say which tokens its KV is of.")
        kv_bytes = sum(
            2 * len(p.place.layers) * len(p.place.heads) * answer.blocks * self._pool.unit
            for p, answer in zip(parts, granted, strict=True)
        )
        return Pulled(
            tokens, frozenset(a.way for p, a in zip(parts, granted, strict=True) if p.place.layers), kv_bytes
        )


# ------------------------------------------------------------------------------ on the event loop


class _Peer:
    """A DEALER socket to the first rank of a prefill instance, and the questions that it has not answered."""

    def __init__(self, context: zmq.asyncio.Context, at: Address) -> None:
        self.at = at
        self.open: dict[int, asyncio.Future[protocol.Answer]] = {}
        self.lost = False
        self._socket, self._monitor = _dial(context, at)
        self._tasks = [asyncio.ensure_future(self._listen()), asyncio.ensure_future(self._watch())]

    async def ask(self, question: protocol.Renew | protocol.Release) -> None:
        """Returns when it was granted. Raises `TransferError`."""
        if self.lost:
            raise _lost(self.at)
        future: asyncio.Future[protocol.Answer] = asyncio.get_running_loop().create_future()
        self.open[question.ask] = future
        try:
            await self._socket.send(protocol.encode(question))
            # Not wait_for: Python 3.11's loses a cancellation that comes with the answer.
            async with asyncio.timeout(_ANSWER_S):
                answer = await future
        except TimeoutError:
            self.lose()
            raise _lost(self.at) from None
        finally:
            self.open.pop(question.ask, None)
        if isinstance(answer, protocol.Refused):
            raise _ERRORS[answer.code](answer.reason)

    async def _listen(self) -> None:
        while True:
            head, *_ = await self._socket.recv_multipart(copy=False)
            try:
                answer = _read(head.buffer, self.at)
            except TransferError:
                return self.lose()
            future = self.open.get(answer.ask)
            if future and not future.done():
                future.set_result(answer)

    async def _watch(self) -> None:
        await recv_monitor_message(self._monitor)
        self.lose()

    def lose(self) -> None:
        """Fail what is open; the next question needs a new peer."""
        self.lost = True
        for future in self.open.values():
            if not future.done():
                future.set_exception(_lost(self.at))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError, zmq.ZMQError):
                await task
        self._socket.disable_monitor()
        self._socket.close()


class Others(Protocol):
    """The other ranks of this instance, which pull their own parts."""

    def fetch(
        self, handoff: protocol.Handoff, blocks: Sequence[int]
    ) -> tuple[Sequence[asyncio.Future[frozenset[protocol.Way]]], Callable[[], None]]:
        """A pull on each of them, over when nothing is written there any more, and what ends it early."""


class KVClient:
    """Asks prefill instances. One per decode worker, used on one event loop; `pull` needs a puller first."""

    def __init__(self, pairing_key: str) -> None:
        self._key = pairing_key
        self.puller: Puller | None = None
        self.others: Others | None = None
        self._context = zmq.asyncio.Context()
        self._peers: dict[Address, _Peer] = {}
        self._releases: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count(1)
        self._thread = ThreadPoolExecutor(1, "pull", initializer=lambda: torch.set_num_threads(1))

    async def renew(self, handoff: protocol.Handoff) -> None:
        """Keep the hand-off for another lease. Raises `TransferError`."""
        await self._ask(protocol.Renew, handoff)

    async def release(self, handoff: protocol.Handoff) -> None:
        """Give the hand-off up. Raises `TransferError`."""
        await self._ask(protocol.Release, handoff)

    def release_soon(self, handoff: protocol.Handoff) -> None:
        """The same, beside whatever follows, and without a word where nobody hears it."""

        async def quietly() -> None:
            # A prefill worker that is gone needs no release; one that did not hear it has its lease's end.
            with contextlib.suppress(TransferError):
                await self.release(handoff)

        task = asyncio.get_running_loop().create_task(quietly())
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def pull(self, handoff: protocol.Handoff, blocks: Sequence[int]) -> Pulled:
        """Fill these blocks with the hand-off's KV, on every rank of this instance.

        Afterwards, however it ends, nothing writes to them. Raises `TransferError`.
        """
        assert self.puller is not None
        stop = threading.Event()
        mine = asyncio.get_running_loop().run_in_executor(
            self._thread, self.puller.pull, handoff, blocks, stop.is_set
        )
        theirs, stop_theirs = self.others.fetch(handoff, blocks) if self.others else ([], lambda: None)
        works: list[asyncio.Future[Any]] = [mine, *theirs]
        try:
            await asyncio.wait(works, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            # The first fault is the one to tell: the others were told to stop because of it.
            faults = [work.exception() for work in works if work.done() and work.exception()]
            if not all(work.done() for work in works):
                stop.set()
                stop_theirs()
            while not all(work.done() for work in works):
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait(works)
            faults += [work.exception() for work in works if work.exception()]
        if faults[:1] and faults[0]:
            raise faults[0]
        pulled = mine.result()
        pulled = dataclasses.replace(pulled, ways=pulled.ways.union(*(work.result() for work in theirs)))
        if not pulled.ways <= {"zmq", "tcp"}:
            await self.renew(handoff)  # still held: so it was, all the while that it was read
        return pulled

    async def close(self) -> None:
        """Forget all peers."""
        for peer in self._peers.values():
            await peer.close()
        self._context.destroy(linger=0)
        if self.puller:
            await asyncio.get_running_loop().run_in_executor(self._thread, self.puller.close)
        self._thread.shutdown()

    async def _ask(
        self, kind: type[protocol.Renew] | type[protocol.Release], handoff: protocol.Handoff
    ) -> None:
        at = (handoff.host, handoff.port)
        peer = self._peers.get(at)
        if peer is None or peer.lost:
            old, peer = peer, _Peer(self._context, at)
            self._peers[at] = peer
            if old:
                await old.close()
        question = kind(
            ask=next(self._numbers),
            handoff=handoff.handoff,
            generation=handoff.generation,
            pairing_key=self._key,
        )
        await peer.ask(question)
