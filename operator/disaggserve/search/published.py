"""The search that DistServe's public code does, rule by rule, so that its figures can be had again (REFERENCE § 3).

It looks for one prefill and one decode instance with the highest goodput per GPU on N nodes of M GPUs, and knows
no rate. Candidates are product(cross, tp_p, pp_p, tp_d, pp_d): tp divides the heads; each instance has cross·pp
pipeline stages, which divide the layers; cross·(tp_p·pp_p + tp_d·pp_d) GPUs in all. Low affinity: cross ≤ N, and
one segment (tp_p·pp_p + tp_d·pp_d) stands on a node. High affinity: cross is 1, and a node is no limit. Shapes
without a fit or a row of memory are dropped. Each one's rate per GPU is bisected in [0, 5] until the interval is
at most the resolution, on 300 requests; ties go to fewer GPUs, then to the first.

This is a reproduction and no advice: 300 requests are a start-up transient that ends before queues have grown,
TTFT and TPOT are tested apart (90 % each can be 80 % of both), and neither KV transfer nor decode memory is in it.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from disaggserve import catalogue, engines, hardware
from disaggserve.api.errors import Infeasible, InvalidInput
from disaggserve.catalogue import Model
from disaggserve.engines import Role
from disaggserve.hardware import Inventory
from disaggserve.latency import Fit, Profile
from disaggserve.search import packing, predicting
from disaggserve.search.packing import Group, NoRoom
from disaggserve.search.problem import Placement, Problem, Rejected, Shape
from disaggserve.simulate import Promise
from disaggserve.simulate.published import Ints, Simulator, warm_up
from disaggserve.workload import Lengths

__all__ = ["place", "search", "warm_up"]

REQUESTS = 300
MOST_PER_GPU = 5.0  # req/s: the upper end of the bisection
RUNNERS_UP = 10
_ROWS = Path(__file__).parents[1] / "data" / "profiles" / "max_num_tokens.csv"


class Pair(NamedTuple):
    """A prefill and a decode instance with all their stages; each has 1/cross of them on every one of `cross` nodes."""

    cross: int
    prefill: Shape
    decode: Shape

    @property
    def gpus(self) -> int:
        return self.prefill.gpus + self.decode.gpus

    def __str__(self) -> str:
        return f"prefill {self.prefill} + decode {self.decode}" + (
            f" across {self.cross} nodes" if self.cross > 1 else ""
        )


@dataclasses.dataclass(frozen=True)
class Tables:
    """Of one model: fits by tp; tokens of KV that an instance holds by (tp, pp), as the public code ships them."""

    fits: Mapping[int, Fit]
    tokens: Mapping[tuple[int, int], int]

    def knows(self, shape: Shape) -> bool:
        return shape.tp in self.fits and shape in self.tokens


@dataclasses.dataclass(frozen=True)
class Searched:
    """Goodput per GPU in req/s of every candidate, best first.

    `simulations` counts those that the published search runs. Here equal ones are shared, in whole or in their
    prefill, and decode is simulated only where TTFT is kept: `prefills` and `decodes` is what was run.
    """

    ranking: tuple[tuple[Pair, float], ...]
    simulations: int
    prefills: int
    decodes: int
    ttft_kept: bool  # by any of them


@functools.cache
def _memory() -> Mapping[str, Mapping[tuple[int, int], int]]:
    found: dict[str, dict[tuple[int, int], int]] = {}
    with _ROWS.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            shape = int(row["tp"]), int(row["pp"])
            found.setdefault(row["model"], {})[shape] = int(row["max_num_tokens"])
    return found


def tables(model: Model, profile: Profile) -> Tables:
    """Raises `InvalidInput` for a model that the profile or the published table of memory does not hold."""
    fits = {tp: fit for (name, tp), fit in profile.fits.items() if name == model.id}
    if not fits:
        known = ", ".join(sorted({name for name, _ in profile.fits}))
        raise InvalidInput(
            f"as published: {profile.name} holds no step times of {model.id}, it holds {known}"
        )
    if model.id not in _memory():
        known = ", ".join(sorted(_memory()))
        raise InvalidInput(f"as published: the public code knows the memory of {known}, not of {model.id}")
    return Tables(fits, _memory()[model.id])


def candidates(
    model: Model, known: Tables, nodes: int, node_gpus: int, most_gpus: int, high: bool
) -> Iterator[Pair]:
    """In the published order. `most_gpus`: of all instances together."""
    splits = _divisors(model.layers)
    limit = most_gpus if high else node_gpus
    tps = [tp for tp in _divisors(model.heads) if tp <= limit]
    pps = [pp for pp in splits if pp <= limit]
    crosses = [1] if high else [cross for cross in splits if cross <= nodes]
    for cross, tp_p, pp_p, tp_d, pp_d in itertools.product(crosses, tps, pps, tps, pps):
        segment = tp_p * pp_p + tp_d * pp_d
        if cross * segment > most_gpus or (not high and segment > node_gpus):
            continue
        pair = Pair(cross, Shape(tp_p, cross * pp_p), Shape(tp_d, cross * pp_d))
        if all(shape.pp in splits and known.knows(shape) for shape in (pair.prefill, pair.decode)):
            yield pair


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def search(pairs: Iterator[Pair], known: Tables, simulator: Simulator, resolution: float) -> Searched:
    """Bisects every pair. `resolution`: req/s per GPU."""
    firsts: dict[tuple[Shape, float], Ints | None] = {}
    kept: dict[tuple[Shape, Shape, float], bool] = {}

    def keeps(pair: Pair, rate: float) -> bool:
        prefill, decode = pair.prefill, pair.decode
        if (prefill, rate) not in firsts:
            firsts[prefill, rate] = simulator.first_tokens(
                known.fits[prefill.tp], prefill.pp, known.tokens[prefill], rate
            )
        first = firsts[prefill, rate]
        if first is None:
            return False
        if (prefill, decode, rate) not in kept:
            kept[prefill, decode, rate] = simulator.keeps_tpot(known.fits[decode.tp], decode.pp, first)
        return kept[prefill, decode, rate]

    ranking: list[tuple[Pair, float]] = []
    simulations = 0
    for pair in pairs:
        good, bad = 0.0, MOST_PER_GPU
        while bad - good > resolution:
            middle = (good + bad) / 2
            simulations += 1
            if keeps(pair, middle * pair.gpus):
                good = middle
            else:
                bad = middle
        ranking.append((pair, good))
    ranking.sort(key=lambda found: (-found[1], found[0].gpus))  # stable: then the first
    ttft_kept = any(first is not None for first in firsts.values())
    return Searched(tuple(ranking), simulations, len(firsts), len(kept), ttft_kept)


def place(problem: Problem, profile: Profile, resolution: float = 0.25) -> Placement:
    """What the public code answers for these nodes; its one prefill and one decode instance, put where they fit.

    The answer stands even where the nodes cannot hold it as it is meant (an instance larger than a node, or a low-
    affinity pair across nodes): its groups then name no node, and the first of `rejected` says why. Raises
    `InvalidInput` for what the public code has no tables of, `Infeasible` (GPUs, TTFT, TPOT, Nodes).
    """
    if not 0 < resolution < MOST_PER_GPU:
        raise InvalidInput(
            f"resolution is {resolution}; write req/s per GPU above 0 and below {MOST_PER_GPU:g}"
        )
    if profile.source != "profile" or profile.product is None:
        raise InvalidInput(
            f"as published: {profile.name} is not in the public code's form; give DistServe's JSON"
        )
    model, promise = problem.model, problem.promise
    known = tables(model, profile)
    inventory = _of_product(problem.inventory, profile.product)
    affinity, reason = hardware.affinity(inventory, problem.affinity)
    high = affinity == "High" if problem.algorithm == "DistServe" else problem.algorithm == "HighAffinity"
    node_gpus = max(n.gpus_free for n in inventory.nodes)
    free = min(problem.max_gpus, sum(n.gpus_free for n in inventory.nodes))
    lengths = problem.workload.lengths
    lengths = Lengths(lengths.name, lengths.input[:REQUESTS], lengths.output[:REQUESTS])
    longest = int(lengths.input.max())
    known = Tables(known.fits, {shape: n for shape, n in known.tokens.items() if n >= longest})
    pairs = candidates(model, known, len(inventory.nodes), node_gpus, free, high)
    simulator = Simulator(lengths, promise)
    searched = search(pairs, known, simulator, resolution)
    if not searched.ranking:
        raise Infeasible(
            "GPUs", f"as published: no prefill and decode instance of {model.id} fit {free} GPUs together"
        )
    best, per_gpu = searched.ranking[0]
    if per_gpu == 0:
        raise _too_slow(searched, promise, resolution)
    rate = per_gpu * best.gpus
    groups, why = _groups(best, inventory, high)
    link = predicting.kv_link(inventory, groups, engines.DISTSERVE, paired=not high)
    prefill, decode = best.prefill, best.decode
    return Placement(
        algorithm="HighAffinity" if high else "LowAffinity",
        affinity=affinity,
        affinity_reason=reason,
        groups=groups,
        gpus=best.gpus,
        rate=rate,
        link=link,
        paired=not high,
        goodput=rate,
        prediction=simulator.predict(
            (known.fits[prefill.tp], prefill.pp, known.tokens[prefill]),
            (known.fits[decode.tp], decode.pp),
            rate,
        ),
        bottleneck="",
        bound=0.0,
        bound_share=0.0,
        latency_source=_words(profile, lengths, promise, searched),
        rejected=(*why, *_runners_up(searched)),
        simulations=searched.simulations,
    )


def _of_product(inventory: Inventory, product: str) -> Inventory:
    nodes = tuple(n for n in inventory.nodes if n.gpu.product == product and n.gpus_free > 0)
    if not nodes:
        raise Infeasible(
            "Nodes",
            f"as published: the public code knows {catalogue.gpu(product).short} only, and no usable node has a "
            "free one",
        )
    return Inventory(nodes, inventory.refused)


def _groups(best: Pair, inventory: Inventory, high: bool) -> tuple[tuple[Group, ...], list[Rejected]]:
    """On their nodes, or without any and the reason."""
    shapes: list[tuple[Role, Shape]] = [("prefill", best.prefill), ("decode", best.decode)]
    try:
        if high:
            return packing.pack([(role, *shape, 1) for role, shape in shapes], inventory), []
        return packing.pack_pairs(best.prefill, best.decode, 1, inventory), []
    except NoRoom as error:
        unplaced = tuple(Group(role, *shape, 1, ()) for role, shape in shapes)
        return unplaced, [Rejected("nodes for this plan", f"none are named: {error}")]


def _runners_up(searched: Searched) -> list[Rejected]:
    (best, most), *others = searched.ranking
    return [
        Rejected(
            str(pair),
            f"{per_gpu:.3f} req/s per GPU on {pair.gpus} GPUs, "
            + (f"as many as {best}, which comes first" if per_gpu == most else f"the best has {most:.3f}"),
        )
        for pair, per_gpu in others[:RUNNERS_UP]
    ]


def _too_slow(searched: Searched, promise: Promise, resolution: float) -> Infeasible:
    limit, limit_s = ("TPOT", promise.tpot_s) if searched.ttft_kept else ("TTFT", promise.ttft_s)
    return Infeasible(
        limit,
        f"as published: none of {len(searched.ranking)} configurations keeps a {limit} of {limit_s * 1e3:.0f} ms for "
        f"{promise.attainment:.0%} of the requests at any rate tried, to {resolution:g} req/s per GPU",
    )


def _words(profile: Profile, lengths: Lengths, promise: Promise, searched: Searched) -> str:
    """What a reader must know before believing the figures."""
    quantile = f"p{promise.attainment * 100:g}"
    return (
        f"as published: {profile.name} and the public simulator's own overhead; {len(lengths)} requests whatever "
        f"the rate, which is a start-up transient and no steady state; {quantile} of TTFT and {quantile} of TPOT "
        f"tested apart; one prefill and one decode instance, no KV transfer, no decode memory; "
        f"{len(searched.ranking)} configurations, {searched.simulations} simulations asked for (equal ones shared: "
        f"{searched.prefills} prefill and {searched.decodes} decode phases run)"
    )
