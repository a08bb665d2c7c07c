"""Attention of a step over paged KV, in plain torch."""

from __future__ import annotations

import itertools
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from disaggworker.engine.step import Step
from disaggworker.kv.blocks import BLOCK_TOKENS, blocks_for
from disaggworker.kv.pool import Ints, Pool


class Attend(Protocol):
    """Attention of a step, or of some neighbouring sequences of it.

    q `[tokens, heads, head_dim]`, k and v `[tokens, kv_heads, head_dim]` → `[tokens, heads × head_dim]`
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class Attention:
    """Puts a step's keys and values into the pool, and attends over everything before each token.

    Each part of it finds them there.
    """

    def __init__(self, pool: Pool, step: Step) -> None:
        self._pool = pool
        positions, tables = step.positions(), padded(step)
        owners = tables[np.repeat(np.arange(len(tables)), step.counts), positions // BLOCK_TOKENS]
        self._rows = pool.rows(owners, positions % BLOCK_TOKENS)
        self._parts: list[tuple[slice, Attend]] = []
        at = 0
        # Neighbours with one new token each are computed together; any other alone.
        for alone, group in itertools.groupby(range(len(step.counts)), lambda row: step.counts[row] > 1):
            rows = list(group)
            for some in [[row] for row in rows] if alone else [rows]:
                end = at + sum(step.counts[row] for row in some)
                self._parts.append((slice(at, end), self._part(step, tables, some)))
                at = end

    def _part(self, step: Step, tables: Ints, rows: list[int]) -> Attend:
        first = rows[0]
        if step.counts[first] > 1 and step.starts[first] == 0:
            return _whole
        seen = [step.starts[row] + step.counts[row] for row in rows]
        of = tables[rows, : blocks_for(max(seen))]
        if step.counts[first] == 1:
            return _Single(self._pool, of, seen)
        return _Chunk(self._pool, of, seen[0], step.counts[first])

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q `[tokens, heads, head_dim]`, k and v `[tokens, kv_heads, head_dim]` → `[tokens, heads × head_dim]`."""
        self._pool.store(layer, self._rows, k, v)
        out = [part(layer, q[rows], k[rows], v[rows]) for rows, part in self._parts]
        return out[0] if len(out) == 1 else torch.cat(out)


def _whole(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first tokens of one sequence: nothing is gathered, for all there is to see has just been made."""
    heads = scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        is_causal=True,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return heads[0].transpose(0, 1).reshape(len(q), -1)


class _Chunk:
    """Further tokens of one sequence: what came before them is gathered from the pool, and they with it."""

    def __init__(self, pool: Pool, table: Ints, seen: int, count: int) -> None:
        self._pool, self._seen = pool, seen
        self._pairs = _pairs(pool, table)
        place = torch.arange(seen, device=pool.device)
        self._mask = _added(place[None, :] <= place[-count:, None], pool.dtype)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pool = self._pool
        shape = (1, pool.kv_heads, -1, pool.head_dim)
        keys, values = (part.view(shape)[:, :, : self._seen] for part in pool.gather(layer, self._pairs))
        heads = scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys,
            values,
            attn_mask=self._mask,
            enable_gqa=q.shape[1] != pool.kv_heads,
        )
        return heads[0].transpose(0, 1).reshape(len(q), -1)


class _Single:
    """One new token of each of several sequences, over all that came before it, gathered from the pool by block."""

    def __init__(self, pool: Pool, tables: Ints, seen: list[int]) -> None:
        self._pool = pool
        self._pairs = _pairs(pool, tables)
        mask = np.arange(tables.shape[1] * BLOCK_TOKENS)[None, :] < np.asarray(seen)[:, None]
        self._mask = _added(torch.from_numpy(mask[:, None, None, :]).to(pool.device), pool.dtype)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pool, batch = self._pool, len(q)
        shape = (batch, pool.kv_heads, -1, pool.head_dim)
        keys, values = (part.view(shape) for part in pool.gather(layer, self._pairs))
        if q.dtype != torch.float32:
            # Short floats are multiplied by oneDNN, whose call costs more than so small a product: a dot product each is faster.
            q = q[:, :, None]
            out = scaled_dot_product_attention(q, keys, values, attn_mask=self._mask, enable_gqa=True)
        else:
            # Heads of one group share their keys: the group becomes the query axis, and nothing is repeated.
            out = scaled_dot_product_attention(q.reshape(shape), keys, values, attn_mask=self._mask)
        return out.reshape(batch, -1)


def padded(step: Step) -> Ints:
    """The block tables `[sequences, widest]`, as far as the step reaches; block 0 where a shorter one has ended."""
    widths = [blocks_for(s + c) for s, c in zip(step.starts, step.counts, strict=True)]
    tables = np.zeros((len(widths), max(widths)), dtype=np.int64)
    for row, table, width in zip(tables, step.blocks, widths, strict=True):
        row[:width] = table[:width]
    return tables


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as what is added to scores: given as truths, it would be made into that anew in every layer."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def _pairs(pool: Pool, tables: Ints) -> Tensor:
    """What to gather for block tables `[n, width]`, so that it is `[n, kv_heads, width × BLOCK_TOKENS, head_dim]`."""
    pairs = tables[:, None, :] * pool.kv_heads + np.arange(pool.kv_heads)[None, :, None]
    return torch.from_numpy(pairs.reshape(-1)).to(pool.device)
