"""Where KV bytes are: paged tensors, read and written by block."""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from disaggworker.errors import StartError
from disaggworker.kv.blocks import BLOCK_TOKENS

_CPU_POOL_BYTES = 1 << 30  # KV memory on a CPU where nobody says how many blocks
_GPU_SHARE = 0.9  # of the memory that is free after the weights

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]

TOKEN_BYTES = 16
NORESERVE = getattr(mmap, "MAPNORESERVE", 0)
_ALIGN = mmap.PAGESIZE


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


def _tensor_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Of one tensor, up to where the next one begins."""
    return -(-int(np.prod(shape)) * dtype.itemsize // _ALIGN) * _ALIGN


def file_bytes(layers: int, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Memory of a pool on a CPU: keys and values of each layer, and room for a token."""
    return 2 * layers * _tensor_bytes(shape, dtype) + TOKEN_BYTES


def tensors_in(memory: mmap.mmap, layers: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Keys, values of layer 0, keys, values of layer 1, … in such memory."""
    count, step = int(np.prod(shape)), _tensor_bytes(shape, dtype)
    return [
        torch.frombuffer(memory, dtype=dtype, count=count, offset=i * step).view(shape)
        for i in range(2 * layers)
    ]


class Pages:
    """Keys and values of `layers` layers, each `[blocks, kv_heads, BLOCK_TOKENS, head_dim]`: this process's own, or a peer's.

    Heads before tokens: what is gathered by block and head is then what attention reads, without a copy.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self.keys, self.values = list(keys), list(values)
        self.layers, self.device, self.dtype = len(self.keys), keys[0].device, keys[0].dtype
        self.limit, self.kv_heads, _, self.head_dim = keys[0].shape
        self.unit = BLOCK_TOKENS * self.head_dim * self.dtype.itemsize  # bytes of one head of one block
        # Bytes in rows of a whole block, and of one of its heads.
        pairs = [*zip(self.keys, self.values, strict=True)]
        self._whole = [[_bytes(t, self.kv_heads * self.unit) for t in pair] for pair in pairs]
        self._single = [[_bytes(t, self.unit) for t in pair] for pair in pairs]
        flat = [[_bytes(t, self.unit).reshape(-1) for t in pair] for pair in pairs]
        self._flat = [[bytes_.data for bytes_ in pair if isinstance(bytes_, np.ndarray)] for pair in flat]

    def take(self, layer: int, blocks: Ints, heads: range, out: Bytes) -> None:
        """Copy these heads of these blocks to `out`, bytes `[2, len(blocks), len(heads) × unit]`; keys come first."""
        tables, index = self._at(layer, blocks, heads)
        for table, part in zip(tables, out.reshape(2, len(index), -1), strict=True):
            if isinstance(table, np.ndarray):
                np.take(table, index, 0, out=part, mode="clip")
            else:
                picked = table.index_select(0, torch.from_numpy(index).to(self.device))
                torch.from_numpy(part).copy_(picked)

    def put(self, layer: int, blocks: Ints, heads: range, data: Bytes) -> None:
        """The reverse of `take`."""
        tables, index = self._at(layer, blocks, heads)
        for table, part in zip(tables, data.reshape(2, len(index), -1), strict=True):
            if isinstance(table, np.ndarray):
                table[index] = part
            else:
                given = torch.from_numpy(part).to(self.device)
                table.index_copy_(0, torch.from_numpy(index).to(self.device), given)

    def spans(self, layers: Iterable[int], blocks: Ints, heads: range) -> Iterator[list[memoryview]]:
        """On a CPU, of each layer, what `take` would copy, in its order, where it lies; what is side by side is one."""
        places: list[slice] = []
        end = -1
        for block in blocks.tolist():
            at = (block * self.kv_heads + heads.start) * self.unit
            start = places.pop().start if at == end else at
            end = at + len(heads) * self.unit
            places.append(slice(start, end))
        for layer in layers:
            yield [memory[place] for memory in self._flat[layer] for place in places]

    def _at(self, layer: int, blocks: Ints, heads: range) -> tuple[list[Bytes | Tensor], Ints]:
        if len(heads) == self.kv_heads:
            return self._whole[layer], blocks
        return self._single[layer], (blocks[:, None] * self.kv_heads + np.asarray(heads)).reshape(-1)


def _bytes(tensor: Tensor, row: int) -> Bytes | Tensor:
    """As rows; on a CPU numpy's: torch's own index_select and index_copy_ are up to ten times slower on bytes."""
    rows = tensor.view(-1).view(torch.uint8).view(-1, row)
    return rows.numpy() if rows.device.type == "cpu" else rows


class Shared(NamedTuple):
    """Where other processes of this host find a pool's memory: the file `fd` of this process, which ends in `token`."""

    fd: int
    token: bytes


class Pool(Pages):
    """The KV of one process: `limit` blocks may be named.

    On a CPU memory is taken as it is touched, so that a worker that emulates a large GPU does not hold a large GPU's memory.
    It begins as zeros, not garbage: attention masks padding by weight 0, and 0 × NaN is NaN. `shared`: other processes of
    this host may map it.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        limit: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        shared: bool = False,
    ) -> None:
        shape = (limit, kv_heads, BLOCK_TOKENS, head_dim)
        self.shared: Shared | None = None
        if device.type == "cpu":
            memory = self._memory(file_bytes(layers, shape, dtype), shared)
            tensors = tensors_in(memory, layers, shape, dtype)
        else:
            # A GPU's memory was measured to find `limit`: it is taken at once.
            tensors = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2 * layers)]
        super().__init__(tensors[0::2], tensors[1::2])
        empty = torch.empty((0, BLOCK_TOKENS, head_dim), dtype=dtype, device=device)
        self._scratch = [empty, empty]

    def _memory(self, size: int, shared: bool) -> mmap.mmap:
        if not shared:
            return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
        fd, token = os.memfd_create("kv"), secrets.token_bytes(TOKEN_BYTES)
        os.ftruncate(fd, size)
        os.pwrite(fd, token, size - TOKEN_BYTES)
        self.shared = Shared(fd, token)
        return mmap.mmap(fd, size)

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
