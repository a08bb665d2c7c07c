"""Whether the promise is kept: joint attainment with an interval, percentiles, goodput."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from disaggserve.simulate.serving import Deployment, Outcome
from disaggserve.workload import Requests

BATCHES = 20  # of consecutive requests, for the interval
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
         2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)  # fmt: skip
# Student's t, two-sided 95 %, 1 to 19 degrees of freedom


@dataclasses.dataclass(frozen=True)
class Promise:
    """A share of requests (`attainment`, 0 … 1) keeps both limits, in seconds."""

    ttft_s: float
    tpot_s: float
    attainment: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Share of requests that keep both limits, its 95 % interval, percentiles (50, 90, 99) in seconds.

    Percentiles are over completed requests, those of TPOT over the ones with more than one token; NaN where
    there are none.
    """

    attainment: float
    low: float
    high: float
    ttft: tuple[float, float, float]
    tpot: tuple[float, float, float]
    requests: int


T = TypeVar("T")


class Parts(NamedTuple, Generic[T]):
    """Where the time of a request goes, in order, seconds."""

    queue: T
    prefill: T
    transfer: T
    decode_wait: T
    decode: T


def kept(requests: Requests, outcome: Outcome, promise: Promise) -> npt.NDArray[np.bool_]:
    """Which requests keep the promise: both TTFT and TPOT, (last − first) / (output − 1), at most the limit.

    TPOT counts as 0 for one token. A request that never completed misses.
    """
    ttft_s = (outcome.first_ns - requests.arrival_ns) / 1e9
    tpot_s = (outcome.last_ns - outcome.first_ns) / (1e9 * np.maximum(requests.output - 1, 1))
    met: npt.NDArray[np.bool_] = (ttft_s <= promise.ttft_s) & (tpot_s <= promise.tpot_s)
    return met & (outcome.last_ns >= 0)


def parts(deployment: Deployment, requests: Requests, outcome: Outcome) -> Parts[npt.NDArray[np.float64]]:
    """Where the time of each completed request went; the parts add up to last token − arrival.

    The transfer is the request's own time on the link; waiting for the link, for memory at decode and for a
    step boundary counts as waiting for decode. Where the first token comes from decode, the end of prefill is
    not recorded: waiting for memory and link then counts as prefill.
    """
    done = outcome.last_ns >= 0
    arrival = requests.arrival_ns[done] / 1e9
    start, first, moved, begun, last = (t[done] / 1e9 for t in _times(outcome))
    unmoved = outcome.transfer_end_ns[done] < 0  # it ended with its prefill
    kv_s = requests.input[done] * (deployment.kv_bytes_per_token / deployment.link_bytes_s)
    own = deployment.link_latency_s + kv_s
    ended = np.where(unmoved | (first <= moved), first, moved - own)
    # Decoded where it was prefilled, or moved while the prefill ran: no more than the time between.
    transfer = np.where(unmoved, 0.0, np.minimum(own, moved - ended))
    decoded_from = np.where(outcome.decode_start_ns[done] < 0, ended, np.maximum(begun, ended + transfer))
    return Parts(
        start - arrival, ended - start, transfer, decoded_from - ended - transfer, last - decoded_from
    )


def joined(
    runs: Sequence[tuple[Requests, Outcome]], begin_s: float, end_s: float
) -> tuple[Requests, Outcome]:
    """The requests that arrive in [begin_s, end_s) of each run, one run after another on the first one's clock,
    so that batches of consecutive requests are of one run, but for those at a seam.
    """
    width_ns = round((end_s - begin_s) * 1e9)
    pieces: list[tuple[Requests, Outcome]] = []
    for i, (requests, outcome) in enumerate(runs):
        begin, end = np.searchsorted(requests.arrival_ns, [round(begin_s * 1e9), round(end_s * 1e9)])
        cut, shift = slice(int(begin), int(end)), i * width_ns
        some = requests.take(cut)
        start, first, moved, begun, last = (np.where(t[cut] < 0, -1, t[cut] + shift) for t in _times(outcome))
        shifted = Outcome(start, first, moved, begun, last, outcome.events)
        pieces.append((dataclasses.replace(some, arrival_ns=some.arrival_ns + shift), shifted))
    cached = [r.cached for r, _ in pieces if r.cached is not None]
    requests = Requests(
        np.concatenate([r.arrival_ns for r, _ in pieces]),
        np.concatenate([r.input for r, _ in pieces]),
        np.concatenate([r.output for r, _ in pieces]),
        np.concatenate(cached) if cached else None,
    )
    return requests, one_after_another([outcome for _, outcome in pieces])


def one_after_another(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcomes of consecutive requests on one clock, as one."""
    start, first, moved, begun, last = (
        np.concatenate(column) for column in zip(*map(_times, outcomes), strict=True)
    )
    return Outcome(start, first, moved, begun, last, sum(o.events for o in outcomes))


def _times(outcome: Outcome) -> tuple[npt.NDArray[np.int64], ...]:
    return (
        outcome.prefill_start_ns,
        outcome.first_ns,
        outcome.transfer_end_ns,
        outcome.decode_start_ns,
        outcome.last_ns,
    )


def judge(
    requests: Requests, outcome: Outcome, promise: Promise, warmup_s: float = 0.0, until_s: float = math.inf
) -> Prediction:
    """Judge the requests that arrive in [warmup_s, until_s).

    Which of them keep it, `kept` says. The interval is that of the mean of 20 batches of consecutive requests,
    which holds for correlated misses where a plain binomial interval is too narrow. With fewer than 40
    requests, or no difference between batches, Wilson's interval of independent requests is taken instead, as
    it is where it is the wider one. Without requests the attainment is NaN: unknown, not zero.
    """
    arrival = requests.arrival_ns
    begin = int(np.searchsorted(arrival, math.ceil(warmup_s * 1e9)))
    end = len(arrival) if math.isinf(until_s) else int(np.searchsorted(arrival, math.ceil(until_s * 1e9)))
    window = slice(begin, max(begin, end))
    met = kept(requests, outcome, promise)[window]
    first, last = outcome.first_ns[window], outcome.last_ns[window]
    done = last >= 0
    ttft = (first - arrival[window])[done] / 1e9
    steps = (requests.output[window] - 1)[done]
    tpot = (last - first)[done] / (1e9 * np.maximum(steps, 1))
    attainment, low, high = _interval(met)
    return Prediction(attainment, low, high, _percentiles(ttft), _percentiles(tpot[steps > 0]), len(met))


def _interval(kept: npt.NDArray[np.bool_]) -> tuple[float, float, float]:
    n = len(kept)
    if n == 0:
        return math.nan, 0.0, 1.0
    mean = float(np.mean(kept))
    z = 1.96
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    low, high = centre - half, centre + half
    if n >= 2 * BATCHES:
        means = np.array([np.mean(batch) for batch in np.array_split(kept, BATCHES)])
        wide = _T_95[BATCHES - 2] * float(np.std(means, ddof=1)) / math.sqrt(BATCHES)
        low, high = min(low, mean - wide), max(high, mean + wide)
    return mean, max(0.0, low), min(1.0, high)


def _percentiles(values: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    if not len(values):
        return math.nan, math.nan, math.nan
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return float(p50), float(p90), float(p99)


def goodput(
    attain: Callable[[float], float],
    target: float,
    *,
    start: float = 1.0,
    low: float = 0.0,
    high: float = math.inf,
    resolution: float = 0.02,
) -> float:
    """The highest rate (requests/s) with attain(rate) ≥ target, to a relative `resolution`, from below.

    `attain` is taken to fall with the rate. From `start` the rate is doubled while the target is met, or
    halved while it is missed; the bracket is then bisected in the geometric mean. `low` is a rate known to
    meet the target (0: none is), `high` one known to miss it, such as a fluid capacity; neither is tried.
    Returns a rate that met the target, 0.0 where none did down to start/1024. Raises `ValueError` for a start
    outside (low, high).
    """
    if not low < start < high:
        raise ValueError(f"goodput must start between {low:g} and {high:g} requests/s, not at {start:g}")
    good, bad, rate = low, high, start
    while True:
        if attain(rate) >= target:
            good = rate
        else:
            bad = rate
        if good <= 0:
            if bad <= start / 1024:
                return 0.0
            rate = bad / 2
        elif bad <= good * (1 + resolution):
            return good
        else:
            rate = 2 * good if math.isinf(bad) else math.sqrt(good * bad)
