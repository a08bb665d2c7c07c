"""KV of an instance of several ranks: each serves and pulls its own part, and rank 0 tells them of what.

What goes down the ranks' pipes is in order with the steps (engine/parallel), so that a hand-off is held after the step that
made it, dropped before any that writes its blocks anew, and pulled after the last one that used the blocks before.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import torch

from disaggserve import protocol
from disaggworker import errors
from disaggworker.config import Config
from disaggworker.engine.parallel.part import Part
from disaggworker.engine.parallel.ranks import Ranks
from disaggworker.errors import RankLost, TransferError
from disaggworker.kv.pull import Pulled, Puller
from disaggworker.kv.serve import KVServer
from disaggworker.kv.shm import Shm
from disaggworker.kv.transport import Place


class _Hold(msgspec.Struct, frozen=True, tag=True):
    handoff: str
    generation: int
    blocks: list[int]


class _Drop(msgspec.Struct, frozen=True, tag=True):
    handoff: str


class _Pull(msgspec.Struct, frozen=True, tag=True):
    number: int
    handoff: protocol.Handoff
    blocks: list[int]


class _GiveUp(msgspec.Struct, frozen=True, tag=True):
    number: int


class _Ended(msgspec.Struct, frozen=True):
    """From a rank: nothing of that pull is written any more."""

    number: int
    ways: frozenset[protocol.Way] = frozenset()
    kv_bytes: int = 0
    fault: tuple[str, str] | None = None  # the error's class and sentence


_encode = msgspec.msgpack.encode
_note = msgspec.msgpack.Decoder(_Hold | _Drop | _Pull | _GiveUp).decode
_ended = msgspec.msgpack.Decoder(_Ended).decode


def place_of(part: Part) -> Place:
    """What a rank's pool is of the model."""
    return Place(part.layers, part.kv_heads)


class Keeper:
    """The attendant of a rank but 0: one endpoint, at the KV port + rank, and one pull at a time."""

    def __init__(self, config: Config, part: Part, say: Callable[[bytes], None]) -> None:
        """Raises `StartError`."""
        self._say, self._device, self._given_up = say, part.pool.device, 0
        port, key = config.kv_port + part.rank, config.pairing_key
        self._server = KVServer(config.pod_ip, port, key, config.lease_s, follows=True, ways=[Shm()])
        self._server.serve(part.pool, place_of(part))
        self._puller = Puller(key, part.pool, place_of(part), ways=[Shm()], checksum=config.kv_checksum)
        self._thread = ThreadPoolExecutor(1, "pull", initializer=self._begin)

    def hear(self, note: bytes) -> None:
        """What rank 0 says, between two steps."""
        match _note(note):
            case _Hold(handoff, generation, blocks):
                self._settle()
                self._server.hold(handoff, generation, blocks, [], lambda: None)
            case _Drop(handoff):
                self._server.drop(handoff)
            case _Pull() as pull:
                self._settle()
                self._thread.submit(self._pull, pull)
            case _GiveUp(number):
                self._given_up = number

    def close(self) -> None:
        """Stop answering."""
        self._server.close()
        self._thread.shutdown()
        self._puller.close()

    def _begin(self) -> None:
        torch.set_num_threads(1)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _settle(self) -> None:
        # A step is over for this thread when its last kernel is queued; others read and write the blocks on their own.
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def _pull(self, pull: _Pull) -> None:
        try:
            pulled = self._puller.pull(pull.handoff, pull.blocks, lambda: self._given_up >= pull.number)
            said = _Ended(pull.number, pulled.ways, pulled.kv_bytes)
        except TransferError as e:
            said = _Ended(pull.number, fault=(type(e).__name__, str(e)))
        except Exception as e:
            said = _Ended(pull.number, fault=("TransferError", f"A rank cannot pull: {e}."))
        self._say(_encode(said))


class LeadServer(KVServer):
    """Rank 0's endpoint. It alone counts leases; the others hold while it does."""

    ranks: Ranks | None = None  # None in an instance of one

    def hold(
        self,
        handoff: str,
        generation: int,
        blocks: Sequence[int],
        tokens: list[int],
        free: Callable[[], None],
    ) -> None:
        """As `KVServer.hold`, on all ranks."""

        def end() -> None:
            if self.ranks:
                with contextlib.suppress(RankLost):  # the worker ends, too
                    self.ranks.tell(_encode(_Drop(handoff)))
            free()

        if self.ranks:
            self.ranks.tell(_encode(_Hold(handoff, generation, list(blocks))))
        super().hold(handoff, generation, blocks, tokens, end)


class LeadPuller(Puller):
    """Pulls on all ranks at once; rank 0's own part in the thread that asks."""

    def __init__(self, config: Config, part: Part, ranks: Ranks) -> None:
        super().__init__(
            config.pairing_key, part.pool, place_of(part), ways=[Shm()], checksum=config.kv_checksum
        )
        self._ranks, self._others = ranks, part.tp * part.pp - 1
        self._numbers = itertools.count(1)
        self._answers: queue.SimpleQueue[_Ended] = queue.SimpleQueue()
        ranks.on_note = lambda rank, note: self._answers.put(_ended(note))

    def pull(
        self, handoff: protocol.Handoff, blocks: Sequence[int], stop: Callable[[], bool] = lambda: False
    ) -> Pulled:
        """As `Puller.pull`, for all ranks. Raises `TransferError`, `RankLost`."""
        number = next(self._numbers)
        self._ranks.tell(_encode(_Pull(number, handoff, list(blocks))))
        try:
            own = super().pull(handoff, blocks, stop)
        except BaseException:
            self._ranks.tell(_encode(_GiveUp(number)))
            self._gather()
            raise
        others = self._gather(stop, number)
        for ended in others:
            if ended.fault:
                raise getattr(errors, ended.fault[0])(ended.fault[1])
        return Pulled(
            own.tokens,
            own.ways.union(*(ended.ways for ended in others)),
            own.kv_bytes + sum(ended.kv_bytes for ended in others),
        )

    def _gather(self, stop: Callable[[], bool] = lambda: False, number: int = 0) -> list[_Ended]:
        """Wait until no rank writes any more."""
        found: list[_Ended] = []
        while len(found) < self._others:
            try:
                found.append(self._answers.get(timeout=0.1))
            except queue.Empty:
                if stop():
                    self._ranks.tell(_encode(_GiveUp(number)))
        return found
