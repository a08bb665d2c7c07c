"""What the joint search stands on: where instances may be, in which shapes, packed on nodes, and simulated there."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from disaggserve import catalogue, engines, hardware
from disaggserve.api.errors import Infeasible
from disaggserve.catalogue import GPU, Link
from disaggserve.engines import Role
from disaggserve.hardware import Inventory, Node
from disaggserve.search import mixed, packing, predicting, shapes
from disaggserve.search.goodputs import Goodputs, Kept, bound_per_gpu
from disaggserve.search.high_affinity import Counts
from disaggserve.search.mixed import Mixed
from disaggserve.search.packing import Group, NoRoom, Standing
from disaggserve.search.paper import MOST_REJECTED, Paper
from disaggserve.search.problem import Placement, Problem, Progress, Rejected, Shape
from disaggserve.search.words import floor
from disaggserve.simulate import Deployment, Prediction
from disaggserve.workload import Requests


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


class Field:
    """The ground of one search, and what was rejected on it."""

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

    def available(self) -> int:
        standing = sum(k.gpus for k in self.problem.keep if not k.decode_tp)
        return min(self.problem.max_gpus, self.problem.inventory.gpus_free + standing)

    def pairs_of(self, ground: Ground) -> list[tuple[Shape, Shape]]:
        """Pairs of shapes that the engine takes and that keep the promise without load, the transfer in it."""
        problem = self.problem
        found: list[tuple[Shape, Shape]] = []
        for d in self.shapes[ground.decode, "decode"]:
            for p in self.shapes[ground.prefill, "prefill"]:
                if engines.refuse_shape(problem.engine, "prefill", *p, other=d) is not None:
                    continue
                ttft, tpot = self.idle(ground, p, d)
                both = (ttft <= problem.promise.ttft_s) & (tpot <= problem.promise.tpot_s)
                if float(np.mean(both)) >= problem.promise.attainment:
                    found.append((p, d))
        return found

    def idle(
        self, ground: Ground, p: Shape, d: Shape
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """TTFT and TPOT in seconds by row of the lengths without load, the transfer in whichever has it."""
        decode = self.goodputs[ground.decode]
        ttft = self.goodputs[ground.prefill].idle_rows("prefill", p) + decode.idle_first_rows(d, ground.link)
        return ttft, decode.idle_rows("decode", d, ground.link)

    def whole(self, gpu: GPU) -> list[Shape]:
        """Shapes that keep both limits without load."""
        return [s for s in self.shapes[gpu, "prefill"] if s in self.shapes[gpu, "decode"]]

    # ----------------------------------------------------------------------------------------------------- onto nodes

    def packed(self, splits: Sequence[Split]) -> list[Plan]:
        found: list[Plan] = []
        for split in splits:
            try:
                found.append(self.pack(split))
            except NoRoom as e:
                self.rejected.append(Rejected(str(split.counts), f"does not fit the free GPUs: {e}"))
        return found

    def pack(self, split: Split) -> Plan:
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
        return self.plan(split, groups)

    def mixed_plan(self, one: Mixed, inventory: Inventory) -> Plan | None:
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

    def plan(self, split: Split, groups: tuple[Group, ...]) -> Plan:
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

    # ------------------------------------------------------------------------------------------------------ simulated

    def kept(
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

    def predict(self, plan: Plan, rate: float) -> Prediction:
        problem = self.problem
        self.tell(f"{plan.words} on fresh seeds", 0, 1)
        seeds = [problem.seed * 1000 + s for s in predicting.FRESH_SEEDS]
        self.goodputs[plan.prefill].simulations += len(seeds)
        workload = dataclasses.replace(problem.workload, rate=rate)
        return predicting.predict(plan.deployment, workload, problem.promise, seeds=seeds)

    def placement(
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
            simulations=self.simulations(),
        )

    def _most_by_fluid(self, plan: Plan) -> float:
        """req/s that the plan cannot reach, by fluid capacity and a little."""
        if plan.deployment.mixed:
            return math.inf
        prefill = plan.split.n * self.goodputs[plan.prefill].fluid("prefill", plan.split.prefill)
        decode = plan.split.m * self.goodputs[plan.decode].fluid("decode", plan.split.decode)
        return max(1.05 * self.problem.workload.rate, 1.1 * min(prefill, decode))

    def simulations(self) -> int:
        return sum(g.simulations for g in self.goodputs.values())

    def _bottleneck(self, plan: Plan, goodput: float) -> str:
        """What binds first above the goodput, and how the other phase stands there."""
        rate = 1.15 * goodput
        kept = self.kept(plan, rate)
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
        with_room = self.kept(dataclasses.replace(plan, deployment=more), rate).both
        return 1 - with_room <= 0.5 * (1 - kept.both)


def pod_link(gpu: GPU, inventory: Inventory) -> Link:
    """Between any two pods on these nodes."""
    rdma = all(n.rdma for n in inventory.nodes)
    return catalogue.pod_link(gpu, rdma, gpu, rdma)
