"""The search of DistServe's public code, whole: our CPU time beside that of the public simulator.

    python benchmarks/published.py

One warm process: imports and compiling are not in it. Each search begins with nothing known and is repeated; the
median and the range are printed. The public simulator (LLMServe/DistServe, commit 82831f1, simdistserve) took 771
and 875 CPU-seconds for the same two searches, measured on two shared cores of a like kind; it is not run here, so
ratios hold for a like machine only. Bounds: 0.15 and 0.2 CPU-s, in issue 4.
"""

from __future__ import annotations

import time
from statistics import median

from disaggserve import catalogue, latency, workload
from disaggserve.search import published
from disaggserve.simulate import Promise
from disaggserve.simulate.published import Simulator
from disaggserve.workload import Lengths

RUNS = 11
NODES, NODE_GPUS = 4, 8


def run(model_id: str, promise: Promise, high: bool) -> published.Searched:
    """Tables, arrivals and all: what a plan's search does, but for reading nodes and packing."""
    model = catalogue.model(model_id)
    known = published.tables(model, latency.shipped_profile())
    lengths = workload.preset("sharegpt")
    first = Lengths(lengths.name, lengths.input[: published.REQUESTS], lengths.output[: published.REQUESTS])
    pairs = published.candidates(model, known, NODES, NODE_GPUS, NODES * NODE_GPUS, high)
    return published.search(pairs, known, Simulator(first, promise), 0.25)


def main() -> None:
    published.warm_up()
    for model_id, promise, high, public_cpu_s, bound_s in (
        ("facebook/opt-13b", Promise(0.2, 0.1, 0.9), False, 771.0, 0.15),
        ("facebook/opt-66b", Promise(2.5, 0.15, 0.9), True, 875.0, 0.2),
    ):
        took: list[float] = []
        for _ in range(RUNS):
            began = time.process_time()
            found = run(model_id, promise, high)
            took.append(time.process_time() - began)
        best, per_gpu = found.ranking[0]
        cpu_s = median(took)
        print(
            f"{model_id} {NODES}×{NODE_GPUS} {'high' if high else 'low'} affinity, {promise.ttft_s * 1e3:.0f}/"
            f"{promise.tpot_s * 1e3:.0f} ms: {best}, {per_gpu:g} req/s per GPU\n"
            f"  {len(found.ranking)} configurations, {found.simulations} simulations of {published.REQUESTS} requests "
            f"asked for; {found.prefills} prefill and {found.decodes} decode phases run\n"
            f"  {cpu_s:.3f} CPU-s (median of {RUNS}, {min(took):.3f} to {max(took):.3f}; bound {bound_s}): "
            f"{public_cpu_s / cpu_s:,.0f} times the public simulator ({public_cpu_s:.0f} CPU-s, measured elsewhere)"
        )


if __name__ == "__main__":
    main()
