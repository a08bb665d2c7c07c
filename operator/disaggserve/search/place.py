"""From a problem to a placement: the joint search on all nodes, or the paper's algorithms on one GPU product."""

from __future__ import annotations

import dataclasses
from collections import Counter

from disaggserve import engines
from disaggserve.api.errors import Infeasible
from disaggserve.catalogue import GPU
from disaggserve.hardware import Inventory
from disaggserve.search.joint import Joint
from disaggserve.search.paper import MOST_REJECTED, Paper
from disaggserve.search.problem import Placement, Problem, Progress, Rejected, TooShort
from disaggserve.search.words import floor, milliseconds, shown

LOOSER, LOOSENED = (
    1.25,
    9,
)  # a limit that is too short is loosened so, from a fifth above the idle one to 7 times it


def place(problem: Problem, progress: Progress | None = None) -> Placement:
    """The placement for the problem. Pure: the same problem gives the same placement.

    The joint search uses every GPU product among the nodes. A plan of the paper's algorithms stands on one: the
    one with most free GPUs that keeps the promise. `progress` is told what is being simulated. Raises
    `Infeasible` with the limit that binds: Memory, TTFT, TPOT, GPUs, Engine, Nodes or Affinity.
    """
    tell = progress or (lambda what, done, of: None)
    try:
        return _place(problem, tell)
    except TooShort as short:
        raise Infeasible(short.limit, f"{short}; {_nearest(problem, short, tell)}") from None


def _nearest(problem: Problem, short: TooShort, tell: Progress) -> str:
    """The least limit found that the same GPUs keep at the same rate, each tried by a search of its own."""

    def asked(limit_s: float) -> Problem:
        promise = (
            dataclasses.replace(problem.promise, ttft_s=limit_s)
            if short.what == "TTFT"
            else dataclasses.replace(problem.promise, tpot_s=limit_s)
        )
        return dataclasses.replace(problem, promise=promise, explain=False)

    limits_s = [shown(1.2 * short.idle_s * LOOSER**k) for k in range(LOOSENED)]
    for limit_s in limits_s:
        try:
            _place(asked(limit_s), tell)
        except Infeasible:
            continue
        return f"a {short.what} of about {milliseconds(limit_s)} could be kept"
    words = f"an idle instance has a {short.what} of about {milliseconds(limits_s[0])}"
    if problem.objective == "gpus":
        words += f", but at {problem.workload.rate:g} req/s not even {milliseconds(limits_s[-1])} are kept"
    try:
        most = _place(dataclasses.replace(asked(limits_s[-1]), objective="goodput"), tell)
    except Infeasible as e:
        return f"{words}: {e}"
    return f"{words}; with {most.gpus} GPUs {floor(most.goodput)} req/s could be"


def _place(problem: Problem, tell: Progress) -> Placement:
    model = problem.model
    if reason := engines.refuse_architecture(problem.engine, model.architecture, model.quantised):
        raise Infeasible("Engine", reason)
    products = _by_product(problem.inventory)
    if not products:
        raise Infeasible("Nodes", _no_node(problem.inventory))
    if problem.algorithm == "Joint":
        return Joint(problem, products, tell).place()
    failures: list[Infeasible] = []
    for gpu, inventory in products:
        try:
            found = Paper(dataclasses.replace(problem, inventory=inventory), gpu, tell).place()
        except Infeasible as e:
            failures.append(e)
            continue
        others = [
            Rejected(f"{other.short} nodes", str(failure))
            for (other, _), failure in zip(products, failures, strict=False)
        ]
        others += [
            Rejected(f"{other.short} nodes", f"a plan stands on one GPU product; {gpu.short} has most free")
            for other, _ in products[len(failures) + 1 :]
        ]
        return dataclasses.replace(found, rejected=(*others, *found.rejected)[:MOST_REJECTED])
    raise failures[0]


def _by_product(inventory: Inventory) -> list[tuple[GPU, Inventory]]:
    """The inventory of each GPU product, that with most free GPUs first."""
    nodes = sorted(inventory.nodes, key=lambda n: n.name)
    gpus = {n.gpu.product: n.gpu for n in nodes}
    free = Counter[str]()
    for n in nodes:
        free[n.gpu.product] += n.gpus_free
    return [
        (gpus[p], Inventory(tuple(n for n in nodes if n.gpu.product == p), inventory.refused))
        for p in sorted(gpus, key=lambda p: (-free[p], p))
    ]


def _no_node(inventory: Inventory) -> str:
    reasons = [f"{r.name}: {r.reason}" for r in inventory.refused]
    if not reasons:
        return "there is no node with GPUs; the nearest that can be kept is nothing until one is added"
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    return f"none of {len(reasons)} nodes can be used: {'; '.join(reasons[:3])}{more}"
