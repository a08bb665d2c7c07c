"""How the ranks of one instance hand KV over: each serves and pulls its own part; rank 0 tells them when.

On every rank but 0 an `Attendant` has a `KVServer` at kv_port + rank, which holds what rank 0 holds and lets go when rank 0
says so, and a `Puller` into its own pool. Notes go down the ranks' pipes in order with the steps (`engine.parallel`): a pull
begins when the steps before it are over, and blocks that were let go are written by steps that come after.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import torch

from disaggserve import protocol
from disaggworker import errors
from disaggworker.config import Config
from disaggworker.engine.parallel.part import Part
from disaggworker.engine.parallel.ranks import Ranks
from disaggworker.errors import TransferError
from disaggworker.kv.pull import Puller
from disaggworker.kv.serve import KVServer
from disaggworker.kv.shm import Shm
from disaggworker.kv.transport import Place


class Hold(msgspec.Struct, frozen=True, tag=True):
    """To a rank: this hand-off may be pulled."""

    handoff: str
    generation: int
    blocks: list[int]


class Drop(msgspec.Struct, frozen=True, tag=True):
    """To a rank: it may not any more."""

    handoff: str


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """To a rank: pull your part of this hand-off into these blocks, and answer."""

    number: int
    handoff: protocol.Handoff
    blocks: list[int]


class Stop(msgspec.Struct, frozen=True, tag=True):
    """To a rank: end that pull; it is answered all the same."""

    number: int


class Fetched(msgspec.Struct, frozen=True, tag=True):
    """From a rank: that pull is over; `error` is the name of a `TransferError`, empty where there is none."""

    number: int
    ways: list[protocol.Way] = []
    error: str = ""
    reason: str = ""


_encode = msgspec.msgpack.Encoder().encode
_read_note = msgspec.msgpack.Decoder(Hold | Drop | Fetch | Stop).decode
_read_reply = msgspec.msgpack.Decoder(Fetched).decode


def place_of(part: Part) -> Place:
    """What of the model's KV a rank holds."""
    return Place(part.layers, part.kv_heads)


class Attendant:
    """On a rank that is not 0 (`engine.parallel.rank.Attendant`)."""

    def __init__(self, config: Config, part: Part, say: Callable[[bytes], None]) -> None:
        """Serves at once. Raises `StartError`."""
        place, ways = place_of(part), [Shm()]
        self._say, self._device = say, part.pool.device
        self._server = KVServer(
            config.pod_ip,
            config.kv_port + part.rank,
            config.pairing_key,
            math.inf,
            follows=True,
            ways=ways,
            streams=True,
        )
        self._server.serve(part.pool, place)
        self._puller = Puller(
            config.pairing_key, part.pool, place, ways=ways, streams=True, checksum=config.kv_checksum
        )
        self._thread = ThreadPoolExecutor(1, "pull", initializer=self._begin)
        self._stopped: set[int] = set()

    def hear(self, note: bytes) -> None:
        """Do what rank 0 says."""
        match _read_note(note):
            case Hold(handoff, generation, blocks):
                self._settle()
                self._server.hold(handoff, generation, blocks, [], lambda: None)
            case Drop(handoff):
                self._server.drop(handoff)
            case Fetch() as fetch:
                self._settle()
                self._thread.submit(self._fetch, fetch)
            case Stop(number):
                self._stopped.add(number)

    def _begin(self) -> None:
        torch.set_num_threads(1)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _settle(self) -> None:
        # A step is over for this thread when its last kernel is queued; others read and write the blocks on their own.
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def _fetch(self, fetch: Fetch) -> None:
        number = fetch.number
        try:
            pulled = self._puller.pull(fetch.handoff, fetch.blocks, lambda: number in self._stopped)
            fetched = Fetched(number, sorted(pulled.ways))
        except TransferError as e:
            fetched = Fetched(number, error=type(e).__name__, reason=str(e))
        except Exception as e:  # rank 0 waits for an answer, whatever happens here
            fetched = Fetched(number, error="TransferError", reason=f"A rank cannot pull: {e}.")
        self._stopped.discard(number)
        self._say(_encode(fetched))

    def close(self) -> None:
        """The worker ends."""
        self._server.close()
        self._thread.shutdown()
        self._puller.close()


class Others:
    """On rank 0: the other ranks, as the worker's event loop and the engine's thread see them."""

    def __init__(self, ranks: Ranks, loop: asyncio.AbstractEventLoop) -> None:
        self._ranks, self._loop, self.count = ranks, loop, len(ranks.pids)
        self._numbers = itertools.count(1)
        self._open: dict[tuple[int, int], asyncio.Future[frozenset[protocol.Way]]] = {}
        ranks.on_note = self._hear

    def hold(self, handoff: str, generation: int, blocks: Sequence[int]) -> None:
        """They may be asked for it. In the engine's thread."""
        self._ranks.tell(_encode(Hold(handoff, generation, list(blocks))))

    def drop(self, handoff: str) -> None:
        """They may not any more: before the blocks are another's. In the engine's thread."""
        self._ranks.tell(_encode(Drop(handoff)))

    def fetch(
        self, handoff: protocol.Handoff, blocks: Sequence[int]
    ) -> tuple[list[asyncio.Future[frozenset[protocol.Way]]], Callable[[], None]]:
        """A pull on each of them, and what ends it early; each is over when its rank writes nothing any more."""
        number = next(self._numbers)
        ranks = range(1, self.count + 1)
        futures = [self._loop.create_future() for _ in ranks]
        self._open |= {(rank, number): future for rank, future in zip(ranks, futures, strict=True)}
        self._ranks.tell(_encode(Fetch(number, handoff, list(blocks))))
        return futures, lambda: self._ranks.tell(_encode(Stop(number)))

    def _hear(self, rank: int, note: bytes) -> None:
        """In the thread that listens to the ranks."""
        self._loop.call_soon_threadsafe(self._heard, rank, note)

    def _heard(self, rank: int, note: bytes) -> None:
        fetched = _read_reply(note)
        future = self._open.pop((rank, fetched.number), None)
        if future is None or future.done():
            return
        if fetched.error:
            future.set_exception(getattr(errors, fetched.error)(fetched.reason))
        else:
            future.set_result(frozenset(fetched.ways))
