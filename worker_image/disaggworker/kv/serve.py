"""The prefill side of a pull: leases on finished prompts' KV, and the thread that answers for them."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

import msgspec
import torch
import zmq

from disaggserve import protocol
from disaggserve.wire import VERSION
from disaggworker.errors import StartError
from disaggworker.kv.blocks import BLOCK_TOKENS
from disaggworker.kv.pool import Pool

_TICK_MS = 500  # how late the end of a lease may be noticed


@dataclasses.dataclass(eq=False)
class Lease:
    """KV that waits to be pulled, and until when (monotonic)."""

    generation: int
    blocks: Sequence[int]
    tokens: list[int]
    free: Callable[[], None]
    until_s: float


class KVServer:
    """A ROUTER socket on `host:port` and the leases behind it.

    It reads blocks that the engine wrote and will not write again before `free` is called; it never frees blocks that
    are being read, because reading and the end of a lease happen in one thread.
    """

    def __init__(self, host: str, port: int, pairing_key: str, lease_s: float) -> None:
        """Binds at once; `serve` starts to answer. Raises `StartError`."""
        self._key, self._lease_s = pairing_key, lease_s
        self._leases: dict[str, Lease] = {}
        self.expired = 0  # leases that ended with nobody having fetched the KV
        self.late = 0  # pulls of hand-offs that are held no longer
        self._lock = threading.Lock()
        self._pool: Pool | None = None
        self._closed = threading.Event()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        try:
            self._socket.bind(f"tcp://{host}:{port}")
        except zmq.ZMQError as e:
            raise StartError(f"The KV port {host}:{port} cannot be bound: {e}.") from None
        self._thread = threading.Thread(target=self._run, name="kv", daemon=True)

    @property
    def leased(self) -> int:
        """Hand-offs that wait to be pulled."""
        return len(self._leases)

    @property
    def leased_blocks(self) -> int:
        """Blocks that they hold."""
        with self._lock:
            return sum(len(lease.blocks) for lease in self._leases.values())

    def serve(self, pool: Pool) -> None:
        """Answer from now on."""
        self._pool = pool
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
        with self._lock:
            self._leases[handoff] = Lease(generation, blocks, tokens, free, time.monotonic() + self._lease_s)

    def drop(self, handoff: str) -> None:
        """End a lease now, if it still runs."""
        with self._lock:
            lease = self._leases.pop(handoff, None)
        if lease:
            lease.free()

    def close(self) -> None:
        """Stop answering."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        self._socket.close()
        self._context.term()

    def _run(self) -> None:
        torch.set_num_threads(1)
        while not self._closed.is_set():
            if self._socket.poll(_TICK_MS):
                peer, *frames = self._socket.recv_multipart()
                self._socket.send_multipart([peer, *self._answer(frames)], copy=False)
            self._expire(time.monotonic())

    def _expire(self, now: float) -> None:
        with self._lock:
            ended = [name for name, lease in self._leases.items() if lease.until_s < now]
        for name in ended:
            self.drop(name)
        self.expired += len(ended)

    def _answer(self, frames: list[bytes]) -> list[bytes | memoryview]:
        try:
            ask = protocol.question(frames[0])
        except (msgspec.DecodeError, IndexError) as e:
            refused = protocol.Refused(ask=-1, code="malformed", reason=f"This is no question of ours: {e}.")
            return [protocol.encode(refused)]
        if refusal := self._refusal(ask):
            return [protocol.encode(refusal)]
        if isinstance(ask, protocol.Release):
            self.drop(ask.handoff)
            return [protocol.encode(protocol.Done(ask=ask.ask))]
        with self._lock:
            lease = self._leases[ask.handoff]
            lease.until_s = time.monotonic() + self._lease_s
        if isinstance(ask, protocol.Renew):
            return [protocol.encode(protocol.Done(ask=ask.ask))]
        return self._payload(ask, lease)

    def _refusal(self, ask: protocol.Question) -> protocol.Refused | None:
        if ask.version != VERSION:
            reason = f"This worker speaks version {VERSION} of the hand-off, not {ask.version}."
            return protocol.Refused(ask=ask.ask, code="version", reason=reason)
        if ask.pairing_key != self._key:
            reason = f"The prefill worker's pairing key is {self._key!r}, not {ask.pairing_key!r}."
            return protocol.Refused(ask=ask.ask, code="pairing", reason=reason)
        with self._lock:
            lease = self._leases.get(ask.handoff)
        if lease is None or lease.generation != ask.generation:
            self.late += isinstance(ask, protocol.Pull)
            reason = f"The prefill worker no longer holds hand-off {ask.handoff!r}: its lease of {self._lease_s:g} s ended, or it was released."
            return protocol.Refused(ask=ask.ask, code="expired", reason=reason)
        return None

    def _payload(self, ask: protocol.Pull, lease: Lease) -> list[bytes | memoryview]:
        pool = self._pool
        assert pool is not None
        layout = protocol.Layout(
            ask=ask.ask,
            tokens=lease.tokens,
            layers=pool.layers,
            blocks=len(lease.blocks),
            block_tokens=BLOCK_TOKENS,
            kv_heads=pool.kv_heads,
            head_dim=pool.head_dim,
            dtype=str(pool.dtype).removeprefix("torch."),
        )
        raw = [part.view(torch.uint8).numpy().reshape(-1).data for part in pool.read(lease.blocks)]
        return [protocol.encode(layout), *raw]
