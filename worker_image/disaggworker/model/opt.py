"""OPT: learned positions, LayerNorm before (or, 350M, after) each branch, ReLU, tied embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import embedding

from disaggworker.engine.attention import Attend
from disaggworker.model import ops
from disaggworker.model.linear import Linear, packed
from disaggworker.model.share import WHOLE, Share
from disaggworker.model.weights import Weights

_OFFSET = 2  # rows before the first position in OPT's table


@dataclasses.dataclass(frozen=True)
class _Layer:
    qkv: Linear
    out: Linear
    up: Linear
    down: Linear
    attention_norm: ops.Affine
    ffn_norm: ops.Affine


class OPT:
    """Sizes as every model here has them, and `forward`."""

    def __init__(self, config: Mapping[str, Any], weights: Weights, share: Share = WHOLE) -> None:
        layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        ffn = int(config["ffn_dim"])
        share.check(layers=layers, heads=heads, kv_heads=heads, ffn=ffn)
        self.share = share
        self.layer_range, self.kv_head_range = share.layers(layers), share.kv_heads(heads)
        self.layers, self.kv_heads = len(self.layer_range), len(self.kv_head_range)
        self.hidden = int(config["hidden_size"])
        self.head_dim = self.hidden // heads
        self.max_positions = int(config["max_position_embeddings"])
        self.dtype, self.device = weights.dtype, weights.device
        self._norm_before = bool(config.get("do_layer_norm_before", True))
        base = "model.decoder."
        self.vocabulary = weights.rows(base + "embed_tokens.weight")
        own = share.vocabulary(self.vocabulary)
        if share.first:
            self._tokens = weights.take(base + "embed_tokens.weight")
            self._positions = weights.take(base + "embed_positions.weight")
            self._project_in = self._optional(weights, base + "project_in")
        if share.last:
            # Embeddings are tied. A table that is looked up stays in rows, and is not kept a second time.
            table = base + "embed_tokens.weight"
            self._head = Linear(self._tokens[own], None) if share.first else packed(weights.take(table, own))
            self._project_out = self._optional(weights, base + "project_out")
            final = base + "final_layer_norm"
            self._final = weights.affine(final) if f"{final}.weight" in weights else None
        self._attention, self._ffn = share.part(heads, self.head_dim), share.part(ffn)
        self._layers = [self._layer(weights, f"{base}layers.{i}.") for i in self.layer_range]

    @staticmethod
    def _optional(weights: Weights, name: str) -> Linear | None:
        return weights.linear(name) if f"{name}.weight" in weights else None

    def _layer(self, weights: Weights, at: str) -> _Layer:
        first = self.share.tp_rank == 0  # of what is summed over the ranks, one adds the bias
        return _Layer(
            qkv=weights.fused(*((f"{at}self_attn.{part}_proj", self._attention) for part in "qkv")),
            out=weights.linear(at + "self_attn.out_proj", columns=self._attention, bias=first),
            up=weights.linear(at + "fc1", self._ffn),
            down=weights.linear(at + "fc2", columns=self._ffn, bias=first),
            attention_norm=weights.affine(at + "self_attn_layer_norm"),
            ffn_norm=weights.affine(at + "final_layer_norm"),
        )

    def forward(self, x: Tensor, positions: Tensor, attention: Attend, last: Tensor | None) -> Tensor:
        """This stage of one pass over packed tokens at `positions` `[n]`.

        `x` is tokens `[n]` on the first stage, elsewhere what the stage before gave, `[n, hidden]`. The last stage gives
        logits `[rows, own vocabulary]` of the rows that `last` names (None: all).
        """
        reduce = self.share.reduce
        if self.share.first:
            x = embedding(x, self._tokens)
            if self._project_in:
                x = self._project_in(x)
            x = x + embedding(positions + _OFFSET, self._positions)
        branch: Tensor | None = None
        for number, layer in enumerate(self._layers):
            h = x
            if self._norm_before:
                x, h = ops.add_layer_norm(x, branch, layer.attention_norm)
            q, k, v = layer.qkv(h).view(len(x), 3, -1, self.head_dim).unbind(1)
            branch = reduce(layer.out(attention(number, q, k, v)))
            if self._norm_before:
                x, h = ops.add_layer_norm(x, branch, layer.ffn_norm)
            else:
                x = h = ops.add_layer_norm(x, branch, layer.attention_norm)[1]
            branch = reduce(layer.down(ops.linear_relu(h, layer.up)))
            if not self._norm_before:
                x, branch = ops.add_layer_norm(x, branch, layer.ffn_norm)[1], None
        x = x if branch is None else x + branch
        if not self.share.last:
            return x
        if last is not None:
            x = x.index_select(0, last)
        if self._final:
            x = ops.add_layer_norm(x, None, self._final)[1]
        if self._project_out:
            x = self._project_out(x)
        return self._head(x)
