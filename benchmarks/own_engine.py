"""Our engine's own profile on this CPU, and what the simulator then says of one prefill and one decode worker here.

    python benchmarks/own_engine.py [folder]      # where measurements.csv and profile.json go; default: nowhere

A seeded Llama of 100M parameters in float32 is written, measured by `disaggworker profile` on one thread (two workers
share two cores: they are to be started with OMP_NUM_THREADS=1 as well) and fitted as `disaggserve fit` does. The link is
what a bare ZeroMQ socket moves over loopback. No load is sent: the table is the simulator's word, to be held against a run.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import zmq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from disaggserve import catalogue, latency, simulate
from disaggserve.latency import fitting, measurements
from disaggserve.workload import Lengths, Workload
from disaggworker.kv.pool import blocks_in_memory
from e2e.nodes.tiny import make_tiny

ROOT = Path(__file__).resolve().parents[1]
MODEL = "llama-100m"
SHAPE = {"hidden": 768, "layers": 14, "heads": 12}
GRID = ["--batches", "1,2,4,8,16", "--prompts", "64,128,256,512", "--contexts", "64,256,512", "--repeat", "3"]
BATCH_TOKENS = 512  # of a worker that is not paced
DURATION_S, SEED = 3600.0, 0
# Bounds every measured step from below, and no CPU comes near: a profile is of a model and a GPU of the catalogue.
GPU = catalogue.gpu("NVIDIA-A100-SXM4-80GB")


def profiled(weights: Path, csv: Path) -> tuple[measurements.Row, ...]:
    argv = [
        "-m",
        "disaggworker",
        "profile",
        "--model",
        MODEL,
        "--weights",
        str(weights),
        *GRID,
        "-o",
        str(csv),
    ]
    path = os.pathsep.join(str(ROOT / part) for part in ("operator", "worker_image"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    subprocess.run([sys.executable, *argv], check=True, env=environment)
    return measurements.read(csv.read_text(), csv.name)


def loopback_bytes_s(size: int) -> float:
    """Bytes a second of so many in one message over loopback, there and a short word back."""
    with zmq.Context() as context, context.socket(zmq.REQ) as near, context.socket(zmq.REP) as far:
        near.connect(f"tcp://127.0.0.1:{far.bind_to_random_port('tcp://127.0.0.1')}")
        taken, message = [], bytes(size)
        for _ in range(9):
            begun = time.perf_counter()
            near.send(message, copy=False)
            far.recv(copy=False)
            far.send(b"")
            near.recv()
            taken.append(time.perf_counter() - begun)
    return size / statistics.median(taken)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[1]) if sys.argv[1:] else Path(scratch)
        weights = make_tiny(MODEL, Path(scratch) / "model", **SHAPE)
        model = catalogue.model_from_config(MODEL, json.loads((weights / "config.json").read_text()))
        rows = profiled(weights, folder / "measurements.csv")
        document = fitting.fit(rows, "fitted to this machine", None, None, "torch")
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
    blocks = blocks_in_memory(
        model.layers, model.kv_heads, model.head_dim, torch.float32, torch.device("cpu")
    )
    link = loopback_bytes_s(512 * model.kv_bytes_per_token())
    pool = simulate.Pool(1, times, blocks, BATCH_TOKENS)
    deployment = simulate.Deployment((pool,), (pool,), model.kv_bytes_per_token(), link)

    draw = np.random.default_rng(SEED)
    pair = (draw.integers(least, most, 1000).astype(np.int32) for least, most in ((64, 513), (16, 65)))
    lengths = Lengths("64 to 512 in, 16 to 64 out", *pair)
    one_s = float(np.mean([times.prefill_stage_s([int(n)]) for n in lengths.input]))
    promise = simulate.Promise(4 * one_s, 1.25 * times.decode_stage_s(8, 8 * 320), 0.9)
    print(
        f"1 prefill + 1 decode, {lengths.name}: a prompt takes {one_s * 1e3:.0f} ms on average, a decode step of 8 at "
        f"320 tokens {promise.tpot_s / 1.25 * 1e3:.0f} ms; link {link / 1e9:.2f} GB/s\n"
        f"promise: TTFT {promise.ttft_s * 1e3:.0f} ms (4 prompts' time), TPOT {promise.tpot_s * 1e3:.0f} ms (1.25 "
        f"such steps)\n{'req/s':>8}{'of prefill':>12}{'attainment':>12}{'TTFT p50, p90, ms':>22}{'TPOT p50, p90, ms':>22}"
    )
    for share in (0.5, 0.7, 0.85, 0.95):
        rate = share / one_s
        requests = Workload(rate, 1.0, lengths).requests(DURATION_S, SEED)
        found = simulate.judge(requests, simulate.run(deployment, requests), promise)
        ttft, tpot = (f"{1e3 * t[0]:.0f}, {1e3 * t[1]:.0f}" for t in (found.ttft, found.tpot))
        print(f"{rate:8.2f}{share:12.0%}{found.attainment:12.4f}{ttft:>22}{tpot:>22}")


if __name__ == "__main__":
    main()
