"""The simulator's word on a real vLLM: one prefill and one decode instance on this CPU, against the same requests simulated.

    python benchmarks/real_vllm.py [--requests 300] [--shares 0.4,0.55,0.7] [folder]     # needs: make e2e-vllm

A seeded Llama of 100M parameters is served by two vLLM of one thread each behind our router. One of them is measured over
HTTP by `disaggworker profile` and fitted as `disaggserve fit` does; then Poisson requests go through the router, and the very
same requests, at the times at which they were sent, through the simulator. The promise is set beforehand, from the profile
alone. A row is valid only where the sender was not late; a machine that does other work gives no result.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from disaggserve import catalogue, latency, simulate
from disaggserve.latency import fitting, measurements
from disaggserve.workload import Lengths, Workload, read_trace
from disaggworker.router.app import serving
from disaggworker.router.config import Config
from disaggworker.router.fleet import Seen
from e2e import load
from e2e.nodes.tiny import make_tiny
from e2e.vllm import environment

ROOT = Path(__file__).resolve().parents[1]
MODEL = "llama-100m"
SHAPE = {"hidden": 768, "layers": 14, "heads": 12}
HOSTS = {"prefill": "127.0.91.1", "decode": "127.0.91.2"}
ROUTER = "127.0.91.3"
PORT, CONTEXT, VOCABULARY = 8000, 1024, 700
KV_BYTES, BATCH_TOKENS, BATCH_REQUESTS = 1 << 30, 2048, 16
GRID = [
    "--batches",
    "1,2,4,8,16",
    "--prompts",
    "32,64,128,256,512",
    "--contexts",
    "64,256,512",
    "--repeat",
    "3",
]
START_S = 600.0
SEED = 0
LATE_S = 0.05  # a request that was sent so long after it was due, at the 99th percentile, makes a row invalid
# Bounds every measured step from below, and no CPU comes near: a profile is of a model and a GPU of the catalogue.
GPU = catalogue.gpu("NVIDIA-A100-SXM4-80GB")


@contextlib.contextmanager
def servers(weights: Path, folder: Path) -> Iterator[None]:
    """Both vLLM, ready."""
    transfer = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_load_failure_policy": "fail"}
    running = []
    try:
        for host in HOSTS.values():
            argv = [*environment.command(), "serve", str(weights), "--served-model-name", MODEL]
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
                running.append(subprocess.Popen(argv, env=env, stdout=log, stderr=log))
        deadline_s = time.monotonic() + START_S
        for host, process in zip(HOSTS.values(), running, strict=True):
            while not _serves(f"http://{host}:{PORT}/health"):
                if process.poll() is not None or time.monotonic() > deadline_s:
                    raise SystemExit(f"vLLM does not start: see {folder / host}.log")
                time.sleep(0.5)
        yield
    finally:
        for process in running:
            process.kill()
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


def profiled(csv: Path) -> tuple[measurements.Row, ...]:
    url = f"http://{HOSTS['prefill']}:{PORT}/v1"
    argv = [
        sys.executable,
        "-m",
        "disaggworker",
        "profile",
        "--model",
        MODEL,
        "--url",
        url,
        *GRID,
        "-o",
        str(csv),
    ]
    path = os.pathsep.join(str(ROOT / part) for part in ("operator", "worker_image"))
    subprocess.run(argv, check=True, env=os.environ | {"PYTHONPATH": path})
    return measurements.read(csv.read_text(), csv.name)


def link_bytes_s(url: str) -> float:
    """What decode's own figures say of a few hand-offs; the first of a pair, with its handshake, is among them and not counted."""
    few = [(0.3 * k, 256, 4) for k in range(12)]
    for part in (few[:2], few):
        before = _moved()
        done = asyncio.run(load.run_load(url, MODEL, part, vocab=VOCABULARY, seed=len(part)))
        if any(r.error for r in done):
            raise SystemExit(f"a request failed: {next(r.error for r in done if r.error)}")
    size, seconds = (after - b for after, b in zip(_moved(), before, strict=True))
    return size / seconds


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=300, help="for each rate")
    parser.add_argument("--shares", default="0.4,0.55,0.7", help="rates, as shares of what prefill can do")
    parser.add_argument("folder", nargs="?", type=Path, help="where measurements, profile and results go")
    flags = parser.parse_args()
    if not environment.made():
        print("there is no vLLM here: make e2e-vllm installs it; nothing was measured")
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = flags.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        weights = make_tiny(MODEL, Path(scratch) / "model", **SHAPE)
        with servers(weights, Path(scratch)), router() as url:
            compare(weights, folder, url, flags.requests, [float(s) for s in flags.shares.split(",")])


def compare(weights: Path, folder: Path, url: str, count: int, shares: Sequence[float]) -> None:
    model = catalogue.model_from_config(MODEL, json.loads((weights / "config.json").read_text()))
    rows = profiled(folder / "measurements.csv")
    document = fitting.fit(rows, "fitted to this machine", None, None, "vllm")
    profile = latency.Profile.of(document.model_dump(mode="json", exclude_none=True), MODEL)
    profile.dump(folder / "profile.json")
    (fit,) = document.fits
    for phase, evidence in (("prefill", fit.prefill.evidence), ("decode", fit.decode.evidence)):
        off = evidence.residuals
        print(
            f"{phase}: {evidence.rows} rows, form {evidence.form}, off by {off.median:.1%} (median), "
            f"{off.p90:.1%} (p90), {off.max:.1%} (most)"
        )
    times = latency.step_times(model, GPU, 1, 1, profile)
    bytes_per_token = model.kv_bytes_per_token()
    blocks = KV_BYTES // (16 * bytes_per_token)  # of the simulator's size
    link = link_bytes_s(url)
    pool = simulate.Pool(1, times, blocks, BATCH_TOKENS, batch_requests=BATCH_REQUESTS)
    deployment = simulate.Deployment((pool,), (pool,), bytes_per_token, link, first_token_from="decode")
    draw = np.random.default_rng(SEED)
    pair = (draw.integers(least, most, 1000).astype(np.int32) for least, most in ((32, 513), (16, 49)))
    lengths = Lengths("32 to 512 in, 16 to 48 out", *pair)
    one_s = float(np.mean([times.prefill_stage_s([int(n)]) for n in lengths.input]))
    promise = simulate.Promise(4 * one_s, 1.5 * times.decode_stage_s(8, 8 * 300), 0.9)
    print(
        f"1 prefill + 1 decode, {lengths.name}: a prompt takes {one_s * 1e3:.0f} ms on average; promise: TTFT "
        f"{promise.ttft_s * 1e3:.0f} ms, TPOT {promise.tpot_s * 1e3:.0f} ms; link {link / 1e9:.2f} GB/s\n{'req/s':>7}{'served':>9}{'simulated':>11}"
        f"{'TTFT p50, p90, ms':>24}{'simulated':>14}{'TPOT p50, p90, ms':>20}{'simulated':>12}"
    )
    for share in shares:
        rate = share / one_s
        wanted = Workload(rate, 1.0, lengths).requests(count / rate, SEED)
        asked = [
            (int(a) / 1e9, int(i), int(o))
            for a, i, o in zip(wanted.arrival_ns, wanted.input, wanted.output, strict=True)
        ]
        results = asyncio.run(load.run_load(url, MODEL, asked, vocab=VOCABULARY, seed=SEED))
        trace = folder / f"sent-{share:g}.csv"
        load.write_csv(results, trace)
        served = load.summary(results, promise.ttft_s, promise.tpot_s)
        sent = read_trace(trace)
        found = simulate.judge(sent, simulate.run(deployment, sent), promise)
        real = (f"{1e3 * served[k]['p50']:.0f}, {1e3 * served[k]['p90']:.0f}" for k in ("ttft", "tpot"))
        ours = (f"{1e3 * t[0]:.0f}, {1e3 * t[1]:.0f}" for t in (found.ttft, found.tpot))
        (ttft, tpot), (our_ttft, our_tpot) = real, ours
        late = served["lag"]["p99"] > LATE_S
        print(
            f"{rate:7.2f}{served['attainment']:9.3f}{found.attainment:11.3f}{ttft:>24}{our_ttft:>14}{tpot:>20}"
            f"{our_tpot:>12}" + (f"   invalid: sent {served['lag']['p99']:.2f} s late" if late else "")
        )


if __name__ == "__main__":
    main()
