"""Where KV bytes are: paged tensors, read and written by block, and attention over them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from disaggworker.errors import StartError
from disaggworker.kv.blocks import BLOCK_TOKENS, blocks_for

_FIRST_BLOCKS = 256
_CPU_POOL_BYTES = 1 << 30  # KV memory on a CPU where nobody says how many blocks
_GPU_SHARE = 0.9  # of the memory that is free after the weights

Ints = NDArray[np.int64]


def blocks_in_memory(
    layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> int:
    """KV blocks of such a model that the device has memory for, beside the weights. Raises `StartError`."""
    size = 2 * layers * kv_heads * head_dim * BLOCK_TOKENS * dtype.itemsize
    room = _CPU_POOL_BYTES
    if device.type == "cuda":
        room = int(_GPU_SHARE * torch.cuda.mem_get_info()[0])
    if not room // size:
        raise StartError(f"No memory is left for a KV block of {size} bytes beside the weights.")
    return room // size


class Pool:
    """Keys and values of `layers` layers, each `[blocks, kv_heads, BLOCK_TOKENS, head_dim]`.

    Heads before tokens: what is gathered by block and head is then what attention reads, without a copy.

    `limit` blocks may be named; memory is taken as they are, by doubling, so that a worker that emulates a large
    GPU does not hold a large GPU's memory. Growing replaces the tensors and keeps their contents.
    """

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, limit: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layers, self.kv_heads, self.head_dim, self.limit = layers, kv_heads, head_dim, limit
        self.dtype, self.device = dtype, device
        # A GPU's memory was measured to find `limit`: it is taken at once.
        self._blocks = limit if device.type == "cuda" else min(limit, _FIRST_BLOCKS)
        self.keys = [self._empty(self._blocks) for _ in range(layers)]
        self.values = [self._empty(self._blocks) for _ in range(layers)]

        empty = torch.empty((0, BLOCK_TOKENS, head_dim), dtype=dtype, device=device)
        self._scratch = [empty, empty]

    def _empty(self, blocks: int) -> Tensor:
        # Zeros, not garbage: attention masks padding by weight 0, and 0 × NaN is NaN.
        shape = (blocks, self.kv_heads, BLOCK_TOKENS, self.head_dim)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def reserve(self, blocks: Sequence[int]) -> None:
        """Have memory for these blocks."""
        need = max(blocks, default=-1) + 1
        if need <= self._blocks:
            return
        size = self._blocks
        while size < need:
            size *= 2
        size = min(size, self.limit)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                new = self._empty(size)
                new[: self._blocks] = old
                tensors[layer] = new
        self._blocks = size

    def read(self, blocks: Sequence[int]) -> list[Tensor]:
        """Copies of these blocks on the CPU: keys, values of layer 0, keys, values of layer 1, …"""
        index = torch.tensor(blocks, device=self.device)
        parts = []
        for layer in range(self.layers):
            parts.append(self.keys[layer].index_select(0, index).cpu())
            parts.append(self.values[layer].index_select(0, index).cpu())
        return parts

    def write(self, blocks: Sequence[int], frames: Sequence[memoryview]) -> None:
        """Fill these blocks with what `read` gave, as bytes. Raises `ValueError` for frames of another size."""
        self.reserve(blocks)
        index = torch.tensor(blocks, device=self.device)
        shape = (len(blocks), self.kv_heads, BLOCK_TOKENS, self.head_dim)
        size = int(np.prod(shape)) * self.dtype.itemsize
        if len(frames) != 2 * self.layers or any(len(frame) != size for frame in frames):
            raise ValueError(f"{len(frames)} KV frames are not {2 * self.layers} of {size} bytes")
        for layer in range(self.layers):
            for tensors, frame in ((self.keys, frames[2 * layer]), (self.values, frames[2 * layer + 1])):
                part = torch.frombuffer(bytearray(frame), dtype=self.dtype).view(shape)
                tensors[layer].index_copy_(0, index, part.to(self.device))

    def rows(self, blocks: Ints, offsets: Ints) -> Tensor:
        """Rows of `[blocks × kv_heads × BLOCK_TOKENS, head_dim]` for tokens in these blocks, at these places in them."""
        heads = np.arange(self.kv_heads)[None, :]
        rows = (blocks[:, None] * self.kv_heads + heads) * BLOCK_TOKENS + offsets[:, None]
        return torch.from_numpy(rows.reshape(-1)).to(self.device)

    def store(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Write k and v `[tokens, kv_heads, head_dim]` at `rows`."""
        self.keys[layer].view(-1, self.head_dim).index_copy_(0, rows, k.reshape(-1, self.head_dim))
        self.values[layer].view(-1, self.head_dim).index_copy_(0, rows, v.reshape(-1, self.head_dim))

    def gather(self, layer: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[len(index), BLOCK_TOKENS, head_dim]` of the (block, head) pairs `block × kv_heads + head`;
        valid until the next call."""
        count = len(index)
        if count > len(self._scratch[0]):
            # Kept from step to step: a fresh buffer of megabytes costs more in page faults than the copy into it.
            shape = (2 * count, BLOCK_TOKENS, self.head_dim)
            self._scratch = [torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2)]
        keys, values = (scratch[:count] for scratch in self._scratch)
        view = (-1, BLOCK_TOKENS, self.head_dim)
        torch.index_select(self.keys[layer].view(view), 0, index, out=keys)
        torch.index_select(self.values[layer].view(view), 0, index, out=values)
        return keys, values


class PrefillAttention:
    """Attention of whole prompts, packed one after another; their KV goes into the pool."""

    def __init__(self, pool: Pool, lengths: Sequence[int], blocks: Sequence[Sequence[int]]) -> None:
        self.pool, self.lengths = pool, lengths
        for table in blocks:
            pool.reserve(table)
        tokens = [np.arange(n) for n in lengths]
        owners = [np.asarray(table)[t // BLOCK_TOKENS] for t, table in zip(tokens, blocks, strict=True)]
        self.rows = pool.rows(np.concatenate(owners), np.concatenate(tokens) % BLOCK_TOKENS)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q `[tokens, heads, head_dim]`, k and v `[tokens, kv_heads, head_dim]` → `[tokens, heads × head_dim]`."""
        self.pool.store(layer, self.rows, k, v)
        grouped = q.shape[1] != k.shape[1]
        out, start = [], 0
        for n in self.lengths:
            part = slice(start, start + n)
            heads = scaled_dot_product_attention(
                q[part].transpose(0, 1)[None],
                k[part].transpose(0, 1)[None],
                v[part].transpose(0, 1)[None],
                is_causal=True,
                enable_gqa=grouped,
            )
            out.append(heads[0].transpose(0, 1).reshape(n, -1))
            start += n
        return out[0] if len(out) == 1 else torch.cat(out)


class DecodeAttention:
    """Attention of one new token per sequence over everything before it, gathered from the pool by block."""

    def __init__(self, pool: Pool, lengths: Sequence[int], blocks: Sequence[Sequence[int]]) -> None:
        """`lengths` include the new token."""
        self.pool = pool
        length = np.asarray(lengths)
        self.width = width = blocks_for(int(length.max()))
        table = np.zeros((len(lengths), width), dtype=np.int64)
        for row, owned in zip(table, blocks, strict=True):
            count = min(len(owned), width)
            row[:count] = owned[:count]
            pool.reserve(owned[-1:])
        last = length - 1
        self.rows = pool.rows(table[np.arange(len(lengths)), last // BLOCK_TOKENS], last % BLOCK_TOKENS)
        pairs = table[:, None, :] * pool.kv_heads + np.arange(pool.kv_heads)[None, :, None]
        self.pairs = torch.from_numpy(pairs.reshape(-1)).to(pool.device)
        mask = np.arange(width * BLOCK_TOKENS)[None, :] < length[:, None]
        self.mask = torch.from_numpy(mask[:, None, None, :]).to(pool.device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q `[batch, heads, head_dim]`, k and v `[batch, kv_heads, head_dim]` → `[batch, heads × head_dim]`."""
        pool, batch = self.pool, q.shape[0]
        pool.store(layer, self.rows, k, v)
        keys, values = pool.gather(layer, self.pairs)
        shape = (batch, pool.kv_heads, self.width * BLOCK_TOKENS, pool.head_dim)
        # Heads of one group share their keys: the group becomes the query axis, and nothing is repeated.
        group = q.shape[1] // pool.kv_heads
        out = scaled_dot_product_attention(
            q.reshape(batch, pool.kv_heads, group, pool.head_dim),
            keys.view(shape),
            values.view(shape),
            attn_mask=self.mask,
        )
        return out.reshape(batch, -1)


Attention = PrefillAttention | DecodeAttention
