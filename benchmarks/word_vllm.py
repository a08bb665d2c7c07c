"""The simulator's word on a real vLLM: one prefill and one decode instance on this CPU, against the same requests simulated.

    python -m benchmarks.word_vllm [--shares 0.1,0.2,0.3] [--requests 210] [--folder DIR]     # needs: make e2e-vllm

A seeded Llama of 100M parameters in bfloat16 is served by two vLLM of one thread each, each on a core of its own, as the kubelet's
static policy gives one to a pod, behind our router. What `disaggworker profile` measures over HTTP is measured of both at once, prefill
of one while the other decodes, for so they share this machine. The link is measured by a few hand-offs. At each of the shares of what
prefill can bear Poisson requests go through the router in several loads, the rates in turns, with a profile between every two loads. All
profiles are fitted as `disaggserve fit` does, and the very requests that were sent are simulated, each load at the speeds that
the machine had just before and just after it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import multiprocessing
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.word import Row, fitted, judged, opening, posed, profiled, taken, verdict
from disaggserve import catalogue, engines, latency, simulate
from disaggworker.router.app import serving
from disaggworker.router.config import Config
from disaggworker.router.fleet import Seen
from e2e import load
from e2e.nodes.tiny import make_tiny
from e2e.vllm import environment

MODEL = "llama-100m"
SHAPE = {"hidden": 768, "layers": 14, "heads": 12}
HOSTS = {"prefill": "127.0.91.1", "decode": "127.0.91.2"}
ROUTER = "127.0.91.3"
PORT, CONTEXT, VOCABULARY = 8000, 1024, 700
KV_BYTES, BATCH_TOKENS, BATCH_REQUESTS = 1 << 30, 2048, 16
START_S = 600.0
# Decode steps of 8 requests in the promised TPOT: a core in its slow seconds takes 1.8 times as long.
STEPS = 2.0
OTHERS = 3  # streams beside which a hand-off is timed
_ROUNDS = 3  # of 25 turns each
SEED = 0
PROMPTS = (32, 512)  # tokens, shortest and longest
BOUND = 0.05


@contextlib.contextmanager
def servers(weights: Path, folder: Path) -> Iterator[None]:
    """Both vLLM, ready."""
    transfer = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_load_failure_policy": "fail"}
    running = []
    try:
        cores = sorted(os.sched_getaffinity(0))
        for host, core in zip(HOSTS.values(), cores[: len(HOSTS)], strict=True):
            argv = [
                "taskset",
                "--cpu-list",
                str(core),
                *environment.command(),
                "serve",
                str(weights),
                "--served-model-name",
                MODEL,
            ]
            argv += ["--max-model-len", str(CONTEXT), "--host", host, "--port", str(PORT)]
            argv += [
                "--kv-transfer-config",
                json.dumps(transfer),
                "--max-num-batched-tokens",
                str(BATCH_TOKENS),
            ]
            argv += ["--enable-per-request-metrics", *environment.CPU_FLAGS]
            argv += ["--dtype", "bfloat16", "--kv-cache-memory-bytes", str(KV_BYTES)]
            argv += ["--max-num-seqs", str(BATCH_REQUESTS), "--no-enable-prefix-caching"]
            env = os.environ | environment.variables(folder / host)
            env |= {"VLLM_NIXL_SIDE_CHANNEL_HOST": host, "VLLM_NIXL_SIDE_CHANNEL_PORT": "5600"}
            with (folder / f"{host}.log").open("wb") as log:
                running.append(
                    subprocess.Popen(argv, env=env, stdout=log, stderr=log, start_new_session=True)
                )
        deadline_s = time.monotonic() + START_S
        for host, process in zip(HOSTS.values(), running, strict=True):
            while not _serves(f"http://{host}:{PORT}/health"):
                if process.poll() is not None or time.monotonic() > deadline_s:
                    words = (folder / f"{host}.log").read_text(errors="replace")[-1500:]
                    raise SystemExit(f"vLLM does not start:\n{words}")
                time.sleep(0.5)
        yield
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its engine is a process of its own
            process.wait()


def _serves(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextlib.contextmanager
def router() -> Iterator[str]:
    """Our router before the two, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_route, args=(theirs,))
    process.start()
    ours.recv()
    try:
        yield f"http://{ROUTER}:{PORT}"
    finally:
        ours.send(None)
        process.join()


def _route(pipe: Connection) -> None:
    async def serve() -> None:
        config = Config("ns", "bench", MODEL, CONTEXT, 1.0, 1.0, ROUTER, PORT)
        async with serving(config) as made:
            seen = [
                Seen(r, r, r, "k", f"http://{host}:{PORT}", True, engine="vllm")  # type: ignore[arg-type]
                for r, host in HOSTS.items()
            ]
            made.update(seen)
            pipe.send(None)
            await asyncio.to_thread(pipe.recv)

    uvloop.run(serve())


def link(url: str) -> tuple[float, float]:
    """Bandwidth, bytes/s: what decode's own figures say of a few hand-offs. Latency, s: from the end of a prompt until decode may pull.

    That is how much later than prefill alone would answer the first token is there, less what the simulator knows of: half a decode
    step until one begins, the one in which it is pulled, and its own. The mean of turns with short prompts, whose own times do not
    hide it, while decode has others in its batch, as in service: its API server has to wait for the core that computes.
    """
    asyncio.run(_alone_and_handed(url, 2, 256))  # the first one of a pair shakes hands
    before = _moved()
    asyncio.run(_alone_and_handed(url, 10, 256))
    size, seconds = (after - b for after, b in zip(_moved(), before, strict=True))
    turns = asyncio.run(_beside_others(url))
    return size / seconds, max(0.0, statistics.mean(h.ttft_s - 2.5 * h.tpot_s - a.ttft_s for a, h in turns))


async def _alone_and_handed(url: str, count: int, tokens: int) -> list[tuple[load.Result, load.Result]]:
    """So many requests of `tokens` to prefill alone, and as many through the router, in turns and one at a time."""
    apart_s = 0.4

    async def of(url: str, begin_s: float, output: int) -> list[load.Result]:
        # Not in step with anything: when a prompt ends should tell nothing of decode's steps.
        requests = [
            (begin_s + 2 * apart_s * k + random.uniform(0, apart_s / 4), tokens, output) for k in range(count)
        ]
        done = await load.run_load(url, MODEL, requests, vocab=VOCABULARY, seed=tokens + output)
        if error := next((r.error for r in done if r.error), None):
            raise SystemExit(f"a request failed: {error}")
        return done

    prefill = f"http://{HOSTS['prefill']}:{PORT}"
    return list(zip(*await asyncio.gather(of(prefill, 0.0, 1), of(url, apart_s, 8)), strict=True))


async def _beside_others(url: str) -> list[tuple[load.Result, load.Result]]:
    """Turns of short prompts while `OTHERS` streams decode, which are as long as may be and outlast them."""
    found: list[tuple[load.Result, load.Result]] = []
    for number in range(_ROUNDS):
        streams = asyncio.create_task(
            load.run_load(
                f"http://{HOSTS['decode']}:{PORT}",
                MODEL,
                [(0.0, 32, CONTEXT - 64)] * OTHERS,
                vocab=VOCABULARY,
                seed=number,
            )
        )
        try:
            await asyncio.sleep(2)
            found += await _alone_and_handed(url, 25, 32)
        finally:
            streams.cancel()
            await asyncio.gather(streams, return_exceptions=True)
    return found


def _moved() -> tuple[float, float]:
    """Bytes that decode has pulled, and the seconds that it took."""
    with urllib.request.urlopen(f"http://{HOSTS['decode']}:{PORT}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = (
        sum(map(float, re.findall(rf"^vllm:nixl_{name}_sum\{{.*\}} (\S+)$", text, re.M)))
        for name in ("bytes_transferred", "xfer_time_seconds")
    )
    size, seconds = found
    return size, seconds


def measure(weights: Path, folder: Path, url: str, count: int, shares: Sequence[float]) -> list[Row]:
    model = catalogue.model_from_config(MODEL, json.loads((weights / "config.json").read_text()))
    profile = functools.partial(
        profiled, MODEL, PROMPTS, *(f"http://{host}:{PORT}/v1" for host in HOSTS.values())
    )
    fit = functools.partial(fitted, engine="vllm", model=model, folder=folder)
    times = fit(opening(profile))
    kv_bytes = model.kv_bytes_per_token()
    bytes_s, latency_s = link(url)
    print(f"a hand-off takes {latency_s * 1e3:.0f} ms beside its bytes")

    asked = posed(times, bytes_s, PROMPTS, (16, 48), 300, STEPS, SEED)

    async def load_of(requests: Sequence[load.Wanted], number: int) -> Sequence[load.Result]:
        return await load.run_load(url, MODEL, requests, vocab=VOCABULARY, seed=SEED + number)

    sent = asyncio.run(taken(shares, count, asked, load_of, profile))

    def deployment(times: latency.StepTimes) -> simulate.Deployment:
        blocks = KV_BYTES // (16 * kv_bytes)
        pool = simulate.Pool(1, times, blocks, BATCH_TOKENS, batch_requests=BATCH_REQUESTS)
        return simulate.Deployment(
            (pool,),
            (pool,),
            kv_bytes,
            bytes_s,
            latency_s,
            first_token_from=engines.VLLM.first_token_from,
            transfer=engines.VLLM.transfer,
        )

    return judged(sent, fit, deployment, asked.promise, folder)


def main() -> int:
    p = argparse.ArgumentParser(description="Served against simulated attainment on a real vLLM.")
    p.add_argument("--shares", default="0.1,0.2,0.3", help="of the rate that prefill can bear, with commas")
    p.add_argument("--requests", type=int, default=210, help="of each rate")
    p.add_argument("--folder", type=Path, help="where profile and what was sent stay; left out: nowhere")
    a = p.parse_args()
    if not environment.made():
        print("there is no vLLM here: make e2e-vllm installs it; nothing was measured")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = (a.folder or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        weights = make_tiny(MODEL, Path(scratch) / "model", **SHAPE)
        shares = [float(s) for s in a.shares.split(",")]
        with servers(weights, Path(scratch)), router() as url:
            rows = measure(weights, folder, url, a.requests, shares)
    return verdict(rows, BOUND)


if __name__ == "__main__":
    sys.exit(main())
