"""The fewest GPUs that keep the promise, or the lowest price: costs one by one, all splits of each."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from disaggserve import engines
from disaggserve.catalogue import GPU
from disaggserve.engines import Role
from disaggserve.hardware import Inventory
from disaggserve.search import mixed, predicting
from disaggserve.search.field import Field, Ground, Plan, Split, pod_link
from disaggserve.search.goodputs import SCREEN
from disaggserve.search.mixed import Mixed
from disaggserve.search.problem import Placement, Rejected, Shape
from disaggserve.search.words import in_gpus
from disaggserve.simulate import Prediction

HOPE = 0.04  # a phase alone, or both multiplied, may miss the target by so much and be simulated whole
SCREENED, FINALISTS = 18, 6  # of one cost: simulated whole on few requests; of these on three seeds
MOST_GPUS = 4096  # where it is asked how many would do
WALKED = 6  # costs tried one by one where none keeps the promise, before it is asked whether twice the GPUs bring more
RISES = 0.01  # attainment that twice the GPUs must add to be worth doubling again


class Cost(NamedTuple):
    """What is made least: the price of an hour where prices are given, then GPUs."""

    price: float
    gpus: int


class Fewest:
    """What costs least on a field."""

    def __init__(self, field: Field) -> None:
        self.field = field
        self._least: dict[tuple[GPU, Role, Shape, int], int | None] = {}

    def _cost(self, split: Split) -> Cost:
        gpus = {"prefill": split.prefill.gpus * split.n, "decode": split.decode.gpus * split.m}
        prices, ground = self.field.problem.prices, self.field.grounds[split.ground]
        price = (
            prices[ground.prefill.product] * gpus["prefill"] + prices[ground.decode.product] * gpus["decode"]
            if prices
            else 0.0
        )
        return Cost(round(price, 6), gpus["prefill"] + gpus["decode"])

    def levels(self, most: int) -> Iterator[tuple[Cost, list[Split]]]:
        """Splits of equal cost, dearer and dearer, none of more than `most` GPUs, each with the instances at least that
        the phases alone need; only those are yielded that let hope."""
        heap: list[tuple[Cost, bool, Split, int]] = []

        def push(split: Split, refined: bool, least_m: int) -> None:
            cost = self._cost(split)
            if cost.gpus <= most:
                heapq.heappush(heap, (cost, refined, split, least_m))

        for i, ground in enumerate(self.field.grounds):
            for p, d in self.field.pairs_of(ground):
                n, m = self._fluid(ground, "prefill", p), self._fluid(ground, "decode", d)
                push(Split(i, p, n, d, m), False, 0)
        while heap:
            level = heap[0][0]
            found: list[Split] = []
            while heap and heap[0][0] == level:
                _, refined, split, least_m = heapq.heappop(heap)
                if refined:
                    found.append(split)
                    push(split._replace(m=split.m + 1), True, least_m)
                    if split.m == least_m:
                        push(split._replace(n=split.n + 1), True, least_m)
                    continue
                ground = self.field.grounds[split.ground]
                n_alone = self._fewest_alone(ground.prefill, "prefill", split.prefill, split.n, most)
                if n_alone is None:
                    continue
                m_alone = self._fewest_alone(ground.decode, "decode", split.decode, split.m, most)
                if m_alone is not None:
                    push(split._replace(n=n_alone, m=m_alone), True, m_alone)
            hopeful = [(self._hope(split), split) for split in found]
            target = self.field.problem.promise.attainment
            best = sorted((-hope, split) for hope, split in hopeful if hope >= target - HOPE)
            if best:
                few = SCREENED if self.field.problem.workload.rate <= predicting.MANY_S else FINALISTS
                yield level, [split for _, split in best[:few]]

    def _fluid(self, ground: Ground, role: Role, shape: Shape) -> int:
        goodputs = self.field.goodputs[ground.gpu(role)]
        per_s = goodputs.fluid(role, shape)
        if role == "decode":  # KV comes to an instance one request after another
            per_s = min(per_s, 1 / float(np.mean(goodputs.moved_rows(ground.link))))
        # A window's own rate may be a little lower than the workload's.
        return max(1, math.ceil(0.95 * self.field.problem.workload.rate / per_s))

    def _fewest_alone(self, gpu: GPU, role: Role, shape: Shape, least: int, most: int) -> int | None:
        """Fewest instances with which the phase alone lets hope; None where as many as fit do not."""
        key = (gpu, role, shape, most)
        if key not in self._least:
            enough = self.field.problem.promise.attainment - HOPE
            missed, step, count = least - 1, 1, least
            while count * shape.gpus <= most and self._alone(gpu, role, shape, count) < enough:
                missed, count, step = count, count + step, 2 * step
            if count * shape.gpus > most:
                count = most // shape.gpus
                if count <= missed or self._alone(gpu, role, shape, count) < enough:
                    self._least[key] = None
                    return None
            while count - missed > 1:
                middle = (count + missed) // 2
                if self._alone(gpu, role, shape, middle) < enough:
                    missed = middle
                else:
                    count = middle
            self._least[key] = count
        return self._least[key]

    def _alone(self, gpu: GPU, role: Role, shape: Shape, count: int) -> float:
        return self.field.goodputs[gpu].alone(role, shape, count, self.field.problem.workload.rate)

    def _hope(self, split: Split) -> float:
        """What both phases alone make of the promise, if one's misses are not the other's."""
        ground = self.field.grounds[split.ground]
        return self._alone(ground.prefill, "prefill", split.prefill, split.n) * self._alone(
            ground.decode, "decode", split.decode, split.m
        )

    def best(self, plans: Sequence[Plan], what: str) -> tuple[Plan, Prediction, list[Rejected]] | None:
        """The plan that keeps the promise on fresh seeds, of those of one cost, and why the others lost.

        Least change from what stands first, then the most requests that keep it.
        """
        target, rate = self.field.problem.promise.attainment, self.field.problem.workload.rate
        screened: list[tuple[float, Plan]] = []
        for done, plan in enumerate(plans):
            self.field.tell(f"{what}: {plan.words}", done, len(plans))
            kept = self.field.kept(plan, rate, predicting.SEARCH_SEEDS[:1], SCREEN).both
            screened.append((kept, plan))
        screened.sort(key=lambda s: (-s[0], s[1].split))
        last = FINALISTS if rate <= predicting.MANY_S else FINALISTS // 2
        finalists = [
            (self.field.kept(plan, rate).both, plan)
            for kept, plan in screened[:last]
            if kept >= target - HOPE
        ]
        # Where several keep it with ease, fewer stages: decode with pp above 1 is slower in real runs than the latency
        # model says (REFERENCE § 1).
        finalists.sort(
            key=lambda f: (
                f[0] < target,
                f[1].changed,
                f[0] < target + HOPE / 2,
                f[1].split.prefill.pp + f[1].split.decode.pp,
                -f[0],
                f[1].split,
            )
        )
        said: list[Rejected] = []
        for kept, plan in finalists:
            if kept < target - HOPE / 4:
                continue
            prediction = self.field.predict(plan, rate)
            if prediction.attainment >= target:
                others = [
                    Rejected(other.words, f"{what} too, and {mine:.1%} keep the promise at that rate")
                    for mine, other in finalists
                    if other is not plan
                ]
                return plan, prediction, said + others[:3]
            said.append(Rejected(plan.words, f"attains {prediction.attainment:.1%} on fresh seeds"))
        if not said and screened:
            kept, plan = max(finalists, key=lambda f: f[0]) if finalists else screened[0]
            said.append(Rejected(plan.words, f"{kept:.1%} keep the promise, the best of {what}"))
        self.field.rejected[:0] = said[:1]
        return None

    # -------------------------------------------------------------------------------------------- do not disaggregate

    def mixed(self, pools: Cost | None) -> Placement | None:
        """Instances that prefill and decode, where they cost less than `pools` (None: than nothing that was found) and
        the engine can run them. What loses, and what the engine cannot do, is among the rejected."""
        problem, target = self.field.problem, self.field.problem.promise.attainment
        found: list[tuple[Cost, Mixed, float, Inventory]] = []
        for gpu, inventory in self.field.products:
            free = min(problem.max_gpus, inventory.gpus_free)
            while pools and free > 0 and self._mixed_cost(gpu, free) >= pools:
                free -= 1
            self.field.tell(f"one kind of instance on {gpu.short}", 0, 1)
            link = pod_link(gpu, inventory)
            for one, share in mixed.fewest(
                problem, self.field.goodputs[gpu], self.field.whole(gpu), free, link
            ):
                found.append((self._mixed_cost(gpu, one.gpus), one, share, inventory))
        found.sort(key=lambda f: (f[0], -f[2], f[1].gpu.product))
        tried = Counter[Cost]()
        for cost, one, share, inventory in found:
            if tried[cost] == FINALISTS // 2:  # few requests flatter: what costs more has its turn
                continue
            tried[cost] += 1
            plan = self.field.mixed_plan(one, inventory)
            if plan is None:
                continue
            if share >= target - HOPE / 4:
                share = self.field.kept(plan, problem.workload.rate).both
            if share < target:
                self.field.rejected.append(
                    Rejected(str(one), f"{share:.1%} keep the promise on {in_gpus(cost.gpus)}")
                )
                continue
            refused = (engines.refuse_chunk(problem.engine, chunk) for _, chunk in one.parts)
            if reason := engines.refuse_mixed(problem.engine, len(one.parts)) or next(
                filter(None, refused), None
            ):
                words = f"{reason}; it would take {in_gpus(cost.gpus)}"
                self.field.rejected.insert(0, Rejected(str(one), words))
                if not problem.engine.colocates:
                    return None
                continue
            prediction = self.field.predict(plan, problem.workload.rate)
            if prediction.attainment >= target:
                return self.field.placement(plan, prediction, [])
            self.field.rejected.append(
                Rejected(str(one), f"attains {prediction.attainment:.1%} on fresh seeds")
            )
        return None

    def _mixed_cost(self, gpu: GPU, gpus: int) -> Cost:
        return Cost(round(self.field.problem.prices.get(gpu.product, 0.0) * gpus, 6), gpus)

    # -------------------------------------------------------------------------------------------------------- no plan

    def would_take(self) -> str:
        """How many GPUs would keep the promise at the rate, wherever they stood: the first costs one by one, then twice the
        instances of the best split and again, while that brings more."""
        rate, target = self.field.problem.workload.rate, self.field.problem.promise.attainment

        def kept(split: Split) -> float:
            return self.field.kept(self.field.plan(split, ()), rate).both

        def takes(split: Split) -> str:
            return f"{rate:g} req/s takes {self._cost(split).gpus} GPUs ({self.field.plan(split, ()).words})"

        best, at = 0.0, None
        for _, splits in itertools.islice(self.levels(MOST_GPUS), WALKED):
            share, split = max(((kept(split), split) for split in splits[:FINALISTS]), key=lambda k: k[0])
            if share >= target:
                return takes(split)
            if share > best:
                best, at = share, split
        if at is None:
            return f"{rate:g} req/s takes more than {MOST_GPUS} GPUs"
        while True:
            double = at._replace(n=2 * at.n, m=2 * at.m)
            if self._cost(double).gpus > MOST_GPUS:
                return f"{rate:g} req/s takes more than {MOST_GPUS} GPUs"
            share = kept(double)
            if share >= target:
                break
            if share < best + RISES:
                return (
                    f"{rate:g} req/s is kept by no number of GPUs: {share:.1%} keep the promise with "
                    f"{self._cost(double).gpus} ({self.field.plan(double, ()).words}), {best:.1%} with half of them"
                )
            best, at = share, double
        few, enough = 8, 16  # eighths of `at`
        while enough - few > 1:
            middle = (few + enough) // 2
            if kept(_eighths(at, middle)) >= target:
                enough = middle
            else:
                few = middle
        return takes(_eighths(at, enough))


def _eighths(split: Split, eighths: int) -> Split:
    """So many eighths of its instances, rounded up."""
    return split._replace(n=-(-split.n * eighths // 8), m=-(-split.m * eighths // 8))
