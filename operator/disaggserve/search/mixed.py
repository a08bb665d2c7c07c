"""Do not disaggregate: instances that prefill and decode, whole prompts first or prompts cut into chunks.

One kind of instance is colocated serving: a request stays where it was prefilled. Two kinds, with a large chunk and
with a small one, are mixed pools: what was prefilled on one may decode on the other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from disaggserve import simulate
from disaggserve.catalogue import GPU, Link
from disaggserve.engines import Role
from disaggserve.search import predicting
from disaggserve.search.goodputs import PART, SCREEN, Goodputs
from disaggserve.search.packing import Group
from disaggserve.search.problem import Problem, Shape
from disaggserve.simulate import Deployment

# Chunks: tokens of a step; None: whole prompts, before any decode step. Colocated, then mixed pools.
KINDS: tuple[tuple[int | None, ...], ...] = ((None,), (512,), (1024,), (2048,), (2048, 256), (1024, 256))
HOPE = 0.04  # see fewest.HOPE


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Instances of one shape, by chunk."""

    gpu: GPU
    shape: Shape
    parts: tuple[tuple[int, int | None], ...]  # (instances, chunk)

    @property
    def count(self) -> int:
        return sum(n for n, _ in self.parts)

    @property
    def gpus(self) -> int:
        return self.count * self.shape.gpus

    def __str__(self) -> str:
        taken = [f"chunks of {chunk}" if chunk else "whole prompts" for _, chunk in self.parts]
        parts = [f"{n}×{self.shape} with {how}" for (n, _), how in zip(self.parts, taken, strict=True)]
        return ("colocated " if len(parts) == 1 else "mixed ") + " + ".join(parts)

    def groups(self, nodes: Sequence[tuple[str, int]] = ()) -> tuple[Group, ...]:
        """One group for each chunk; `nodes` (name, instances) are dealt to them in order."""
        left = [name for name, n in nodes for _ in range(n)]
        found: list[Group] = []
        for n, chunk in self.parts:
            mine, left = left[:n], left[n:]
            shares = tuple((name, mine.count(name)) for name in dict.fromkeys(mine))
            found.append(Group("mixed", *self.shape, n, shares, chunk))
        return tuple(found)


def deployment(problem: Problem, mixed: Mixed, link: Link) -> Deployment:
    where: dict[Role, GPU] = {"prefill": mixed.gpu, "decode": mixed.gpu, "mixed": mixed.gpu}
    return predicting.deployment(
        problem.model, problem.engine, where, mixed.groups(), link, profile=problem.profile
    )


def fewest(
    problem: Problem, goodputs: Goodputs, shapes: Sequence[Shape], most: int, link: Link
) -> list[tuple[Mixed, float]]:
    """Mixed instances of at most `most` GPUs that may keep the promise at the workload's rate, those that take least
    first, with the share of a few requests that do; where none may, the one that comes nearest; none where none fits.
    """
    rate, target = problem.workload.rate, problem.promise.attainment

    def kept(mixed: Mixed) -> float:
        # Of many, a part with its share of the rate tells for all.
        k = max(1, mixed.count // PART)
        part = dataclasses.replace(mixed, parts=tuple((-(-n // k), chunk) for n, chunk in mixed.parts))
        share = rate * part.count / mixed.count
        return goodputs.kept(deployment(problem, part, link), share, predicting.SEARCH_SEEDS[:1], SCREEN).both

    found: list[tuple[Mixed, float]] = []
    for shape in shapes:
        least = _least(goodputs, shape, rate)
        count = most // shape.gpus
        if count < max(1, least):
            continue
        for chunks in KINDS:
            low, high = max(least, len(chunks)) - 1, count
            if low >= high:
                continue
            best = _of(goodputs.gpu, shape, high, chunks)
            found.append((best, kept(best)))
            while found[-1][1] >= target - HOPE and high - low > 1:
                middle = _of(goodputs.gpu, shape, (low + high) // 2, chunks)
                share = kept(middle)
                if share >= target - HOPE:
                    high = middle.count
                    found.append((middle, share))
                else:
                    low = middle.count
    hopeful = [f for f in found if f[1] >= target - HOPE / 4]
    if hopeful:
        return sorted(hopeful, key=lambda f: (f[0].gpus, -f[1], f[0].shape))
    return sorted(found, key=lambda f: (-f[1], f[0].gpus, f[0].shape))[:1]


def fastest(
    problem: Problem, goodputs: Goodputs, shapes: Sequence[Shape], most: int, link: Link
) -> list[tuple[Mixed, float]]:
    """Colocated instances on as many of `most` GPUs as they fill, with their goodput (req/s) on a few requests, the
    highest first."""
    target = problem.promise.attainment
    found: list[tuple[Mixed, float]] = []
    for shape in shapes:
        count = most // shape.gpus
        for chunks in KINDS if count else ():
            if len(chunks) > 1:
                continue
            mixed = _of(goodputs.gpu, shape, count, chunks)
            plan = deployment(problem, mixed, link)
            goodput = simulate.goodput(
                lambda rate: goodputs.kept(plan, rate, predicting.SEARCH_SEEDS[:1], SCREEN).both,  # noqa: B023
                target,
                start=0.7 * count / _each_s(goodputs, shape),
                resolution=0.05,
            )
            found.append((mixed, goodput))
    return sorted(found, key=lambda f: (-f[1], f[0].gpus, f[0].shape))


def _each_s(goodputs: Goodputs, shape: Shape) -> float:
    """Seconds of an instance that a request takes at least, both phases together."""
    return sum(1 / goodputs.fluid(role, shape) for role in _PHASES)


def _least(goodputs: Goodputs, shape: Shape, rate: float) -> int:
    """Instances by fluid capacity. Larger steps than L_m are a little cheaper."""
    return max(1, math.ceil(0.9 * rate * _each_s(goodputs, shape)))


_PHASES: tuple[Role, ...] = ("prefill", "decode")


def _of(gpu: GPU, shape: Shape, count: int, chunks: tuple[int | None, ...]) -> Mixed:
    """So many instances, half of them with each chunk; one more with the first where they are odd."""
    shares = [count // len(chunks) + (k < count % len(chunks)) for k in range(len(chunks))]
    return Mixed(gpu, shape, tuple(zip(shares, chunks, strict=True)))
