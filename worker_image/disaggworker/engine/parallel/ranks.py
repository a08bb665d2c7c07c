"""Rank 0's hold on the other ranks: forked processes, a pipe to each, and what goes through it."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import msgspec

from disaggworker.engine.step import Step
from disaggworker.errors import RankLost, StartError

_PR_SET_PDEATHSIG = 1
_PATIENCE_S = 5.0  # for a rank to end by itself


class Meet(msgspec.Struct, frozen=True, tag=True):
    """To a rank: join the others at this port of loopback, and load your share."""

    port: int


class Serve(msgspec.Struct, frozen=True, tag=True):
    """To a rank: the instance has so many KV blocks; steps follow."""

    blocks: int


class Run(msgspec.Struct, frozen=True, tag=True):
    """To a rank: compute your share of this step."""

    step: Step


class End(msgspec.Struct, frozen=True, tag=True):
    """To a rank: no more steps follow."""


class Note(msgspec.Struct, frozen=True, tag=True):
    """To a rank's attendant, or from it."""

    body: bytes


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """From a rank: the weights are there; memory holds so many KV blocks beside them."""

    blocks: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """From a rank: it ends, and why."""

    reason: str
    refused: bool  # a flag or a file is at fault
    at_s: float  # monotonic: one rank's fault can be another's a moment later


Order = Meet | Serve | Run | Note | End
Reply = Loaded | Failed | Note

_encode = msgspec.msgpack.Encoder().encode
read_order = msgspec.msgpack.Decoder(Order).decode
_read_reply = msgspec.msgpack.Decoder(Reply).decode

Body = Callable[[int, "Link"], None]


class Link:
    """A rank's end of its pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def hear(self) -> Order:
        """The next order. Raises `EOFError` when the worker is gone or done."""
        order: Order = read_order(self._pipe.recv_bytes())
        return order

    def say(self, reply: Reply) -> None:
        """Tell rank 0; from any thread. Nothing happens when it is gone."""
        with self._lock, contextlib.suppress(OSError):
            self._pipe.send_bytes(_encode(reply))


class Ranks:
    """Ranks 1 … `count` of this instance. `listen` once there may be threads; `close` at the end."""

    def __init__(self, count: int, body: Body) -> None:
        """Fork them; `body(rank, link)` is what each does. Call it in the main thread, and before there is another.

        (OpenBLAS, numpy's, may have made some at its import; it ends them before a fork by itself.)
        """
        fork = multiprocessing.get_context("fork")
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._lock = threading.Lock()
        self._loaded: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._failed: dict[int, Failed] = {}
        self._gone: list[int] = []
        self.ended = threading.Event()  # one of them, and not because it was told to
        self._closing = False
        self.on_note: Callable[[int, bytes], None] = lambda rank, body: None
        self.on_end: Callable[[], None] = lambda: None
        parent = os.getpid()
        for rank in range(1, count + 1):
            here, there = fork.Pipe()
            self._pipes.append(here)
            process = fork.Process(
                target=_become, args=(body, rank, there, parent, list(self._pipes)), name=f"rank {rank}"
            )
            process.start()
            there.close()
            self._processes.append(process)

    @property
    def pids(self) -> list[int]:
        """Their process ids."""
        return [process.pid for process in self._processes if process.pid]

    def listen(self) -> None:
        """Hear them from now on, in a thread."""
        threading.Thread(target=self._listen, name="ranks", daemon=True).start()

    def order(self, order: Order) -> None:
        """Send to every rank, from any thread. Raises `RankLost`."""
        data = _encode(order)
        try:
            with self._lock:
                for pipe in self._pipes:
                    pipe.send_bytes(data)
        except OSError:
            raise self.lost() from None

    def tell(self, note: bytes) -> None:
        """Send to every rank's attendant, from any thread. Raises `RankLost`."""
        self.order(Note(note))

    def loaded(self) -> int:
        """Wait until all have loaded; the KV blocks that each of them has memory for. Raises `RankLost`, `StartError`."""
        fits = [self._loaded.get() for _ in self._pipes]
        for failed in self._failed.values():
            if failed.refused:
                raise StartError(failed.reason)
        known = [blocks for blocks in fits if blocks is not None]
        if len(known) < len(fits):
            raise self.lost()
        return min(known)

    def lost(self) -> RankLost:
        """What happened to the rank that ended first."""
        for rank in list(self._gone):
            process = self._processes[rank - 1]
            process.join(_PATIENCE_S)  # its pipe has ended, and so will it
            if process.exitcode is not None and process.exitcode < 0:
                name = signal.Signals(-process.exitcode).name
                return RankLost(f"Rank {rank} of this worker was ended by {name}; the worker ends with it.")
        if self._failed:
            rank, failed = min(self._failed.items(), key=lambda item: item[1].at_s)
            return RankLost(f"Rank {rank} of this worker failed: {failed.reason}")
        return RankLost("A rank of this worker has ended; the worker ends with it.")

    def close(self) -> None:
        """End them, and wait until they have. Where one has ended the others may be waiting for it for ever."""
        self._closing = True
        with contextlib.suppress(RankLost):
            self.order(End())
        until_s = time.monotonic() + (0.0 if self.ended.is_set() else _PATIENCE_S)
        for process in self._processes:
            process.join(max(0.0, until_s - time.monotonic()))
            process.kill()
            process.join()

    def _listen(self) -> None:
        ranks = {pipe: rank for rank, pipe in enumerate(self._pipes, 1)}
        while ranks:
            ready = wait(list(ranks))
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    reply: Reply = _read_reply(pipe.recv_bytes())
                except (EOFError, OSError):
                    rank = ranks.pop(pipe)
                    self._gone.append(rank)
                    self._loaded.put(None)
                    if not self._closing:
                        self.ended.set()
                        self.on_end()
                    continue
                match reply:
                    case Loaded():
                        self._loaded.put(reply.blocks)
                    case Failed():
                        self._failed[ranks[pipe]] = reply
                    case Note():
                        self.on_note(ranks[pipe], reply.body)


def _become(body: Body, rank: int, pipe: Connection, parent: int, others: list[Connection]) -> None:
    """In the child."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    for other in others:
        other.close()  # or the worker's end of a pipe would outlive the worker
    with contextlib.suppress(EOFError):
        body(rank, Link(pipe))
