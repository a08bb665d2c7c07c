"""Algorithm 2 of the paper: a prefill and a decode instance as a pair on one node, so that KV stays inside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from disaggserve.search.problem import Shape


@dataclasses.dataclass(frozen=True)
class Pair:
    """One prefill and one decode instance with the same pipeline split, on one node."""

    prefill: Shape
    decode: Shape

    @property
    def gpus(self) -> int:
        return self.prefill.gpus + self.decode.gpus

    @property
    def pp(self) -> int:
        return self.prefill.pp

    def __str__(self) -> str:
        return f"prefill {self.prefill} + decode {self.decode}"


def pairs(prefill: Iterable[Shape], decode: Iterable[Shape], node_gpus: int) -> list[Pair]:
    """Pairs that share the pipeline split and fit one node together, in order of GPUs."""
    decode = list(decode)
    found = (Pair(p, d) for p in prefill for d in decode if p.pp == d.pp)
    fitting = [pair for pair in found if pair.gpus <= node_gpus]
    return sorted(fitting, key=lambda pair: (pair.gpus, pair.pp, pair.prefill, pair.decode))
