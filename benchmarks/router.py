"""What the router costs beside a direct connection and beside vllm-router (Rust): TTFT, CPU per chunk, memory.

    python -m benchmarks.router [--seconds 6] [--rounds 3] [--without-peer]

An engine without a model answers prefill at once and sends a chunk every 5 or 10 ms. The same streams are read from it directly,
through our router and through vllm-router 0.1.17 in prefill-decode mode, in turn, in one run: so many at a time, begun at random
moments, each followed by the next. Engine, routers and client have a process each, and the first and the last are bare asyncio
protocols, so that they are not what is measured. CPU is the router process's own, from /proc, requests included. Chunks say when
they were sent, since timers of 5 ms are a millisecond off: *chunk* is the time that one takes to the client, *gap* the time between
two at the client less that between them where they were sent. The peer gets an environment of its own in the user's cache folder.
Ratios are what may be compared between machines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import msgspec
import uvloop

from disaggworker.router.app import serving, settle
from disaggworker.router.config import Config
from disaggworker.router.fleet import Seen

PEER = "0.1.17"
MODEL, HOST = "none", "127.0.0.1"
PORTS = {"direct": 18480, "ours": 18481, "vllm-router": 18482, "metrics": 18483, "prefill": 18484}
PATIENCE_S = 30.0
CHUNKS = 64
PROMPT = [7] * 512
POINTS = ((32, 5.0), (128, 10.0), (128, 5.0))  # streams, ms between chunks
_HEAD = b'{"id":"cmpl-0","object":"text_completion","created":1,"model":"none","choices":[{"index":0,"text":'
# With the time of sending for its text: 17 bytes, whenever.
FRAME = b"data: " + _HEAD + b'"%017.6f","logprobs":null,"finish_reason":null}]}\n\n'
NAMED = b"data: " + _HEAD + b'"%017.6f","logprobs":null,"finish_reason":null,"token_ids":[7]}]}\n\n'
TEXT = re.compile(rb'"text":"([^"]+)"')
DONE = b"data: [DONE]\n\n"
HEADERS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


# ------------------------------------------------------------------------------------------- the engine


class Engine(asyncio.Protocol):
    """Prefill and decode of our dialect and of vLLM's. `X-Pace` of the first request's prompt is in its `seed`, in ms."""

    def __init__(self) -> None:
        self._rest = b""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._rest += data
        head, found, body = self._rest.partition(b"\r\n\r\n")
        if not found:
            return
        lines = head.lower().split(b"\r\n")
        length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
        if len(body) < length:
            return
        self._rest = body[length:]
        if not head.startswith(b"POST /v1/"):
            known = head.split(b" ")[1] != b"/load"
            self._answer(b'{"status":"ok"}', b"200 OK" if known else b"404 Not Found")
            return
        asked = msgspec.json.decode(body[:length])
        params = asked.get("kv_transfer_params") or {}
        if params.get("do_remote_decode"):
            self._answer(msgspec.json.encode(self._prefilled(asked)), b"200 OK")
            return
        self._frame = NAMED if asked.get("return_token_ids") else FRAME
        self._frame = b"%x\r\n%b\r\n" % (len(self._frame % 0), self._frame)
        # Our router has streamed prefill's token as the first.
        self._left = asked["max_tokens"] - ("seed" in params)
        self._pace_s, self._due_s = asked["seed"] / 1e3, self._loop.time()
        self._transport.write(HEADERS)
        self._next()

    def _prefilled(self, asked: dict[str, Any]) -> dict[str, Any]:
        ours = "max_tokens" in asked["kv_transfer_params"]
        params = {"done": False, "seed": 1} if ours else {"remote_engine_id": "e", "remote_block_ids": [1]}
        return {
            "id": "cmpl-0",
            "object": "text_completion",
            "created": 1,
            "model": MODEL,
            "choices": [{"index": 0, "text": " a", "finish_reason": "length", "token_ids": [7]}],
            "usage": {"prompt_tokens": len(PROMPT), "completion_tokens": 1, "total_tokens": len(PROMPT) + 1},
            "kv_transfer_params": params,
        }

    def _answer(self, body: bytes, status: bytes) -> None:
        head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self._transport.write(head % (status, len(body)) + body)

    def _next(self) -> None:
        self._left -= 1
        frame = self._frame % time.perf_counter()
        if self._left:
            self._transport.write(frame)
            self._due_s += self._pace_s
            self._timer = self._loop.call_at(self._due_s, self._next)
        else:
            self._transport.write(frame + b"%x\r\n%b\r\n0\r\n\r\n" % (len(DONE), DONE))


async def engine(pipe: Connection) -> None:
    # The peer does not take one address for two workers.
    listen = asyncio.get_running_loop().create_server
    async with (
        await listen(Engine, HOST, PORTS["direct"], backlog=1024),
        await listen(Engine, HOST, PORTS["prefill"], backlog=1024),
    ):
        pipe.send(None)
        await asyncio.to_thread(pipe.recv)


async def ours(pipe: Connection) -> None:
    settle()  # as its own process does
    config = Config("ns", "bench", MODEL, 4096, 1.0, 1.0, HOST, PORTS["ours"])
    async with serving(config) as made:
        prefill, decode = (f"http://{HOST}:{PORTS[name]}" for name in ("prefill", "direct"))
        made.update(
            [Seen("p", "p", "prefill", "k", prefill, True), Seen("d", "d", "decode", "k", decode, True)]
        )
        pipe.send(None)
        await asyncio.to_thread(pipe.recv)


def child(serve: Callable[[Connection], Coroutine[Any, Any, None]], pipe: Connection) -> None:
    uvloop.run(serve(pipe))


# ------------------------------------------------------------------------------------------- the client


@dataclass
class Figures:
    """Of one path at one point, over all rounds."""

    ttft_s: list[float] = field(default_factory=list)
    chunk_s: list[float] = field(default_factory=list)
    gap_s: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)  # of each round's: so a disturbed one is seen
    chunks: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0


class Stream(asyncio.Protocol):
    """One stream after another over one connection, until `ends_s`."""

    def __init__(self, request: bytes, chunks: int, ends_s: float, figures: Figures) -> None:
        self._request, self._chunks, self._ends_s, self._figures = request, chunks, ends_s, figures
        self._late_s = 0.0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._ask()

    def _ask(self) -> None:
        self._seen, self._tail, self._sent_s = 0, b"", time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self._seen and not self._tail and not data.startswith(b"HTTP/1.1 200"):
            self._end(AssertionError(data[:300]))
            return
        # Only texts are looked for. One may be cut between two pieces: so what follows the last whole one is kept.
        whole, now_s, end = self._tail + data, time.perf_counter(), 0
        for text in TEXT.finditer(whole):
            self._note(text[1], now_s)
            end = text.end()
        self._tail = whole[end:]
        if not whole.endswith(b"0\r\n\r\n"):
            return
        if self._seen != self._chunks or DONE not in whole:
            self._end(AssertionError(f"{self._seen} frames, not {self._chunks} and [DONE]: {whole[-300:]!r}"))
            return
        self._figures.chunks += self._chunks
        if time.perf_counter() < self._ends_s:
            self._ask()
        else:
            self._end(None)

    def _note(self, text: bytes, now_s: float) -> None:
        """One chunk. The first may be prefill's, which says no time; how long the second takes has the hand-off in it."""
        self._seen += 1
        if self._seen == 1:
            self._figures.ttft_s.append(now_s - self._sent_s)
            return
        late_s = now_s - float(text)
        if self._seen > 2:
            self._figures.chunk_s.append(late_s)
            self._figures.gap_s.append(late_s - self._late_s)
        self._late_s = late_s

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc or ConnectionError("the connection ended"))

    def _end(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(error) if error else self.ended.set_result(None)
        self._transport.close()


def request(port: int, chunks: int, pace_ms: float) -> bytes:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": chunks, "stream": True, "temperature": 0}
    data = json.dumps({**body, "seed": int(pace_ms)}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


async def load(
    port: int, streams: int, pace_ms: float, seconds: float, figures: Figures, chunks: int = CHUNKS
) -> None:
    loop, rng = asyncio.get_running_loop(), random.Random(1)
    asked, ends_s = request(port, chunks, pace_ms), time.perf_counter() + seconds

    async def one() -> None:
        await asyncio.sleep(rng.random() * chunks * pace_ms / 1e3)  # no two in step
        _, made = await loop.create_connection(lambda: Stream(asked, chunks, ends_s, figures), HOST, port)
        await made.ended

    began_s = time.perf_counter()
    async with asyncio.timeout(seconds + PATIENCE_S):
        await asyncio.gather(*(one() for _ in range(streams)))
    figures.wall_s += time.perf_counter() - began_s


# ------------------------------------------------------------------------------------------- processes


def cpu_s(pid: int) -> float:
    """CPU time of a process and its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextmanager
def forked(serve: Callable[[Connection], Coroutine[Any, Any, None]]) -> Iterator[int]:
    """The id of a process that serves."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=child, args=(serve, theirs))
    process.start()
    try:
        pipe.recv()
        assert process.pid
        yield process.pid
    finally:
        with suppress(OSError):
            pipe.send(None)
        process.join()


@contextmanager
def peer() -> Iterator[int]:
    """vllm-router in an environment of its own."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "disaggserve" / f"vllm-router-{PEER}"
    if not (folder / "bin" / "vllm-router").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = str(folder / "bin" / "python")
        quiet = ("--quiet", "--disable-pip-version-check")
        subprocess.run([python, "-m", "pip", "install", *quiet, f"vllm-router=={PEER}"], check=True)
    prefill, decode = (f"http://{HOST}:{PORTS[name]}" for name in ("prefill", "direct"))
    flags = f"--vllm-pd-disaggregation --prefill {prefill} --decode {decode} --host {HOST}"
    flags += f" --port {PORTS['vllm-router']} --prometheus-port {PORTS['metrics']} --log-level warning"
    process = subprocess.Popen(
        [folder / "bin" / "vllm-router", *flags.split()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait()


async def answering(port: int, pid: int) -> None:
    """Until one request went through."""
    for _ in range(300):
        with suppress(OSError, AssertionError):
            await load(port, 1, 0, 0, Figures(), chunks=2)
            return
        assert Path(f"/proc/{pid}").exists(), f"the process for port {port} has ended"
        await asyncio.sleep(0.1)
    raise AssertionError(f"nothing serves on port {port}")


# ------------------------------------------------------------------------------------------- figures


async def measure(pids: dict[str, int], seconds: float, rounds: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for streams, pace_ms in POINTS:
        figures = {path: Figures() for path in pids}
        for _ in range(rounds):
            for path, pid in pids.items():
                await load(PORTS[path], streams, pace_ms, 0.3, Figures())  # connections are there
                before, f = cpu_s(pid), figures[path]
                earlier = len(f.ttft_s)
                await load(PORTS[path], streams, pace_ms, seconds, f)
                f.cpu_s += cpu_s(pid) - before
                f.p99_ms.append(p99_ms(f.ttft_s[earlier:]))
        rows = {path: row(path, f) for path, f in figures.items()}
        rounds_ms = {"p99 of each round, ms": {path: f.p99_ms for path, f in figures.items()}}
        out[f"{streams} streams, a chunk every {pace_ms:g} ms"] = rows | rounds_ms | compared(rows)
    return out


def p99_ms(times_s: list[float]) -> float:
    return round(1e3 * statistics.quantiles(times_s, n=100)[98], 2)


def row(path: str, f: Figures) -> dict[str, float]:
    out = {"ttft_p50_ms": 1e3 * statistics.median(f.ttft_s), "ttft_p99_ms": p99_ms(f.ttft_s)}
    for name, times_s in (("chunk", f.chunk_s), ("gap", f.gap_s)):
        out |= {f"{name}_p50_ms": 1e3 * statistics.median(times_s), f"{name}_p99_ms": p99_ms(times_s)}
    out["chunks_per_s"] = f.chunks / f.wall_s
    if path != "direct":
        out |= {"cpu_us_per_chunk": 1e6 * f.cpu_s / f.chunks, "chunks_per_core_s": f.chunks / f.cpu_s}
    return {k: round(v, 2 if v < 1000 else None) for k, v in out.items()}


def compared(rows: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Ours over the others'."""
    ours = rows["ours"]
    return {
        f"ours over {path}": {
            k: round(ours[k] / v, 2)
            for k, v in theirs.items()
            if k.startswith(("ttft", "chunk_", "gap_p99", "cpu"))
        }
        for path, theirs in rows.items()
        if path != "ours"
    }


async def memory(pid: int) -> dict[str, float]:
    """Resident memory of our router after a thousand short requests and after ten thousand more."""
    out = {}
    for name, wanted in (("after_1000_mb", 1_000), ("after_11000_mb", 10_000)):
        figures = Figures()
        while figures.chunks < 8 * wanted:
            await load(PORTS["ours"], 32, 0, 1.0, figures, chunks=8)
        out[name] = round(resident_mb(pid), 1)
    return out


async def run(seconds: float, rounds: int, with_peer: bool) -> dict[str, Any]:
    with forked(engine) as engine_pid, forked(ours) as ours_pid:
        pids = {"direct": engine_pid, "ours": ours_pid}
        if not with_peer:
            return await measure(pids, seconds, rounds) | {"memory of ours": await memory(ours_pid)}
        with peer() as peer_pid:
            pids["vllm-router"] = peer_pid
            await answering(PORTS["vllm-router"], peer_pid)
            return await measure(pids, seconds, rounds) | {"memory of ours": await memory(ours_pid)}


def main() -> int:
    p = argparse.ArgumentParser(description="What the router adds to a direct connection, and vllm-router.")
    p.add_argument("--seconds", type=float, default=6.0, help="of load, per path, point and round")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--without-peer", action="store_true", help="leave vllm-router out: nothing is installed")
    a = p.parse_args()
    print(json.dumps(uvloop.run(run(a.seconds, a.rounds, not a.without_peer)), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
