"""The paper's algorithms on the nodes of one GPU product: 1 or 2 as the fabric decides, packed, simulated as a whole.

Neither algorithm as published looks at both phases together. What they choose is simulated with all instances,
the link of the nodes found and finite memory; where that misses the promise, the phase that misses gets one
more instance until it is kept, and the answer says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

from disaggserve import engines, hardware
from disaggserve.api.errors import Infeasible
from disaggserve.catalogue import GPU, Link
from disaggserve.engines import Role
from disaggserve.search import high_affinity, low_affinity, packing, predicting, shapes
from disaggserve.search.goodputs import RESOLUTION, Goodputs, Kept, bound_per_gpu
from disaggserve.search.high_affinity import Counts
from disaggserve.search.low_affinity import Pair
from disaggserve.search.packing import Group, NoRoom
from disaggserve.search.problem import Placement, Problem, Progress, Rejected, Shape, TooShort
from disaggserve.search.ranking import EQUAL, ranked
from disaggserve.search.words import floor, milliseconds
from disaggserve.simulate import Deployment, Prediction

MOST_REJECTED = 10
TRIED = 12  # plans that fit the GPUs and are simulated before giving up
FAULTS_SHOWN = 3  # better plans that did not fit, among the rejected
PACKED = 200  # numbers of instances tried for the nearest rate that can be kept


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """Instances on nodes, as they are simulated: all at the whole rate, or one pair at its share of it."""

    groups: tuple[Group, ...]
    link: Link
    deployment: Deployment
    copies: int  # of the deployment: low-affinity pairs, each with a share of the requests

    @property
    def gpus(self) -> int:
        return sum(g.gpus for g in self.groups)


class Paper:
    """One search by Algorithm 1 or 2 on the nodes of one GPU product."""

    def __init__(self, problem: Problem, gpu: GPU, tell: Progress) -> None:
        self.problem, self.gpu, self.tell = problem, gpu, tell
        self.goodputs = Goodputs(problem, gpu)
        self.rejected: list[Rejected] = []
        self.node_gpus = max(n.gpus_total for n in problem.inventory.nodes)
        self.affinity, self.affinity_reason = hardware.affinity(problem.inventory, problem.affinity)
        self.high = (
            self.affinity == "High"
            if problem.algorithm == "DistServe"
            else problem.algorithm == "HighAffinity"
        )

    def place(self) -> Placement:
        """The placement. Raises `Infeasible`."""
        tried, refused = self._shapes()
        problem = self.problem
        if problem.objective == "goodput":
            plan, prediction, goodput = self._most(tried)
            return self._placement(plan, prediction, refused, goodput, goodput)
        plan, prediction, added = self._high(tried) if self.high else self._low(tried)
        self.rejected[:0] = added
        rate = problem.workload.rate
        self.tell("goodput of the plan", 0, 1)
        # The rate itself was met on fresh seeds, whatever the search's own say a step of the bisection below.
        goodput = max(rate, plan.copies * self.goodputs.joint(plan.deployment, rate / plan.copies))
        self.tell("goodput of the plan", 1, 1)
        return self._placement(plan, prediction, refused, rate, goodput)

    def _placement(
        self,
        plan: _Plan,
        prediction: Prediction,
        refused: list[shapes.Refused],
        rate: float,
        goodput: float,
    ) -> Placement:
        bound = bound_per_gpu(self.problem, self.gpu, self.node_gpus)
        times = [p.times.provenance.describe() for p in plan.deployment.prefill + plan.deployment.decode]
        rejected = (*self.rejected, *shapes.summary(refused))
        return Placement(
            algorithm="HighAffinity" if self.high else "LowAffinity",
            affinity=self.affinity,
            affinity_reason=self.affinity_reason,
            groups=plan.groups,
            gpus=plan.gpus,
            rate=rate,
            link=plan.link,
            paired=not self.high,
            goodput=goodput,
            prediction=prediction,
            bottleneck=self._bottleneck(plan, goodput),
            bound=bound,
            bound_share=goodput / plan.gpus / bound if bound else 0.0,
            latency_source="; ".join(dict.fromkeys(times)),
            rejected=rejected[:MOST_REJECTED],
            simulations=self.goodputs.simulations,
        )

    def _most(self, tried: dict[Role, tuple[Shape, ...]]) -> tuple[_Plan, Prediction, float]:
        """The highest goodput that the GPUs at hand have, kept on fresh seeds."""
        if self.high:
            phases = self._phases(tried)
            fastest = self._fastest_high(phases)
            if fastest is None:
                raise Infeasible("GPUs", self._nearest_high(phases))
            counts, goodput = fastest
            plan = self._pack_counts(counts)
        else:
            found = self._pairs(tried)
            largest = self._fastest_low(found)
            if largest is None:
                raise Infeasible("GPUs", self._nearest_low(found))
            goodput, pair, count = largest
            plan = self._pack_pair(pair, count)
        prediction = self._predict(plan, goodput)
        while prediction.attainment < self.problem.promise.attainment:
            goodput *= 1 - RESOLUTION
            prediction = self._predict(plan, goodput)
        return plan, prediction, goodput

    # ------------------------------------------------------------------------------------------------ phases

    def _shapes(self) -> tuple[dict[Role, tuple[Shape, ...]], list[shapes.Refused]]:
        """Shapes to try by role, and those refused. Raises `Infeasible` where a role has none."""
        tried: dict[Role, tuple[Shape, ...]] = {}
        refused: list[shapes.Refused] = []
        p = self.problem
        roles: tuple[Role, ...] = ("prefill", "decode")
        for role in roles:
            tried[role], no = shapes.shapes(
                p.model, self.gpu, p.engine, role, p.inventory.nodes, p.workload.lengths, p.profile
            )
            refused += no
            if not tried[role]:
                raise self.no_shape(role, no)
        return tried, refused

    def no_shape(self, role: Role, refused: tuple[shapes.Refused, ...]) -> Infeasible:
        for limit in ("Engine", "Nodes", "Memory"):
            # What would fit the memory says more than that smaller shapes do not.
            of_limit = [r for r in refused if r.limit == limit]
            if of_limit:
                largest = of_limit[-1]
                return Infeasible(
                    limit,
                    f"no {role} shape of {self.problem.model.id} stands on one {self.gpu.short} node of "
                    f"{self.node_gpus} GPUs: {largest.shape}: {largest.reason}",
                )
        return Infeasible(
            "Nodes", f"{self.problem.model.id} has no {role} shape for nodes of {self.node_gpus} GPUs"
        )

    def _phases(self, tried: dict[Role, tuple[Shape, ...]]) -> dict[Role, dict[Shape, float]]:
        """Goodput of one instance by role and shape. Raises `Infeasible` where none keeps its limit."""
        found: dict[Role, dict[Shape, float]] = {}
        total, done = sum(map(len, tried.values())), 0
        for role, role_shapes in tried.items():
            found[role] = {}
            for shape in role_shapes:
                self.tell(f"{role} {shape}", done, total)
                found[role][shape] = self.goodputs.phase(role, shape)
                done += 1
            if not any(found[role].values()):
                raise self.too_slow(role, role_shapes)
        return found

    def too_slow(self, role: Role, role_shapes: Iterable[Shape]) -> Infeasible:
        promise = self.problem.promise
        best = min(role_shapes, key=lambda s: self.goodputs.idle(role, s, promise.attainment))
        idle_s = self.goodputs.idle(role, best, promise.attainment)
        what: Literal["TTFT", "TPOT"] = "TTFT" if role == "prefill" else "TPOT"
        limit_s = promise.ttft_s if role == "prefill" else promise.tpot_s
        unit = "prompts" if role == "prefill" else "requests"
        return TooShort(
            what,
            f"even an idle {role} {best} on {self.gpu.short} has a {what} of {milliseconds(idle_s)} at "
            f"{promise.attainment:.0%} of the {unit}, and {milliseconds(limit_s)} is promised",
            what,
            self._idle_s(role, best),
        )

    def _idle_s(self, role: Role, shape: Shape) -> float:
        """TTFT or TPOT in seconds without load, a transfer in TPOT where prefill makes the first token."""
        link = predicting.kv_link(self.problem.inventory, (), self.problem.engine, paired=not self.high)
        return self.goodputs.idle(role, shape, self.problem.promise.attainment, link)

    # ------------------------------------------------------------------------------------------- Algorithm 1

    def _high(self, tried: dict[Role, tuple[Shape, ...]]) -> tuple[_Plan, Prediction, list[Rejected]]:
        problem = self.problem
        phases = self._phases(tried)
        plans = list(
            high_affinity.plans(phases["prefill"], phases["decode"], problem.workload.rate, problem.engine)
        )
        if not plans:
            raise Infeasible(
                "Engine", f"{problem.engine.name} takes no pair of the shapes that keep the promise"
            )
        self._runners_up(phases, plans[0])
        faults: list[Infeasible] = []
        simulated = 0
        for counts in plans:
            try:
                plan = self._pack_counts(counts)
                simulated += 1
                return self._settle(counts, plan)
            except Infeasible as e:
                faults.append(e)
                if len(faults) <= FAULTS_SHOWN:
                    self.rejected.insert(len(faults) - 1, Rejected(str(counts), str(e)))
                if simulated >= TRIED or e.limit == "Affinity":
                    break
        if faults[0].limit == "GPUs":
            raise Infeasible("GPUs", f"{faults[0]}; {self._nearest_high(phases)}")
        raise faults[0]

    def _runners_up(self, phases: dict[Role, dict[Shape, float]], chosen: Counts) -> None:
        of_role: dict[Role, Shape] = {"prefill": chosen.prefill, "decode": chosen.decode}
        for role, shape in of_role.items():
            goodputs = phases[role]
            best = goodputs[shape] / shape.gpus
            for other in [s for s in ranked(goodputs) if s != shape][:2]:
                mine = goodputs[other] / other.gpus
                equal = ", which counts as equal" if mine >= best * (1 - EQUAL) else ""
                more = f" and takes {other.gpus} GPUs" if equal and other.gpus > shape.gpus else ""
                self.rejected.append(
                    Rejected(
                        f"{role} {other}", f"{mine:.2f} req/s per GPU, {shape} has {best:.2f}{equal}{more}"
                    )
                )

    def _settle(self, counts: Counts, plan: _Plan) -> tuple[_Plan, Prediction, list[Rejected]]:
        """The plan, with instances added until the simulation of the whole keeps the promise."""
        problem, target = self.problem, self.problem.promise.attainment
        published = counts
        said: list[Rejected] = []
        while True:
            prediction = self._predict(plan, self.problem.workload.rate)
            if prediction.attainment >= target:
                return plan, prediction, said
            if counts == published:
                self._check_idle(plan, counts)
            kept = self.goodputs.kept(plan.deployment, problem.workload.rate)
            said.append(
                Rejected(
                    str(counts),
                    f"attains {prediction.attainment:.1%} when both phases are simulated together "
                    f"(TTFT {kept.ttft:.1%}, TPOT {kept.tpot:.1%})",
                )
            )
            # Neither phase has a goal of its own here: the one that misses more gets the next instance.
            if kept.ttft <= kept.tpot:
                counts = dataclasses.replace(counts, n=counts.n + 1)
            else:
                counts = dataclasses.replace(counts, m=counts.m + 1)
            plan = self._pack_counts(counts)

    def _pack_counts(self, counts: Counts) -> _Plan:
        p = self.problem
        self._check_max(counts.gpus, str(counts))
        wanted: list[packing.Wanted] = [
            ("prefill", *counts.prefill, counts.n),
            ("decode", *counts.decode, counts.m),
        ]
        try:
            groups = packing.pack(wanted, p.inventory, p.keep)
        except NoRoom as e:
            raise self._no_gpus(counts.gpus, str(counts), e) from None
        link = predicting.kv_link(p.inventory, groups, p.engine)
        return _Plan(
            groups,
            link,
            predicting.deployment(p.model, p.engine, p.inventory, groups, link, profile=p.profile),
            copies=1,
        )

    def _check_idle(self, plan: _Plan, counts: Counts) -> None:
        """Raise where the plan misses the promise without load: more instances would not help."""
        problem = self.problem
        kept = self.goodputs.kept(plan.deployment, min(0.05, problem.workload.rate / 4))
        if kept.both >= problem.promise.attainment:
            return
        mean = float(problem.workload.lengths.input.mean())
        transfer_s = plan.link.latency_s + mean * problem.model.kv_bytes_per_token() / plan.link.bytes_per_s
        limit: Literal["TTFT", "TPOT"] = "TTFT" if kept.ttft < kept.tpot else "TPOT"
        message = (
            f"{counts} keeps the promise for {kept.both:.0%} of the requests even without load (TTFT "
            f"{kept.ttft:.0%}, TPOT {kept.tpot:.0%}); KV of a prompt takes {milliseconds(transfer_s)} over {plan.link.name}"
            f"{predicting.carried(plan.link, problem.engine)}"
        )
        if plan.link.name == "tcp":
            raise Infeasible(
                "Affinity",
                f"{message}: nodes with RDMA, or planner.algorithm LowAffinity, would keep KV off it",
            )
        role: Role = "prefill" if limit == "TTFT" else "decode"
        promised_s = problem.promise.ttft_s if role == "prefill" else problem.promise.tpot_s
        idle_s = self._idle_s(role, counts.prefill if role == "prefill" else counts.decode)
        raise TooShort(limit, message, limit, max(idle_s, promised_s))

    def _fastest_high(self, phases: dict[Role, dict[Shape, float]]) -> tuple[Counts, float] | None:
        """The highest rate, by the phases alone, that fits what is free, and its goodput by simulation of both."""
        limit = min(self.problem.max_gpus, self._available())
        options: list[tuple[float, int, Counts]] = []
        for p, per_p in phases["prefill"].items():
            for d, per_d in phases["decode"].items():
                refused = engines.refuse_shape(self.problem.engine, "prefill", *p, other=d)
                if refused is not None or not per_p or not per_d:
                    continue
                for n in range(1, (limit - d.gpus) // p.gpus + 1):
                    rate = min(n * per_p, (limit - n * p.gpus) // d.gpus * per_d)
                    counts = Counts(p, math.ceil(rate / per_p), d, math.ceil(rate / per_d))
                    options.append((-rate, counts.gpus, counts))
        for _, _, counts in sorted(options, key=lambda o: o[:2])[:PACKED]:
            try:
                plan = self._pack_counts(counts)
            except Infeasible:
                continue
            start = min(
                counts.n * phases["prefill"][counts.prefill], counts.m * phases["decode"][counts.decode]
            )
            return counts, self.goodputs.joint(plan.deployment, start)
        return None

    def _nearest_high(self, phases: dict[Role, dict[Shape, float]]) -> str:
        if not self.problem.explain:
            return "nothing nearer was looked for"
        fastest = self._fastest_high(phases)
        if fastest is not None:
            counts, goodput = fastest
            return f"with {counts.gpus} GPUs {floor(goodput)} req/s could be kept ({counts})"
        least = sum(min(s.gpus for s, g in of_role.items() if g) for of_role in phases.values())
        return f"any plan that keeps the promise takes at least {least} GPUs"

    # ------------------------------------------------------------------------------------------- Algorithm 2

    def _pairs(self, tried: dict[Role, tuple[Shape, ...]]) -> dict[Pair, float]:
        """Goodput of every pair. Raises `Infeasible` where none has any."""
        problem = self.problem
        self._phases_possible(tried)
        found: dict[Pair, float] = {}
        pairs = [
            p
            for p in low_affinity.pairs(tried["prefill"], tried["decode"], self.node_gpus)
            if engines.refuse_shape(problem.engine, "prefill", *p.prefill, other=p.decode) is None
        ]
        if not pairs:
            raise Infeasible(
                "Nodes",
                f"no pair of prefill and decode of {problem.model.id} fits one node of {self.node_gpus} GPUs; "
                "nodes with RDMA would let them stand apart",
            )
        for done, pair in enumerate(pairs):
            self.tell(str(pair), done, len(pairs))
            found[pair] = self._pair_goodput(pair)
        if not any(found.values()):
            raise Infeasible(
                "TTFT" if self._worse(pairs[-1]) == "prefill" else "TPOT",
                f"no pair on one node of {self.node_gpus} {self.gpu.short} keeps the promise even without load",
            )
        return found

    def _low(self, tried: dict[Role, tuple[Shape, ...]]) -> tuple[_Plan, Prediction, list[Rejected]]:
        problem = self.problem
        found = self._pairs(tried)
        order = ranked(found)
        best = order[0]
        for other in order[1:4]:
            self.rejected.append(
                Rejected(
                    str(other),
                    f"{found[other] / other.gpus:.2f} req/s per GPU, the chosen has {found[best] / best.gpus:.2f}",
                )
            )
        faults: list[Infeasible] = []
        for pair in order:
            try:
                return self._settle_pairs(pair, math.ceil(problem.workload.rate / found[pair]))
            except Infeasible as e:
                faults.append(e)
                if len(faults) <= FAULTS_SHOWN:
                    self.rejected.insert(len(faults) - 1, Rejected(str(pair), str(e)))
        raise Infeasible("GPUs", f"{faults[0]}; {self._nearest_low(found)}")

    def _phases_possible(self, tried: dict[Role, tuple[Shape, ...]]) -> None:
        """Raise `Infeasible` where no shape of a role keeps its limit even without load."""
        for role, role_shapes in tried.items():
            limit_s = self.problem.promise.ttft_s if role == "prefill" else self.problem.promise.tpot_s
            quantile = self.problem.promise.attainment
            if all(self.goodputs.idle(role, s, quantile) > limit_s for s in role_shapes):
                raise self.too_slow(role, role_shapes)

    def _pair_goodput(self, pair: Pair) -> float:
        p = self.problem.promise
        if (
            self.goodputs.idle("prefill", pair.prefill, p.attainment) > p.ttft_s
            or self.goodputs.idle("decode", pair.decode, p.attainment) > p.tpot_s
        ):
            return 0.0
        start = min(self.goodputs.guess("prefill", pair.prefill), self.goodputs.guess("decode", pair.decode))
        return self.goodputs.joint(self._pair_deployment(pair), start)

    def _pair_deployment(self, pair: Pair) -> Deployment:
        p = self.problem
        wanted: list[packing.Wanted] = [("prefill", *pair.prefill, 1), ("decode", *pair.decode, 1)]
        nodes = [n for n in p.inventory.nodes if n.gpus_total >= pair.gpus]
        links = (predicting.link_between(n, n, p.engine, paired=True) for n in nodes)
        link = min(links, key=lambda x: x.bytes_per_s)
        return predicting.deployment(p.model, p.engine, self.gpu, wanted, link, profile=p.profile)

    def _worse(self, pair: Pair) -> Role:
        kept = self.goodputs.kept(self._pair_deployment(pair), 0.05)
        return "prefill" if kept.ttft < kept.tpot else "decode"

    def _settle_pairs(self, pair: Pair, count: int) -> tuple[_Plan, Prediction, list[Rejected]]:
        said: list[Rejected] = []
        while True:
            plan = self._pack_pair(pair, count)
            prediction = self._predict(plan, self.problem.workload.rate)
            if prediction.attainment >= self.problem.promise.attainment:
                return plan, prediction, said
            said.append(Rejected(f"{count} × {pair}", f"attains {prediction.attainment:.1%} on fresh seeds"))
            count += 1

    def _pack_pair(self, pair: Pair, count: int) -> _Plan:
        p = self.problem
        what = f"{count} × {pair}"
        self._check_max(pair.gpus * count, what)
        try:
            groups = packing.pack_pairs(pair.prefill, pair.decode, count, p.inventory, p.keep)
        except NoRoom as e:
            raise self._no_gpus(pair.gpus * count, what, e) from None
        link = predicting.kv_link(p.inventory, groups, p.engine, paired=True)
        return _Plan(groups, link, self._pair_deployment(pair), copies=count)

    def _fastest_low(self, found: dict[Pair, float]) -> tuple[float, Pair, int] | None:
        """The highest rate of pairs that fit what is free."""
        limit = min(self.problem.max_gpus, self._available())
        options: list[tuple[float, Pair, int]] = []
        for pair, goodput in found.items():
            for count in range(limit // pair.gpus, 0, -1) if goodput else ():
                try:
                    self._pack_pair(pair, count)
                except Infeasible:
                    continue
                options.append((goodput * count, pair, count))
                break
        return max(options, key=lambda o: (o[0], -o[1].gpus * o[2])) if options else None

    def _nearest_low(self, found: dict[Pair, float]) -> str:
        if not self.problem.explain:
            return "nothing nearer was looked for"
        fastest = self._fastest_low(found)
        if fastest is None:
            least = min(p.gpus for p, g in found.items() if g)
            return f"any pair that keeps the promise takes at least {least} GPUs of one node"
        rate, pair, count = fastest
        return f"with {pair.gpus * count} GPUs {floor(rate)} req/s could be kept ({count} × {pair})"

    # -------------------------------------------------------------------------------------------------- both

    def _predict(self, plan: _Plan, rate: float) -> Prediction:
        problem = self.problem
        self.tell(f"the plan of {plan.gpus} GPUs", 0, 1)
        # Low-affinity pairs: each is one more queue with its share of a random split, which is a little
        # harder on it than the router's shortest queue.
        share = dataclasses.replace(problem.workload, rate=rate / plan.copies)
        seeds = [problem.seed * 1000 + s for s in predicting.FRESH_SEEDS]
        self.goodputs.simulations += len(seeds)
        return predicting.predict(plan.deployment, share, problem.promise, seeds=seeds)

    def _check_max(self, gpus: int, what: str) -> None:
        if gpus > self.problem.max_gpus:
            raise Infeasible(
                "GPUs",
                f"{self.problem.workload.rate:g} req/s takes {gpus} GPUs ({what}), maxGPUs is {self.problem.max_gpus}",
            )

    def _available(self) -> int:
        standing = sum(k.gpus for k in self.problem.keep if bool(k.decode_tp) != self.high)
        return self.problem.inventory.gpus_free + standing

    def _no_gpus(self, gpus: int, what: str, no_room: NoRoom) -> Infeasible:
        free = self.problem.inventory.gpus_free
        return Infeasible(
            "GPUs",
            f"{self.problem.workload.rate:g} req/s takes {gpus} GPUs ({what}), {free} are free on "
            f"{self.gpu.short} nodes: {no_room}",
        )

    def _bottleneck(self, plan: _Plan, goodput: float) -> str:
        """What binds first above the goodput, and how far the other phase would go."""
        if goodput <= 0:
            return ""
        kept = self.goodputs.kept(plan.deployment, 1.15 * goodput / plan.copies)
        first: Role = "prefill" if kept.ttft < kept.tpot else "decode"
        words: list[str] = []
        roles: tuple[Role, ...] = ("prefill", "decode")
        for role in roles:
            what = "TTFT" if role == "prefill" else "TPOT"
            if role == first:
                if self._memory_binds(plan, role, 1.15 * goodput / plan.copies, kept):
                    what = "KV memory"
                words.append(f"{role}: {what} binds first, above {goodput:.1f} req/s")
                continue
            (group,) = (g for g in plan.groups if g.role == role)
            alone = self.goodputs.phase(role, Shape(group.tp, group.pp))
            one = group.count == 1 and alone > 2 * goodput
            least = ", and one is the least" if one else ""
            words.append(f"{role}: {what}, an instance alone is good for {alone:.1f} req/s{least}")
        return "; ".join(words)

    def _memory_binds(self, plan: _Plan, role: Role, rate: float, kept: Kept) -> bool:
        """Whether four times the KV blocks would undo at least half of the misses."""
        more = predicting.roomier(plan.deployment, role)
        return 1 - self.goodputs.kept(more, rate).both <= 0.5 * (1 - kept.both)
