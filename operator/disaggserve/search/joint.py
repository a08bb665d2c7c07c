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
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from disaggserve import engines
from disaggserve.api.errors import Infeasible
from disaggserve.catalogue import GPU
from disaggserve.hardware import Inventory
from disaggserve.search import predicting
from disaggserve.search.fewest import MOST_GPUS, Fewest
from disaggserve.search.field import Field, Ground
from disaggserve.search.most import EQUAL_GOODPUT, Most
from disaggserve.search.paper import MOST_REJECTED, Paper
from disaggserve.search.problem import Placement, Problem, Progress, Rejected, Shape, TooShort
from disaggserve.search.words import floor, in_gpus, milliseconds


class Joint:
    """One joint search."""

    def __init__(self, problem: Problem, products: Sequence[tuple[GPU, Inventory]], tell: Progress) -> None:
        self.field = Field(problem, products, tell)
        self.fewest, self.most = Fewest(self.field), Most(self.field)

    def place(self) -> Placement:
        """The placement. Raises `Infeasible` with the limit that binds and the nearest that could be kept."""
        if not self.field.grounds:
            return self._inside()
        pools: Placement | None = None
        fault: Infeasible | None = None
        try:
            pools = self._most() if self.field.problem.objective == "goodput" else self._fewest()
        except Infeasible as e:
            fault = e
        if self.field.affinity == "High" and self.field.problem.affinity != "Low":
            if pools is None:
                assert fault is not None
                raise fault
            return pools
        return self._or_pairs(pools, fault)

    def _fewest(self) -> Placement:
        for cost, splits in self.fewest.levels(self.field.available()):
            found = self.fewest.best(self.field.packed(splits), f"{cost.gpus} GPUs")
            if found is not None:
                return self.fewest.mixed(cost) or self.field.placement(*found)
        fault = self._no_plan()
        placement = self.fewest.mixed(None)
        if placement is None:
            raise fault
        return dataclasses.replace(
            placement, rejected=(Rejected("prefill and decode apart", str(fault)), *placement.rejected)
        )

    def _most(self) -> Placement:
        """The highest goodput per GPU of the GPUs at hand; of those that are equal, the highest goodput."""
        found = self.most.fastest(lambda goodput, gpus: goodput / gpus)
        if found is None:
            raise self._no_plan()
        plan, goodput = found
        prediction = self.field.predict(plan, goodput)
        while prediction.attainment < self.field.problem.promise.attainment:
            goodput *= 1 - EQUAL_GOODPUT
            prediction = self.field.predict(plan, goodput)
        return self.field.placement(plan, prediction, [], goodput)

    # -------------------------------------------------------------------------------------------------------- no plan

    def _no_plan(self) -> Infeasible:
        """Which limit binds, and the nearest that could be kept."""
        problem = self.field.problem
        if not any(self.field.pairs_of(ground) for ground in self.field.grounds):
            return self._no_pair()
        if not problem.explain:
            return Infeasible("GPUs", f"{problem.workload.rate:g} req/s takes more GPUs")
        most = self.field.available()
        words: list[str] = []
        if problem.objective == "gpus":
            words.append(self.fewest.would_take())
        if problem.max_gpus == most:
            words.append(f"maxGPUs is {most}")
        else:
            words.append(f"{problem.inventory.gpus_free} are free")
        found = self.most.fastest(lambda goodput, _: goodput)
        if found is None:
            least = min(
                p.gpus + d.gpus for ground in self.field.grounds for p, d in self.field.pairs_of(ground)
            )
            words.append(f"any plan that keeps the promise takes at least {least} GPUs")
        else:
            plan, goodput = found
            words.append(f"with {plan.gpus} GPUs {floor(goodput)} req/s could be kept ({plan.words})")
        return Infeasible("GPUs", "; ".join(words))

    def _no_pair(self) -> Infeasible:
        """Where no two shapes keep both limits without load: the limit that more requests miss on the pair that comes
        nearest, and what it would have to be. TTFT and TPOT each can be kept by some shape, for as many requests."""
        problem, promise = self.field.problem, self.field.problem.promise
        nearest: tuple[float, Ground, Shape, Shape] | None = None
        for ground in self.field.grounds:
            for p in self.field.shapes[ground.prefill, "prefill"]:
                for d in self.field.shapes[ground.decode, "decode"]:
                    if engines.refuse_shape(problem.engine, "prefill", *p, other=d) is not None:
                        continue
                    ttft, tpot = self.field.idle(ground, p, d)
                    kept = float(np.mean((ttft <= promise.ttft_s) & (tpot <= promise.tpot_s)))
                    if nearest is None or kept > nearest[0]:
                        nearest = kept, ground, p, d
        if nearest is None:
            return Infeasible(
                "Engine", f"{problem.engine.name} takes no pair of the shapes that keep the promise"
            )
        kept, ground, p, d = nearest
        ttft, tpot = self.field.idle(ground, p, d)
        early, steady = ttft <= promise.ttft_s, tpot <= promise.tpot_s
        late = float(np.mean(early)) < float(np.mean(steady))
        what: Literal["TTFT", "TPOT"] = "TTFT" if late else "TPOT"
        rows = ttft[steady] if late else tpot[early]
        enough = math.ceil(promise.attainment * len(ttft))
        moved_s = float(np.mean(self.field.goodputs[ground.decode].moved_rows(ground.link)))
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

    # -------------------------------------------------------------------------------------------- pairs in containers

    def _inside(self) -> Placement:
        """Where KV must stay inside a node: pairs, or instances that prefill and decode."""
        apart = Infeasible("Affinity", "hardware.affinity Low keeps KV inside a node")
        whole: Placement | None = None
        if self.field.problem.objective == "gpus":
            whole = self.fewest.mixed(None)
        elif self.field.problem.engine.colocates:
            with contextlib.suppress(Infeasible):
                whole = self._most()
        return self._or_pairs(whole, None if whole else apart)

    def _or_pairs(self, pools: Placement | None, fault: Infeasible | None) -> Placement:
        """The pools, or pairs of Algorithm 2 where those take fewer GPUs (for the highest goodput: serve more per GPU) or
        nothing else keeps the promise."""
        found: list[Placement] = []
        faults = [fault] if fault else []
        most = self.field.problem.objective == "goodput"
        products = self.field.products
        # An engine that starts, but not so, gets a plan that can be carried out; one that is planned only is planned in full.
        refused = engines.refuse_start(self.field.problem.engine, True)
        if refused and not engines.refuse_start(self.field.problem.engine, False):
            faults.append(Infeasible("Affinity", refused))
            products = ()
        for gpu, inventory in products:
            problem = dataclasses.replace(
                self.field.problem,
                inventory=inventory,
                algorithm="LowAffinity",
                max_gpus=min(self.field.problem.max_gpus, pools.gpus - 1)
                if pools and not most
                else self.field.problem.max_gpus,
            )
            if pools and not most and self._least_pairs(gpu) >= pools.gpus:
                continue
            try:
                found.append(Paper(problem, gpu, self.field.tell).place())
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
            return f"takes {in_gpus(p.gpus)}"

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
            simulations=best.simulations + self.field.simulations(),
        )

    def _least_pairs(self, gpu: GPU) -> int:
        """GPUs that pairs take at least, by fluid capacity."""
        goodputs, rate = self.field.goodputs[gpu], self.field.problem.workload.rate
        return min(
            (
                math.ceil(0.95 * rate / min(goodputs.fluid("prefill", p), goodputs.fluid("decode", d)))
                * (p.gpus + d.gpus)
                for p in self.field.shapes[gpu, "prefill"]
                for d in self.field.shapes[gpu, "decode"]
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
