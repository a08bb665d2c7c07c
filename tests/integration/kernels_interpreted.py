"""The Triton kernels against their twins in plain torch, on a CPU: run with TRITON_INTERPRET=1, which Triton reads at import."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from disaggworker.cuda import kernels
from disaggworker.engine.attention import Attention
from disaggworker.engine.step import Step
from disaggworker.kv.blocks import BLOCK_TOKENS, blocks_for
from disaggworker.kv.pool import Pool
from disaggworker.model import ops

LENGTHS = (
    1,
    16,
    17,
    64,
    65,
    100,
)  # of sequences, new token included; around a block, and a tile of the attention
BLOCKS = 24
PAD = 7.0  # what stands in a row that pads the batch


def pool(kv_heads: int, dim: int, dtype: torch.dtype) -> Pool:
    return Pool(1, kv_heads, dim, BLOCKS, dtype, torch.device("cpu"))


def close(found: Tensor, expected: Tensor) -> None:
    """Within a few roundings of the type, relative to the largest."""
    most = expected.double().abs().max()
    assert ((found.double() - expected.double()).abs().max() / most) < 8 * torch.finfo(expected.dtype).eps


def check_attention(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, cut: int) -> None:
    """One decode step of several sequences and a row of padding, whose blocks are strewn about."""
    ours, twin = (pool(kv_heads, dim, dtype) for _ in range(2))
    for mine, other in ((ours.keys[0], twin.keys[0]), (ours.values[0], twin.values[0])):
        other.copy_(mine.normal_())
    free = iter(torch.randperm(BLOCKS).tolist())
    tables = [list(itertools.islice(free, blocks_for(n))) for n in LENGTHS]
    batch = len(LENGTHS)
    qkv = torch.cat(
        (torch.randn(batch, heads + 2 * kv_heads, dim), torch.full((1, heads + 2 * kv_heads, dim), PAD))
    )
    q, k, v = qkv.to(dtype).split((heads, kv_heads, kv_heads), 1)
    step = Step([0] * batch, [1] * batch, [n - 1 for n in LENGTHS], tables, list(range(batch)))
    expected = Attention(twin, step)(0, q[:batch], k[:batch], v[:batch])

    last = [
        table[(n - 1) // BLOCK_TOKENS] * BLOCK_TOKENS + (n - 1) % BLOCK_TOKENS
        for table, n in zip(tables, LENGTHS, strict=True)
    ]
    kernels.store(ours.keys[0], ours.values[0], k, v, torch.tensor([*last, -1]))
    assert torch.equal(ours.keys[0], twin.keys[0])
    assert torch.equal(ours.values[0], twin.values[0])

    padded = torch.zeros((batch + 1, max(map(len, tables))), dtype=torch.int32)
    for row, table in zip(padded, tables, strict=False):
        row[: len(table)] = torch.tensor(table)
    lengths = torch.tensor([*LENGTHS, 0], dtype=torch.int32)
    found = kernels.attend(q, ours.keys[0], ours.values[0], padded, lengths, cut)
    close(found[:batch], expected)
    assert not found[batch].any()


def check_small_steps() -> None:
    x, branch, weight, bias = torch.randn(5, 100), torch.randn(5, 100), torch.randn(100), torch.randn(100)
    for added in (None, branch):
        for offset, twin in (
            (None, ops.add_rms_norm(x, added, weight, 1e-5)),
            (bias, ops.add_layer_norm(x, added, (weight, bias))),
        ):
            for found, expected in zip(kernels.add_norm(x, added, weight, offset, 1e-5), twin, strict=True):
                close(found, expected)
    heads = torch.randn(5, 6, 24)[:, 1:4]  # of a fused product: not all of a row
    angle = torch.randn(5, 1, 12).repeat(1, 1, 2)
    close(kernels.rotate(heads, angle.cos(), angle.sin()), ops.rotate(heads, angle.cos(), angle.sin()))
    wide = torch.randn(5, 2 * 1100)
    close(kernels.gated(wide), ops.gated(wide))


if __name__ == "__main__":
    torch.manual_seed(0)
    # Grouped heads and heads alone; dimensions that are a power of two and not. The interpreter knows no bfloat16.
    for shape, cut in itertools.product(((4, 2, 16, torch.float32), (3, 3, 40, torch.float16)), (1, 4)):
        check_attention(*shape, cut)
    check_small_steps()
