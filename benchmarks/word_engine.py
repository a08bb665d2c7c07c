"""The simulator's word on our own engine: profiled and fitted on this machine, then one prefill and one decode worker serve.

    python -m benchmarks.word_engine [--shares 0.25,0.4,0.5] [--requests 300] [--hidden 512 --layers 8] [--folder DIR]

A seeded Llama in float32. What `disaggworker profile` measures over HTTP is measured of two workers at once, apart from the pair that
serves: prefill of one while the other decodes, for so the pair will share this machine. The link is what a bare ZeroMQ socket moves
over loopback. At each of the shares of what the prefill worker can bear requests are served in several loads, the rates in turns, with a
profile between every two loads. All profiles are fitted as `disaggserve fit` does, and the very requests that were sent are simulated,
each load at the speeds that the machine had just before and just after it.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import zmq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.word import Row, fitted, judged, opening, posed, profiled, taken, verdict
from benchmarks.word_paced import SEED, served
from disaggserve import catalogue, latency, simulate
from e2e import load
from e2e.dataplane import DataPlane, fork_server
from e2e.nodes.tiny import make_tiny

MODEL = "llama"
HEAD_DIM = 64
BATCH_TOKENS = 512  # of a worker that is not paced
CONTEXT, BLOCKS = 1024, 1200
PROMPTS = (64, 512)  # tokens, shortest and longest
BOUND = 0.05


def loopback_bytes_s(size: int) -> float:
    """Bytes a second of so many in one message over loopback, there and a short word back."""
    with zmq.Context() as context, context.socket(zmq.REQ) as near, context.socket(zmq.REP) as far:
        near.connect(f"tcp://127.0.0.1:{far.bind_to_random_port('tcp://127.0.0.1')}")
        seconds, message = [], bytes(size)
        for _ in range(9):
            begun = time.perf_counter()
            near.send(message, copy=False)
            far.recv(copy=False)
            far.send(b"")
            near.recv()
            seconds.append(time.perf_counter() - begun)
    return size / statistics.median(seconds)


async def measure(shares: Sequence[float], count: int, hidden: int, layers: int, folder: Path) -> list[Row]:
    heads = hidden // HEAD_DIM
    weights = make_tiny(MODEL, folder / "model", hidden=hidden, layers=layers, heads=heads)
    model = catalogue.model_from_config(MODEL, json.loads((weights / "config.json").read_text()))
    link = loopback_bytes_s(512 * model.kv_bytes_per_token())

    flags = ["--dtype", "float32", "--kv-blocks", str(BLOCKS)]
    async with (
        fork_server(folder) as forks,
        DataPlane(forks, folder, MODEL, weights, *flags, context_length=CONTEXT) as plane,
        DataPlane(forks, folder / "profiled", MODEL, weights, *flags, context_length=CONTEXT) as apart,
    ):
        both = await asyncio.gather(apart.worker("mixed"), apart.worker("mixed"))
        profile = functools.partial(profiled, MODEL, PROMPTS, *(f"{worker.url}/v1" for worker in both))
        fit = functools.partial(fitted, engine="torch", model=model, folder=folder)
        times = fit(await asyncio.to_thread(opening, profile))

        asked = posed(times, link, PROMPTS, (16, 64), 320, 1.25, SEED)
        promise = asked.promise
        # Memory for KV is taken as it is first used, at the cost of milliseconds a prompt: here all of it is used once.
        warm = [(0.05 * k, 512, 64) for k in range(40)]
        await asyncio.gather(plane.worker("prefill"), plane.worker("decode"))
        router = await plane.router("--max-queued", str(max(count, len(warm))))
        await plane.until_sees(router)
        await served(plane, router.url, warm, SEED, promise.ttft_s, promise.tpot_s)

        async def load_of(requests: Sequence[load.Wanted], number: int) -> Sequence[load.Result]:
            results, *_ = await served(
                plane, router.url, requests, SEED + 1 + number, promise.ttft_s, promise.tpot_s
            )
            return results

        sent = await taken(shares, count, asked, load_of, profile)

    def deployment(times: latency.StepTimes) -> simulate.Deployment:
        pool = simulate.Pool(1, times, BLOCKS, BATCH_TOKENS)
        return simulate.Deployment((pool,), (pool,), model.kv_bytes_per_token(), link)

    return judged(sent, fit, deployment, promise, folder)


def main() -> int:
    p = argparse.ArgumentParser(description="Served against simulated attainment on our own engine.")
    p.add_argument("--shares", default="0.25,0.4,0.5", help="of the rate that prefill can bear, with commas")
    p.add_argument("--requests", type=int, default=300, help="of each rate")
    p.add_argument("--hidden", type=int, default=512, help="a multiple of 128")
    p.add_argument("--layers", type=int, default=8)
    p.add_argument(
        "--folder", type=Path, help="where profile, logs and what was sent stay; left out: nowhere"
    )
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (a.folder or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        shares = [float(share) for share in a.shares.split(",")]
        rows = asyncio.run(measure(shares, a.requests, a.hidden, a.layers, folder))
    return verdict(rows, BOUND)


if __name__ == "__main__":
    sys.exit(main())
