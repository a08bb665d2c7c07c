from __future__ import annotations

import math

import numpy as np
import pytest

from disaggserve import simulate
from disaggserve.simulate import Deployment, Outcome, Prediction, Promise, goodput, judge
from disaggserve.workload import Requests

SECOND = 10**9


def judged(ttft_s: list[float], tpot_s: list[float], output: int = 11, **window: float) -> Prediction:
    """One request a second with these latencies; a negative TTFT: it fits no memory."""
    n = len(ttft_s)
    arrival = np.arange(n, dtype=np.int64) * SECOND
    first = np.array([-1 if t < 0 else round(t * SECOND) for t in ttft_s], dtype=np.int64)
    last = np.array([round(t * SECOND) * (output - 1) for t in tpot_s], dtype=np.int64) + first
    done = first >= 0
    first, last = np.where(done, first + arrival, -1), np.where(done, last + arrival, -1)
    requests = Requests(arrival, np.full(n, 5, dtype=np.int32), np.full(n, output, dtype=np.int32))
    nothing = np.full(n, -1, dtype=np.int64)
    outcome = Outcome(nothing, first, nothing, nothing, last, events=0)
    return judge(requests, outcome, Promise(0.25, 0.1, 0.9), **window)


def test_both_limits_must_be_kept_by_the_same_request() -> None:
    found = judged([0.25, 0.2, 0.3, 0.3], [0.1, 0.2, 0.1, 0.2])
    assert found.attainment == 0.25
    assert found.requests == 4


def test_what_was_never_served_misses_and_has_no_latency() -> None:
    found = judged([0.2, -1.0], [0.05, 0.05])
    assert found.attainment == 0.5
    assert found.ttft == pytest.approx((0.2, 0.2, 0.2))
    assert found.tpot == pytest.approx((0.05, 0.05, 0.05))


def test_one_token_has_no_tpot() -> None:
    found = judged([0.2, 0.2], [9.0, 9.0], output=1)
    assert found.attainment == 1.0
    assert all(math.isnan(p) for p in found.tpot)


def test_only_arrivals_in_the_window_count() -> None:
    found = judged([9.0, 9.0, 0.2, 0.2, 9.0], [0.05] * 5, warmup_s=2, until_s=4)
    assert (found.attainment, found.requests) == (1.0, 2)


def test_nothing_judged_is_unknown_not_zero() -> None:
    found = judged([0.2], [0.05], warmup_s=5)
    assert math.isnan(found.attainment)
    assert (found.low, found.high, found.requests) == (0.0, 1.0, 0)


def test_misses_in_a_row_widen_the_interval() -> None:
    spread = judged([0.2] * 9 + [9.0], [0.05] * 10)
    many = judged(([0.2] * 9 + [9.0]) * 40, [0.05] * 400)
    burst = judged([0.2] * 360 + [9.0] * 40, [0.05] * 400)
    assert many.attainment == burst.attainment == spread.attainment == 0.9
    for found in (spread, many, burst):
        assert 0 <= found.low < 0.9 < found.high <= 1
    assert burst.high - burst.low > 2 * (many.high - many.low)
    assert spread.high - spread.low > 2 * (many.high - many.low)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    draw = np.random.Generator(np.random.PCG64(1))
    covered = 0
    for _ in range(200):
        found = judged(np.where(draw.random(1000) < 0.9, 0.2, 9.0).tolist(), [0.05] * 1000)
        covered += found.low <= 0.9 <= found.high
    assert covered >= 180


@pytest.mark.parametrize("knee", [0.01, 0.7, 1.0, 1.5, 37.0])
@pytest.mark.parametrize("start", [0.1, 1.0, 8.0])
def test_goodput_finds_the_knee(knee: float, start: float) -> None:
    tried: list[float] = []

    def attain(rate: float) -> float:
        tried.append(rate)
        return 0.95 if rate <= knee else 0.5

    found = goodput(attain, 0.9, start=start, resolution=0.01)
    assert knee / 1.01 <= found <= knee
    assert len(tried) < 24


def test_goodput_keeps_to_its_bounds() -> None:
    tried: list[float] = []

    def attain(rate: float) -> float:
        tried.append(rate)
        return 1.0

    assert goodput(attain, 0.9, start=3.0, low=2.0, high=4.0, resolution=0.01) >= 4.0 / 1.01
    assert all(2 < rate < 4 for rate in tried)
    with pytest.raises(ValueError, match="must start between 2 and 4"):
        goodput(attain, 0.9, start=5.0, low=2.0, high=4.0)


def test_goodput_is_nothing_where_nothing_is_met() -> None:
    assert goodput(lambda _: 0.0, 0.9) == 0.0
    assert goodput(lambda _: math.nan, 0.9) == 0.0


def run_of(*rows: tuple[int, int, int, int, int, int], cached: bool = False) -> tuple[Requests, Outcome]:
    """(arrival, prefill start, first, transfer end, decode start, last) in ms, -1 = never; prompts of 1000 tokens."""
    table = np.array(rows, dtype=np.int64)
    times = [np.where(c < 0, -1, c * 1_000_000) for c in table.T]
    lens = np.full(len(rows), 1000, dtype=np.int32)
    requests = Requests(
        times[0], lens, np.arange(2, len(rows) + 2, dtype=np.int32), lens - 1 if cached else None
    )
    return requests, Outcome(times[1], times[2], times[3], times[4], times[5], events=7)


LINKED = Deployment((), (), kv_bytes_per_token=1000, link_bytes_s=1e8, link_latency_s=0.002)  # 12 ms a prompt


def test_the_parts_of_a_request_are_its_whole_time() -> None:
    requests, outcome = run_of(
        (0, 10, 60, 80, 85, 500),
        (5, 60, 110, -1, -1, 110),  # one token, made at prefill
        (6, -1, -1, -1, -1, -1),  # fits nowhere
        (7, 20, 900, 80, 85, 1000),  # its first token is decode's: prefill ends as the transfer begins
    )
    found = simulate.parts(LINKED, requests, outcome)
    expected = [(10, 50, 12, 13, 415), (55, 50, 0, 0, 0), (13, 48, 12, 5, 915)]
    assert pytest.approx(np.array(expected)) == np.stack(found).T * 1000
    assert np.sum(found, axis=0) * 1000 == pytest.approx([500, 105, 993])


def test_runs_are_joined_one_after_another() -> None:
    row = (1, 1, 1)
    first = run_of((0, *row, 1, 9), (100, 110, 120, 130, 140, 150), (300, *row, 1, 9), cached=True)
    other = run_of((99, *row, 1, 9), (150, 160, -1, -1, -1, -1), (299, 300, 301, 302, 303, 900), cached=True)
    requests, outcome = simulate.joined([first, other], 0.1, 0.3)
    assert (requests.arrival_ns // 1_000_000).tolist() == [100, 350, 499]
    assert requests.output.tolist() == [3, 3, 4]
    assert requests.cached is not None
    assert requests.cached.tolist() == [999] * 3
    assert (outcome.last_ns // 1_000_000).tolist() == [150, -1, 1100]
    assert (outcome.prefill_start_ns // 1_000_000).tolist() == [110, 360, 500]
    assert outcome.events == 14


def test_which_requests_kept_the_promise() -> None:
    requests, outcome = run_of((0, 0, 250, 250, 250, 350), (0, 0, 251, 251, 251, 300), (0, 0, 9, 9, 9, 210))
    assert simulate.kept(requests, outcome, Promise(0.25, 0.1, 0.9)).tolist() == [True, False, True]
    assert simulate.kept(requests, outcome, Promise(0.25, 0.06, 0.9)).tolist() == [False, False, False]
