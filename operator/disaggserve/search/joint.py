"""Both pools together: shapes and numbers of prefill and decode instances that cost least, or serve most per GPU.

Prefill and decode queues are pooled, so what an instance is good for depends on how many there are, and on what
the other phase leaves of the promise. The search goes up in cost: the fewest instances of each shape by fluid
capacity, then by its phase alone; every split of the same cost; those that the phases let hope are packed on
nodes and simulated whole, on few requests, then the best of them on three seeds; what would win is judged on
fresh seeds and replaced where it fails (REFERENCE § 3, § 13).
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from disaggserve import catalogue, engines, hardware, simulate
from disaggserve.api.errors import Infeasible
from disaggserve.catalogue import GPU, Link
from disaggserve.engines import Role
from disaggserve.hardware import Inventory, Node
from disaggserve.search import mixed, packing, predicting, shapes
from disaggserve.search.goodputs import SCREEN, Goodputs, Kept, bound_per_gpu
from disaggserve.search.high_affinity import Counts
from disaggserve.search.mixed import Mixed
from disaggserve.search.packing import Group, NoRoom, Standing
from disaggserve.search.paper import MOST_REJECTED, Paper
from disaggserve.search.problem import Placement, Problem, Progress, Rejected, Shape, TooShort
from disaggserve.search.words import floor, milliseconds
from disaggserve.simulate import Deployment, Prediction
from disaggserve.workload import Requests

HOPE = 0.04  # a phase alone, or both multiplied, may miss the target by so much and be simulated whole
SCREENED, FINALISTS = 18, 6  # of one cost: simulated whole on few requests; of these on three seeds
MOST_GPUS = 4096  # where it is asked how many would do
WALKED = 6  # costs tried one by one where none keeps the promise, before it is asked whether twice the GPUs bring more
RISES = 0.01  # attainment that twice the GPUs must add to be worth doubling again
CLOSER = 6000  # requests a seed for the finalists
COUNTS = 64  # beyond so many instances the goodput of each is taken to rise no more
CLIMBED = 2  # for the highest goodput: of the best splits found, so many are improved instance by instance
EQUAL_GOODPUT = 0.02  # goodputs per GPU within the bisection's own step are equal


class Cost(NamedTuple):
    """What is made least: the price of an hour where prices are given, then GPUs."""

    price: float
    gpus: int


@dataclasses.dataclass(frozen=True, eq=False)
class Ground:
    """Where both roles may stand: one GPU product each, and the slowest link between their nodes."""

    prefill: GPU
    decode: GPU
    inventory: Inventory  # of both
    link: Link

    def gpu(self, role: Role) -> GPU:
        return self.prefill if role == "prefill" else self.decode

    def nodes(self, role: Role) -> tuple[Node, ...]:
        return tuple(n for n in self.inventory.nodes if n.gpu is self.gpu(role))

    def __str__(self) -> str:
        where = (
            self.prefill.short
            if self.prefill is self.decode
            else f"prefill on {self.prefill.short}, decode on {self.decode.short}"
        )
        return f"{where}, KV over {self.link.name}"


class Split(NamedTuple):
    """Instances of one shape each, on the ground of that number."""

    ground: int
    prefill: Shape
    n: int
    decode: Shape
    m: int

    @property
    def counts(self) -> Counts:
        return Counts(self.prefill, self.n, self.decode, self.m)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A split on nodes, as it is simulated."""

    split: Split
    groups: tuple[Group, ...]
    link: Link
    deployment: Deployment
    changed: int  # GPUs of instances that would be created or deleted
    gpus: int
    prefill: GPU
    decode: GPU
    words: str


class Joint:
    """One joint search."""

    def __init__(self, problem: Problem, products: Sequence[tuple[GPU, Inventory]], tell: Progress) -> None:
        self.problem, self.tell = problem, tell
        self.rejected: list[Rejected] = []
        self.affinity, self.affinity_reason = hardware.affinity(problem.inventory, problem.affinity)
        if problem.prices:
            for gpu, _ in products:
                if gpu.product not in problem.prices:
                    self.rejected.append(
                        Rejected(f"{gpu.short} nodes", f"hardware.prices has no {gpu.product}")
                    )
            products = [(gpu, nodes) for gpu, nodes in products if gpu.product in problem.prices]
            if not products:
                raise Infeasible(
                    "Nodes",
                    f"hardware.prices has none of the nodes' products: {'; '.join(r.reason for r in self.rejected)}",
                )
        self.products = products
        drawn: dict[tuple[float, int, int], Requests] = {}
        self.goodputs = {gpu: Goodputs(problem, gpu, drawn) for gpu, _ in products}
        self.refused: list[shapes.Refused] = []
        self.shapes = self._shapes()
        self.grounds = self._grounds()
        self._least: dict[tuple[GPU, Role, Shape, int], int | None] = {}
        self._goodput_alone: dict[tuple[GPU, Role, Shape, int], float] = {}

    # ------------------------------------------------------------------------------------------------ what there is

    def _shapes(self) -> dict[tuple[GPU, Role], tuple[Shape, ...]]:
        """Shapes that keep their limit without load, by product and role. Raises `Infeasible` where a role has none."""
        problem = self.problem
        found: dict[tuple[GPU, Role], tuple[Shape, ...]] = {}
        faults: list[Infeasible] = []
        roles: tuple[Role, ...] = ("prefill", "decode")
        for role in roles:
            for gpu, inventory in self.products:
                paper = Paper(
                    dataclasses.replace(problem, inventory=inventory, algorithm="HighAffinity"),
                    gpu,
                    self.tell,
                )
                tried, no = shapes.shapes(
                    problem.model,
                    gpu,
                    problem.engine,
                    role,
                    inventory.nodes,
                    problem.workload.lengths,
                    problem.profile,
                )
                self.refused += no
                kept = tuple(
                    s
                    for s in tried
                    if self.goodputs[gpu].idle(role, s, problem.promise.attainment) <= self._limit_s(role)
                )
                found[gpu, role] = kept
                if not tried:
                    faults.append(paper.no_shape(role, no))
                elif not kept:
                    faults.append(paper.too_slow(role, tried))
            if not any(found[gpu, role] for gpu, _ in self.products):
                raise faults[-len(self.products)]
        self.rejected += [Rejected(f"{fault.limit} on other nodes", str(fault)) for fault in faults]
        return found

    def _grounds(self) -> list[Ground]:
        """Every pair of products; nodes with RDMA apart from all, where not every node has it. KV that must stay inside
        a node leaves none."""
        if self.problem.affinity == "Low":
            return []
        found: list[Ground] = []
        refused = self.problem.inventory.refused
        for a, at_a in self.products:
            for b, at_b in self.products:
                nodes = at_a.nodes if a is b else (*at_a.nodes, *at_b.nodes)
                fast = tuple(n for n in nodes if n.rdma)
                for some in (fast, nodes) if len(fast) < len(nodes) else (nodes,):
                    prefill, decode = ([n for n in some if n.gpu is gpu] for gpu in (a, b))
                    if prefill and decode:
                        links = [
                            predicting.link_between(p, d, self.problem.engine)
                            for p in prefill
                            for d in decode
                        ]
                        link = min(links, key=lambda x: (x.bytes_per_s, -x.latency_s))
                        found.append(Ground(a, b, Inventory(some, refused), link))
        return found

    def _limit_s(self, role: Role) -> float:
        return self.problem.promise.ttft_s if role == "prefill" else self.problem.promise.tpot_s

    def _available(self) -> int:
        standing = sum(k.gpus for k in self.problem.keep if not k.decode_tp)
        return min(self.problem.max_gpus, self.problem.inventory.gpus_free + standing)

    def place(self) -> Placement:
        """The placement. Raises `Infeasible` with the limit that binds and the nearest that could be kept."""
        if not self.grounds:
            return self._inside()
        pools: Placement | None = None
        fault: Infeasible | None = None
        try:
            pools = self._most() if self.problem.objective == "goodput" else self._fewest()
        except Infeasible as e:
            fault = e
        if self.affinity == "High" and self.problem.affinity != "Low":
            if pools is None:
                assert fault is not None
                raise fault
            return pools
        return self._or_pairs(pools, fault)

    # --------------------------------------------------------------------------------------------- the fewest GPUs

    def _fewest(self) -> Placement:
        for cost, splits in self._levels(self._available()):
            found = self._best(self._packed(splits), f"{cost.gpus} GPUs")
            if found is not None:
                return self._mixed(cost) or self._placement(*found)
        fault = self._no_plan()
        placement = self._mixed(None)
        if placement is None:
            raise fault
        return dataclasses.replace(
            placement, rejected=(Rejected("prefill and decode apart", str(fault)), *placement.rejected)
        )

    def _cost(self, split: Split) -> Cost:
        gpus = {"prefill": split.prefill.gpus * split.n, "decode": split.decode.gpus * split.m}
        prices, ground = self.problem.prices, self.grounds[split.ground]
        price = (
            prices[ground.prefill.product] * gpus["prefill"] + prices[ground.decode.product] * gpus["decode"]
            if prices
            else 0.0
        )
        return Cost(round(price, 6), gpus["prefill"] + gpus["decode"])

    def _levels(self, most: int) -> Iterator[tuple[Cost, list[Split]]]:
        """Splits of equal cost, dearer and dearer, none of more than `most` GPUs, each with the instances at least that
        the phases alone need; only those are yielded that let hope."""
        heap: list[tuple[Cost, bool, Split, int]] = []

        def push(split: Split, refined: bool, least_m: int) -> None:
            cost = self._cost(split)
            if cost.gpus <= most:
                heapq.heappush(heap, (cost, refined, split, least_m))

        for i, ground in enumerate(self.grounds):
            for p, d in self._pairs_of(ground):
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
                ground = self.grounds[split.ground]
                n_alone = self._fewest_alone(ground.prefill, "prefill", split.prefill, split.n, most)
                if n_alone is None:
                    continue
                m_alone = self._fewest_alone(ground.decode, "decode", split.decode, split.m, most)
                if m_alone is not None:
                    push(split._replace(n=n_alone, m=m_alone), True, m_alone)
            hopeful = [(self._hope(split), split) for split in found]
            target = self.problem.promise.attainment
            best = sorted((-hope, split) for hope, split in hopeful if hope >= target - HOPE)
            if best:
                few = SCREENED if self.problem.workload.rate <= predicting.MANY_S else FINALISTS
                yield level, [split for _, split in best[:few]]

    def _pairs_of(self, ground: Ground) -> list[tuple[Shape, Shape]]:
        """Pairs of shapes that the engine takes and that keep the promise without load, the transfer in it."""
        problem = self.problem
        found: list[tuple[Shape, Shape]] = []
        for d in self.shapes[ground.decode, "decode"]:
            for p in self.shapes[ground.prefill, "prefill"]:
                if engines.refuse_shape(problem.engine, "prefill", *p, other=d) is not None:
                    continue
                ttft, tpot = self._idle(ground, p, d)
                both = (ttft <= problem.promise.ttft_s) & (tpot <= problem.promise.tpot_s)
                if float(np.mean(both)) >= problem.promise.attainment:
                    found.append((p, d))
        return found

    def _idle(
        self, ground: Ground, p: Shape, d: Shape
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """TTFT and TPOT in seconds by row of the lengths without load, the transfer in whichever has it."""
        decode = self.goodputs[ground.decode]
        ttft = self.goodputs[ground.prefill].idle_rows("prefill", p) + decode.idle_first_rows(d, ground.link)
        return ttft, decode.idle_rows("decode", d, ground.link)

    def _fluid(self, ground: Ground, role: Role, shape: Shape) -> int:
        goodputs = self.goodputs[ground.gpu(role)]
        per_s = goodputs.fluid(role, shape)
        if role == "decode":  # KV comes to an instance one request after another
            per_s = min(per_s, 1 / float(np.mean(goodputs.moved_rows(ground.link))))
        # A window's own rate may be a little lower than the workload's.
        return max(1, math.ceil(0.95 * self.problem.workload.rate / per_s))

    def _fewest_alone(self, gpu: GPU, role: Role, shape: Shape, least: int, most: int) -> int | None:
        """Fewest instances with which the phase alone lets hope; None where as many as fit do not."""
        key = (gpu, role, shape, most)
        if key not in self._least:
            enough = self.problem.promise.attainment - HOPE
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
        return self.goodputs[gpu].alone(role, shape, count, self.problem.workload.rate)

    def _hope(self, split: Split) -> float:
        """What both phases alone make of the promise, if one's misses are not the other's."""
        ground = self.grounds[split.ground]
        return self._alone(ground.prefill, "prefill", split.prefill, split.n) * self._alone(
            ground.decode, "decode", split.decode, split.m
        )

    def _best(self, plans: Sequence[Plan], what: str) -> tuple[Plan, Prediction, list[Rejected]] | None:
        """The plan that keeps the promise on fresh seeds, of those of one cost, and why the others lost.

        Least change from what stands first, then the most requests that keep it.
        """
        target, rate = self.problem.promise.attainment, self.problem.workload.rate
        screened: list[tuple[float, Plan]] = []
        for done, plan in enumerate(plans):
            self.tell(f"{what}: {plan.words}", done, len(plans))
            kept = self._kept(plan, rate, predicting.SEARCH_SEEDS[:1], SCREEN).both
            screened.append((kept, plan))
        screened.sort(key=lambda s: (-s[0], s[1].split))
        last = FINALISTS if rate <= predicting.MANY_S else FINALISTS // 2
        finalists = [
            (self._kept(plan, rate).both, plan) for kept, plan in screened[:last] if kept >= target - HOPE
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
            prediction = self._predict(plan, rate)
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
        self.rejected[:0] = said[:1]
        return None

    # ------------------------------------------------------------------------------------------- do not disaggregate

    def _mixed(self, pools: Cost | None) -> Placement | None:
        """Instances that prefill and decode, where they cost less than `pools` (None: than nothing that was found) and
        the engine can run them. What loses, and what the engine cannot do, is among the rejected."""
        problem, target = self.problem, self.problem.promise.attainment
        found: list[tuple[Cost, Mixed, float, Inventory]] = []
        for gpu, inventory in self.products:
            free = min(problem.max_gpus, inventory.gpus_free)
            while pools and free > 0 and self._mixed_cost(gpu, free) >= pools:
                free -= 1
            self.tell(f"one kind of instance on {gpu.short}", 0, 1)
            link = _pod_link(gpu, inventory)
            for one, share in mixed.fewest(problem, self.goodputs[gpu], self._whole(gpu), free, link):
                found.append((self._mixed_cost(gpu, one.gpus), one, share, inventory))
        found.sort(key=lambda f: (f[0], -f[2], f[1].gpu.product))
        tried = Counter[Cost]()
        for cost, one, share, inventory in found:
            if tried[cost] == FINALISTS // 2:  # few requests flatter: what costs more has its turn
                continue
            tried[cost] += 1
            plan = self._mixed_plan(one, inventory)
            if plan is None:
                continue
            if share >= target - HOPE / 4:
                share = self._kept(plan, problem.workload.rate).both
            if share < target:
                self.rejected.append(
                    Rejected(str(one), f"{share:.1%} keep the promise on {_gpus(cost.gpus)}")
                )
                continue
            refused = (engines.refuse_chunk(problem.engine, chunk) for _, chunk in one.parts)
            if reason := engines.refuse_mixed(problem.engine, len(one.parts)) or next(
                filter(None, refused), None
            ):
                words = f"{reason}; it would take {_gpus(cost.gpus)}"
                self.rejected.insert(0, Rejected(str(one), words))
                if not problem.engine.colocates:
                    return None
                continue
            prediction = self._predict(plan, problem.workload.rate)
            if prediction.attainment >= target:
                return self._placement(plan, prediction, [])
            self.rejected.append(Rejected(str(one), f"attains {prediction.attainment:.1%} on fresh seeds"))
        return None

    def _whole(self, gpu: GPU) -> list[Shape]:
        """Shapes that keep both limits without load."""
        return [s for s in self.shapes[gpu, "prefill"] if s in self.shapes[gpu, "decode"]]

    def _mixed_cost(self, gpu: GPU, gpus: int) -> Cost:
        return Cost(round(self.problem.prices.get(gpu.product, 0.0) * gpus, 6), gpus)

    def _mixed_plan(self, one: Mixed, inventory: Inventory) -> Plan | None:
        """On nodes; None where they do not fit, which is then among the rejected."""
        try:
            (group,) = packing.pack(
                [("mixed", *one.shape, one.count)],
                inventory,
                self._standing(inventory, self.problem.keep),
            )
        except NoRoom as e:
            self.rejected.append(Rejected(str(one), f"does not fit the free GPUs: {e}"))
            return None
        groups = one.groups(group.nodes)
        link = predicting.kv_link(inventory, groups, self.problem.engine)
        split = Split(0, one.shape, one.count, one.shape, 0)
        return Plan(
            split,
            groups,
            link,
            mixed.deployment(self.problem, one, link),
            self._changed(groups),
            one.gpus,
            one.gpu,
            one.gpu,
            str(one),
        )

    # ---------------------------------------------------------------------------------------- the highest goodput

    def _most(self) -> Placement:
        """The highest goodput per GPU of the GPUs at hand; of those that are equal, the highest goodput."""
        found = self._fastest(lambda goodput, gpus: goodput / gpus)
        if found is None:
            raise self._no_plan()
        plan, goodput = found
        prediction = self._predict(plan, goodput)
        while prediction.attainment < self.problem.promise.attainment:
            goodput *= 1 - EQUAL_GOODPUT
            prediction = self._predict(plan, goodput)
        return self._placement(plan, prediction, [], goodput)

    def _fastest(self, value: Callable[[float, int], float]) -> tuple[Plan, float] | None:
        """The plan that fits the GPUs at hand with the highest value of (goodput, GPUs), and its goodput; None where no
        plan fits."""
        most = self._available()
        options: list[tuple[float, Split]] = []
        for i, ground in enumerate(self.grounds):
            for p, d in self._pairs_of(ground):
                if p.gpus + d.gpus > most:
                    continue
                prefill = self._by_count(ground.prefill, "prefill", p, (most - d.gpus) // p.gpus)
                decode = self._by_count(ground.decode, "decode", d, (most - p.gpus) // d.gpus)
                for n, rate in enumerate(prefill.tolist(), 1):
                    room = (most - n * p.gpus) // d.gpus
                    balanced = int(np.searchsorted(decode, rate)) + 1
                    for m in {min(balanced, room), min(max(balanced - 1, 1), room)}:
                        split = Split(i, p, n, d, m)
                        estimate = min(rate, float(decode[m - 1]))
                        options.append((round(value(estimate, split.counts.gpus), 6), split))
        options.sort(key=lambda o: (-o[0], o[1]))
        tried: list[tuple[float, float, Plan]] = []
        seen: set[Split] = set()

        def attempt(split: Split) -> float | None:
            """The value of a split; None where it does not fit or was tried. Phases alone are only a first word on it."""
            counts = split.counts
            if split in seen or min(counts.n, counts.m) < 1 or counts.gpus > most:
                return None
            seen.add(split)
            try:
                plan = self._pack(split)
            except NoRoom:
                return None
            self.tell(f"goodput of {counts}", len(tried), len(tried) + 1)
            ground = self.grounds[split.ground]
            start = min(
                float(self._by_count(ground.prefill, "prefill", split.prefill, split.n)[-1]),
                float(self._by_count(ground.decode, "decode", split.decode, split.m)[-1]),
            )
            goodput = self.goodputs[ground.prefill].joint(plan.deployment, start) if start else 0.0
            if not goodput:
                return None
            tried.append((value(goodput, plan.gpus), goodput, plan))
            return tried[-1][0]

        for _, split in options:  # the best, whatever their shapes
            if attempt(split) is not None and len(tried) == FINALISTS:
                break
        first: dict[tuple[int, Shape, Shape], Split] = {}  # and the best of each pair of shapes
        for _, split in options:
            first.setdefault((split.ground, split.prefill, split.decode), split)
        for split in list(first.values())[:FINALISTS]:
            attempt(split)
        for best, _, top in sorted(tried, key=lambda t: (-t[0], t[2].split))[:CLIMBED]:
            at = top.split
            while True:  # an instance more or less of a role, or of both, or one moved, while that is better
                around = [
                    at._replace(n=at.n + n, m=at.m + m)
                    for n, m in ((1, 0), (0, 1), (-1, 0), (0, -1), (1, 1), (1, -1), (-1, 1))
                ]
                values = [(found, split) for split in around if (found := attempt(split)) is not None]
                found, split = max(values, default=(-math.inf, at), key=lambda v: v[0])
                if found <= best:
                    break
                best, at = found, split
        if self.problem.engine.colocates:
            tried += self._fastest_mixed(value)
        if not tried:
            return None
        best = max(v for v, _, _ in tried)
        equal = [t for t in tried if t[0] >= best * (1 - EQUAL_GOODPUT)]
        _, goodput, plan = min(equal, key=lambda t: (-t[1], t[2].gpus, t[2].split))
        for _, rate, other in sorted(tried, key=lambda t: (-t[0], t[2].split)):
            if other is not plan:
                self.rejected.append(
                    Rejected(
                        other.words,
                        f"{rate / other.gpus:.2f} req/s per GPU, {floor(rate)} in all; the chosen has "
                        f"{goodput / plan.gpus:.2f} and {floor(goodput)}",
                    )
                )
        return plan, goodput

    def _fastest_mixed(self, value: Callable[[float, int], float]) -> list[tuple[float, float, Plan]]:
        """The same of colocated instances: the best two of each product."""
        found: list[tuple[float, float, Plan]] = []
        for gpu, inventory in self.products:
            free = min(self.problem.max_gpus, inventory.gpus_free)
            link = _pod_link(gpu, inventory)
            best = mixed.fastest(self.problem, self.goodputs[gpu], self._whole(gpu), free, link)
            for one, goodput in best[:2]:
                plan = self._mixed_plan(one, inventory) if goodput else None
                if plan is not None:
                    goodput = self.goodputs[gpu].joint(plan.deployment, goodput)
                    found.append((value(goodput, plan.gpus), goodput, plan))
        return found

    def _by_count(self, gpu: GPU, role: Role, shape: Shape, most: int) -> npt.NDArray[np.float64]:
        """Goodput of 1, 2, … `most` instances with their phase alone, req/s: simulated for powers of two up to
        COUNTS, between them and beyond by goodput per instance."""
        goodputs, target = self.goodputs[gpu], self.problem.promise.attainment
        counts = [2**k for k in range(COUNTS.bit_length()) if 2**k < 2 * most]
        each: list[float] = []
        for count in counts:
            key = (gpu, role, shape, count)
            if key not in self._goodput_alone:
                high = 1.2 * count * goodputs.fluid(role, shape)
                self._goodput_alone[key] = simulate.goodput(
                    lambda rate: goodputs.alone(role, shape, count, rate),  # noqa: B023
                    target,
                    start=0.7 * high,
                    high=high,
                    resolution=0.03,
                )
            each.append(self._goodput_alone[key] / count)
        numbers = np.arange(1, most + 1)
        total = numbers * np.interp(np.log2(numbers), np.log2(counts), each)
        return np.maximum.accumulate(total)

    # ------------------------------------------------------------------------------------------------------ no plan

    def _no_plan(self) -> Infeasible:
        """Which limit binds, and the nearest that could be kept."""
        problem = self.problem
        if not any(self._pairs_of(ground) for ground in self.grounds):
            return self._no_pair()
        if not problem.explain:
            return Infeasible("GPUs", f"{problem.workload.rate:g} req/s takes more GPUs")
        most = self._available()
        words: list[str] = []
        if problem.objective == "gpus":
            words.append(self._would_take())
        if problem.max_gpus == most:
            words.append(f"maxGPUs is {most}")
        else:
            words.append(f"{problem.inventory.gpus_free} are free")
        found = self._fastest(lambda goodput, _: goodput)
        if found is None:
            least = min(p.gpus + d.gpus for ground in self.grounds for p, d in self._pairs_of(ground))
            words.append(f"any plan that keeps the promise takes at least {least} GPUs")
        else:
            plan, goodput = found
            words.append(f"with {plan.gpus} GPUs {floor(goodput)} req/s could be kept ({plan.words})")
        return Infeasible("GPUs", "; ".join(words))

    def _would_take(self) -> str:
        """How many GPUs would keep the promise at the rate, wherever they stood: the first costs one by one, then twice the
        instances of the best split and again, while that brings more."""
        rate, target = self.problem.workload.rate, self.problem.promise.attainment

        def kept(split: Split) -> float:
            return self._kept(self._plan(split, ()), rate).both

        def takes(split: Split) -> str:
            return f"{rate:g} req/s takes {self._cost(split).gpus} GPUs ({self._plan(split, ()).words})"

        best, at = 0.0, None
        for _, splits in itertools.islice(self._levels(MOST_GPUS), WALKED):
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
                    f"{self._cost(double).gpus} ({self._plan(double, ()).words}), {best:.1%} with half of them"
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

    def _no_pair(self) -> Infeasible:
        """Where no two shapes keep both limits without load: the limit that more requests miss on the pair that comes
        nearest, and what it would have to be. TTFT and TPOT each can be kept by some shape, for as many requests."""
        problem, promise = self.problem, self.problem.promise
        nearest: tuple[float, Ground, Shape, Shape] | None = None
        for ground in self.grounds:
            for p in self.shapes[ground.prefill, "prefill"]:
                for d in self.shapes[ground.decode, "decode"]:
                    if engines.refuse_shape(problem.engine, "prefill", *p, other=d) is not None:
                        continue
                    ttft, tpot = self._idle(ground, p, d)
                    kept = float(np.mean((ttft <= promise.ttft_s) & (tpot <= promise.tpot_s)))
                    if nearest is None or kept > nearest[0]:
                        nearest = kept, ground, p, d
        if nearest is None:
            return Infeasible(
                "Engine", f"{problem.engine.name} takes no pair of the shapes that keep the promise"
            )
        kept, ground, p, d = nearest
        ttft, tpot = self._idle(ground, p, d)
        early, steady = ttft <= promise.ttft_s, tpot <= promise.tpot_s
        late = float(np.mean(early)) < float(np.mean(steady))
        what: Literal["TTFT", "TPOT"] = "TTFT" if late else "TPOT"
        rows = ttft[steady] if late else tpot[early]
        enough = math.ceil(promise.attainment * len(ttft))
        moved_s = float(np.mean(self.goodputs[ground.decode].moved_rows(ground.link)))
        message = (
            f"even idle, prefill {p} and decode {d} on {ground} keep TTFT for {np.mean(early):.0%}, TPOT for "
            f"{np.mean(steady):.0%} and both for {kept:.0%} of the requests; KV of a prompt takes "
            f"{milliseconds(moved_s)}"
        )
        message += predicting.carried(ground.link, problem.engine)
        moved_in = "TPOT" if problem.engine.first_token_from == "prefill" else "TTFT"
        limit: str = what
        if what == moved_in and ground.link.name == "tcp":
            limit, message = "Affinity", f"{message}: nodes with RDMA would keep it"
        if len(rows) < enough:
            return Infeasible(limit, f"{message}; both limits would have to be longer")
        return TooShort(limit, message, what, float(np.sort(rows)[enough - 1]))

    # ------------------------------------------------------------------------------------------- pairs in containers

    def _inside(self) -> Placement:
        """Where KV must stay inside a node: pairs, or instances that prefill and decode."""
        apart = Infeasible("Affinity", "hardware.affinity Low keeps KV inside a node")
        whole: Placement | None = None
        if self.problem.objective == "gpus":
            whole = self._mixed(None)
        elif self.problem.engine.colocates:
            with contextlib.suppress(Infeasible):
                whole = self._most()
        return self._or_pairs(whole, None if whole else apart)

    def _or_pairs(self, pools: Placement | None, fault: Infeasible | None) -> Placement:
        """The pools, or pairs of Algorithm 2 where those take fewer GPUs (for the highest goodput: serve more per GPU) or
        nothing else keeps the promise."""
        found: list[Placement] = []
        faults = [fault] if fault else []
        most = self.problem.objective == "goodput"
        products = self.products
        # An engine that starts, but not so, gets a plan that can be carried out; one that is planned only is planned in full.
        refused = engines.refuse_start(self.problem.engine, True)
        if refused and not engines.refuse_start(self.problem.engine, False):
            faults.append(Infeasible("Affinity", refused))
            products = ()
        for gpu, inventory in products:
            problem = dataclasses.replace(
                self.problem,
                inventory=inventory,
                algorithm="LowAffinity",
                max_gpus=min(self.problem.max_gpus, pools.gpus - 1)
                if pools and not most
                else self.problem.max_gpus,
            )
            if pools and not most and self._least_pairs(gpu) >= pools.gpus:
                continue
            try:
                found.append(Paper(problem, gpu, self.tell).place())
            except Infeasible as e:
                faults.append(e)
        if not found:
            if pools is None:
                raise self._neither(faults)
            said = [Rejected("pairs in one container", str(e)) for e in faults]
            return dataclasses.replace(pools, rejected=(*pools.rejected, *said)[:MOST_REJECTED])
        best = min(found, key=lambda p: (-p.goodput / p.gpus if most else 0.0, p.gpus))

        def has(p: Placement) -> str:
            if most:
                return f"{p.goodput / p.gpus:.2f} req/s per GPU, {floor(p.goodput)} in all"
            return f"takes {_gpus(p.gpus)}"

        if pools and most and pools.goodput / pools.gpus >= best.goodput / best.gpus:
            lost = Rejected("pairs in one container", has(best))
            return dataclasses.replace(pools, rejected=(lost, *pools.rejected)[:MOST_REJECTED])
        said = [Rejected("prefill and decode apart", str(fault))] if fault else []
        if pools and pools.groups[0].role == "mixed":
            said = [Rejected("prefill and decode in one instance", has(pools))]
        elif pools:
            said = [Rejected(f"prefill and decode apart, KV over {pools.link.name}", has(pools))]
        return dataclasses.replace(
            best,
            algorithm="Joint",
            rejected=(*said, *best.rejected)[:MOST_REJECTED],
            simulations=best.simulations + self._simulations(),
        )

    def _least_pairs(self, gpu: GPU) -> int:
        """GPUs that pairs take at least, by fluid capacity."""
        goodputs, rate = self.goodputs[gpu], self.problem.workload.rate
        return min(
            (
                math.ceil(0.95 * rate / min(goodputs.fluid("prefill", p), goodputs.fluid("decode", d)))
                * (p.gpus + d.gpus)
                for p in self.shapes[gpu, "prefill"]
                for d in self.shapes[gpu, "decode"]
                if p.pp == d.pp
            ),
            default=MOST_GPUS,
        )

    def _neither(self, faults: Sequence[Infeasible]) -> Infeasible:
        if len(faults) == 1:
            return faults[0]
        first, *rest = faults
        said = f"{first}; as pairs in one container: {rest[0]}"
        if isinstance(first, TooShort):
            return TooShort(first.limit, said, first.what, first.idle_s)
        return Infeasible(first.limit, said)

    # -------------------------------------------------------------------------------------------------- onto nodes

    def _packed(self, splits: Sequence[Split]) -> list[Plan]:
        found: list[Plan] = []
        for split in splits:
            try:
                found.append(self._pack(split))
            except NoRoom as e:
                self.rejected.append(Rejected(str(split.counts), f"does not fit the free GPUs: {e}"))
        return found

    def _pack(self, split: Split) -> Plan:
        problem, ground = self.problem, self.grounds[split.ground]
        wanted: list[packing.Wanted] = [
            ("prefill", *split.prefill, split.n),
            ("decode", *split.decode, split.m),
        ]
        if ground.prefill is ground.decode:
            groups = packing.pack(wanted, ground.inventory, self._standing(ground.inventory, problem.keep))
        else:
            groups = ()
            for one in wanted:
                nodes = ground.nodes(one[0])
                inventory = Inventory(nodes, ground.inventory.refused)
                groups += packing.pack([one], inventory, self._standing(inventory, problem.keep))
        return self._plan(split, groups)

    def _plan(self, split: Split, groups: tuple[Group, ...]) -> Plan:
        """The split as it is simulated; without groups on any nodes of its ground, at its slowest link."""
        problem, ground = self.problem, self.grounds[split.ground]
        link = predicting.kv_link(ground.inventory, groups, problem.engine) if groups else ground.link
        where: dict[Role, GPU] = {"prefill": ground.prefill, "decode": ground.decode}
        wanted: list[packing.Wanted] = [
            ("prefill", *split.prefill, split.n),
            ("decode", *split.decode, split.m),
        ]
        deployment = predicting.deployment(
            problem.model,
            problem.engine,
            where,
            wanted,
            link,
            profile=problem.profile,
        )
        where_words = f" ({ground})" if len(self.grounds) > 1 else ""
        return Plan(
            split,
            groups,
            link,
            deployment,
            self._changed(groups),
            split.counts.gpus,
            ground.prefill,
            ground.decode,
            f"{split.counts}{where_words}",
        )

    def _standing(self, inventory: Inventory, keep: Sequence[Standing]) -> list[Standing]:
        """Of what stands, that which is not on another ground's node."""
        others = {n.name for n in self.problem.inventory.nodes} - {n.name for n in inventory.nodes}
        return [k for k in keep if k.node not in others]

    def _changed(self, groups: Sequence[Group]) -> int:
        planned = Counter(
            {Standing(g.role, g.tp, g.pp, name): count for g in groups for name, count in g.nodes}
        )
        stands = Counter(self.problem.keep)
        moved = (planned - stands) + (stands - planned)
        return sum(k.gpus * count for k, count in moved.items())

    # -------------------------------------------------------------------------------------------------- simulated

    def _kept(
        self,
        plan: Plan,
        rate: float,
        seeds: Sequence[int] = predicting.SEARCH_SEEDS,
        enough: int | None = None,
    ) -> Kept:
        goodputs = self.goodputs[plan.prefill]
        if enough is None:
            return goodputs.kept(plan.deployment, rate, seeds)
        return goodputs.kept(plan.deployment, rate, seeds, enough)

    def _predict(self, plan: Plan, rate: float) -> Prediction:
        problem = self.problem
        self.tell(f"{plan.words} on fresh seeds", 0, 1)
        seeds = [problem.seed * 1000 + s for s in predicting.FRESH_SEEDS]
        self.goodputs[plan.prefill].simulations += len(seeds)
        workload = dataclasses.replace(problem.workload, rate=rate)
        return predicting.predict(plan.deployment, workload, problem.promise, seeds=seeds)

    def _placement(
        self, plan: Plan, prediction: Prediction, said: list[Rejected], goodput: float | None = None
    ) -> Placement:
        problem = self.problem
        rate = problem.workload.rate
        goodputs = self.goodputs[plan.prefill]
        if goodput is None:
            self.tell("goodput of the plan", 0, 1)
            most = self._most_by_fluid(plan)
            start = 1.1 * rate if math.isinf(most) else math.sqrt(rate * most)
            goodput = goodputs.joint(plan.deployment, start, rate, most)
        else:
            rate = goodput
        node_gpus = max(n.gpus_total for n in problem.inventory.nodes if n.gpu is plan.decode)
        bound = bound_per_gpu(problem, plan.prefill, node_gpus, plan.decode)
        d = plan.deployment
        times = [p.times.provenance.describe() for p in d.prefill + d.mixed + d.decode]
        return Placement(
            algorithm="Joint",
            affinity=self.affinity,
            affinity_reason=self.affinity_reason,
            groups=plan.groups,
            gpus=plan.gpus,
            rate=rate,
            link=plan.link,
            paired=False,
            goodput=goodput,
            prediction=prediction,
            bottleneck=self._bottleneck(plan, goodput),
            bound=bound,
            bound_share=goodput / plan.gpus / bound if bound else 0.0,
            latency_source="; ".join(dict.fromkeys(times)),
            rejected=(*said, *self.rejected, *shapes.summary(self.refused))[:MOST_REJECTED],
            simulations=self._simulations(),
        )

    def _most_by_fluid(self, plan: Plan) -> float:
        """req/s that the plan cannot reach, by fluid capacity and a little."""
        if plan.deployment.mixed:
            return math.inf
        prefill = plan.split.n * self.goodputs[plan.prefill].fluid("prefill", plan.split.prefill)
        decode = plan.split.m * self.goodputs[plan.decode].fluid("decode", plan.split.decode)
        return max(1.05 * self.problem.workload.rate, 1.1 * min(prefill, decode))

    def _simulations(self) -> int:
        return sum(g.simulations for g in self.goodputs.values())

    def _bottleneck(self, plan: Plan, goodput: float) -> str:
        """What binds first above the goodput, and how the other phase stands there."""
        rate = 1.15 * goodput
        kept = self._kept(plan, rate)
        if plan.deployment.mixed:
            what = "TTFT" if kept.ttft < kept.tpot else "TPOT"
            return f"mixed: {what} binds first, above {floor(goodput)} req/s"
        shares: dict[Role, float] = {"prefill": kept.ttft, "decode": kept.tpot}
        first: Role = "prefill" if kept.ttft < kept.tpot else "decode"
        words: list[str] = []
        for role, share in shares.items():
            what = "TTFT" if role == "prefill" else "TPOT"
            if role == first:
                if self._memory_binds(plan, role, rate, kept):
                    what = "KV memory"
                words.append(f"{role}: {what} binds first, above {floor(goodput)} req/s")
            else:
                words.append(f"{role}: {what}, still kept by {share:.0%} of requests at {floor(rate)} req/s")
        return "; ".join(words)

    def _memory_binds(self, plan: Plan, role: Role, rate: float, kept: Kept) -> bool:
        """Whether four times the KV blocks would undo at least half of the misses."""
        more = predicting.roomier(plan.deployment, role)
        with_room = self._kept(dataclasses.replace(plan, deployment=more), rate).both
        return 1 - with_room <= 0.5 * (1 - kept.both)


def _eighths(split: Split, eighths: int) -> Split:
    """So many eighths of its instances, rounded up."""
    return split._replace(n=-(-split.n * eighths // 8), m=-(-split.m * eighths // 8))


def _gpus(n: int) -> str:
    return f"{n} GPU" if n == 1 else f"{n} GPUs"


def _pod_link(gpu: GPU, inventory: Inventory) -> Link:
    """Between any two pods on these nodes."""
    rdma = all(n.rdma for n in inventory.nodes)
    return catalogue.pod_link(gpu, rdma, gpu, rdma)
