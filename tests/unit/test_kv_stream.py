"""KV over TCP, beyond what holds for every transport (test_kv_conformance.py): connections that break, lie or are refused."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import torch

from disaggserve import protocol
from disaggworker.errors import TransferError
from disaggworker.kv import stream
from disaggworker.kv.pool import Pool
from disaggworker.kv.stream import Listener
from tests.unit.test_kv_conformance import (
    KEY,
    LAYERS,
    MINE,
    PORT,
    THEIRS,
    WAIT_S,
    Decode,
    Prefill,
    a_pull,
    decode,
    prefill,
    until,
)


def listener(made: Prefill) -> Listener:
    found = made.servers[0]._listener
    assert found
    return found


def comes(made: Prefill, here: Decode, way: protocol.Way) -> None:
    """A pull gives what it should, by that way."""
    here.pool.keys[0].zero_()
    assert here.pull(made.hold(THEIRS), MINE).ways == {way}
    assert here.has(made, THEIRS, MINE)


# ------------------------------------------------------------------------------ spans


@pytest.mark.parametrize("heads", [range(4), range(1, 3), range(2, 3)])
@pytest.mark.parametrize(
    ("blocks", "runs"), [([3], 1), ([3, 4, 5], 1), ([5, 4, 3], 3), ([0, 1, 7, 3, 4, 5, 2], 4)]
)
def test_spans_are_what_is_taken(heads: range, blocks: list[int], runs: int) -> None:
    pool = Pool(2, 4, 8, 8, torch.float16, torch.device("cpu"))
    for tensor in (*pool.keys, *pool.values):
        tensor.copy_(torch.rand(tensor.shape))
    index = np.asarray(blocks, dtype=np.int64)
    taken = np.empty(2 * len(blocks) * len(heads) * pool.unit, np.uint8)
    pool.take(1, index, heads, taken)
    [_, spans] = pool.spans((0, 1), index, heads)
    assert b"".join(spans) == taken.tobytes()
    assert len(spans) == 2 * (runs if len(heads) == 4 else len(blocks))
    for span in spans:
        span[:] = bytes(len(span))
    assert not pool.keys[1][blocks, heads.start : heads.stop].any()


@pytest.mark.parametrize("size", [1, 10, 1 << 20])
def test_a_call_may_move_any_part(size: int) -> None:
    spans = [memoryview(bytes([i % 251]) * (1 + i % 7)) for i in range(3000)]
    whole, moved, sizes = b"".join(spans), bytearray(), itertools.cycle((1, 2, 3, 100, 5000))

    def step(some: list[memoryview]) -> int:
        assert len(some) <= 1024
        part = b"".join(some)[: next(sizes)]
        moved.extend(part)
        return len(part)

    stream._move(step, spans, size)
    assert moved == whole
    with pytest.raises(ConnectionError):
        stream._move(lambda _: 0, spans[:1], size)


def test_small_buffers_in_the_kernel_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_SEND_BYTES", 1 << 12)
    monkeypatch.setattr(stream, "_RECEIVE_BYTES", 1 << 12)
    with prefill("tcp") as made, decode("tcp") as here:
        comes(made, here, "tcp")


# ------------------------------------------------------------------------------ connections that break


def test_a_connection_that_ended_meanwhile_is_made_again() -> None:
    with prefill("tcp") as made, decode("tcp") as here:
        comes(made, here, "tcp")
        for at in (*listener(made)._sockets,):
            if at.getsockname()[1] == listener(made).port and at.fileno() >= 0:
                try:
                    at.getpeername()
                except OSError:
                    continue  # the one that listens
                at.shutdown(socket.SHUT_RDWR)
        until(lambda: len(listener(made)._sockets) == 1, "the server to see it")
        comes(made, here, "tcp")


def test_where_nobody_listens_it_comes_in_pieces() -> None:
    with prefill("tcp") as made, decode("tcp") as here:
        listener(made).close()
        until(lambda: not listener(made)._sockets, "the listener to end")
        comes(made, here, "zmq")
        comes(made, here, "zmq")


def test_who_comes_when_there_are_enough_gets_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_PULLERS", 1)
    with prefill("tcp") as made, decode("tcp") as a, decode("tcp") as b:
        comes(made, a, "tcp")
        comes(made, b, "zmq")
        comes(made, a, "tcp")


def test_a_puller_that_is_gone_leaves_no_thread() -> None:
    with prefill("tcp") as made:
        with decode("tcp") as here:
            comes(made, here, "tcp")
            assert len(listener(made)._sockets) == 2
        until(lambda: len(listener(made)._sockets) == 1, "its thread to end")


# ------------------------------------------------------------------------------ wrong bytes


def framed(data: bytes) -> bytes:
    return len(data).to_bytes(4) + data


def said(connected: socket.socket) -> protocol.Answer:
    return protocol.answer(stream._message(connected, 1 << 16))


def test_hostile_questions_end_nothing() -> None:
    with prefill("tcp") as made, decode("tcp") as here:
        handoff, at = made.hold(THEIRS), (made.host, listener(made).port)
        for hung_up_on in (
            b"\xff\xff\xff\xff",
            b"\x00\x00\x00\x00",
            framed(b"\xc1" * 9),
            framed(msgspec.msgpack.encode({"type": "pull", "ask": "x"})),
        ):
            with socket.create_connection(at, WAIT_S) as connected:
                connected.sendall(hung_up_on)
                assert connected.recv(1) == b""
        with socket.create_connection(at, WAIT_S) as connected:
            for wrong, code in (
                (a_pull(handoff, pairing_key="another"), "pairing"),
                (a_pull(handoff, version=99), "version"),
                (a_pull(handoff, generation=8), "expired"),
                (msgspec.structs.replace(a_pull(handoff), handoff="another"), "expired"),
                (protocol.Renew(ask=1, handoff="h", generation=7, pairing_key=KEY), "malformed"),
                (protocol.More(ask=1, credit=-(2**62)), "malformed"),
            ):
                connected.sendall(framed(protocol.encode(wrong)))
                refused = said(connected)
                assert isinstance(refused, protocol.Refused)
                assert refused.code == code
            for nothing in ({"layers": (3, -9), "heads": (-1, 2**60)}, {"layers": (2**40, 2**50)}):
                connected.sendall(framed(protocol.encode(a_pull(handoff, **nothing))))
                granted = said(connected)
                assert isinstance(granted, protocol.Granted)
                assert granted.layers == (0, 0)
                assert isinstance(said(connected), protocol.Done)
            connected.sendall(framed(protocol.encode(a_pull(handoff))))  # and leaves
        comes(made, here, "tcp")


def a_granted(ask: int, **more: object) -> bytes:
    fields = {
        "ask": ask,
        "way": "tcp",
        "tokens": list(range(77)),
        "layers": (0, LAYERS),
        "heads": (0, 4),
        "blocks": 5,
        "block_tokens": 16,
        "head_dim": 8,
        "dtype": "float16",
    } | more
    return framed(protocol.encode(protocol.Granted(**fields)))  # type: ignore[arg-type]


KV = bytes(LAYERS * 2 * 5 * 4 * 256)


@pytest.mark.parametrize(
    "lie",
    [
        lambda ask: framed(b"nonsense"),
        lambda ask: b"\xff\xff\xff\xff",
        lambda ask: a_granted(ask + 1),
        lambda ask: a_granted(ask, blocks=4),
        lambda ask: a_granted(ask, layers=(0, 5)),
        lambda ask: a_granted(ask, heads=(-1, 3)),
        lambda ask: a_granted(ask, version=77),
        lambda ask: a_granted(ask) + KV[:-1],
        lambda ask: a_granted(ask) + KV,
        lambda ask: a_granted(ask) + KV + a_granted(ask),
        lambda ask: a_granted(ask, tokens=[]) + KV + framed(protocol.encode(protocol.Done(ask=ask))),
    ],
)
def test_hostile_answers_are_errors(lie: Callable[[int], bytes]) -> None:
    """Another process listens where the server said that it would. What comes then is right again."""
    with (
        prefill("tcp") as made,
        decode("tcp") as here,
        socket.create_server((made.host, 0)) as other,
    ):
        handoff, port = made.hold(THEIRS), listener(made).port
        listener(made).port = other.getsockname()[1]

        def answer() -> None:
            connected, _ = other.accept()
            with connected:
                ask = protocol.question(stream._message(connected, 1 << 16))
                connected.sendall(lie(ask.ask))

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            pulled = here.pull(handoff, MINE)
            assert pulled.ways == {"zmq"}  # it said nothing at all that is a message
            here.puller._lines.pop((made.host, PORT)).close()
        except TransferError:
            pass
        thread.join()
        listener(made).port = port
        comes(made, here, "tcp")
