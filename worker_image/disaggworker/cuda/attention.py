"""Attention of a step on an NVIDIA GPU: torch's fused kernels for prompts, our paged kernel for one token a sequence."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from disaggworker.cuda import kernels
from disaggworker.engine.attention import Attend, padded
from disaggworker.engine.step import Step
from disaggworker.kv.blocks import BLOCK_TOKENS, blocks_for
from disaggworker.kv.pool import Ints, Pool


class PagedAttention:
    """One new token a sequence, and nothing of it known but on the device: what a CUDA graph can hold."""

    def __init__(self, pool: Pool, tables: Tensor, lengths: Tensor) -> None:
        """int32 `tables` `[batch, width]` and `lengths` `[batch]`, new token included; a length of 0 pads the batch."""
        self._pool, self._tables, self._lengths = pool, tables, lengths
        self._cut = _cut(pool, len(lengths))
        last = (lengths - 1).clamp(min=0)
        block = tables.gather(1, (last // BLOCK_TOKENS).long()[:, None])[:, 0].long()
        self._slots = torch.where(lengths > 0, block * BLOCK_TOKENS + last % BLOCK_TOKENS, -1)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `engine.attention.Attention`."""
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        kernels.store(keys, values, k, v, self._slots)
        return kernels.attend(q, keys, values, self._tables, self._lengths, self._cut)


class PackedAttention:
    """Whole prompts, packed one after another, each attending to itself."""

    def __init__(self, pool: Pool, slots: Tensor, ends: Tensor, longest: int) -> None:
        """Where each token's KV goes (`kernels.store`); int32 `ends` `[prompts + 1]`: 0 and where each prompt ends."""
        self._pool, self._slots, self._ends, self._longest = pool, slots, ends, longest

    @staticmethod
    def knows(dtype: torch.dtype) -> bool:
        """Whether flash attention has this type."""
        return dtype in (torch.float16, torch.bfloat16)

    @classmethod
    def of(cls, pool: Pool, step: Step) -> PackedAttention:
        """For a step of whole prompts."""
        ends = torch.tensor([0, *np.cumsum(step.counts)], dtype=torch.int32, device=pool.device)
        return cls(pool, torch.from_numpy(slots(step)).to(pool.device), ends, max(step.counts))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `engine.attention.Attention`."""
        kernels.store(self._pool.keys[layer], self._pool.values[layer], k, v, self._slots)
        # What is under torch.nn.attention.varlen, whose own arguments change from release to release.
        flash, ends, most = torch.ops.aten._flash_attention_forward, self._ends, self._longest
        mixed: Tensor
        mixed, *_ = flash(q, k, v, ends, ends, most, most, 0.0, is_causal=True, return_debug_mask=False)
        return mixed.flatten(1)


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """Several new tokens of one sequence."""

    rows: slice  # of the step
    seen: int  # tokens in the cache, with these
    blocks: Tensor | None  # None: there were none before


@dataclasses.dataclass(frozen=True)
class _Singles:
    """One new token of each of several sequences, which are tokens `rows` of the step."""

    rows: Tensor
    tables: Tensor
    lengths: Tensor
    cut: int


class StepAttention:
    """Any step: whole prompts, chunks on what is in the cache, and single tokens side by side."""

    def __init__(self, pool: Pool, step: Step) -> None:
        self._pool = pool
        device = pool.device
        counts, tables = np.asarray(step.counts), padded(step)
        self._slots = torch.from_numpy(slots(step)).to(device)
        ends = counts.cumsum()
        self._prompts: list[_Prompt] = []
        for row in np.flatnonzero(counts > 1).tolist():
            seen = step.starts[row] + step.counts[row]
            blocks = None
            if step.starts[row]:
                blocks = torch.from_numpy(tables[row, : blocks_for(seen)]).to(device)
            self._prompts.append(_Prompt(slice(int(ends[row] - counts[row]), int(ends[row])), seen, blocks))
        single = np.flatnonzero(counts == 1)
        self._singles = None
        if len(single):
            lengths = np.asarray(step.starts, dtype=np.int32)[single] + 1
            width = blocks_for(int(lengths.max()))
            self._singles = _Singles(
                torch.from_numpy(ends[single] - 1).to(device),
                torch.from_numpy(tables[single, :width].astype(np.int32)).to(device),
                torch.from_numpy(lengths).to(device),
                _cut(pool, len(single)),
            )

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `engine.attention.Attention`."""
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        kernels.store(keys, values, k, v, self._slots)
        if len(self._prompts) == 1 and self._singles is None:
            return self._prompt(layer, q, k, v, self._prompts[0])
        out = torch.empty((len(q), q.shape[1] * q.shape[2]), dtype=q.dtype, device=q.device)
        if (some := self._singles) is not None:
            own = q.index_select(0, some.rows)
            mixed = kernels.attend(own, keys, values, some.tables, some.lengths, some.cut)
            out.index_copy_(0, some.rows, mixed)
        for prompt in self._prompts:
            at = prompt.rows
            out[at] = self._prompt(layer, q[at], k[at], v[at], prompt)
        return out

    def _prompt(self, layer: int, q: Tensor, k: Tensor, v: Tensor, prompt: _Prompt) -> Tensor:
        mask = None
        if prompt.blocks is not None:
            k, v = (self._gathered(of[layer], prompt) for of in (self._pool.keys, self._pool.values))
            # The last token sees everything; with is_causal the first one would see only itself.
            mask = causal_lower_right(len(q), prompt.seen)
        heads = scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return heads[0].transpose(0, 1).reshape(len(q), -1)

    @staticmethod
    def _gathered(of: Tensor, prompt: _Prompt) -> Tensor:
        """Keys or values `[seen, kv_heads, head_dim]` of a sequence."""
        assert prompt.blocks is not None
        return of.index_select(0, prompt.blocks).transpose(1, 2).flatten(0, 1)[: prompt.seen]


def attention_for(pool: Pool, step: Step) -> Attend:
    """The fastest that takes the step. One prompt alone is faster by torch's choice of kernel than by packed flash."""
    if len(step.counts) > 1 and not any(step.starts) and PackedAttention.knows(pool.dtype):
        return PackedAttention.of(pool, step)
    return StepAttention(pool, step)


def slots(step: Step) -> Ints:
    """Where each token's KV goes: block × BLOCK_TOKENS + place."""
    positions = step.positions()
    owners = padded(step)[np.repeat(np.arange(len(step.counts)), step.counts), positions // BLOCK_TOKENS]
    return owners * BLOCK_TOKENS + positions % BLOCK_TOKENS


def _cut(pool: Pool, batch: int) -> int:
    sms = torch.cuda.get_device_properties(pool.device).multi_processor_count
    return kernels.splits(batch, pool.kv_heads, sms)
