"""Drift on synthetic traffic: what is judged, what is held, and an hour of the demo's own traffic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from disaggserve import drift, metric_names, plan, workload
from disaggserve.api import manifest
from disaggserve.api.model import seconds
from disaggserve.api.plan import Commit
from disaggserve.api.spec import Spec
from disaggserve.workload import Lengths, Requests, Workload, preset
from tests.integration.bench import node

ROOT = Path(__file__).parents[2]
CHAT = manifest.load((ROOT / "examples/chat.yaml").read_text())[0].spec
FACTS = plan.Facts(nodes=(node("gpu-0", 8), node("gpu-1", 8)))


def commit(draft: plan.Draft, revision: int) -> Commit:
    numbered = draft.plan.model_copy(update={"revision": revision})
    return Commit(
        plan=numbered,
        instances=draft.instances,
        inputs=plan.inputs(CHAT),
        workload_inputs=plan.workload_inputs(CHAT),
        cause="Spec",
        reason="test",
    )


def learned(requests: Requests) -> Lengths:
    """What the router's counters would keep of these requests."""
    edges_in, edges_out = np.array(metric_names.INPUT_EDGES), np.array(metric_names.OUTPUT_EDGES)
    i = np.searchsorted(edges_in, requests.input, side="left") - 1
    j = np.searchsorted(edges_out, requests.output, side="left") - 1
    counts = np.zeros((len(edges_in) - 1, len(edges_out) - 1))
    np.add.at(counts, (i, j), 1)

    def means(values: np.ndarray, bucket: np.ndarray, n: int) -> list[float]:
        return [float(values[bucket == k].mean()) if (bucket == k).any() else float("nan") for k in range(n)]

    return workload.from_cells(
        counts.tolist(),
        edges_in.tolist(),
        edges_out.tolist(),
        means(requests.input, i, len(edges_in) - 1),
        means(requests.output, j, len(edges_out) - 1),
    )


def window(requests: Requests, begin_s: float, length_s: float) -> drift.Window:
    """One window of a trace as Prometheus would tell it."""
    inside = (requests.arrival_ns >= begin_s * 1e9) & (requests.arrival_ns < (begin_s + length_s) * 1e9)
    cut = Requests(requests.arrival_ns[inside], requests.input[inside], requests.output[inside])
    gaps = np.diff(cut.arrival_ns) / 1e9
    cv = float(gaps.std() / gaps.mean())
    n = len(cut)
    return drift.Window(rate=n / length_s, cv=cv, requests=n, attainment=None, judged=0, lengths=learned(cut))


def hour(scale: float, seed: int, duration_s: float = 3600) -> Requests:
    lengths = preset("sharegpt").scaled(scale, 2048)
    return Workload(rate=CHAT.workload.rate, cv=1.0, lengths=lengths).requests(duration_s, seed)


def drive(
    spec: Spec, requests: Requests, began: Commit, since_s: float = 1e6
) -> list[tuple[float, Commit, str]]:
    """Looks at every window's end as the operator does; returns the plans that it commits."""
    length_s = seconds(spec.replan.window)
    end_s = float(requests.arrival_ns[-1]) / 1e9
    committed: list[tuple[float, Commit, str]] = []
    current, last_s = began, -since_s
    at_s = spec.replan.breaches * length_s
    while at_s <= end_s:
        windows = tuple(
            window(requests, at_s - (n + 1) * length_s, length_s) for n in range(spec.replan.breaches)
        )
        recent = sum(t > at_s - 3600 for t, _, _ in committed)
        history = drift.History(at_s - last_s, recent, current.plan.revision or 0)
        hour = window(requests, at_s - 3600, 3600) if at_s >= 3600 else None
        verdict = drift.judge(spec, current, drift.Traffic(windows, "", hour), history, FACTS)
        if verdict.plan is not None:
            current, last_s = commit(verdict.plan, (current.plan.revision or 0) + 1), at_s
            committed.append((at_s, current, verdict.reason))
        at_s += length_s
    return committed


@pytest.fixture(scope="module")
def first() -> Commit:
    return commit(plan.draft(CHAT, FACTS), 1)


def test_an_hour_of_the_first_traffic_changes_nothing_then_full_prompts_change_it_once(first: Commit) -> None:
    short, full = hour(CHAT.workload.lengths.input_scale, seed=21), hour(1.0, seed=22)
    assert drive(CHAT, short, first) == []
    changes = drive(CHAT, full, first)
    assert len(changes) == 1, [(t, c.plan.prefill, c.plan.decode, why) for t, c, why in changes]
    at_s, second, reason = changes[0]
    assert at_s == CHAT.replan.breaches * seconds(CHAT.replan.window), "as soon as every window misses"
    assert second.plan.gpus > first.plan.gpus
    assert second.plan.predicted.attainment >= CHAT.slo.attainment
    assert "the plan would attain" in reason


def judged(traffic: drift.Traffic, of: Commit, **history: float) -> drift.Verdict:
    past = drift.History(
        history.get("since_last_s", 1e6), int(history.get("in_last_hour", 0)), of.plan.revision or 0
    )
    return drift.judge(CHAT, of, traffic, past, FACTS)


def windows(scale: float, n: int = 3) -> drift.Traffic:
    requests = hour(scale, seed=5, duration_s=60.0 * n)
    return drift.Traffic(tuple(window(requests, 60.0 * k, 60.0) for k in range(n)), "")


def test_unknown_is_held_and_said(first: Commit) -> None:
    verdict = judged(drift.Traffic((), "traffic is unknown: connection refused"), first)
    assert (verdict.plan, verdict.reason) == (None, "traffic is unknown: connection refused")


def test_too_few_windows_or_requests_are_held(first: Commit) -> None:
    assert "2 of 3 windows" in judged(windows(1.0, 2), first).reason
    empty = drift.Window(rate=0.0, cv=1.0, requests=0, attainment=None, judged=0, lengths=None)
    assert "fewer than" in judged(drift.Traffic((empty,) * 3, ""), first).reason


def test_one_good_window_among_bad_ones_is_held(first: Commit) -> None:
    bad, good = windows(1.0).windows, windows(0.333).windows
    verdict = judged(drift.Traffic((bad[0], good[1], bad[2]), ""), first)
    assert verdict.plan is None
    assert "2 of 3" in verdict.reason


def test_dwell_and_budget_hold(first: Commit) -> None:
    assert "minDwell" in judged(windows(1.0), first, since_last_s=5).reason
    assert "maxPerHour" in judged(windows(1.0), first, in_last_hour=2).reason


def test_a_pause_before_one_window_is_not_planned_for(first: Commit) -> None:
    """Its gap is in that window's CV, as one of 100 s is in the demo's when clients wait between two loads."""
    steady = windows(1.0)
    after_pause = replace(steady.windows[2], cv=8.0)
    paused = drift.Traffic((*steady.windows[:2], after_pause), "")
    wanted, found = judged(steady, first).plan, judged(paused, first).plan
    assert wanted is not None
    assert found is not None
    assert found.plan.roles == wanted.plan.roles


def test_far_fewer_gpus_are_taken(first: Commit) -> None:
    large = judged(windows(1.0), first).plan
    assert large is not None
    seen = windows(0.333)
    assert judged(seen, commit(large, 2)).plan is None, "minutes are not enough to shrink"
    lasting = drift.Traffic(seen.windows, "", window(hour(0.333, seed=6), 0, 3600))
    assert judged(lasting, commit(large, 2), since_last_s=1800).plan is None, "nor is a plan of half an hour"
    verdict = judged(lasting, commit(large, 2))
    assert verdict.plan is not None
    assert verdict.plan.plan.gpus <= 0.8 * large.plan.gpus
    assert "would do" in verdict.reason
    hasty = CHAT.model_copy(update={"replan": CHAT.replan.model_copy(update={"horizon": "1m"})})
    verdict = drift.judge(hasty, commit(large, 2), lasting, drift.History(1e6, 0, 2), FACTS)
    assert verdict.plan is None
    assert "GPU-hours in 1m" in verdict.reason


@pytest.mark.parametrize(
    ("attainment", "judged_n", "before", "says"),
    [
        (0.95, 1000, "Unknown", "True"),
        (0.80, 1000, "True", "False"),
        (0.89, 100, "True", "True"),  # within the interval: what was said stands
        (0.91, 100, "False", "False"),
        (0.89, 100, "Unknown", "False"),
        (None, 1000, "True", "Unknown"),
        (0.5, 3, "True", "True"),  # three requests say nothing new
        (0.5, 3, "Unknown", "Unknown"),
    ],
)
def test_meeting_keeps_its_word_within_the_interval(
    attainment: float | None, judged_n: int, before: str, says: str
) -> None:
    seen = drift.Window(rate=5, cv=1, requests=judged_n, attainment=attainment, judged=judged_n, lengths=None)
    assert drift.meeting(seen, 0.9, before) == says


def test_the_example_is_what_the_demo_says() -> None:
    spec = yaml.safe_load((ROOT / "examples/chat.yaml").read_text())["spec"]
    assert (spec["workload"]["rate"], spec["slo"]["ttft"], spec["slo"]["tpot"]) == (5, "250ms", "100ms")


def test_traffic_that_nothing_can_serve_is_said_and_held(first: Commit) -> None:
    tight = CHAT.model_copy(update={"hardware": CHAT.hardware.model_copy(update={"max_gpus": 2})})
    past = drift.History(1e6, 0, 1)
    verdict = drift.judge(tight, first, windows(1.0), past, FACTS)
    assert (verdict.plan, verdict.limit) == (None, "GPUs")
    assert "maxGPUs" in verdict.reason
