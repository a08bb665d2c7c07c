"""Is the committed plan still the right one for the traffic that was seen? Decisions are compared, not statistics.

Growing looks at minutes, shrinking at an hour. The current plan is simulated on each of the last windows; when it misses the
promise in all of them, the placement is run on what was seen. When a plan with at most 80 % of its GPUs would keep the promise
for the whole last hour, at the highest rate that any window saw, that is taken, if it saves more over the horizon than the
switch costs. Unknown is not zero: without a window there is
no verdict but to hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import median
from typing import Literal

import numpy as np

from disaggserve import plan
from disaggserve.api.errors import Infeasible
from disaggserve.api.model import seconds
from disaggserve.api.plan import Commit, Slot
from disaggserve.api.spec import Spec
from disaggserve.workload import Lengths, Workload

Truth = Literal["True", "False", "Unknown"]

SHRINK_TO = 0.8
SHRINK_WINDOW_S = 3600.0
MIN_REQUESTS = 30


@dataclass(frozen=True)
class Window:
    """Traffic of one window, as the routers counted it. `rate`: arrivals per second; `judged`: requests with an outcome."""

    rate: float
    cv: float
    requests: int
    attainment: float | None
    judged: int
    lengths: Lengths | None

    @property
    def tells(self) -> bool:
        """Whether there is enough in it to plan for."""
        return self.requests >= MIN_REQUESTS and self.lengths is not None

    def workload(self, spec: Spec) -> Workload:
        assert self.lengths is not None, "ask `tells` first"
        source = f"observed over {spec.replan.window}"
        return Workload(rate=self.rate, cv=max(0.5, self.cv), lengths=self.lengths, source=source)


@dataclass(frozen=True)
class Traffic:
    """The last windows, latest first; `unknown` says why there are none. `hour`: the last hour as one, None until it was seen."""

    windows: tuple[Window, ...]
    unknown: str
    hour: Window | None = None

    def latest(self, spec: Spec) -> Workload | None:
        """What to plan for: the last windows together, at their highest rate, with headroom and within the bounds."""
        if not self.windows or not all(w.tells for w in self.windows):
            return None
        merged = merge(self.windows, spec)
        return _bounded(merged, spec)


@dataclass(frozen=True)
class History:
    """What the revisions' timestamps say."""

    since_last_s: float
    in_last_hour: int
    revision: int


@dataclass(frozen=True)
class Verdict:
    """`plan` is the better plan when there is one and it may be carried out now. `limit`: what keeps every plan from it."""

    reason: str
    for_revision: int
    plan: plan.Draft | None = None
    missed: int = 0
    limit: str = ""


def merge(windows: Sequence[Window], spec: Spec) -> Workload:
    """All windows as one: lengths in proportion to their requests, the highest rate, and the median CV.

    A pause that ends in one window makes the CV of that window many times what it is before and after; to plan for it
    would be to plan for a burst that never came.
    """
    tables = [w.lengths for w in windows if w.lengths is not None]
    lengths = Lengths(
        "observed",
        np.concatenate([t.input for t in tables]),
        np.concatenate([t.output for t in tables]),
    )
    return Workload(
        rate=max(w.rate for w in windows),
        cv=max(0.5, median(w.cv for w in windows)),
        lengths=lengths,
        source=f"observed over {len(windows)} x {spec.replan.window}",
    )


def _bounded(seen: Workload, spec: Spec) -> Workload:
    rate = seen.rate * spec.replan.headroom
    if spec.workload.min_rate is not None:
        rate = max(rate, spec.workload.min_rate)
    if spec.workload.max_rate is not None:
        rate = min(rate, spec.workload.max_rate)
    return Workload(rate=round(rate, 3), cv=seen.cv, lengths=seen.lengths, source=seen.source)


def meeting(window: Window, target: float, before: str) -> Truth:
    """True, False or Unknown; what was said before stands while the 95 % interval holds the target or requests are few."""
    known: Truth = "True" if before == "True" else "False" if before == "False" else "Unknown"
    if window.attainment is None:
        return "Unknown"
    if window.judged < MIN_REQUESTS:
        return known
    half = 1.96 * sqrt(max(window.attainment * (1 - window.attainment), 1e-4) / window.judged)
    if window.attainment + half < target:
        return "False"
    if window.attainment - half >= target or known == "Unknown":
        return "True" if window.attainment >= target else "False"
    return known


def judge(spec: Spec, commit: Commit, traffic: Traffic, history: History, facts: plan.Facts) -> Verdict:
    """One look. Pure: the same windows give the same verdict."""

    def hold(reason: str, missed: int = 0) -> Verdict:
        return Verdict(reason, history.revision, None, missed)

    if traffic.unknown:
        return hold(traffic.unknown)
    needed = spec.replan.breaches
    if len(traffic.windows) < needed:
        return hold(f"{len(traffic.windows)} of {needed} windows seen since the router started")
    windows = traffic.windows[:needed]
    if not all(w.tells for w in windows):
        return hold(f"fewer than {MIN_REQUESTS} requests in a window")
    hour = traffic.hour
    if hour is not None and (not hour.tells or history.since_last_s < SHRINK_WINDOW_S):
        hour = None  # nothing to shrink by
    predictions = [plan.predict(commit.plan, windows[0].workload(spec))]
    if predictions[0].attainment_high < spec.slo.attainment or hour is not None:
        # Else the plan stays, whatever the windows before this one were like.
        predictions += [plan.predict(commit.plan, w.workload(spec)) for w in windows[1:]]
    missed = sum(p.attainment_high < spec.slo.attainment for p in predictions)
    if 0 < missed < needed:
        return hold(f"the plan misses the promise in {missed} of {needed} windows", missed)
    if history.since_last_s < seconds(spec.replan.min_dwell):
        return hold(
            f"the last plan is {history.since_last_s:.0f} s old, minDwell is {spec.replan.min_dwell}", missed
        )
    if history.in_last_hour >= spec.replan.max_per_hour:
        return hold(
            f"{history.in_last_hour} plans in the last hour, maxPerHour is {spec.replan.max_per_hour}", missed
        )
    attained = median(p.attainment for p in predictions)
    if missed:
        wanted = _bounded(merge(windows, spec), spec)
        try:
            draft = plan.draft(spec, facts, wanted, commit.instances)
        except Infeasible as error:
            return Verdict(f"saw {_seen(wanted, spec)}: {error}", history.revision, None, missed, error.limit)
        if draft.plan.roles == commit.plan.roles:
            return hold("the plan misses the promise and is still the best that can be had", missed)
        reason = (
            f"saw {_seen(wanted, spec)}: the plan would attain {attained:.1%} of {spec.slo.attainment:.0%}"
        )
        return Verdict(reason, history.revision, draft, missed)
    keeps = f"the plan keeps the promise on what was seen ({attained:.1%})"
    if hour is None:
        return hold(keeps)
    wanted = _bounded(merge((hour, *windows), spec), spec)
    try:
        draft = plan.draft(spec, facts, wanted, commit.instances)
    except Infeasible as error:
        return hold(f"{keeps}; with headroom none would: {error}")
    if draft.plan.gpus > SHRINK_TO * commit.plan.gpus:
        return hold(keeps)
    saved, spent = _switch_gpu_hours(spec, commit.instances, draft.instances)
    if saved <= spent:
        return hold(
            f"{keeps}; {draft.plan.gpus} GPUs would do, which saves {saved:.1f} GPU-hours in {spec.replan.horizon}, "
            f"and the switch may cost {spent:.1f}"
        )
    reason = f"saw {_seen(wanted, spec)} for an hour: {draft.plan.gpus} GPUs would do, the plan has {commit.plan.gpus}"
    return Verdict(reason, history.revision, draft)


def _switch_gpu_hours(spec: Spec, old: Sequence[Slot], new: Sequence[Slot]) -> tuple[float, float]:
    """What a smaller plan saves over the horizon, and the most that its new instances can cost while they and the old ones
    stand side by side: from their start until the old ones have drained, as long as the rollout's timeouts allow."""
    saved = sum(s.gpus for s in old) - sum(s.gpus for s in new)
    stay = {(s.identity, s.node, s.template) for s in old}  # a change of role takes no second GPU
    twice = sum(s.gpus for s in new if (s.identity, s.node, s.template) not in stay)
    side_by_side_s = seconds(spec.rollout.ready_timeout) + seconds(spec.rollout.drain_timeout)
    return saved * seconds(spec.replan.horizon) / 3600, twice * side_by_side_s / 3600


def _seen(wanted: Workload, spec: Spec) -> str:
    lengths = wanted.lengths
    return (
        f"{wanted.rate / spec.replan.headroom:.1f} req/s, prompts of {lengths.input.mean():.0f} "
        f"and outputs of {lengths.output.mean():.0f} tokens on average"
    )
