"""The simulator's word on paced workers: what was served, and what `disaggserve simulate --trace` says of the same requests.

    python -m benchmarks.word_paced [--rates 8,10,12] [--requests 1000] [--folder DIR]

OPT-13B on emulated A100s, 2 prefill tp 1 and 1 decode tp 2, the joint plan for 10 req/s of ShareGPT under 0.25/0.1 s; rates
around that knee. Workers and router are real processes, without a control plane; a worker computes with a tiny model and waits
until the GPU's time has passed. More than 1 % late steps (the machine did not keep the pace) make a row invalid, not a result.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.word import Row, drawn, verdict
from disaggserve import metric_names as names
from disaggserve.workload import preset
from e2e import load
from e2e.dataplane import DataPlane, fork_server
from e2e.nodes.tiny import make_tiny

MODEL, GPU = "facebook/opt-13b", "NVIDIA-A100-SXM4-80GB"
SHAPE = "prefill=2xtp1,decode=1xtp2"
TTFT_S, TPOT_S = 0.25, 0.1
SEED = 7
VOCAB = 256  # of the tiny model's tokens
BOUND = 0.02


async def served(
    plane: DataPlane, url: str, requests: Sequence[load.Wanted], seed: int, ttft_s: float, tpot_s: float
) -> tuple[list[load.Result], dict[str, Any], float]:
    """One load, to its end: results, their summary, and the share of late steps. Raises AssertionError where one failed.

    `seed`: of the prompts; those of an earlier load would be found in the prefix cache.
    """
    before = await steps(plane)
    results = await load.run_load(url, plane.model, requests, vocab=VOCAB, seed=seed)
    after = await steps(plane)
    assert all(r.outcome == names.OK for r in results), next(r for r in results if r.outcome != names.OK)
    await plane.quiet()
    late, taken = (b - a for a, b in zip(before, after, strict=True))
    return results, load.summary(results, ttft_s, tpot_s), late / taken


async def steps(plane: DataPlane) -> tuple[float, float]:
    """Late steps and all steps so far, of all workers."""
    found = {names.WORKER_LATE_STEPS: 0.0, names.WORKER_STEPS: 0.0}
    for worker in (*plane.alive("prefill"), *plane.alive("decode")):
        for name in found:
            found[name] += await plane.metric(worker, name)
    return found[names.WORKER_LATE_STEPS], found[names.WORKER_STEPS]


def simulated(trace: Path) -> dict[str, Any]:
    """What the command line says of the requests that were sent."""
    command = [sys.executable, "-m", "disaggserve.cli", "simulate", "--trace", str(trace), "--shape", SHAPE]
    command += ["--model", MODEL, "--gpu", GPU, "--engine", "torch", "--link", "rdma"]
    command += ["--ttft", f"{TTFT_S}s", "--tpot", f"{TPOT_S}s", "-o", "json"]
    answer: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return answer


async def measure(rates: Sequence[float], count: int, folder: Path) -> list[Row]:
    weights = make_tiny(MODEL, folder / "model")
    pace = json.dumps({"gpu": GPU, "nvlink": True, "rdma": True, "model": MODEL})
    lengths = preset("sharegpt").scaled(1.0, 2048)
    rows = []
    async with (
        fork_server(folder) as forks,
        DataPlane(forks, folder, MODEL, weights, "--served-name", MODEL, "--pace", pace) as plane,
    ):
        await asyncio.gather(
            plane.worker("prefill"), plane.worker("prefill"), plane.worker("decode", "--tp", "2")
        )
        router = await plane.router("--max-queued", str(count))
        await plane.until_sees(router)
        for number, rate in enumerate(rates, 1):
            requests = drawn(rate, count, lengths, 10, SEED)
            results, summary, late = await served(plane, router.url, requests, SEED + number, TTFT_S, TPOT_S)
            trace = folder / f"sent-{rate:g}.csv"
            load.write_csv(results, trace)
            rows.append(Row(rate, len(results), summary, await asyncio.to_thread(simulated, trace), late))
            print(
                f"{rate:g} req/s: {rows[-1].difference * 100:+.1f} points, {late:.2%} late", file=sys.stderr
            )
    return rows


def main() -> int:
    p = argparse.ArgumentParser(description="Served against simulated attainment on paced workers.")
    p.add_argument("--rates", default="8,10,12", help="req/s, with commas")
    p.add_argument("--requests", type=int, default=1000, help="of each rate")
    p.add_argument("--folder", type=Path, help="where what was sent and logs stay; left out: nowhere")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (a.folder or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        rows = asyncio.run(measure([float(rate) for rate in a.rates.split(",")], a.requests, folder))
    return verdict(rows, BOUND)


if __name__ == "__main__":
    sys.exit(main())
