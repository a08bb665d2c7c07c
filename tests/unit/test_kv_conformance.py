"""What every KV transport must do (`disaggworker.kv.transport`), held against each of them."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import zmq

from disaggserve import protocol
from disaggworker.errors import Corrupted, HandoffGone, NotPaired, PeerLost, TransferError
from disaggworker.kv import nixl, pull, stream
from disaggworker.kv.blocks import BLOCK_TOKENS
from disaggworker.kv.pool import Pool
from disaggworker.kv.pull import KVClient, Pulled, Puller
from disaggworker.kv.serve import KVServer
from disaggworker.kv.shm import Shm
from disaggworker.kv.stream import Spans, Stream
from disaggworker.kv.transport import OneSided, Place

KEY, PORT, LEASE_S, WAIT_S = "key", 5600, 30.0, 10.0
LAYERS, HEADS, HEAD_DIM, BLOCKS = 4, 4, 8, 24
_hosts = itertools.count(1)

NIXL = any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13"))
TRANSPORTS = [
    "zmq",
    "shm",
    "tcp",
    pytest.param(
        "nixl", marks=pytest.mark.skipif(not NIXL, reason="NIXL is not installed (extra nixl-cu12)")
    ),
]


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> protocol.Way:
    monkeypatch.setattr(protocol, "PIECE_BYTES", 1 << 13)  # of small pools many pieces
    monkeypatch.setattr(pull, "_CREDIT", 1 << 15)
    monkeypatch.setattr(stream, "_SEND_BYTES", 1 << 15)
    monkeypatch.setattr(stream, "_RECEIVE_BYTES", 1 << 15)
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def quiet_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    """NIXL's agents answer in a thread that never sleeps, unless they are told to: there are many here, and few cores."""
    if not NIXL:
        return
    bindings = importlib.import_module(nixl.library().__name__ + "._bindings")

    def agent(name: str, config: Any, make: Callable[[str, Any], Any] = bindings.nixlAgent) -> Any:
        config.pthrDelay = 1000  # µs
        return make(name, config)

    monkeypatch.setattr(bindings, "nixlAgent", agent)


def ways(transport: protocol.Way) -> list[OneSided]:
    return [Shm()] if transport == "shm" else [nixl.Nixl()] if transport == "nixl" else []


def a_host() -> str:
    """A loopback address of this process's and this call's own."""
    return f"127.{1 + os.getpid() % 250}.{1 + os.getpid() // 250 % 250}.{next(_hosts)}"


def places(tp: int, pp: int, layers: int = LAYERS, heads: int = HEADS) -> list[Place]:
    """What each of the ranks of an instance holds, in their order."""
    wide, deep = heads // tp, layers // pp
    return [
        Place(range(p * deep, (p + 1) * deep), range(t * wide, (t + 1) * wide))
        for p in range(pp)
        for t in range(tp)
    ]


def a_pool(place: Place, head_dim: int = HEAD_DIM, blocks: int = BLOCKS, shared: bool = False) -> Pool:
    cpu = torch.device("cpu")
    return Pool(len(place.layers), len(place.heads), head_dim, blocks, torch.float16, cpu, shared=shared)


class Prefill:
    """The ranks of a prefill instance, and the KV of a whole model in them: `kv` is `[layers, 2, blocks, heads, …]`."""

    def __init__(
        self,
        transport: protocol.Way,
        tp: int = 1,
        pp: int = 1,
        *,
        lease_s: float = LEASE_S,
        layers: int = LAYERS,
        head_dim: int = HEAD_DIM,
        blocks: int = BLOCKS,
        host: str = "",
    ) -> None:
        self.host, self.lease_s, self.freed = host or a_host(), lease_s, 0
        shape = (layers, 2, blocks, HEADS, BLOCK_TOKENS, head_dim)
        self.kv = torch.from_numpy(np.random.default_rng(1).integers(1, 1 << 14, shape, np.int16)).view(
            torch.float16
        )
        self.servers: list[KVServer] = []
        self.pools: list[Pool] = []
        for rank, place in enumerate(places(tp, pp, layers)):
            pool = a_pool(place, head_dim, blocks, shared=transport == "shm")
            for i, layer in enumerate(place.layers):
                pool.keys[i][:], pool.values[i][:] = self.kv[layer][
                    :, :, place.heads.start : place.heads.stop
                ]
            server = KVServer(
                self.host,
                PORT + rank,
                KEY,
                lease_s,
                follows=rank > 0,
                ways=ways(transport),
                streams=transport == "tcp",
            )
            server.serve(pool, place)
            self.pools.append(pool)
            self.servers.append(server)

    def free(self) -> None:
        """What the engine does at the end of a lease: first the ranks are told, then the blocks are another's."""
        for server in self.servers[1:]:
            server.drop("h")
        self.freed += 1

    def hold(self, blocks: list[int], generation: int = 7) -> protocol.Handoff:
        tokens = list(range(len(blocks) * BLOCK_TOKENS - 3))
        for server in reversed(self.servers):
            server.hold(
                "h",
                generation,
                blocks,
                tokens if server is self.servers[0] else [],
                self.free if server is self.servers[0] else int,
            )
        return self.handoff(blocks, generation)

    def handoff(self, blocks: list[int], generation: int = 7, ranks: int = 0) -> protocol.Handoff:
        return protocol.Handoff(
            done=False,
            first_token_id=1,
            text="",
            prompt_tokens=len(blocks) * BLOCK_TOKENS - 3,
            host=self.host,
            port=PORT,
            ranks=ranks or len(self.servers),
            lease_s=self.lease_s,
            handoff="h",
            generation=generation,
            pairing_key=KEY,
            seed=1,
        )

    def close(self) -> None:
        for server in self.servers:
            server.close()


@contextlib.contextmanager
def prefill(transport: protocol.Way, *args: int, **more: float) -> Iterator[Prefill]:
    made = Prefill(transport, *args, **more)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.close()


class Decode:
    """One rank of a decode instance, and how its worker uses it."""

    def __init__(
        self,
        transport: protocol.Way,
        place: Place | None = None,
        key: str = KEY,
        checksum: bool = False,
        **shape: int,
    ) -> None:
        self.place = place or places(1, 1, shape.pop("layers", LAYERS))[0]
        self.pool = a_pool(self.place, **shape)
        self.puller = Puller(
            key, self.pool, self.place, ways=ways(transport), streams=transport == "tcp", checksum=checksum
        )

    def pull(
        self, handoff: protocol.Handoff, blocks: list[int], stop: Callable[[], bool] = lambda: False
    ) -> Pulled:
        """As `KVClient` does it: read, and ask whether it was held all the while."""

        async def ask() -> Pulled:
            client = KVClient(self.puller._key)
            client.puller = self.puller
            try:
                return await client.pull(handoff, blocks)
            finally:
                client.puller = None  # it is used again
                await client.close()

        if stop():
            raise AssertionError("stopped before it began")
        return asyncio.run(ask())

    def has(self, made: Prefill, theirs: list[int], mine: list[int]) -> bool:
        """These blocks are the prefill's, and no other was touched."""
        heads = slice(self.place.heads.start, self.place.heads.stop)
        others = [b for b in range(self.pool.limit) if b not in mine]
        return all(
            torch.equal(tensors[i][mine], made.kv[layer][kind][theirs][:, heads])
            and not tensors[i][others].any()
            for i, layer in enumerate(self.place.layers)
            for kind, tensors in enumerate((self.pool.keys, self.pool.values))
        )

    def close(self) -> None:
        self.puller.close()


@contextlib.contextmanager
def decode(transport: protocol.Way, *args: Place, **more: object) -> Iterator[Decode]:
    made = Decode(transport, *args, **more)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.close()


def meanwhile(
    monkeypatch: pytest.MonkeyPatch, transport: protocol.Way, here: Decode, action: Callable[[], None]
) -> None:
    """Do this once when a pull has written something and not all; NIXL's is one write."""
    done: list[bool] = []

    def after(write: Callable[..., None], nth: int) -> Callable[..., None]:
        count = itertools.count(1)

        def written(*args: object) -> None:
            write(*args)
            if next(count) >= nth and not done:
                done.append(True)
                action()

        return written

    if transport == "nixl":
        monkeypatch.setattr(nixl._Source, "read", after(nixl._Source.read, 1))
    elif transport == "tcp":
        monkeypatch.setattr(Stream, "fill", after(Stream.fill, 3))
    else:
        monkeypatch.setattr(here.pool, "put", after(here.pool.put, 3))


def until(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.002)


def release(handoff: protocol.Handoff, kind: str = "release", key: str = KEY) -> None:
    async def ask() -> None:
        client = KVClient(key)
        try:
            await getattr(client, kind)(handoff)
        finally:
            await client.close()

    asyncio.run(ask())


THEIRS, MINE = [5, 2, 3, 4, 17], [1, 9, 8, 20, 0]


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ((1, 1), (1, 1)),
        ((2, 1), (1, 1)),
        ((1, 1), (2, 1)),
        ((2, 1), (4, 1)),
        ((1, 2), (1, 1)),
        ((1, 1), (1, 4)),
        ((2, 2), (4, 1)),
        ((4, 1), (2, 2)),
    ],
)
def test_any_cut_on_the_two_sides(
    transport: protocol.Way, there: tuple[int, int], here: tuple[int, int]
) -> None:
    with prefill(transport, *there) as made:
        handoff = made.hold(THEIRS)
        for place in places(*here):
            with decode(transport, place) as rank:
                pulled = rank.pull(handoff, MINE)
                assert rank.has(made, THEIRS, MINE)
                assert pulled.ways == {transport}
                assert pulled.tokens == list(range(handoff.prompt_tokens))
                assert pulled.kv_bytes == 2 * 2 * 5 * 16 * HEAD_DIM * len(place.layers) * len(place.heads)
        assert [server.leased for server in made.servers] == [1] * len(made.servers)
        release(handoff)
        until(lambda: made.freed == 1, "the release to free the blocks")
        assert [server.leased_blocks for server in made.servers] == [0] * len(made.servers)


@pytest.mark.parametrize("checksum", [False, True])
def test_big_ones_come_in_pieces(
    transport: protocol.Way, checksum: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    shape = {"layers": 2, "head_dim": 128, "blocks": 300}
    with prefill(transport, **shape) as made, decode(transport, checksum=checksum, **shape) as here:
        theirs = np.random.default_rng(2).permutation(300)[:290].tolist()
        assert here.pull(made.hold(theirs), theirs[::-1]).kv_bytes == 2 * 2 * 290 * HEADS * 16 * 128 * 2
        assert here.has(made, theirs, theirs[::-1])


def test_the_end_of_a_lease_frees_once_and_refuses_what_comes_late(transport: protocol.Way) -> None:
    with prefill(transport, lease_s=0.05) as made, decode(transport) as here:
        handoff = made.hold(THEIRS)
        until(lambda: made.freed == 1, "the lease to end")
        with pytest.raises(HandoffGone, match=r"no longer holds hand-off 'h': its lease of 0\.05 s ended"):
            here.pull(handoff, MINE)
        with pytest.raises(HandoffGone):
            release(handoff)
        assert made.freed == 1


def test_a_lease_that_is_renewed_outlives_itself(transport: protocol.Way) -> None:
    """By a decode worker that has waited for two leases, and goes on to say so while it pulls."""
    with prefill(transport, lease_s=0.5) as made, decode(transport) as here:
        handoff = made.hold(THEIRS)

        async def wait_and_pull() -> None:
            client = KVClient(KEY)
            client.puller = here.puller

            async def renew() -> None:
                while True:
                    await client.renew(handoff)
                    await asyncio.sleep(handoff.lease_s / 5)

            renewing = asyncio.create_task(renew())
            await asyncio.sleep(2 * handoff.lease_s)
            await client.pull(handoff, MINE)
            renewing.cancel()
            client.puller = None
            await client.close()

        asyncio.run(wait_and_pull())
        assert here.has(made, THEIRS, MINE)
        assert made.freed == 0


def test_another_generation_is_refused(transport: protocol.Way) -> None:
    """The blocks were freed and hold another prompt, which happens to be held under the same name."""
    with prefill(transport) as made, decode(transport) as here:
        old = made.hold(THEIRS, generation=7)
        made.servers[0].drop("h")
        made.hold(THEIRS, generation=8)
        with pytest.raises(HandoffGone):
            here.pull(old, MINE)
        with pytest.raises(HandoffGone):
            release(old)
        assert made.servers[0].leased == 1


def test_another_pairing_key_is_refused(transport: protocol.Way) -> None:
    with prefill(transport) as made, decode(transport, key="other") as here:
        handoff = made.hold(THEIRS)
        with pytest.raises(NotPaired, match="pairing key is 'key', not 'other'"):
            here.pull(handoff, MINE)
        with pytest.raises(NotPaired):
            release(handoff, key="other")
        assert made.servers[0].leased == 1


def test_another_version_is_refused(transport: protocol.Way, monkeypatch: pytest.MonkeyPatch) -> None:
    with prefill(transport) as made, decode(transport) as here:
        handoff = made.hold(THEIRS)
        encode = protocol.encode

        def of_tomorrow(message: protocol.Question | protocol.Answer) -> bytes:
            return encode(
                msgspec.structs.replace(message, version=99)
                if isinstance(message, protocol.Pull)
                else message
            )

        monkeypatch.setattr(protocol, "encode", of_tomorrow)
        with pytest.raises(NotPaired, match=r"speaks version \d of the hand-off, not 99"):
            here.pull(handoff, MINE)


def test_two_pull_at_once(transport: protocol.Way) -> None:
    shape = {"layers": 8}
    blocks = list(range(22))
    with (
        prefill(transport, **shape) as made,
        decode(transport, **shape) as a,
        decode(transport, **shape) as b,
    ):
        handoff = made.hold(blocks)
        threads = [threading.Thread(target=one.pull, args=(handoff, blocks)) for one in (a, b)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert a.has(made, blocks, blocks)
        assert b.has(made, blocks, blocks)


def test_nothing_of_the_model_may_be_missing(transport: protocol.Way) -> None:
    with prefill(transport, 2, 1) as made, decode(transport) as here:
        made.hold(THEIRS)
        with pytest.raises(TransferError, match="holds 8 of the 16 layers × KV heads"):
            here.pull(made.handoff(THEIRS, ranks=1), MINE)


def test_kv_of_another_shape_is_refused(transport: protocol.Way) -> None:
    with (
        prefill(transport) as made,
        decode(transport, head_dim=16) as here,
        pytest.raises(
            TransferError, match=r"\(8, 16, 'float16', 5\).*this worker's is \(16, 16, 'float16', 5\)"
        ),
    ):
        here.pull(made.hold(THEIRS), MINE)


# ------------------------------------------------------------------------------ ends


def _serve(transport: protocol.Way, host: str, pipe: int) -> None:
    """A prefill instance, until the process is killed."""
    made = Prefill(transport, layers=8, host=host)
    made.hold(list(range(22)))
    os.write(pipe, b".")
    signal.pause()


def _start(transport: protocol.Way, host: str, pipe: int) -> int:
    if transport != "nixl":
        if pid := os.fork():
            return pid
        _serve(transport, host, pipe)
    # UCX does not survive a fork of a process that uses it.
    script = f"import runpy; runpy.run_path({__file__!r})['_serve']({transport!r}, {host!r}, {pipe})"
    return subprocess.Popen([sys.executable, "-c", script], pass_fds=[pipe]).pid


@contextlib.contextmanager
def far(transport: protocol.Way) -> Iterator[tuple[Callable[[], None], protocol.Handoff]]:
    """A hand-off of a prefill instance in a process of its own, and what kills it."""
    host, killed = a_host(), False
    here, there = os.pipe()
    pid = _start(transport, host, there)
    os.close(there)

    def kill() -> None:
        nonlocal killed
        if not killed:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        killed = True

    try:
        assert os.read(here, 1), "it is not there"
        at = Prefill.__new__(Prefill)
        at.host, at.lease_s, at.servers = host, LEASE_S, []
        yield kill, at.handoff(list(range(22)), ranks=1)
    finally:
        kill()
        os.close(here)


def test_a_server_killed_before_the_pull(transport: protocol.Way) -> None:
    with far(transport) as (kill, handoff), decode(transport, layers=8) as here:
        here.pull(handoff, list(range(22)))
        kill()
        for _ in range(2):  # on the old connection, and on a new one
            with pytest.raises(PeerLost, match=f"{handoff.host}:{PORT} does not answer"):
                here.pull(handoff, list(range(22)))


def test_a_server_killed_in_mid_pull(transport: protocol.Way, monkeypatch: pytest.MonkeyPatch) -> None:
    with far(transport) as (kill, handoff), decode(transport, layers=8) as here:
        meanwhile(monkeypatch, transport, here, kill)
        with pytest.raises(PeerLost):
            here.pull(handoff, list(range(22)))


def test_a_hand_off_dropped_in_mid_pull(transport: protocol.Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks are another's at once: what is read of them then must not be taken for the prompt's."""
    shape = {"layers": 8}
    blocks = list(range(22))
    with prefill(transport, **shape) as made, decode(transport, **shape) as here:
        handoff = made.hold(blocks)

        def reuse() -> None:
            made.servers[0].drop("h")
            for tensor in (*made.pools[0].keys, *made.pools[0].values):
                tensor.fill_(9)

        meanwhile(monkeypatch, transport, here, reuse)
        with pytest.raises(HandoffGone):
            here.pull(handoff, blocks)
        assert made.freed == 1


def test_a_puller_that_is_gone_costs_the_rest_of_its_lease(transport: protocol.Way) -> None:
    shape = {"layers": 8}
    blocks = list(range(22))
    with prefill(transport, lease_s=0.3, **shape) as made:
        handoff = made.hold(blocks)
        socket = zmq.Context.instance().socket(zmq.DEALER)
        socket.connect(f"tcp://{handoff.host}:{PORT}")
        socket.send(protocol.encode(a_pull(handoff)))
        assert socket.poll(1000 * WAIT_S)
        socket.close(0)
        until(lambda: made.freed == 1, "the lease to end")
        until(lambda: made.servers[0].pulls == 0, "its pull to be forgotten")
        made.servers[0].leases.lease_s = LEASE_S
        with decode(transport, **shape) as here:
            here.pull(made.hold(blocks), blocks)
            assert here.has(made, blocks, blocks)


def test_a_pull_that_is_cancelled_writes_nothing_more(
    transport: protocol.Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"layers": 8}
    blocks = list(range(22))
    with prefill(transport, **shape) as made, decode(transport, **shape) as here:
        handoff, begun, go = made.hold(blocks), threading.Event(), threading.Event()

        def slow() -> None:
            begun.set()
            go.wait(WAIT_S)

        meanwhile(monkeypatch, transport, here, slow)

        async def cancel() -> None:
            client = KVClient(KEY)
            client.puller = here.puller
            task = asyncio.create_task(client.pull(handoff, blocks))
            await asyncio.to_thread(begun.wait, WAIT_S)
            task.cancel()
            asyncio.get_running_loop().call_later(0.05, go.set)
            with pytest.raises(asyncio.CancelledError):
                await task
            before = [tensor.clone() for tensor in here.pool.keys]
            await asyncio.sleep(0.05)
            assert all(torch.equal(a, b) for a, b in zip(before, here.pool.keys, strict=True))
            client.puller = None
            await client.close()

        asyncio.run(cancel())
        here.pull(handoff, blocks)
        assert here.has(made, blocks, blocks)


def test_a_follower_waits_for_rank_0s_word(transport: protocol.Way) -> None:
    with prefill(transport, 2, 1) as made, decode(transport) as here:
        for server in made.servers[:1]:
            server.hold("h", 7, THEIRS, list(range(len(THEIRS) * BLOCK_TOKENS - 3)), made.free)
        timer = threading.Timer(0.1, made.servers[1].hold, ("h", 7, THEIRS, [], int))
        timer.start()
        here.pull(made.handoff(THEIRS), MINE)
        assert here.has(made, THEIRS, MINE)


# ------------------------------------------------------------------------------ wrong bytes


def test_a_byte_flipped_on_the_way_is_found(transport: protocol.Way, monkeypatch: pytest.MonkeyPatch) -> None:
    with prefill(transport) as made, decode(transport, checksum=True) as here:
        handoff = made.hold(THEIRS)
        here.pull(handoff, MINE)
        if transport == "zmq":
            monkeypatch.setattr(made.servers[0], "_send", _flipping(made.servers[0]._send))
        elif transport == "tcp":
            monkeypatch.setattr(Stream, "fill", _filling_wrong(Stream.fill))
        else:
            source = here.puller._lines[(handoff.host, PORT)].source
            assert source
            read = source[1].read

            def misread(ids: np.ndarray, blocks: np.ndarray, place: Place) -> None:
                read(ids, blocks, place)
                here.pool.values[1].view(torch.uint8)[blocks[0], 0, 0, 0] ^= 1

            monkeypatch.setattr(source[1], "read", misread)
        with pytest.raises(Corrupted):
            here.pull(handoff, MINE)


def _flipping(send: Callable[..., object]) -> Callable[..., object]:
    def flip(peer: bytes, message: protocol.Answer, *frames: memoryview) -> object:
        for frame in frames:
            frame[7] ^= 1
        return send(peer, message, *frames)

    return flip


def _filling_wrong(fill: Callable[..., None]) -> Callable[..., None]:
    def flip(self: Stream, spans: Spans) -> None:
        wrong = spans[0]
        fill(self, spans)
        wrong[7] ^= 1

    return flip


def a_pull(handoff: protocol.Handoff, **more: object) -> protocol.Pull:
    fields = {
        "ask": 1,
        "handoff": "h",
        "generation": handoff.generation,
        "pairing_key": KEY,
        "layers": (0, LAYERS),
        "heads": (0, HEADS),
        "ways": [],
        "credit": 1,
    } | more
    return protocol.Pull(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"\x00" * 100],
        [b"\xff", b"\xff"],
        [msgspec.msgpack.encode({"type": "pull", "ask": "x"})],
        [b"x" * 1_000_000],
    ],
)
def test_hostile_questions_end_nothing(transport: protocol.Way, frames: list[bytes]) -> None:
    with prefill(transport) as made, decode(transport) as here:
        handoff = made.hold(THEIRS)
        socket = zmq.Context.instance().socket(zmq.DEALER)
        socket.connect(f"tcp://{handoff.host}:{PORT}")
        socket.send_multipart(frames)
        if len(frames[0]) < 1000:
            assert socket.poll(1000 * WAIT_S)
            refused = protocol.answer(socket.recv())
            assert isinstance(refused, protocol.Refused)
            assert refused.code == "malformed"
        for wrong in (
            a_pull(handoff, credit=0),
            a_pull(handoff, credit=-5),
            a_pull(handoff, layers=(3, -9), heads=(-1, 2**60)),
            a_pull(handoff, layers=(2**40, 2**50)),
        ):
            socket.send(protocol.encode(wrong))
        socket.send(protocol.encode(protocol.More(ask=1, credit=-(2**62))))
        here.pull(handoff, MINE)
        assert here.has(made, THEIRS, MINE)
        socket.close(0)


def test_hostile_answers_are_errors(transport: protocol.Way) -> None:
    """A server that says whatever it likes: nothing it says is more than a `TransferError`."""
    host = a_host()
    socket = zmq.Context.instance().socket(zmq.ROUTER)
    socket.bind(f"tcp://{host}:{PORT}")
    at = Prefill.__new__(Prefill)
    at.host, at.lease_s = host, LEASE_S
    handoff = at.handoff(THEIRS, ranks=1)

    def granted(ask: int, **more: object) -> bytes:
        fields = {
            "ask": ask,
            "way": "zmq",
            "tokens": list(range(handoff.prompt_tokens)),
            "layers": (0, LAYERS),
            "heads": (0, HEADS),
            "blocks": 5,
            "block_tokens": BLOCK_TOKENS,
            "head_dim": HEAD_DIM,
            "dtype": "float16",
        } | more
        return protocol.encode(protocol.Granted(**fields))  # type: ignore[arg-type]

    memory = protocol.SharedMemory(pid=1, fd=0, token=b"x" * 16, blocks=24, layers=(0, 4), heads=(0, 4))
    answers: list[Callable[[int], list[list[bytes]]]] = [
        lambda ask: [[b"nonsense"]],
        lambda ask: [[granted(ask, blocks=4)]],
        lambda ask: [[granted(ask, layers=(0, 5))]],
        lambda ask: [[granted(ask, heads=(-1, 3))]],
        lambda ask: [[granted(ask, tokens=[1])]],
        lambda ask: [
            [granted(ask, tokens=[])],
            *[[protocol.encode(protocol.Piece(ask=ask)), bytes(4 * 2 * 5 * 4 * 256)]],
        ],
        lambda ask: [[protocol.encode(protocol.Piece(ask=ask)), b"early"]],
        lambda ask: [[granted(ask)], [protocol.encode(protocol.Piece(ask=ask)), b"short"]],
        lambda ask: [[granted(ask)], [protocol.encode(protocol.Piece(ask=ask))]],
        lambda ask: [[granted(ask)], [granted(ask)]],
        lambda ask: [[granted(ask, way="shm", memory=memory, ids=[1, 2, 3, 4, 99])]],
        lambda ask: [[granted(ask, version=77)]],
    ]
    try:
        with decode(transport) as here:
            for answer in answers:

                def say(answer: Callable[[int], list[list[bytes]]] = answer) -> None:
                    peer, question = socket.recv_multipart()
                    for frames in answer(protocol.question(question).ask):
                        socket.send_multipart([peer, *frames])

                thread = threading.Thread(target=say)
                thread.start()
                with pytest.raises(TransferError):
                    here.puller.pull(handoff, MINE)
                thread.join()
    finally:
        socket.close(0)


def test_memory_that_cannot_be_reached_is_pulled_in_pieces() -> None:
    """What has the same number here is another process's, or nothing."""
    with prefill("shm") as made, decode("shm") as here:
        offered = made.servers[0]._memories["shm"]
        assert isinstance(offered, protocol.SharedMemory)
        wrong: list[protocol.Memory] = [
            msgspec.structs.replace(offered, token=b"y" * 16),
            msgspec.structs.replace(offered, pid=2**22 + 1),
            msgspec.structs.replace(offered, fd=0),
        ]
        for memory in wrong:
            made.servers[0]._memories["shm"] = memory
            here.puller._lines.clear()
            assert here.pull(made.hold(THEIRS), MINE).ways == {"zmq"}
            assert here.has(made, THEIRS, MINE)
