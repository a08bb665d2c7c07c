"""What the router costs: added time to first token, and CPU per chunk, at 32 streams, against a direct connection.

    python -m benchmarks.router [--streams 32] [--tokens 200] [--pace-ms 10] [--rounds 3]

An instance without an engine answers prefill at once and sends a frame every `pace` ms; the same frames are read from it
directly and through the router. Each of the three has a process of its own. Ratios are what may be compared between machines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Coroutine
from multiprocessing.connection import Connection
from typing import Any

import aiohttp
import uvloop
from aiohttp import web

from disaggworker.router.app import serving
from disaggworker.router.config import Config
from disaggworker.router.fleet import Seen
from disaggworker.router.frames import Frames

MODEL = "none"
FRAME = b'data: {"id":"cmpl-0","object":"text_completion","created":1,"model":"none","choices":[{"index":0,"text":" a","logprobs":null,"finish_reason":null}]}\n\n'


async def engine(port: int, pipe: Connection, pace_s: float) -> None:
    async def handle(http: web.Request) -> web.StreamResponse:
        body = await http.json()
        if not body["stream"]:
            return web.json_response(
                {
                    "choices": [{"index": 0, "text": " a", "finish_reason": None}],
                    "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": 1},
                    "kv_transfer_params": {"at": "here"},
                }
            )
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(http)
        clock = asyncio.get_running_loop().time
        due_s = clock()
        # The router's first token is prefill's; the direct client's is the first of these.
        for _ in range(body["max_tokens"] - ("kv_transfer_params" in body)):
            await answer.write(FRAME)
            due_s += pace_s
            await asyncio.sleep(due_s - clock())
        await answer.write(b"data: [DONE]\n\n")
        return answer

    app = web.Application(client_max_size=2**24)
    app.router.add_post("/v1/completions", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await told(pipe)


async def router(port: int, pipe: Connection, engine_port: int) -> None:
    config = Config("ns", "bench", MODEL, 4096, 1.0, 1.0, "127.0.0.1", port)
    async with serving(config) as made:
        url = f"http://127.0.0.1:{engine_port}"
        made.update([Seen("p", "p", "prefill", "k", url, True), Seen("d", "d", "decode", "k", url, True)])
        await told(pipe)


async def told(pipe: Connection) -> None:
    """Says its CPU seconds each time it is asked, until it is told to end."""
    pipe.send(0.0)
    while await asyncio.to_thread(pipe.recv):
        pipe.send(time.process_time())


def child(serve: Callable[..., Coroutine[Any, Any, None]], *arguments: object) -> None:
    uvloop.run(serve(*arguments))


async def round_(url: str, streams: int, tokens: int) -> list[float]:
    """TTFT of each stream, seconds."""
    body = {"model": MODEL, "prompt": [7] * 512, "max_tokens": tokens, "stream": True, "temperature": 0}
    clock = asyncio.get_running_loop().time

    async def one(session: aiohttp.ClientSession) -> float:
        frames, first_s, sent_s = Frames(), 0.0, clock()
        async with session.post(url + "/v1/completions", json=body) as answer:
            async for chunk in answer.content.iter_any():
                frames.feed(chunk)
                if not first_s and frames.tokens:
                    first_s = clock()
        assert (frames.tokens, frames.done) == (tokens, True), (frames.tokens, frames.done)
        return first_s - sent_s

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        return list(await asyncio.gather(*(one(session) for _ in range(streams))))


async def measure(streams: int, tokens: int, pace_s: float, rounds: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    ports = {"engine": 18480, "router": 18481}
    pipes, processes = {}, []
    for name, serve, last in (("engine", engine, pace_s), ("router", router, ports["engine"])):
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=child, args=(serve, ports[name], theirs, last)))
        processes[-1].start()
        await asyncio.to_thread(pipes[name].recv)

    def cpu_s() -> dict[str, float]:
        for pipe in pipes.values():
            pipe.send(True)
        return {"client": time.process_time(), **{name: pipe.recv() for name, pipe in pipes.items()}}

    try:
        out: dict[str, Any] = {}
        for path, port in (("direct", ports["engine"]), ("router", ports["router"])):
            url = f"http://127.0.0.1:{port}"
            await round_(url, streams, 8)  # connections and caches are warm
            before, ttft_s = cpu_s(), []
            for _ in range(rounds):
                ttft_s += await round_(url, streams, tokens)
            chunks = rounds * streams * tokens
            out[path] = {
                "ttft_p50_ms": round(1e3 * statistics.median(ttft_s), 2),
                "cpu_us_per_chunk": {
                    k: round(1e6 * (v - before[k]) / chunks, 1)
                    for k, v in cpu_s().items()
                    if path == "router" or k != "router"
                },
            }
        direct, through = out["direct"], out["router"]
        cost = through["cpu_us_per_chunk"]["router"]
        out["added_ttft_p50_ms"] = round(through["ttft_p50_ms"] - direct["ttft_p50_ms"], 2)
        out["ttft_ratio"] = round(through["ttft_p50_ms"] / direct["ttft_p50_ms"], 2)
        out["router_cpu_per_direct_client_cpu"] = round(cost / direct["cpu_us_per_chunk"]["client"], 2)
        return out
    finally:
        for pipe in pipes.values():
            pipe.send(False)
        for process in processes:
            process.join()


def main() -> int:
    p = argparse.ArgumentParser(description="What the router adds to a direct connection.")
    p.add_argument("--streams", type=int, default=32)
    p.add_argument("--tokens", type=int, default=200)
    p.add_argument("--pace-ms", type=float, default=10.0, help="between two frames of a stream")
    p.add_argument("--rounds", type=int, default=3)
    a = p.parse_args()
    result = uvloop.run(measure(a.streams, a.tokens, a.pace_ms / 1e3, a.rounds))
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
