"""Small steps of a decoder in plain torch. On an NVIDIA GPU each is one kernel: there their starts cost more than they do."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, silu

from disaggworker.model.linear import Linear

Affine = tuple[Tensor, Tensor | None]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x over the root mean square of its last dimension, times `weight`."""
    if x.is_cuda:
        return torch.rms_norm(x, weight.shape, weight, epsilon)
    wide = x.float()
    length: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide * (length * length / x.shape[-1] + epsilon).rsqrt_()).to(x.dtype).mul_(weight)


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
    half = x.shape[-1] // 2
    turned, sin = x * cos, sin[..., :half]
    turned[..., :half].addcmul_(x[..., half:], sin, value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin)
    return turned


def gated(x: Tensor) -> Tensor:
    """silu(gate) × up of x `[tokens, 2 × width]`, gate before up → `[tokens, width]`."""
    if x.is_cuda:
        from disaggworker.cuda import kernels

        return kernels.gated(x)
    gate, up = x.chunk(2, -1)
    return silu(gate).mul_(up)


def linear_relu(x: Tensor, layer: Linear) -> Tensor:
    """relu(x·weightᵀ + bias)."""
    if x.is_cuda and layer.bias is not None:
        return torch._addmm_activation(layer.bias, x, layer.weight.T)
    return layer(x).relu_()
