"""Triton kernels where torch has none that fits: decode attention over paged KV, and what would be ten small kernels.

Why not a library's: torch's own paged attention (`torch.nn.attention.varlen`) is for tokens before heads and pages of
another size, FlashInfer compiles for minutes at start. Why these are enough: a decode step waits for memory, and what
is not memory is the start of kernels.

Shapes as in `kv.pool`: keys and values `[blocks, kv_heads, BLOCK_TOKENS, head_dim]`. Indices are 64 bits wide where a
pool or a long prompt has more than 2³¹ elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from disaggworker.kv.blocks import BLOCK_TOKENS

# Measured on an H100 over batches of 1 to 64 and contexts of 512 to 2048 (benchmarks/README.md).
_TILE, _WARPS, _STAGES = 64, 4, 3  # of the attention: tokens read at once, warps, reads in flight
_PROGRAMS_PER_SM = (
    7  # that share out a step's attention; two run at once, so these are turns enough to end together
)
_MOST_SPLITS = 32
_GATED_TILE = 1024
_LOG2E = 1.4426950408889634


def _wide(count: int) -> int:
    """The power of two that holds so many: Triton's ranges are of no other length."""
    return 1 << (count - 1).bit_length()


# ---- keys and values into their blocks


@triton.jit
def _store(
    keys, values, k, v, slots, k_token, v_token, heads: tl.constexpr, heads_wide: tl.constexpr, page: tl.constexpr,
    dim: tl.constexpr, dim_wide: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot >= 0:
        head, d = tl.arange(0, heads_wide)[:, None], tl.arange(0, dim_wide)[None, :]
        mask = (head < heads) & (d < dim)
        to = ((slot // page * heads + head) * page + slot % page) * dim + d
        tl.store(keys + to, tl.load(k + token * k_token + head * dim + d, mask=mask), mask=mask)
        tl.store(values + to, tl.load(v + token * v_token + head * dim + d, mask=mask), mask=mask)


def store(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Write k and v `[tokens, kv_heads, head_dim]` at `slots` `[tokens]`, block × BLOCK_TOKENS + place; nothing at -1."""
    tokens, heads, dim = k.shape
    _store[tokens,](
        keys,
        values,
        k,
        v,
        slots,
        k.stride(0),
        v.stride(0),
        heads,
        _wide(heads),
        BLOCK_TOKENS,
        dim,
        _wide(dim),
    )


# ---- attention of one token a sequence


@triton.jit
def _attend(
    out, logsumexp, q, keys, values, tables, lengths, scale, q_token, table_row, kv_heads: tl.constexpr,
    group: tl.constexpr, group_wide: tl.constexpr, page: tl.constexpr, dim: tl.constexpr, dim_wide: tl.constexpr,
    cut: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """A program is one split of one KV head of one sequence, for all query heads that share the KV head."""
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    share = tl.cdiv(tl.cdiv(length, tile), cut) * tile
    begin, end = split * share, tl.minimum(split * share + share, length)
    g, d = tl.arange(0, group_wide), tl.arange(0, dim_wide)
    own = (g < group)[:, None] & (d < dim)[None, :]
    at = head * group + g
    query = tl.load(q + sequence.to(tl.int64) * q_token + at[:, None] * dim + d[None, :], mask=own, other=0.0)
    most = tl.full([group_wide], -float("inf"), tl.float32)
    total = tl.zeros([group_wide], tl.float32)
    mixed = tl.zeros([group_wide, dim_wide], tl.float32)
    for start in range(begin, end, tile):
        n = start + tl.arange(0, tile)
        seen = n < end
        block = tl.load(tables + sequence * table_row + n // page, mask=seen, other=0).to(tl.int64)
        row = ((block * kv_heads + head) * page + n % page) * dim
        read = seen[:, None] & (d < dim)[None, :]
        key = tl.load(keys + row[:, None] + d[None, :], mask=read, other=0.0)
        value = tl.load(values + row[:, None] + d[None, :], mask=read, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(seen[None, :], score, -float("inf"))
        higher = tl.maximum(most, tl.max(score, 1))
        weight, fade = tl.exp2(score - higher[:, None]), tl.exp2(most - higher)
        total = total * fade + tl.sum(weight, 1)
        mixed = mixed * fade[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        most = higher
    # A split with nothing to read, or a row that pads a batch: zeros, which weigh nothing.
    result = mixed / tl.where(total > 0, total, 1.0)[:, None]
    place = (sequence * kv_heads * group + at) * cut + split
    tl.store(out + place[:, None] * dim + d[None, :], result, mask=own)
    if cut > 1:
        tl.store(logsumexp + place, tl.where(total > 0, most + tl.log2(total), -float("inf")), mask=g < group)


@triton.jit
def _merge(
    out, parts, logsumexp, cut: tl.constexpr, dim: tl.constexpr, dim_wide: tl.constexpr
):  # fmt: skip
    """A program is one query head of one sequence."""
    row = tl.program_id(0)
    split, d = tl.arange(0, cut), tl.arange(0, dim_wide)
    said = tl.load(logsumexp + row * cut + split)
    most = tl.max(said, 0)
    weight = tl.exp2(said - tl.where(most == -float("inf"), 0.0, most))
    part = tl.load(
        parts + (row * cut + split)[:, None] * dim + d[None, :], mask=(d < dim)[None, :], other=0.0
    )
    total = tl.sum(weight, 0)
    mixed = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + row * dim + d, mixed, mask=d < dim)


def splits(batch: int, kv_heads: int, sms: int) -> int:
    """Parts, a power of two, that each sequence's context is cut into, so that the GPU is full and stays so."""
    return min(_MOST_SPLITS, _wide(triton.cdiv(_PROGRAMS_PER_SM * sms, batch * kv_heads)))


def attend(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, cut: int) -> Tensor:
    """Attention of q `[batch, heads, head_dim]` over the first `lengths` `[batch]` tokens of the blocks in `tables`
    `[batch, width]`, both int32; each context in `cut` parts. A sequence of length 0 gets zeros.

    → `[batch, heads × head_dim]`. Flash-decoding: parts side by side, then merged by their log-sum-exp.
    """
    batch, heads, dim = q.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    out = torch.empty((batch, heads * dim), dtype=q.dtype, device=q.device)
    parts, logsumexp = out, out
    if cut > 1:
        parts = torch.empty((batch, heads, cut, dim), dtype=torch.float32, device=q.device)
        logsumexp = torch.empty((batch, heads, cut), dtype=torch.float32, device=q.device)
    _attend[batch, kv_heads, cut](
        parts, logsumexp, q, keys, values, tables, lengths, dim**-0.5 * _LOG2E, q.stride(0), tables.stride(0),
        kv_heads, group, max(16, _wide(group)), BLOCK_TOKENS, dim, _wide(dim), cut, _TILE,
        num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    if cut > 1:
        _merge[batch * heads,](out, parts, logsumexp, cut, dim, _wide(dim))
    return out


# ---- the model's small steps


@triton.jit
def _add_norm(
    out, added, x, branch, weight, bias, epsilon, width: tl.constexpr, width_wide: tl.constexpr, adds: tl.constexpr,
    centred: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64) * width, tl.arange(0, width_wide)
    mask = at < width
    value = tl.load(x + row + at, mask=mask, other=0.0)
    if adds:
        value += tl.load(branch + row + at, mask=mask, other=0.0)
        tl.store(added + row + at, value, mask=mask)
    value = value.to(tl.float32)
    if centred:
        value = tl.where(mask, value - tl.sum(value, 0) / width, 0.0)
    value *= tl.rsqrt(tl.sum(value * value, 0) / width + epsilon)
    value *= tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    if centred:
        value += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row + at, value, mask=mask)


def add_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """x + branch `[tokens, width]`, and its norm: LayerNorm with a bias, RMSNorm without."""
    tokens, width = x.shape
    out = torch.empty_like(x)
    added = x if branch is None else torch.empty_like(x)
    _add_norm[tokens,](
        out, added, x, x if branch is None else branch, weight, weight if bias is None else bias, epsilon, width,
        _wide(width), branch is not None, bias is not None, num_warps=8 if width > 2048 else 4,
    )  # fmt: skip
    return added, out


@triton.jit
def _rotate(
    out, x, cos, sin, x_token, heads: tl.constexpr, heads_wide: tl.constexpr, half: tl.constexpr,
    half_wide: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head, d = tl.arange(0, heads_wide)[:, None], tl.arange(0, half_wide)[None, :]
    mask = (head < heads) & (d < half)
    at = head * 2 * half + d
    left = tl.load(x + token * x_token + at, mask=mask).to(tl.float32)
    right = tl.load(x + token * x_token + at + half, mask=mask).to(tl.float32)
    # Both halves of a row of cos and sin are alike.
    c = tl.load(cos + token * 2 * half + d, mask=d < half).to(tl.float32)
    s = tl.load(sin + token * 2 * half + d, mask=d < half).to(tl.float32)
    to = out + token * heads * 2 * half + at
    tl.store(to, left * c - right * s, mask=mask)
    tl.store(to + half, right * c + left * s, mask=mask)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`model.ops.rotate`: x `[tokens, heads, head_dim]`, cos and sin `[tokens, 1, head_dim]`."""
    tokens, heads, dim = x.shape
    out = torch.empty((tokens, heads, dim), dtype=x.dtype, device=x.device)
    half = dim // 2
    _rotate[tokens,](out, x, cos, sin, x.stride(0), heads, _wide(heads), half, _wide(half))
    return out


@triton.jit
def _gated(out, x, width, tile: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * tile + tl.arange(0, tile)
    mask = at < width
    gate = tl.load(x + token * 2 * width + at, mask=mask).to(tl.float32)
    up = tl.load(x + token * 2 * width + width + at, mask=mask).to(tl.float32)
    tl.store(out + token * width + at, gate * tl.sigmoid(gate) * up, mask=mask)


def gated(x: Tensor) -> Tensor:
    """`model.ops.gated`: x `[tokens, 2 × width]` → `[tokens, width]`."""
    tokens, width = x.shape[0], x.shape[1] // 2
    out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    _gated[tokens, triton.cdiv(width, _GATED_TILE)](out, x, width, _GATED_TILE)
    return out
