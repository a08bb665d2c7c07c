"""DistServe's real runs of OPT-13B on A100s, replayed: exact arrivals and lengths, the model of its engine.

    python benchmarks/measured.py [opt13b_sharegpt_a100_runs.csv]

Attainment is of the promise 0.25/0.1 s. Of what the model says, two figures were found by replaying the c21d11
runs: the rates of its transfers and swaps (25 and 20 GB/s). Everything else is its code's rules and the shipped
fits (REFERENCE § 4), and the c21d12 runs were used for nothing.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from disaggserve import catalogue, engines, latency, search, simulate
from disaggserve.search.packing import Wanted
from disaggserve.workload import Requests

FILE = "measured/opt13b_sharegpt_a100_runs.csv"
PROMISE = simulate.Promise(0.25, 0.1, 0.9)
# The public simulator's attainment on the same runs (REFERENCE § 11).
PUBLIC = {
    "distserve-c21d11-300-3": 98.3,
    "distserve-c21d11-300-4.5": 96.3,
    "distserve-c21d11-300-7.5": 88.7,
    "distserve-c21d11-600-6": 70.2,
    "distserve-c21d12-400-4": 98.5,
    "distserve-c21d12-1000-10": 76.5,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    name: str
    requests: Requests
    ttft_s: npt.NDArray[np.float64]
    tpot_s: npt.NDArray[np.float64]

    @property
    def attainment(self) -> float:
        return float(np.mean((self.ttft_s <= PROMISE.ttft_s) & (self.tpot_s <= PROMISE.tpot_s)))


def runs(file: Path) -> list[Run]:
    """The runs of the file, by name; arrivals in order, from 0."""
    rows: dict[str, list[dict[str, str]]] = {}
    for row in csv.DictReader(file.read_text(encoding="utf-8").splitlines()):
        rows.setdefault(row["run"], []).append(row)
    found = []
    for name, own in sorted(rows.items()):
        own.sort(key=lambda row: float(row["arrival_s"]))
        arrival_us = np.array([round(float(row["arrival_s"]) * 1e6) for row in own], dtype=np.int64)
        lens = [np.array([int(row[c]) for row in own], dtype=np.int32) for c in ("input_len", "output_len")]
        ttft_s, tpot_s = (np.array([float(row[c]) for row in own]) / 1e3 for c in ("ttft_ms", "tpot_ms"))
        found.append(Run(name, Requests((arrival_us - arrival_us[0]) * 1000, *lens), ttft_s, tpot_s))
    return found


def deployment(name: str) -> simulate.Deployment:
    """What made a run: prefill tp 2 and decode tp 1 with pp 1 (c21d11) or pp 2 (c21d12); vLLM on one GPU."""
    model, gpu = catalogue.model("facebook/opt-13b"), catalogue.gpu("NVIDIA-A100-SXM4-80GB")
    if name.startswith("vllm"):
        profile = latency.Profile.load(_PROFILES / "profiler-a100-80g.vllm.json")
        pool = search.pool(model, gpu, engines.VLLM, 1, 1, 1, profile)
        return simulate.Deployment((), (), model.kv_bytes_per_token(), 1e9, mixed=(pool,), sticky=True)
    shapes: list[Wanted] = [("prefill", 2, 1, 1), ("decode", 1, 2 if "c21d12" in name else 1, 1)]
    return search.deployment(model, engines.DISTSERVE, gpu, shapes, "nvlink")


_PROFILES = Path(latency.__file__).resolve().parents[1] / "data" / "profiles"


def replay(run: Run) -> simulate.Prediction:
    return simulate.judge(run.requests, simulate.run(deployment(run.name), run.requests), PROMISE)


def main() -> None:
    beside = [parent / "shared" / "data" for parent in Path(__file__).resolve().parents[1:]]
    places = [Path(os.environ.get("DISAGGSERVE_DATA", ".")), *beside]
    given = [Path(argument) for argument in sys.argv[1:2]]
    file = next((f for f in (*given, *(p / FILE for p in places)) if f.is_file()), None)
    if file is None:
        sys.exit(f"{FILE} is not here; give it, or name its folder in DISAGGSERVE_DATA")
    print(
        f"{'':26}{'attainment, %':>30}{'TTFT p50, p90, ms':>28}{'TPOT p50, p90, ms':>28}\n"
        f"{'run':26}{'real':>8}{'ours':>8}{'public':>8}{'real':>20}{'ours':>14}{'real':>14}{'ours':>14}"
    )
    for run in runs(file):
        found = replay(run)
        figures = [
            f"{100 * run.attainment:8.1f}{100 * found.attainment:8.1f}{PUBLIC.get(run.name, np.nan):8.1f}"
        ]
        for real, ours in ((run.ttft_s, found.ttft), (run.tpot_s, found.tpot)):
            figures += [f"{1e3 * a:.0f}, {1e3 * b:.0f}" for a, b in (np.percentile(real, (50, 90)), ours[:2])]
        print(f"{run.name:26}{figures[0]}{figures[1]:>20}" + "".join(f"{f:>14}" for f in figures[2:]))


if __name__ == "__main__":
    main()
