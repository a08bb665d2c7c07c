"""Where KV bytes are: paged tensors, read and written by block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from disaggworker.errors import StartError
from disaggworker.kv.blocks import BLOCK_TOKENS

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
