"""How fast KV is pulled, against a bare transfer of the same bytes, both in one run and in turns.

    python -m benchmarks.kv [--mb 0.3 16 256] [--rounds 15] [--ways zmq tcp shm nixl]

Server and puller are processes. The blocks of a transfer are scattered over the pools of both, 128 KB each in one layer, as a
13B model's KV heads on two GPUs. Against

* zmq, tcp: a bare pyzmq DEALER that receives the same bytes, 1 MB a message, from a ROUTER that sends them from memory without a
  copy, all at once. It drops them; "landed", it has them in memory of its own afterwards, one after another. Ours, beyond that,
  takes them from blocks and puts them into blocks, and sends no more than the puller has room for;
* nixl: one READ of the same bytes, in one piece on both sides, prepared once, by the same agents;
* shm: a memcpy of the same bytes in the puller.

Ours ends when the KV is known to be good: for nixl and shm with the word that it was still held. Above 100 % ours is faster. CPU is of both processes, per GB.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import random
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import zmq

from disaggserve import protocol
from disaggworker.kv.blocks import BLOCK_TOKENS
from disaggworker.kv.nixl import Nixl
from disaggworker.kv.pool import Pool
from disaggworker.kv.pull import KVClient, Pulled, Puller
from disaggworker.kv.serve import KVServer
from disaggworker.kv.shm import Shm
from disaggworker.kv.transport import OneSided

Pair = tuple[tuple[float, float], tuple[float, float]]  # seconds and CPU seconds: ours, bare

HOST, PORT, KEY = "127.0.0.1", 5600, "bench"
HEADS, HEAD_DIM = 16, 128  # a block's keys and values in one layer: 128 KB in float16
BLOCK_BYTES = 2 * HEADS * BLOCK_TOKENS * HEAD_DIM * 2
MESSAGE_BYTES = 1 << 20


def shape(megabytes: float) -> tuple[int, int]:
    """Layers and blocks of a transfer of about so many bytes."""
    total = max(1, round(megabytes * 2**20 / BLOCK_BYTES))
    layers = max(1, min(32, total // 2))
    return layers, max(1, total // layers)


def message_edges(megabytes: float) -> list[int]:
    """Where the bare messages of a transfer begin, and where the last one ends."""
    layers, blocks = shape(megabytes)
    whole = layers * blocks * BLOCK_BYTES
    return [*range(0, whole, MESSAGE_BYTES), whole]


def a_pool(megabytes: float, shared: bool) -> Pool:
    layers, blocks = shape(megabytes)
    pool = Pool(layers, HEADS, HEAD_DIM, 2 * blocks, torch.float16, torch.device("cpu"), shared=shared)
    for tensor in (*pool.keys, *pool.values):
        tensor.fill_(1)
    return pool


def scattered(megabytes: float, seed: int) -> list[int]:
    _, blocks = shape(megabytes)
    return random.Random(seed).sample(range(2 * blocks), blocks)


def ways(way: str) -> list[OneSided]:
    return [Shm()] if way == "shm" else [Nixl()] if way == "nixl" else []


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def serve(pipe: Connection, way: str, megabytes: float, port: int) -> None:
    """Holds one hand-off for good, and beside it sends bare messages, until it is told to end."""
    torch.set_num_threads(1)
    pool = a_pool(megabytes, shared=way == "shm")
    server = KVServer(HOST, port, KEY, 3600.0, ways=ways(way), streams=way == "tcp")
    server.serve(pool)
    blocks = scattered(megabytes, 1)
    server.hold("h", 1, blocks, [0] * (len(blocks) * BLOCK_TOKENS), lambda: None)
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.bind(f"tcp://{HOST}:{port + 1}")
    edges = message_edges(megabytes)
    memory = np.ones(edges[-1], np.uint8).data
    pipe.send(None)
    while True:
        if pipe.poll():
            if not pipe.recv():
                return server.close()
            pipe.send(cpu_s())
        if socket.poll(20):
            peer, _ = socket.recv_multipart()
            for start, stop in itertools.pairwise(edges):
                socket.send_multipart([peer, b"head", memory[start:stop]], copy=False)


def bare_zmq(port: int, megabytes: float, landed: bool) -> Callable[[], None]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(f"tcp://{HOST}:{port + 1}")
    edges = message_edges(megabytes)
    memory = np.ones(edges[-1], np.uint8).data

    def drop() -> None:
        socket.send(b"go")
        for _ in edges[1:]:
            socket.recv_multipart(copy=False)

    def land() -> None:
        socket.send(b"go")
        for start, stop in itertools.pairwise(edges):
            socket.recv()
            socket.recv_into(memory[start:stop])

    return land if landed else drop


def bare_memcpy(megabytes: float) -> Callable[[], None]:
    layers, count = shape(megabytes)
    source = np.ones(layers * count * BLOCK_BYTES, np.uint8)
    into = np.zeros_like(source)
    return lambda: np.copyto(into, source)


def bare_nixl(puller: Puller, port: int, megabytes: float) -> Callable[[], None]:
    """NIXL's own READ: as many bytes of each tensor in one piece."""
    line: Any = puller._lines[HOST, port].source
    memory, source = line
    agent, pool = source._agent, puller._pool
    _, blocks = shape(megabytes)
    size = blocks * BLOCK_BYTES // 2
    mine = [(t.data_ptr(), size, 0) for pair in zip(pool.keys, pool.values, strict=True) for t in pair]
    theirs = [(address, size, 0) for address in memory.addresses]
    handle = agent.initialize_xfer(
        "READ", agent.get_xfer_descs(mine, "DRAM"), agent.get_xfer_descs(theirs, "DRAM"), memory.agent
    )

    def once() -> None:
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        assert state == "DONE", state

    return once


def timed(work: Callable[[], object], server: Connection) -> tuple[float, float]:
    """Seconds, and CPU seconds of both processes."""
    server.send(True)
    before = server.recv() + cpu_s()
    begun = time.perf_counter()
    work()
    took = time.perf_counter() - begun
    server.send(True)
    return took, server.recv() + cpu_s() - before


def measure(way: str, megabytes: float, rounds: int, port: int) -> str:
    fork = multiprocessing.get_context("spawn")
    pipe, theirs = fork.Pipe()
    process = fork.Process(target=serve, args=(theirs, way, megabytes, port))
    process.start()
    try:
        pipe.recv()
        blocks = scattered(megabytes, 2)
        handoff = protocol.Handoff(
            done=False,
            first_token_id=0,
            text="",
            prompt_tokens=len(blocks) * BLOCK_TOKENS,
            host=HOST,
            port=port,
            lease_s=3600.0,
            handoff="h",
            generation=1,
            pairing_key=KEY,
            seed=0,
        )
        puller = Puller(KEY, a_pool(megabytes, shared=False), ways=ways(way), streams=way == "tcp")
        loop, client = asyncio.new_event_loop(), KVClient(KEY)

        def pull() -> Pulled:
            """As `KVClient` does it: what the puller has read itself is good if it is still held afterwards."""
            pulled = puller.pull(handoff, blocks)
            if way in ("shm", "nixl"):
                loop.run_until_complete(client.renew(handoff))
            return pulled

        pulled = pull()
        assert pulled.ways == {way}, pulled.ways
        bare: dict[str, Callable[[], None]] = (
            {"": bare_nixl(puller, port, megabytes)}
            if way == "nixl"
            else {"": bare_memcpy(megabytes)}
            if way == "shm"
            else {name: bare_zmq(port, megabytes, bool(name)) for name in ("", "landed")}
        )
        for work in bare.values():
            work()
        took: dict[str, list[Pair]] = {name: [] for name in bare}
        for _ in range(rounds):
            ours = timed(pull, pipe)
            for name, work in bare.items():
                took[name].append((ours, timed(work, pipe)))
        puller.close()
        loop.run_until_complete(client.close())
        loop.close()
    finally:
        pipe.send(False)
        process.join(10)
        process.kill()
    return "\n".join(row(way, name, pulled.kv_bytes, pairs) for name, pairs in took.items())


def row(way: str, bare_is: str, size: int, took: Sequence[Pair]) -> str:
    ours, bare = (statistics.median(pair[i][0] for pair in took) for i in (0, 1))
    ours_cpu, bare_cpu = (sum(pair[i][1] for pair in took) / len(took) / size * 1e9 for i in (0, 1))
    ratios = sorted(b[0] / o[0] for o, b in took)
    low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
    return (
        f"{way:5} {bare_is:6} {size / 2**20:8.2f} MB {size / ours / 1e9:8.2f} {size / bare / 1e9:8.2f} GB/s {bare / ours:7.0%} "
        f"(quartiles {low:.0%} to {high:.0%}) {ours_cpu:6.2f} {bare_cpu:6.2f} CPU-s/GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mb", type=float, nargs="+", default=[0.3, 16.0, 256.0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--ways", nargs="+", default=["zmq", "tcp", "shm"], choices=["zmq", "tcp", "shm", "nixl"]
    )
    flags = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'way':5} {'bare':6} {'size':>11} {'ours':>8} {'bare':>8}      bare time / ours")
    for number, (way, megabytes) in enumerate(itertools.product(flags.ways, flags.mb)):
        print(measure(way, megabytes, flags.rounds, PORT + 10 * number), flush=True)


if __name__ == "__main__":
    main()
