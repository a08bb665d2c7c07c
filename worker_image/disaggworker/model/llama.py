"""Llama 2 and 3: rotary positions (with Llama 3.1's scaling), RMSNorm, grouped KV heads, gated feed-forward.

Qwen3 is the same with an RMSNorm over each head's query and key before they are rotated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from disaggworker.engine.attention import Attend
from disaggworker.errors import StartError
from disaggworker.model import ops
from disaggworker.model.linear import Linear, packed
from disaggworker.model.share import WHOLE, Share
from disaggworker.model.weights import Weights


@dataclasses.dataclass(frozen=True)
class _Layer:
    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    attention_norm: Tensor
    ffn_norm: Tensor
    head_norms: tuple[Tensor, Tensor] | None  # of queries and keys, `[head_dim]` each: Qwen3


def inverse_frequencies(config: Mapping[str, Any], head_dim: int) -> Tensor:
    """Rotary frequencies `[head_dim / 2]`, float32. Raises `StartError` for a scaling that is not known."""
    # transformers 5 writes rope_parameters, earlier ones rope_theta and rope_scaling.
    rope = config.get("rope_parameters") or {}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    scaling = config.get("rope_scaling") or rope
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return inverse
    if kind == "linear":
        return inverse / float(scaling["factor"])
    if kind != "llama3":
        raise StartError(f"config.json asks for rope scaling {kind!r}; default, linear and llama3 are known.")
    factor, low, high = (float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * math.pi / inverse
    # Long waves are stretched, short ones kept, those between blended (Llama 3.1's model card and code).
    smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * inverse / factor + smooth * inverse


class Llama:
    """Sizes as every model here has them, and `forward`. Raises `StartError` for a window, which is not known."""

    def __init__(self, config: Mapping[str, Any], weights: Weights, share: Share = WHOLE) -> None:
        if config.get("use_sliding_window"):
            raise StartError(
                "config.json sets use_sliding_window; only attention over the whole context is known."
            )
        layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
        ffn = int(config["intermediate_size"])
        share.check(layers=layers, heads=heads, kv_heads=kv_heads, ffn=ffn)
        self.share = share
        self.layer_range, self.kv_head_range = share.layers(layers), share.kv_heads(kv_heads)
        self.layers, self.kv_heads = len(self.layer_range), len(self.kv_head_range)
        self.heads = heads // share.tp
        self.hidden = int(config["hidden_size"])
        self.head_dim = int(config.get("head_dim") or self.hidden // heads)
        self.max_positions = int(config["max_position_embeddings"])
        self.dtype, self.device = weights.dtype, weights.device
        self._epsilon = float(config.get("rms_norm_eps", 1e-6))
        tied = bool(config.get("tie_word_embeddings", False))
        table, head = "model.embed_tokens.weight", "model.embed_tokens.weight" if tied else "lm_head.weight"
        self.vocabulary = weights.rows(head)
        own = share.vocabulary(self.vocabulary)
        if share.first:
            self._tokens = weights.take(table)
        if share.last:
            # A table that is looked up stays in rows, and is not kept a second time.
            both = tied and share.first
            self._head = Linear(self._tokens[own], None) if both else packed(weights.take(head, own))
            self._final = weights.take("model.norm.weight")
        self._q, self._kv = share.part(heads, self.head_dim), _rows(self.kv_head_range, self.head_dim)
        self._ffn = share.part(ffn)
        head_norms = config["model_type"] == "qwen3"
        self._layers = [self._layer(weights, f"model.layers.{i}.", head_norms) for i in self.layer_range]
        self._frequencies = inverse_frequencies(config, self.head_dim).to(self.device)

    def _layer(self, weights: Weights, at: str, head_norms: bool) -> _Layer:
        attention, mlp = at + "self_attn.", at + "mlp."
        first = self.share.tp_rank == 0  # of what is summed over the ranks, one adds the bias
        return _Layer(
            qkv=weights.fused(
                (attention + "q_proj", self._q),
                (attention + "k_proj", self._kv),
                (attention + "v_proj", self._kv),
            ),
            out=weights.linear(attention + "o_proj", columns=self._q, bias=first),
            gate_up=weights.fused((mlp + "gate_proj", self._ffn), (mlp + "up_proj", self._ffn)),
            down=weights.linear(mlp + "down_proj", columns=self._ffn, bias=first),
            attention_norm=weights.take(at + "input_layernorm.weight"),
            ffn_norm=weights.take(at + "post_attention_layernorm.weight"),
            head_norms=(
                weights.take(attention + "q_norm.weight"),
                weights.take(attention + "k_norm.weight"),
            )
            if head_norms
            else None,
        )

    def forward(self, x: Tensor, positions: Tensor, attention: Attend, last: Tensor | None) -> Tensor:
        """This stage of one pass over packed tokens at `positions` `[n]`.

        `x` is tokens `[n]` on the first stage, elsewhere what the stage before gave, `[n, hidden]`. The last stage gives
        logits `[rows, own vocabulary]` of the rows that `last` names (None: all).
        """
        reduce, epsilon = self.share.reduce, self._epsilon
        if self.share.first:
            x = embedding(x, self._tokens)
        angle = positions[:, None].float() * self._frequencies
        angle = torch.cat((angle, angle), -1)[:, None, :]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        turned, heads = self.heads + self.kv_heads, (self.heads, self.kv_heads)
        branch: Tensor | None = None
        for number, layer in enumerate(self._layers):
            x, h = ops.add_rms_norm(x, branch, layer.attention_norm, epsilon)
            h = layer.qkv(h).view(len(x), -1, self.head_dim)
            qk, v = h[:, :turned], h[:, turned:]
            if layer.head_norms:
                parts = zip(torch.split_with_sizes(qk, heads, 1), layer.head_norms, strict=True)
                qk = torch.cat([ops.rms_norm(part, weight, epsilon) for part, weight in parts], 1)
            q, k = torch.split_with_sizes(ops.rotate(qk, cos, sin), heads, 1)
            branch = reduce(layer.out(attention(number, q, k, v)))
            x, h = ops.add_rms_norm(x, branch, layer.ffn_norm, epsilon)
            branch = reduce(layer.down(ops.gated(layer.gate_up(h))))
        x = x if branch is None else x + branch
        if not self.share.last:
            return x
        if last is not None:
            x = x.index_select(0, last)
        return self._head(ops.add_rms_norm(x, None, self._final, epsilon)[1])


def _rows(heads: range, width: int) -> slice:
    return slice(heads.start * width, heads.stop * width)
