"""Small steps of a decoder in plain torch. On an NVIDIA GPU each is one kernel: there their starts cost more than they do."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, relu, silu

Affine = tuple[Tensor, Tensor | None]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x over the root mean square of its last dimension, times `weight`."""
    if x.is_cuda:
        return torch.rms_norm(x, weight.shape, weight, epsilon)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: Tensor, branch: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x + branch `[tokens, hidden]`, and its RMSNorm."""
    if x.is_cuda:
        from disaggworker.cuda import kernels

        return kernels.add_norm(x, branch, weight, None, epsilon)
    x = x if branch is None else x + branch
    return x, rms_norm(x, weight, epsilon)


def add_layer_norm(x: Tensor, branch: Tensor | None, affine: Affine) -> tuple[Tensor, Tensor]:
    """x + branch `[tokens, hidden]`, and its LayerNorm."""
    weight, bias = affine
    if x.is_cuda and bias is not None:
        from disaggworker.cuda import kernels

        return kernels.add_norm(x, branch, weight, bias, 1e-5)
    x = x if branch is None else x + branch
    return x, layer_norm(x, weight.shape, weight, bias)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x `[tokens, heads, head_dim]`, cos and sin `[tokens, 1, head_dim]`, each half of which is alike."""
    if x.is_cuda:
        from disaggworker.cuda import kernels

        return kernels.rotate(x, cos, sin)
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def gated(x: Tensor) -> Tensor:
    """silu(gate) × up of x `[tokens, 2 × width]`, gate before up → `[tokens, width]`."""
    if x.is_cuda:
        from disaggworker.cuda import kernels

        return kernels.gated(x)
    gate, up = x.chunk(2, -1)
    return silu(gate) * up


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """relu(x·weightᵀ + bias)."""
    if x.is_cuda and bias is not None:
        return torch._addmm_activation(bias, x, weight.T)
    return relu(linear(x, weight, bias))
