"""The figures behind the report page: what is simulated and searched for it. Pure: nothing is drawn or written here.

Everything is predicted by the simulator on fresh seeds that all curves share (common random numbers), so that curves
differ by their plans and not by their luck. Rates are req/s, times are seconds, shares are 0…1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from disaggserve import plan as planning
from disaggserve import search, simulate
from disaggserve.api.errors import Infeasible
from disaggserve.api.plan import Plan, RoleName, RolePlan, in_words
from disaggserve.api.spec import Spec
from disaggserve.latency import Profile, Provenance
from disaggserve.search.predicting import FRESH_SEEDS
from disaggserve.simulate import Deployment, Outcome, Parts, Prediction, Promise
from disaggserve.workload import Requests, Workload

Tell = Callable[[str, int, int], None]  # what is being done, how many of it are done, of how many
Algorithm = Literal["Joint", "DistServe", "HighAffinity", "LowAffinity"]

MOST_CURVES = 5
_SHAPE = r"(\d{1,3})×tp(\d{1,2})(?:pp(\d{1,2}))?"
_ALTERNATIVE = re.compile(
    rf"prefill {_SHAPE}, decode {_SHAPE}|colocated {_SHAPE} with (?:chunks of (\d{{1,5}})|whole prompts)"
)
ROLES: tuple[RoleName, ...] = ("prefill", "decode", "mixed")
SCALES = (0.5, 0.625, 0.75, 0.875, 1.0, 1.25, 1.5, 1.75, 2.0)  # of both limits of the promise
GROWTH = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)  # of the planned rate
BASELINE_GROWTH = (0.5, 1.0, 2.0, 5.0)  # the same for the paper's algorithms, whose searches cost more
STEPS_PER_OCTAVE = 8  # rates simulated for a curve: 9 % apart
LOWEST_STEP, HIGHEST_STEP = -32, 40  # 1/16 to 32 times the planned rate
SEEDS = FRESH_SEEDS[:5]
ENOUGH = 4000  # requests a seed for a point of a curve
SHOWN_ATTAINMENT = 0.3  # a curve is drawn down to here
PERCENTILES = (50, 90, 99)
HALF_WIDTH = 2.5  # percentiles on either side whose requests a breakdown is the mean of
PARTS_MEANING = {
    "prefill": (
        "The first token leaves from prefill. Waiting for decode is for its memory, for the link and for a step to end."
    ),
    "decode": (
        "The first token leaves from decode, so everything but most of decode comes before it; waiting for memory at decode "
        "and for the link counts as prefill here."
    ),
}
ALGORITHMS: tuple[Algorithm, ...] = ("Joint", "HighAffinity", "LowAffinity")
NAMES = {
    "Joint": "joint",
    "DistServe": "DistServe (the fabric chooses)",
    "HighAffinity": "Algorithm 1 (high affinity)",
    "LowAffinity": "Algorithm 2 (low affinity)",
}


@dataclass(frozen=True, eq=False)
class Candidate:
    """A plan to draw: the chosen one, or one that lost."""

    name: str
    words: str  # prefill 1×tp4, decode 1×tp2
    gpus: int
    deployment: Deployment  # of one copy
    copies: int  # pairs of a low-affinity plan, each with its share of the requests
    why: str  # why it lost; empty for the chosen one


@dataclass(frozen=True)
class Point:
    """Attainment at one rate."""

    rate: float
    attainment: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Curve:
    """What one candidate attains by rate, and its goodput by the scale of the promise (0: none)."""

    candidate: Candidate
    points: tuple[Point, ...]
    goodputs: tuple[float, ...]  # one for each of SCALES


@dataclass(frozen=True)
class Breakdown:
    """Mean parts of the requests around a percentile: of TTFT, up to the first token; of the whole time, to the last."""

    percentile: int
    to_first: Parts[float]
    whole: Parts[float]


@dataclass(frozen=True)
class Step:
    """GPUs that an algorithm plans at a rate; None where it finds no plan, with the reason."""

    rate: float
    gpus: int | None
    words: str


@dataclass(frozen=True)
class Again:
    """The plan made anew for a scaled promise at the planned rate; None where there is none."""

    scale: float
    gpus: int | None
    goodput_per_gpu: float
    words: str


@dataclass(frozen=True, eq=False)
class Report:
    """All that the page shows beside the plan itself."""

    promise: Promise
    curves: tuple[Curve, ...]  # the chosen plan's first
    breakdown: tuple[Breakdown, ...]
    first_token_from: Literal["prefill", "decode"]
    growth: tuple[tuple[str, tuple[Step, ...]], ...]  # by algorithm, the chosen one first
    again: tuple[Again, ...]
    provenance: tuple[Provenance, ...]


@dataclass(frozen=True, eq=False)
class Asked:
    """What the plan was asked for: searches for other rates and promises ask the same."""

    spec: Spec
    facts: planning.Facts
    workload: Workload
    options: planning.Options = planning.DEFAULT

    def plan(
        self, *, rate: float | None = None, scale: float = 1.0, algorithm: Algorithm | None = None
    ) -> Plan:
        """The fewest GPUs for that rate and the promise so scaled. Raises Infeasible."""
        promise = planning.promise(self.spec)
        limits = {
            name: f"{limit_s * scale * 1000:.6f}ms"
            for name, limit_s in (("ttft", promise.ttft_s), ("tpot", promise.tpot_s))
        }
        planner = {"algorithm": algorithm or self.spec.planner.algorithm}
        spec = self.spec.model_copy(
            update={
                "slo": self.spec.slo.model_copy(update=limits),
                "planner": self.spec.planner.model_copy(update=planner),
                "plan": None,
            }
        )
        workload = replace(self.workload, rate=rate or self.workload.rate)
        options = planning.Options(profile=self.options.profile)
        return planning.draft(spec, self.facts, workload, options=options).plan


def collect(asked: Asked, draft: planning.Draft, tell: Tell) -> Report:
    """Simulate and search all that the page of this plan needs."""
    workload = asked.workload
    promise = planning.promise(asked.spec)
    candidates = _candidates(asked, draft.plan, tell)
    curves = []
    for n, candidate in enumerate(candidates):
        tell("attainment by rate and promise", n, len(candidates))
        curves.append(_curve(candidate, workload, promise))
    tell("where the time goes", 0, 1)
    chosen = candidates[0].deployment
    breakdown = _breakdown(chosen, replace(workload, rate=workload.rate / candidates[0].copies))
    pools = chosen.prefill + chosen.mixed + chosen.decode
    return Report(
        promise=promise,
        curves=tuple(curves),
        breakdown=breakdown,
        first_token_from=chosen.first_token_from,
        growth=_growth(asked, tell),
        again=_again(asked, tell),
        provenance=tuple(dict.fromkeys(p.times.provenance for p in pools)),
    )


# ---- candidates


def _candidates(asked: Asked, chosen: Plan, tell: Tell) -> list[Candidate]:
    """The chosen plan, the search's own runners-up, then what other algorithms would have chosen; each shape once."""
    profile = asked.options.profile
    found = [_candidate(chosen, "chosen", "", profile)]
    plans = [(name, plan, why) for name, plan, why in _runners_up(chosen)]
    others = [a for a in ALGORITHMS if a != chosen.algorithm]
    for n, algorithm in enumerate(others):
        tell("other algorithms", n, len(others))
        try:
            other = asked.plan(algorithm=algorithm)
        except Infeasible:
            continue
        plans.append((NAMES[algorithm], other, _lost(other, chosen, asked.spec.planner.algorithm)))
    for name, plan, why in plans:
        if len(found) < MOST_CURVES and in_words(plan.roles) not in [c.words for c in found]:
            found.append(_candidate(plan, name, why, profile))
    return found


def _runners_up(chosen: Plan) -> Iterator[tuple[str, Plan, str]]:
    """The first rejected of each kind (apart, colocated) that is named as a whole plan is, and why it lost."""
    seen = set()
    for rejected in chosen.rejected:
        found = _ALTERNATIVE.fullmatch(rejected.what)
        if found is None:
            continue
        shapes = [found.group(i, i + 1, i + 2) for i in (1, 4, 7)]
        roles = tuple(
            RolePlan(
                role=role,
                count=int(n),
                tp=int(tp),
                pp=int(pp or 1),
                chunk=int(found[10]) if found[10] else None,
            )
            for role, (n, tp, pp) in zip(ROLES, shapes, strict=True)
            if n
        )
        name = "colocated" if roles[0].role == "mixed" else "runner-up"
        if name not in seen:
            seen.add(name)
            update = {"roles": roles, "gpus": sum(r.gpus for r in roles), "paired": False}
            yield name, chosen.model_copy(update=update), rejected.reason


def _lost(other: Plan, chosen: Plan, asked: str) -> str:
    """Why what another algorithm found is not the plan."""
    what = f"takes {other.gpus} GPUs, the chosen {chosen.gpus}"
    if other.gpus < chosen.gpus:
        return f"{what}; it was not asked for: planner.algorithm is {asked}"
    mine, theirs = chosen.goodput_per_gpu, other.goodput_per_gpu
    return f"{what}; good for {theirs:.2f} req/s per GPU, the chosen for {mine:.2f}"


def _candidate(plan: Plan, name: str, why: str, profile: Profile | None) -> Candidate:
    deployment = planning.replay(plan, profile)[0]
    return Candidate(name, in_words(plan.roles), plan.gpus, deployment, planning.copies(plan), why)


# ---- attainment and goodput


class _Ladder:
    """One candidate at rates a fixed ratio apart, each simulated once for every promise asked of it."""

    def __init__(self, candidate: Candidate, workload: Workload) -> None:
        self._candidate, self._workload = candidate, workload
        self._seen: dict[int, tuple[Requests, Outcome]] = {}

    def rate(self, step: int) -> float:
        return float(self._workload.rate * 2 ** (step / STEPS_PER_OCTAVE))

    def judged(self, step: int, promise: Promise) -> Prediction:
        if step not in self._seen:
            at = replace(self._workload, rate=self.rate(step) / self._candidate.copies)
            self._seen[step] = search.observe(self._candidate.deployment, at, seeds=SEEDS, enough=ENOUGH)
        return simulate.judge(*self._seen[step], promise)

    def goodput(self, promise: Promise, near: int) -> tuple[float, int]:
        """The rate at which attainment falls through the target, between two steps by its straight line, and
        the step below; (0, lowest step) where even the lowest rate misses it."""
        good, bad = near, near
        while self.judged(good, promise).attainment < promise.attainment:
            bad, good = good, good - 4
            if good < LOWEST_STEP:
                return 0.0, LOWEST_STEP
        while bad <= good or self.judged(bad, promise).attainment >= promise.attainment:
            good, bad = max(good, bad), max(good, bad) + 4
            if bad > HIGHEST_STEP:
                return self.rate(HIGHEST_STEP), HIGHEST_STEP
        while bad - good > 1:
            middle = (good + bad) // 2
            kept = self.judged(middle, promise).attainment >= promise.attainment
            good, bad = (middle, bad) if kept else (good, middle)
        over, under = self.judged(good, promise).attainment, self.judged(bad, promise).attainment
        share = (over - promise.attainment) / (over - under)
        return self.rate(good) + share * (self.rate(bad) - self.rate(good)), good


def _curve(candidate: Candidate, workload: Workload, promise: Promise) -> Curve:
    ladder = _Ladder(candidate, workload)
    goodputs = {}
    near = 0
    for scale in sorted(SCALES, key=lambda s: (abs(s - 1), s)):
        goodputs[scale], step = ladder.goodput(_scaled(promise, scale), near)
        near = step if scale == 1 else near
    step = -STEPS_PER_OCTAVE * 2
    points: list[Point] = []
    while step <= HIGHEST_STEP:
        judged = ladder.judged(step, promise)
        points.append(Point(ladder.rate(step), judged.attainment, judged.low, judged.high))
        if judged.attainment < SHOWN_ATTAINMENT and ladder.rate(step) > workload.rate:
            break
        step += 1 if judged.attainment < 0.999 or step >= -2 else 2
    return Curve(candidate, tuple(points), tuple(goodputs[s] for s in SCALES))


def _scaled(promise: Promise, scale: float) -> Promise:
    return Promise(promise.ttft_s * scale, promise.tpot_s * scale, promise.attainment)


# ---- where the time goes


def _breakdown(deployment: Deployment, workload: Workload) -> tuple[Breakdown, ...]:
    requests, outcome = search.observe(deployment, workload)
    done = outcome.last_ns >= 0
    if not done.any():
        return ()
    whole = np.stack(simulate.parts(deployment, requests, outcome))
    ttft_s = ((outcome.first_ns - requests.arrival_ns) / 1e9)[done]
    ends = np.minimum(np.cumsum(whole, axis=0), ttft_s)
    to_first = np.diff(ends, axis=0, prepend=0.0)
    return tuple(
        Breakdown(
            percentile,
            Parts(*to_first[:, _around(ttft_s, percentile)].mean(axis=1).tolist()),
            Parts(*whole[:, _around(whole.sum(axis=0), percentile)].mean(axis=1).tolist()),
        )
        for percentile in PERCENTILES
    )


def _around(values: npt.NDArray[np.float64], percentile: float) -> npt.NDArray[np.int64]:
    """Which of the values lie within HALF_WIDTH percentiles of that one, at least one of them."""
    order = np.argsort(values, kind="stable")
    low = int(len(order) * max(0.0, percentile - HALF_WIDTH) / 100)
    high = math.ceil(len(order) * min(100.0, percentile + HALF_WIDTH) / 100)
    return order[min(low, len(order) - 1) : max(high, low + 1)]


# ---- other rates, other promises


def _growth(asked: Asked, tell: Tell) -> tuple[tuple[str, tuple[Step, ...]], ...]:
    asked_for = asked.spec.planner.algorithm
    factors = {"DistServe": BASELINE_GROWTH, asked_for: GROWTH}
    total, done = sum(map(len, factors.values())), 0
    found = []
    for algorithm in dict.fromkeys((asked_for, "DistServe")):
        steps = []
        for factor in factors[algorithm]:
            tell("GPUs by rate", done, total)
            done += 1
            rate = asked.workload.rate * factor
            try:
                plan = asked.plan(rate=rate, algorithm=algorithm)
            except Infeasible as error:
                steps.append(Step(rate, None, str(error)))
            else:
                steps.append(Step(rate, plan.gpus, in_words(plan.roles)))
        found.append((NAMES[algorithm], tuple(steps)))
    return tuple(found)


def _again(asked: Asked, tell: Tell) -> tuple[Again, ...]:
    found = []
    for n, scale in enumerate(SCALES):
        tell("plans for other promises", n, len(SCALES))
        try:
            plan = asked.plan(scale=scale)
        except Infeasible as error:
            found.append(Again(scale, None, 0.0, str(error)))
        else:
            found.append(Again(scale, plan.gpus, plan.goodput_per_gpu, in_words(plan.roles)))
    return tuple(found)


def front(report: Report) -> list[tuple[float, float]]:
    """(scale, goodput per GPU): the best at each scale of all plans drawn; the Pareto front."""
    best: list[tuple[float, float]] = []
    for n, scale in enumerate(SCALES):
        offers: Sequence[float] = [c.goodputs[n] / c.candidate.gpus for c in report.curves]
        best.append((scale, max(*offers, report.again[n].goodput_per_gpu)))
    return best
