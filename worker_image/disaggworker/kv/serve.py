"""The prefill side of a pull: the threads that answer for held hand-offs, and send their KV piece by piece or in a stream."""

from __future__ import annotations

import math
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np
import torch
import zmq

from disaggserve import protocol
from disaggserve.wire import VERSION
from disaggworker.errors import StartError
from disaggworker.kv.blocks import BLOCK_TOKENS
from disaggworker.kv.leases import Lease, Leases
from disaggworker.kv.pool import Bytes, Ints, Pool
from disaggworker.kv.stream import Listener, Spans
from disaggworker.kv.transport import OneSided, Place, ends, shifted

_TICK_S = 0.1  # how late the end of a lease may be noticed
_EARLY_S = 2.0  # how long a rank waits for rank 0's word of a hand-off that is pulled before it
_EARLY_LOOK_S = 0.001  # it comes within microseconds of the answer: looking often is looking seldom
_LONGEST_QUESTION = 1 << 16  # bytes
_MOST_CREDIT = 1 << 26  # bytes; more that a puller asks for are not sent at once
_HEARD_IN_A_ROW = 64  # questions, between two pieces
_KEPT = 10  # buffers of a piece each: those on their way, and those that are gathered and let go of meanwhile


class _Sending:
    """A pull that is answered in pieces."""

    def __init__(self, peer: bytes, ask: protocol.Pull, place: Place, cuts: Sequence[protocol.Cut]) -> None:
        self.peer, self.ask, self.place = peer, ask, place
        self.cuts = deque(cuts)
        self.credit = min(ask.credit, _MOST_CREDIT)


class _Buffers:
    """Memory for pieces. Used again once ZeroMQ has sent what is in it: new memory costs page faults, and more than the copy."""

    def __init__(self) -> None:
        self._lent: deque[tuple[zmq.MessageTracker, Bytes]] = deque()

    def take(self, size: int) -> Bytes:
        """At least so many bytes."""
        # Not the oldest alone: one puller that has stopped must not cost all the others new memory.
        for at, (tracker, buffer) in enumerate(self._lent):
            if tracker.done:
                del self._lent[at]
                if len(buffer) >= size:
                    return buffer
                break
        return np.empty(max(size, protocol.PIECE_BYTES), np.uint8)

    def lend(self, buffer: Bytes, tracker: zmq.MessageTracker) -> None:
        """It is being sent."""
        if len(self._lent) < _KEPT:
            self._lent.append((tracker, buffer))


class KVServer:
    """A ROUTER socket on `host:port` and the hand-offs behind it.

    It reads blocks that the engine wrote and will not write again before `free` is called; it never frees blocks that are
    being read (`Leases.reading`). Rank 0 of an instance counts the leases; on the others (`follows`) a hand-off is held until
    rank 0 says `drop`, which it says before any step that writes the blocks anew.
    """

    def __init__(
        self,
        host: str,
        port: int,
        pairing_key: str,
        lease_s: float,
        *,
        follows: bool = False,
        ways: Sequence[OneSided] = (),
        streams: bool = False,
    ) -> None:
        """Binds at once; `serve` starts to answer. Raises `StartError`.

        Beside pieces it offers `ways` and, from a CPU, `streams`.
        """
        self._host, self._key, self._follows = host, pairing_key, follows
        self.leases = Leases(math.inf if follows else lease_s)
        self.late = 0  # pulls of hand-offs that are held no longer
        self._ways, self._streams = {way.way: way for way in ways}, streams
        self._listener: Listener | None = None
        self._memories: dict[protocol.Way, protocol.Memory | None] = {}
        self._sendings: dict[tuple[bytes, int], _Sending] = {}
        self._buffers = _Buffers()
        self._early: list[tuple[float, bytes, protocol.Pull]] = []
        self._pool: Pool | None = None
        self._closed = threading.Event()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _LONGEST_QUESTION)
        try:
            self._socket.bind(f"tcp://{host}:{port}")
        except zmq.ZMQError as e:
            raise StartError(f"The KV port {host}:{port} cannot be bound: {e}.") from None
        self._thread = threading.Thread(target=self._run, name="kv", daemon=True)

    @property
    def leased(self) -> int:
        """Hand-offs that wait to be pulled."""
        return len(self.leases)

    @property
    def leased_blocks(self) -> int:
        """Blocks that they hold."""
        return self.leases.blocks

    @property
    def pulls(self) -> int:
        """Pulls whose pieces are not all sent."""
        return len(self._sendings)

    def serve(self, pool: Pool, place: Place | None = None) -> None:
        """Answer from now on, for what `place` says the pool is of the model; by default all of it. Raises `StartError`."""
        self._pool, self._place = pool, place or Place.whole(pool)
        self._memories = {name: way.offer(pool, self._place) for name, way in self._ways.items()}
        if self._streams and pool.device.type == "cpu":
            try:
                self._listener = Listener(self._host, self._stream)
            except OSError as e:
                raise StartError(f"No port of {self._host} can be bound for KV: {e.strerror}.") from None
        self._thread.start()

    def hold(
        self,
        handoff: str,
        generation: int,
        blocks: Sequence[int],
        tokens: list[int],
        free: Callable[[], None],
    ) -> None:
        """Keep these blocks until they are released or the lease ends, then call `free` once."""
        self.leases.hold(handoff, generation, blocks, tokens, free, time.monotonic())

    def drop(self, handoff: str) -> None:
        """End a lease now, if it still runs; when this returns nobody reads its blocks."""
        self.leases.drop(handoff)

    def close(self) -> None:
        """Stop answering."""
        self._closed.set()
        if self._listener:
            self._listener.close()
        if self._thread.is_alive():
            self._thread.join()
        self._socket.close()
        self._context.term()

    # ------------------------------------------------------------------------------ in the thread

    def _run(self) -> None:
        torch.set_num_threads(1)
        with torch.inference_mode():
            look_s = 0.0  # at the leases, again
            while not self._closed.is_set():
                busy = any(sending.credit > 0 for sending in self._sendings.values())
                wait_s = 0.0 if busy else _EARLY_LOOK_S if self._early else _TICK_S
                heard = 0  # bounded: who asks without end must not keep the others from their pieces
                while heard < _HEARD_IN_A_ROW and self._hear(0.0 if heard else wait_s):
                    heard += 1
                for sending in list(self._sendings.values()):
                    if sending.credit > 0:
                        self._send_piece(sending)
                now = time.monotonic()
                if self._early:
                    self._retry(now)
                if not busy or now >= look_s:
                    self.leases.expire(now)
                    self._forget()
                    look_s = now + _TICK_S

    def _forget(self) -> None:
        """Pulls of what is held no longer: who gave one up says so by `Release`, from another socket, and asks for no more."""
        for key, sending in list(self._sendings.items()):
            if sending.ask.handoff not in self.leases:
                self._sendings.pop(key, None)
                self._send(sending.peer, self._gone(sending.ask))  # or somebody still waits

    def _hear(self, wait_s: float) -> bool:
        """One question, if there is one."""
        self._socket.rcvtimeo = int(1000 * wait_s)
        try:
            peer, *frames = self._socket.recv_multipart()
        except zmq.Again:
            return False
        try:
            ask = protocol.question(frames[0])
        except (msgspec.DecodeError, IndexError) as e:
            self._send(peer, _refused(-1, "malformed", f"This is no question of ours: {e}."))
            return True
        if isinstance(ask, protocol.More):
            if sending := self._sendings.get((peer, ask.ask)):
                sending.credit = min(sending.credit + max(0, ask.credit), _MOST_CREDIT)
        elif refused := self._stranger(ask):
            self._send(peer, refused)
        elif isinstance(ask, protocol.Pull):
            self._grant(peer, ask, time.monotonic() + _EARLY_S if self._follows else 0.0)
        elif not self.leases.renew(ask.handoff, ask.generation, time.monotonic()):
            self._send(peer, self._gone(ask))
        else:
            if isinstance(ask, protocol.Release):
                self.drop(ask.handoff)
            self._send(peer, protocol.Done(ask=ask.ask))
        return True

    def _stranger(self, ask: protocol.Renew | protocol.Pull | protocol.Release) -> protocol.Refused | None:
        """What is said to another version or pairing key."""
        if ask.version != VERSION:
            reason = f"This worker speaks version {VERSION} of the hand-off, not {ask.version}."
            return _refused(ask.ask, "version", reason)
        if ask.pairing_key != self._key:
            reason = f"The prefill worker's pairing key is {self._key!r}, not {ask.pairing_key!r}."
            return _refused(ask.ask, "pairing", reason)
        return None

    def _retry(self, now: float) -> None:
        early, self._early = self._early, []
        for until_s, peer, ask in early:
            self._grant(peer, ask, until_s if now < until_s else 0.0)

    def _grant(self, peer: bytes, ask: protocol.Pull, wait_until_s: float) -> None:
        """Answer a pull; ask again later where rank 0 may still have to speak."""
        assert self._pool is not None
        if ask.credit < 1:
            reason = f"credit is {ask.credit}; at least 1 byte is sent."
            self._send(peer, _refused(ask.ask, "malformed", reason))
            return
        offered = {name for name, memory in self._memories.items() if memory}
        if self._listener:
            offered.add("tcp")
        way = next((name for name in ask.ways if name in offered), None)
        if way == "tcp" and self._listener:
            self._send(peer, protocol.Stream(ask=ask.ask, port=self._listener.port))
            return
        granted, _ = self._granted(ask, way)
        if granted is None and wait_until_s:
            self._early.append((wait_until_s, peer, ask))
        elif granted is None:
            self.late += 1
            self._send(peer, self._gone(ask))
        else:
            self._send(peer, granted)
            place = Place(range(*granted.layers), range(*granted.heads))
            unit = 2 * len(place.heads) * self._pool.unit
            if not way and (cuts := [*protocol.pieces(granted.layers, granted.blocks, unit)]):
                self._sendings[peer, ask.ask] = _Sending(peer, ask, place, cuts)

    def _granted(self, ask: protocol.Pull, way: protocol.Way | None) -> tuple[protocol.Granted | None, Ints]:
        """What is said to a pull of what is held, None where it is not, and the blocks. In any thread."""
        pool = self._pool
        assert pool is not None
        place = self._place.common(ask.layers, ask.heads)
        self.leases.renew(ask.handoff, ask.generation, time.monotonic())
        with self.leases.reading(ask.handoff, ask.generation) as lease:
            if lease is None:
                return None, np.empty(0, np.int64)
            sums = checksums(pool, self._place, place, lease.blocks) if way and ask.checksum else []
        memory = self._memories.get(way) if way else None
        granted = protocol.Granted(
            ask=ask.ask,
            way=way or "zmq",
            tokens=lease.tokens,
            layers=ends(place.layers),
            heads=ends(place.heads),
            blocks=len(lease.blocks),
            block_tokens=BLOCK_TOKENS,
            head_dim=pool.head_dim,
            dtype=str(pool.dtype).removeprefix("torch."),
            memory=memory,
            ids=lease.blocks.tolist() if memory else [],
            sums=sums,
        )
        return granted, lease.blocks

    def _send_piece(self, sending: _Sending) -> None:
        ask, cut = sending.ask, sending.cuts[0]
        assert self._pool is not None
        size = len(cut.layers) * 2 * cut.blocks * len(sending.place.heads) * self._pool.unit
        buffer = self._buffers.take(size)
        with self.leases.reading(ask.handoff, ask.generation) as lease:
            if lease:
                self._gather(sending.place, cut, lease, buffer[:size])
        if lease is None:
            self._sendings.pop((sending.peer, ask.ask), None)
            self._send(sending.peer, self._gone(ask))
            return
        sending.credit -= size
        sending.cuts.popleft()
        if not sending.cuts:
            self._sendings.pop((sending.peer, ask.ask), None)
        frame = buffer.data[:size]
        checksum = zlib.crc32(frame) if ask.checksum else None
        tracker = self._send(sending.peer, protocol.Piece(ask=ask.ask, checksum=checksum), frame)
        if tracker:
            self._buffers.lend(buffer, tracker)

    def _gather(self, place: Place, cut: protocol.Cut, lease: Lease, out: Bytes) -> None:
        pool = self._pool
        assert pool is not None
        heads = shifted(place.heads, self._place)
        blocks = lease.blocks[cut.first : cut.first + cut.blocks]
        for layer, part in zip(cut.layers, out.reshape(len(cut.layers), -1), strict=True):
            pool.take(layer - self._place.layers.start, blocks, heads, part)

    def _gone(self, ask: protocol.Renew | protocol.Pull | protocol.Release) -> protocol.Refused:
        reason = (
            f"The prefill worker no longer holds hand-off {ask.handoff!r}: its lease "
            f"{'' if self._follows else f'of {self.leases.lease_s:g} s '}ended, or it was released."
        )
        return _refused(ask.ask, "expired", reason)

    def _send(self, peer: bytes, message: protocol.Answer, *frames: memoryview) -> zmq.MessageTracker | None:
        """Says when ZeroMQ is done with the last of the frames, if there are any and the peer is."""
        try:
            self._socket.send(peer, zmq.SNDMORE)
            if not frames:
                self._socket.send(protocol.encode(message))
                return None
            self._socket.send(protocol.encode(message), zmq.SNDMORE)
            return self._socket.send_multipart(frames, copy=False, track=True)
        except zmq.ZMQError:
            # The puller is gone. Its hand-off stays for the rest of the lease: somebody may pull it again.
            for key in [key for key in self._sendings if key[0] == peer]:
                del self._sendings[key]
            return None

    # ------------------------------------------------------------------------------ in a thread of each stream

    def _stream(self, ask: protocol.Question) -> Iterator[protocol.Answer | Spans]:
        """The answer to a pull, and in it the blocks where they lie; it ends by whether they were held until they were sent."""
        if not isinstance(ask, protocol.Pull):
            yield _refused(ask.ask, "malformed", "Only a pull is answered here.")
            return
        if refused := self._stranger(ask):
            yield refused
            return
        until_s = time.monotonic() + _EARLY_S if self._follows else 0.0
        granted, blocks = self._granted(ask, "tcp")
        while granted is None and time.monotonic() < until_s and not self._closed.wait(_EARLY_LOOK_S):
            granted, blocks = self._granted(ask, "tcp")
        if granted is None:
            self.late += 1
            yield self._gone(ask)
            return
        yield granted
        assert self._pool is not None
        inside = Place(range(*granted.layers), range(*granted.heads)).within(self._place)
        yield from self._pool.spans(inside.layers, blocks, inside.heads)
        held = self.leases.renew(ask.handoff, ask.generation, time.monotonic())
        yield protocol.Done(ask=ask.ask) if held else self._gone(ask)


def _refused(ask: int, code: protocol.RefusalCode, reason: str) -> protocol.Refused:
    return protocol.Refused(ask=ask, code=code, reason=reason)


def checksums(pool: Pool, held: Place, place: Place, blocks: Ints) -> list[int]:
    """zlib.crc32 of each layer's keys and values, as one frame `[2, blocks, heads, block_tokens, head_dim]`."""
    buffer = np.empty(2 * len(blocks) * len(place.heads) * pool.unit, np.uint8)
    sums = []
    for layer in place.layers:
        pool.take(layer - held.layers.start, blocks, shifted(place.heads, held), buffer)
        sums.append(zlib.crc32(buffer.data))
    return sums
