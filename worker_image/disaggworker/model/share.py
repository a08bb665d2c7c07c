"""Which part of a model one rank holds.

Stages hold layers; the ranks of a stage hold heads and feed-forward columns of each. The embedding table is whole on
every rank of the first stage: a look-up reads one row per token, and so costs no all-reduce. The output head, which every
decode step reads in full, is cut by rows of the vocabulary over the ranks of the last stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from disaggworker.errors import StartError


@dataclasses.dataclass(frozen=True)
class Share:
    """Rank `rank` of `tp` × `pp`, numbered stage by stage."""

    tp: int = 1
    pp: int = 1
    rank: int = 0
    reduce: Callable[[Tensor], Tensor] = lambda x: x  # the sum of x over the ranks of this stage

    @property
    def tp_rank(self) -> int:
        """Place in its stage."""
        return self.rank % self.tp

    @property
    def pp_rank(self) -> int:
        """Its stage."""
        return self.rank // self.tp

    @property
    def first(self) -> bool:
        """Whether tokens come in here."""
        return self.pp_rank == 0

    @property
    def last(self) -> bool:
        """Whether logits come out here."""
        return self.pp_rank == self.pp - 1

    def layers(self, total: int) -> range:
        """Of `total` layers, those of this stage."""
        return range(self.pp_rank * total // self.pp, (self.pp_rank + 1) * total // self.pp)

    def part(self, total: int, width: int = 1) -> slice:
        """Of `total` things of `width` rows each, the rows of this rank."""
        size = total // self.tp
        return slice(self.tp_rank * size * width, (self.tp_rank + 1) * size * width)

    def kv_heads(self, total: int) -> range:
        """Of `total` KV heads, those that this rank's query heads read: one that several ranks read is on each of them."""
        if total < self.tp:
            own = self.tp_rank * total // self.tp
            return range(own, own + 1)
        part = self.part(total)
        return range(part.start, part.stop)

    def vocabulary(self, total: int) -> slice:
        """Of `total` tokens, those whose logits this rank computes; the last ranks may have fewer."""
        size = -(-total // self.tp)
        return slice(min(self.tp_rank * size, total), min((self.tp_rank + 1) * size, total))

    def check(self, *, layers: int, heads: int, kv_heads: int, ffn: int) -> None:
        """Raises `StartError` for a model that cannot be cut so. The same rule as the planner's (`catalogue.Model`)."""
        if heads % self.tp or ffn % self.tp:
            raise StartError(
                f"--tp {self.tp} does not divide the model's {heads} heads and its feed-forward of {ffn}."
            )
        if kv_heads % self.tp and self.tp % kv_heads:
            raise StartError(
                f"--tp {self.tp} neither divides the model's {kv_heads} KV heads nor is a multiple of them."
            )
        if layers % self.pp:
            raise StartError(f"--pp {self.pp} does not divide the model's {layers} layers.")


WHOLE = Share()
