"""The keys and values that one rank holds."""

from __future__ import annotations

import dataclasses

from disaggworker.kv.pool import Pool
from disaggworker.model.load import Model


@dataclasses.dataclass(frozen=True)
class Part:
    """Of an instance of `tp` × `pp` ranks, what rank `rank` holds: these layers, of these KV heads, in `pool`.

    Layer i of the pool is `layers[i]` of the model, and head i is `kv_heads[i]`. Where tp is a multiple of the model's KV
    heads several ranks hold the same head.
    """

    tp: int
    pp: int
    rank: int
    layers: range
    kv_heads: range
    pool: Pool

    @property
    def tp_rank(self) -> int:
        """Place in its stage."""
        return self.rank % self.tp

    @property
    def pp_rank(self) -> int:
        """Its stage."""
        return self.rank // self.tp

    @classmethod
    def of(cls, model: Model, pool: Pool) -> Part:
        """What a rank that has loaded `model` holds."""
        share = model.share
        return cls(share.tp, share.pp, share.rank, model.layer_range, model.kv_head_range, pool)
