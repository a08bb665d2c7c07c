"""How KV gets from a prefill instance's pools into a decode instance's.

One conversation for all transports (`protocol`), over pyzmq: `KVServer` (serve.py) holds hand-offs and answers for them,
`KVClient` (pull.py) renews, pulls and releases. What differs is the way of the bytes:

    zmq        the server gathers pieces and sends them; the puller writes piece i while i + 1 is on the wire
    tcp        the server's kernel takes blocks from where they lie, the puller's puts them into blocks (CPUs alone)
    shm        the puller maps the server's pool (two processes of one host) and copies block to block
    cuda_ipc   the same between GPUs of one host
    nixl       the puller's NIXL agent reads the server's registered pool over RDMA, NVLink, shared memory or TCP

By the first two the server sends, and says itself that the hand-off was held until then. The others are a `OneSided`: the
server says where its memory is, the puller reads, and the server's word that the hand-off was still held *afterwards* is what
makes the bytes good.

What every transport must do, and tests/unit/test_kv_conformance.py holds each of them to:

* A pull gives exactly the bytes that the prefill wrote, in the puller's blocks and nowhere else, for any cut of layers (pp)
  and KV heads (tp) on the two sides; or it raises a `TransferError`, and nothing that it wrote is used.
* A hand-off is held for `lease_s` after each word about it. Then, or when it is released or dropped, its blocks are freed,
  once. A lease never comes back.
* A pull of a hand-off that is not held, or whose blocks are of another generation by now, raises `HandoffGone`, also where
  that happens while it runs. Another pairing key or version raises `NotPaired`, a server that is gone, at any time,
  `PeerLost`; what cannot be read, `TransferError`; with checksums, what arrives otherwise than it was sent, `Corrupted`.
* A puller that is gone costs the server nothing but the rest of the lease. Nobody's frames, however wrong, end a server.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from disaggserve import protocol
from disaggworker.kv.pool import Ints, Pages, Pool

_CACHED_BYTES = 1 << 19  # fit a processor's own cache


@dataclasses.dataclass(frozen=True)
class Place:
    """What of a model's KV a process holds: layer i of its pool is `layers[i]`, head i is `heads[i]`."""

    layers: range
    heads: range

    @classmethod
    def whole(cls, pool: Pool) -> Place:
        """That of a process that holds all."""
        return cls(range(pool.layers), range(pool.kv_heads))

    def common(self, layers: tuple[int, int], heads: tuple[int, int]) -> Place:
        """What of these layers and heads is held here; two empty ranges if nothing is."""
        mine = Place(_common(self.layers, layers), _common(self.heads, heads))
        return mine if mine.layers and mine.heads else Place(range(0), range(0))

    def within(self, place: Place) -> Place:
        """The same as that process numbers it."""
        first = place.layers.start
        layers = range(self.layers.start - first, self.layers.stop - first)
        return Place(layers, shifted(self.heads, place))


def _common(held: range, asked: tuple[int, int]) -> range:
    start, stop = max(held.start, asked[0]), min(held.stop, asked[1])
    return range(start, max(start, stop))


def ends(numbers: range) -> tuple[int, int]:
    """A range as messages have it."""
    return numbers.start, numbers.stop


class Source(Protocol):
    """A peer's memory that can be read from here."""

    def read(self, ids: Ints, blocks: Ints, place: Place) -> None:
        """Copy blocks `ids` of the peer to this process's `blocks`, in these layers and heads. Raises `TransferError`."""

    def close(self) -> None:
        """Let go of it."""


class OneSided(Protocol):
    """A way by which a puller reads the server's memory itself."""

    way: protocol.Way

    def offer(self, pool: Pool, place: Place) -> protocol.Memory | None:
        """On the server: where the pool is; None where it cannot be reached this way."""

    def open(self, memory: protocol.Memory, pool: Pool, place: Place) -> Source:
        """On the puller, whose pool is `pool`. Raises `TransferError` where the memory cannot be reached from here."""


class PagesSource:
    """A peer's pool as `Pages` of this process."""

    def __init__(self, theirs: Pages, there: Place, pool: Pool, here: Place) -> None:
        self._theirs, self._there, self._pool, self._here = theirs, there, pool, here

    def read(self, ids: Ints, blocks: Ints, place: Place) -> None:
        """Some blocks at a time, through a buffer that stays in the processor's cache."""
        unit = 2 * len(place.heads) * self._pool.unit
        some = max(1, _CACHED_BYTES // unit)
        buffer = np.empty(some * unit, np.uint8)
        theirs, mine = shifted(place.heads, self._there), shifted(place.heads, self._here)
        for layer in place.layers:
            for first in range(0, len(blocks), some):
                part = slice(first, first + some)
                data = buffer[: len(blocks[part]) * unit]
                self._theirs.take(layer - self._there.layers.start, ids[part], theirs, data)
                self._pool.put(layer - self._here.layers.start, blocks[part], mine, data)

    def close(self) -> None:
        """Nothing to do: the memory goes with the last tensor in it."""


def shifted(heads: range, place: Place) -> range:
    """Heads of the model as that process numbers them."""
    return range(heads.start - place.heads.start, heads.stop - place.heads.start)
