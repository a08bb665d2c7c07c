"""The event kernel against the plain simulator that is its oracle, and its growth, in one run.

    python benchmarks/simulator.py

Measured on two shared cores (2026-11, numba 0.68): see the figures printed; times are noisy there, ratios hold.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from disaggserve import catalogue, latency, simulate
from disaggserve.workload import Requests, Workload, preset
from tests import oracle


def deployment(prefill: int, decode: int) -> simulate.Deployment:
    """OPT-13B on A100s, tp 1 everywhere, KV at 25 GB/s."""
    model, gpu = catalogue.model("facebook/opt-13b"), catalogue.gpu("NVIDIA-A100-SXM4-80GB")
    times = latency.step_times(model, gpu, 1, 1)
    blocks = catalogue.kv_blocks(model, gpu, 1, 1)
    pools = [
        simulate.Pool(n, times, blocks, latency.saturation_tokens(model, gpu)) for n in (prefill, decode)
    ]
    return simulate.Deployment((pools[0],), (pools[1],), model.kv_bytes_per_token(), 25e9)


def colocated(count: int, policy: Literal["whole", "chunked"]) -> simulate.Deployment:
    """The same GPUs, each of them prefilling and decoding."""
    plan = deployment(1, 1)
    pool = dataclasses.replace(plan.decode[0], count=count, policy=policy)
    return dataclasses.replace(plan, prefill=(), decode=(), mixed=(pool,), sticky=True)


def requests(n: int, rate: float) -> Requests:
    drawn = Workload(rate=rate, cv=1.0, lengths=preset("sharegpt")).requests(1.2 * n / rate, seed=0)
    return drawn.take(slice(n))


def seconds(run: Callable[[], object], times: int) -> float:
    """CPU time of the quickest of some runs: the machine is shared."""
    took = []
    for _ in range(times):
        began = time.thread_time()
        run()
        took.append(time.thread_time() - began)
    return min(took)


def main() -> None:
    simulate.warm_up()
    plan = deployment(4, 4)
    few, many, most = requests(1_000, 8.0), requests(10_000, 8.0), requests(1_000_000, 8.0)
    kernel = seconds(lambda: simulate.run(plan, few), 20)
    plain = seconds(lambda: oracle.Oracle(plan, few).run(), 1)
    ten, million = seconds(lambda: simulate.run(plan, many), 30), seconds(lambda: simulate.run(plan, most), 3)
    events = simulate.run(plan, many).events
    print(
        f"1,000 requests on 4P+4D: oracle / kernel = {plain / kernel:.0f} "
        f"({plain * 1e3:.0f} ms / {kernel * 1e3:.2f} ms)"
    )
    print(
        f"10,000 requests on 4P+4D: {ten * 1e3:.1f} ms, {ten / events * 1e9:.0f} ns an event, "
        f"{events / 1e4:.1f} events a request"
    )
    print(f"1,000,000 / 10,000 requests: {million / ten:.0f} times the time")
    for policy in ("whole", "chunked"):
        other = colocated(8, policy)
        took = seconds(lambda other=other: simulate.run(other, many), 10)  # type: ignore[misc]
        print(f"10,000 requests on 8 colocated, {policy}: {took * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
