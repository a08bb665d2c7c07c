"""A layer x·weightᵀ + bias, its weight laid out as the device multiplies by it fastest.

On a CPU that is the packing of the library that multiplies, in place of the rows of the checkpoint: oneDNN's for bfloat16,
MKL's for float32. Given rows, both pack them anew in every call, which for sixteen tokens costs as much as the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

_PACKED_FOR = 512  # tokens; a weight that is packed for many is as fast for one, and not the other way round


class Linear:
    """On x `[tokens, inputs]`, with weight `[outputs, inputs]` as it is and bias `[outputs]`, if there is one."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _OneDNN(Linear):
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR), bias)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


class _MKL(Linear):
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(torch.ops.mkl._mkl_reorder_linear_weight(weight, _PACKED_FOR), bias)
        self._shape = weight.new_empty(1).expand(weight.shape)  # of the unpacked weight only this is asked

    def __call__(self, x: Tensor) -> Tensor:
        # Told of any other number of tokens than x has, it would multiply by the unpacked weight.
        y: Tensor = torch.ops.mkl._mkl_linear(x, self.weight, self._shape, self.bias, len(x))
        return y


def packed(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The layer of that weight and bias; they are not kept beside it."""
    if weight.is_cuda or not weight.numel():
        return Linear(weight, bias)
    if weight.dtype == torch.bfloat16 and _has(torch.backends.mkldnn):
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return _OneDNN(weight, bias)
    elif weight.dtype == torch.float32 and _has(torch.backends.mkl):
        return _MKL(weight, bias)
    return Linear(weight, bias)


def _has(library: Any) -> bool:
    return bool(library.is_available())
