"""The two ways a goodput is measured: as the paper ran it (so many requests from an empty engine), and in steady state.

Both are simulated on seeds of their own and are the same on every machine. A short run flatters: while the queues of an
overloaded engine still grow, its first requests keep the promise. The more GPUs a placement has, the more requests it
gets, but not the longer the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from disaggserve import search, simulate
from disaggserve.simulate import Deployment, Promise
from disaggserve.workload import Lengths, Requests, Workload

Shares = npt.NDArray[np.float64]
SEEDS = tuple(range(200, 220))
STEADY_SEEDS = tuple(range(100, 105))
STEADY_ENOUGH = 4000  # requests a seed after the warm-up, where they come before 600 s
RESOLUTION = 0.01


@dataclasses.dataclass(frozen=True, eq=False)
class System:
    """A deployment under test."""

    name: str
    words: str  # its shapes
    gpus: int
    deployment: Deployment
    source: str  # of step times


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Goodputs per GPU, req/s: as the paper ran it, with the middle 80 % of single runs, and in steady state."""

    as_run: float
    low: float
    high: float
    steady: float


class Bench:
    """One system on one table of lengths; every (rate, seed) is simulated once."""

    def __init__(self, system: System, lengths: Lengths, prompts_per_gpu: int) -> None:
        self.system, self.lengths = system, lengths
        self.prompts = prompts_per_gpu * system.gpus
        self._seen: dict[tuple[float, int], tuple[Shares, Shares]] = {}

    def run(self, per_gpu: float, seed: int) -> tuple[Shares, Shares]:
        """TTFT and TPOT in seconds of the requests of one run; inf where one never ended."""
        key = (per_gpu, seed)
        if key not in self._seen:
            requests = self.requests(per_gpu, seed)
            outcome = simulate.run(self.system.deployment, requests)
            done = outcome.last_ns >= 0
            ttft = np.where(done, (outcome.first_ns - requests.arrival_ns) / 1e9, np.inf)
            steps = np.maximum(requests.output - 1, 1)
            tpot = np.where(done, (outcome.last_ns - outcome.first_ns) / 1e9 / steps, np.inf)
            self._seen[key] = ttft, tpot
        return self._seen[key]

    def requests(self, per_gpu: float, seed: int) -> Requests:
        """The first `prompts` requests of a Poisson stream; another rate of the same seed scales the same gaps."""
        rate = per_gpu * self.system.gpus
        drawn = Workload(rate, 1.0, self.lengths).requests(1.5 * self.prompts / rate + 60 / rate, seed)
        n = self.prompts
        return Requests(drawn.arrival_ns[:n], drawn.input[:n], drawn.output[:n])

    def attained(self, per_gpu: float, promise: Promise, seeds: Sequence[int] = SEEDS) -> float:
        """Mean share of requests that keep both limits."""
        return float(np.mean([_kept(*self.run(per_gpu, seed), promise) for seed in seeds]))

    def each(self, per_gpu: float, promise: Promise) -> tuple[float, float]:
        """Mean shares of requests that keep TTFT, and TPOT."""
        runs = [self.run(per_gpu, seed) for seed in SEEDS]
        ttft = float(np.mean([np.mean(t <= promise.ttft_s) for t, _ in runs]))
        return ttft, float(np.mean([np.mean(t <= promise.tpot_s) for _, t in runs]))

    def goodput(self, promise: Promise, near: float) -> Goodput:
        """`near`: a rate per GPU to begin from."""
        target = promise.attainment
        as_run = simulate.goodput(
            lambda rate: self.attained(round(rate, 4), promise), target, start=near, resolution=RESOLUTION
        )
        single = [
            simulate.goodput(
                lambda rate, seed=seed: self.attained(round(rate, 4), promise, (seed,)),  # type: ignore[misc]
                target,
                start=as_run or near,
                resolution=0.04,
            )
            for seed in SEEDS
        ]
        low, high = np.percentile(single, (10, 90))
        sustained = steady(self.system, self.lengths, promise, near=0.8 * as_run or near)
        return Goodput(as_run, float(low), float(high), sustained)


def steady(
    system: System,
    lengths: Lengths,
    promise: Promise,
    *,
    near: float,
    seeds: Sequence[int] = STEADY_SEEDS,
    resolution: float = RESOLUTION,
) -> float:
    """Goodput per GPU in steady state, req/s; 0 where no rate near is kept. `near`: a rate per GPU to begin from."""

    def attained(per_gpu: float) -> float:
        workload = Workload(per_gpu * system.gpus, 1.0, lengths)
        return search.predict(
            system.deployment, workload, promise, seeds=seeds, enough=STEADY_ENOUGH
        ).attainment

    return simulate.goodput(attained, promise.attainment, start=near, resolution=resolution)


def _kept(ttft: Shares, tpot: Shares, promise: Promise) -> float:
    return float(np.mean((ttft <= promise.ttft_s) & (tpot <= promise.tpot_s)))


def scaled(promise: Promise, scale: float) -> Promise:
    return Promise(promise.ttft_s * scale, promise.tpot_s * scale, promise.attainment)
