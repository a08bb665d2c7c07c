"""The keys and values that one rank holds."""

from __future__ import annotations

import dataclasses

from disaggworker.kv.pool import Pool
from disaggworker.model.load import Model


@dataclasses.dataclass(frozen=True)
class Part:
    """What rank `rank` of an instance holds: these layers, of these KV heads, in `pool`.

    Layer i of the pool is `layers[i]` of the model, and head i is `kv_heads[i]`. Where tp is a multiple of the model's KV
    heads several ranks hold the same head.
    """

    rank: int
    layers: range
    kv_heads: range
    pool: Pool

    @classmethod
    def of(cls, model: Model, pool: Pool) -> Part:
        """What a rank that has loaded `model` holds."""
        return cls(model.share.rank, model.layer_range, model.kv_head_range, pool)
