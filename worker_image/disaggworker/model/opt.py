"""OPT: learned positions, LayerNorm before (or, 350M, after) each branch, ReLU, tied embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, layer_norm, linear, relu

from disaggworker.engine.attention import Attention
from disaggworker.model.weights import Weights

_OFFSET = 2  # rows before the first position in OPT's table

Affine = tuple[Tensor, Tensor | None]


@dataclasses.dataclass(frozen=True)
class _Layer:
    qkv: Affine
    out: Affine
    up: Affine
    down: Affine
    attention_norm: Affine
    ffn_norm: Affine


class OPT:
    """Sizes as every model here has them, and `forward`."""

    def __init__(self, config: Mapping[str, Any], weights: Weights) -> None:
        self.layers = int(config["num_hidden_layers"])
        self.heads = self.kv_heads = int(config["num_attention_heads"])
        self.hidden = int(config["hidden_size"])
        self.head_dim = self.hidden // self.heads
        self.max_positions = int(config["max_position_embeddings"])
        self._norm_before = bool(config.get("do_layer_norm_before", True))
        base = "model.decoder."
        self._tokens = weights.take(base + "embed_tokens.weight")
        self._positions = weights.take(base + "embed_positions.weight")
        self._project_in = self._optional(weights, base + "project_in")
        self._project_out = self._optional(weights, base + "project_out")
        self._final = self._optional(weights, base + "final_layer_norm")
        self._layers = [self._layer(weights, f"{base}layers.{i}.") for i in range(self.layers)]
        self.dtype, self.device = self._tokens.dtype, self._tokens.device

    @staticmethod
    def _optional(weights: Weights, name: str) -> Affine | None:
        return weights.linear(name) if f"{name}.weight" in weights else None

    @staticmethod
    def _layer(weights: Weights, at: str) -> _Layer:
        return _Layer(
            qkv=weights.fused(*(f"{at}self_attn.{part}_proj" for part in "qkv")),
            out=weights.linear(at + "self_attn.out_proj"),
            up=weights.linear(at + "fc1"),
            down=weights.linear(at + "fc2"),
            attention_norm=weights.linear(at + "self_attn_layer_norm"),
            ffn_norm=weights.linear(at + "final_layer_norm"),
        )

    def _norm(self, x: Tensor, affine: Affine) -> Tensor:
        return layer_norm(x, (self.hidden,), *affine)

    def forward(self, tokens: Tensor, positions: Tensor, attention: Attention, last: Tensor | None) -> Tensor:
        """Logits `[batch, vocab]` after packed `tokens` `[n]` at `positions`; `last` names the rows to answer (None: all)."""
        x = embedding(tokens, self._tokens)
        if self._project_in:
            x = linear(x, *self._project_in)
        x = x + embedding(positions + _OFFSET, self._positions)
        for number, layer in enumerate(self._layers):
            h = self._norm(x, layer.attention_norm) if self._norm_before else x
            q, k, v = linear(h, *layer.qkv).view(-1, 3, self.heads, self.head_dim).unbind(1)
            x = x + linear(attention(number, q, k, v), *layer.out)
            if not self._norm_before:
                x = self._norm(x, layer.attention_norm)
            h = self._norm(x, layer.ffn_norm) if self._norm_before else x
            x = x + linear(relu(linear(h, *layer.up)), *layer.down)
            if not self._norm_before:
                x = self._norm(x, layer.ffn_norm)
        if last is not None:
            x = x.index_select(0, last)
        if self._final:
            x = self._norm(x, self._final)
        if self._project_out:
            x = linear(x, *self._project_out)
        return torch.matmul(x, self._tokens.T)
