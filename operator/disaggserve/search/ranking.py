"""The order of shapes and pairs: what is best, and what counts as equal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

EQUAL = 0.05  # per-GPU goodputs so close count as equal: shapes lie closer than seeds do (REFERENCE § 3)


class _Split(Protocol):
    @property
    def gpus(self) -> int: ...
    @property
    def pp(self) -> int: ...


S = TypeVar("S", bound=_Split)


def ranked(goodputs: Mapping[S, float]) -> list[S]:
    """Those with any goodput (req/s), best first: by goodput per GPU, where those within 5 % of the best that is
    left count as equal and go to fewer GPUs, then to fewer pipeline stages (decode with pp above 1 is slower in
    real runs than the latency model says, REFERENCE § 1), then to the first given."""
    left = {split: g / split.gpus for split, g in goodputs.items() if g > 0}
    order: list[S] = []
    while left:
        best = max(left.values())
        equal = [s for s, per_gpu in left.items() if per_gpu >= (1 - EQUAL) * best]
        order.append(min(equal, key=lambda s: (s.gpus, s.pp)))
        del left[order[-1]]
    return order
