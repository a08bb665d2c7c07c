"""When requests arrive: drawn at a rate with a variation, or as a trace has them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from disaggserve.workload.lengths import Lengths
from disaggserve.workload.requests import BadTrace, Lens, Requests, WorkloadError

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: multiples of it are spread evenly over [0, 2^64)


@dataclasses.dataclass(frozen=True, eq=False)
class Workload:
    """Independent requests at a rate, with gaps of a coefficient of variation (1 = Poisson, else gamma).

    With `trace` the requests are its own, in its own order; `cv` and `lengths` then only describe them, and
    another `rate` than the trace's runs it faster or slower.
    """

    rate: float  # req/s
    cv: float
    lengths: Lengths
    source: str = "spec"  # where it comes from, for people: the spec, or the window it was learned from
    trace: Requests | None = None  # at least two requests, not all at one time

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise WorkloadError(f"rate is {self.rate}, not a number of requests per second above 0")
        if not (math.isfinite(self.cv) and self.cv >= 0):
            raise WorkloadError(f"the coefficient of variation is {self.cv}, not a number of at least 0")

    def requests(self, duration_s: float, seed: int) -> Requests:
        """The requests that arrive in [0, duration_s).

        Arrivals and lengths come from streams of their own, each drawn in order: another rate or duration of
        the same seed scales the same gaps and takes the same rows, as far as both go. Arrivals are rounded to
        1 µs, so that no ulp between machines is seen.

        Of a trace, seed 0 is the trace as it is, its first request at 0; another seed starts elsewhere in it.
        Past its last request it begins again, after a gap of its mean.
        """
        horizon_us = round(duration_s * 1e6)
        if self.trace is not None:
            return self._replayed(self.trace, horizon_us, seed)
        count = int(self.rate * duration_s * (1 + self.cv / 4)) + 64
        while True:
            unit = np.cumsum(self._gaps(seed, count))
            arrival_us = np.rint(unit * (1e6 / self.rate)).astype(np.int64)
            if arrival_us[-1] >= horizon_us:
                break
            count *= 2
        arrival_us = arrival_us[: int(np.searchsorted(arrival_us, horizon_us))]
        uniform = np.random.Generator(np.random.PCG64([seed, 1])).random(len(arrival_us))
        rows = (uniform * len(self.lengths)).astype(np.int64)
        return Requests(arrival_us * 1000, self.lengths.input[rows], self.lengths.output[rows])

    def _gaps(self, seed: int, count: int) -> npt.NDArray[np.float64]:
        """Gaps of mean 1; a longer draw begins with the shorter one."""
        draw = np.random.Generator(np.random.PCG64([seed, 0]))
        if self.cv == 0:
            return np.ones(count)
        if self.cv == 1:
            return draw.standard_exponential(count)
        return draw.standard_gamma(1 / self.cv**2, count) * self.cv**2

    def _replayed(self, trace: Requests, horizon_us: int, seed: int) -> Requests:
        n, span_us = len(trace), int(trace.arrival_ns[-1] - trace.arrival_ns[0]) // 1000
        round_us = span_us + round(span_us / (n - 1))  # one time through, with the gap before it begins again
        start = (seed * _GOLDEN % 2**64) * n >> 64
        scale = trace_rate(trace) / self.rate
        rounds = math.ceil(horizon_us / (round_us * scale)) + 1
        index = np.arange(start, start + rounds * n)
        offset_us = trace.arrival_ns[index % n] // 1000 + index // n * round_us
        arrival_us = np.rint((offset_us - offset_us[0]) * scale).astype(np.int64)
        end = int(np.searchsorted(arrival_us, horizon_us))
        return dataclasses.replace(trace.take(index[:end] % n), arrival_ns=arrival_us[:end] * 1000)


def trace_rate(trace: Requests) -> float:
    """Requests per second between the first and the last one. Raises `BadTrace` where that says nothing."""
    span_ns = int(trace.arrival_ns[-1] - trace.arrival_ns[0]) if len(trace) else 0
    if span_ns <= 0:
        raise BadTrace(
            f"a trace of {len(trace)} requests within one microsecond has no rate; it takes two moments"
        )
    return (len(trace) - 1) / (span_ns * 1e-9)


def from_trace(trace: Requests, source: str) -> Workload:
    """The trace as traffic to plan for: its mean rate, variation of gaps, and joint lengths row by row.

    The lengths are of whole prompts, what a prefix cache holds included. Raises `BadTrace`.
    """
    rate = trace_rate(trace)
    gaps = np.diff(trace.arrival_ns).astype(np.float64)
    lengths = Lengths("lengths of its requests", _copy(trace.input), _copy(trace.output))
    return Workload(rate, round(float(gaps.std() / gaps.mean()), 6), lengths, source, trace)


def _copy(lens: Lens) -> Lens:
    return np.array(lens, dtype=np.int32)
