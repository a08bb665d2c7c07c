"""The highest goodput per GPU, or in all, of the GPUs at hand: the best splits by their phases alone, then instance by instance."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from disaggserve import simulate
from disaggserve.catalogue import GPU
from disaggserve.engines import Role
from disaggserve.search import mixed
from disaggserve.search.fewest import FINALISTS
from disaggserve.search.field import Field, Plan, Split, pod_link
from disaggserve.search.packing import NoRoom
from disaggserve.search.problem import Rejected, Shape
from disaggserve.search.words import floor

COUNTS = 64  # beyond so many instances the goodput of each is taken to rise no more
CLIMBED = 2  # for the highest goodput: of the best splits found, so many are improved instance by instance
EQUAL_GOODPUT = 0.02  # goodputs per GPU within the bisection's own step are equal


class Most:
    """What serves most on a field."""

    def __init__(self, field: Field) -> None:
        self.field = field
        self._goodput_alone: dict[tuple[GPU, Role, Shape, int], float] = {}

    def fastest(self, value: Callable[[float, int], float]) -> tuple[Plan, float] | None:
        """The plan that fits the GPUs at hand with the highest value of (goodput, GPUs), and its goodput; None where no
        plan fits."""
        most = self.field.available()
        options: list[tuple[float, Split]] = []
        for i, ground in enumerate(self.field.grounds):
            for p, d in self.field.pairs_of(ground):
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
                plan = self.field.pack(split)
            except NoRoom:
                return None
            self.field.tell(f"goodput of {counts}", len(tried), len(tried) + 1)
            ground = self.field.grounds[split.ground]
            start = min(
                float(self._by_count(ground.prefill, "prefill", split.prefill, split.n)[-1]),
                float(self._by_count(ground.decode, "decode", split.decode, split.m)[-1]),
            )
            goodput = self.field.goodputs[ground.prefill].joint(plan.deployment, start) if start else 0.0
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
        if self.field.problem.engine.colocates:
            tried += self._fastest_mixed(value)
        if not tried:
            return None
        best = max(v for v, _, _ in tried)
        equal = [t for t in tried if t[0] >= best * (1 - EQUAL_GOODPUT)]
        _, goodput, plan = min(equal, key=lambda t: (-t[1], t[2].gpus, t[2].split))
        for _, rate, other in sorted(tried, key=lambda t: (-t[0], t[2].split)):
            if other is not plan:
                self.field.rejected.append(
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
        for gpu, inventory in self.field.products:
            free = min(self.field.problem.max_gpus, inventory.gpus_free)
            link = pod_link(gpu, inventory)
            best = mixed.fastest(
                self.field.problem, self.field.goodputs[gpu], self.field.whole(gpu), free, link
            )
            for one, goodput in best[:2]:
                plan = self.field.mixed_plan(one, inventory) if goodput else None
                if plan is not None:
                    goodput = self.field.goodputs[gpu].joint(plan.deployment, goodput)
                    found.append((value(goodput, plan.gpus), goodput, plan))
        return found

    def _by_count(self, gpu: GPU, role: Role, shape: Shape, most: int) -> npt.NDArray[np.float64]:
        """Goodput of 1, 2, … `most` instances with their phase alone, req/s: simulated for powers of two up to
        COUNTS, between them and beyond by goodput per instance."""
        goodputs, target = self.field.goodputs[gpu], self.field.problem.promise.attainment
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
