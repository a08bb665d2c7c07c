"""Algorithm 1 of the paper: prefill and decode instances chosen apart, each by its phase alone, for a fabric on
which KV may cross nodes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping

from disaggserve import engines
from disaggserve.engines import Engine
from disaggserve.search.problem import Shape
from disaggserve.search.ranking import ranked


@dataclasses.dataclass(frozen=True)
class Counts:
    """Shapes and numbers of instances before any node is named."""

    prefill: Shape
    n: int
    decode: Shape
    m: int

    @property
    def gpus(self) -> int:
        return self.prefill.gpus * self.n + self.decode.gpus * self.m

    def __str__(self) -> str:
        return f"prefill {self.n}×{self.prefill}, decode {self.m}×{self.decode}"


def plans(
    prefill: Mapping[Shape, float], decode: Mapping[Shape, float], rate: float, engine: Engine
) -> Iterator[Counts]:
    """Instances for `rate` req/s: the best shape of each phase, n = ⌈R/goodput⌉, m likewise; then the next best.

    After the published choice come the other pairs of shapes in order of the GPUs that a req/s costs them.
    Pairs that the engine refuses are left out. `prefill`, `decode`: goodput of one instance by shape.
    """
    rank_p, rank_d = ranked(prefill), ranked(decode)

    def cost(p: Shape, d: Shape) -> float:
        return p.gpus / prefill[p] + d.gpus / decode[d]

    pairs: Iterable[tuple[Shape, Shape]] = [
        (p, d) for p in rank_p for d in rank_d if engines.refuse_shape(engine, "prefill", *p, other=d) is None
    ]
    published = (rank_p[0], rank_d[0]) if rank_p and rank_d else None
    for p, d in sorted(pairs, key=lambda pair: (pair != published, cost(*pair), pair)):
        yield Counts(p, math.ceil(rate / prefill[p]), d, math.ceil(rate / decode[d]))
