"""A packed layer multiplies as a plain one."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

# Rounding of the result alone: sums are float32 in both.
EPSILON = {"float32": 1e-5, "bfloat16": 2**-8}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 64), (729, 40), (3, 5), (1, 1), (0, 8)])
def test_a_packed_layer_is_the_layer(dtype: str, biased: bool, outputs: int, inputs: int) -> None:
    from disaggworker.model.linear import packed

    generator = torch.Generator().manual_seed(outputs)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(getattr(torch, dtype))

    weight, bias = random(outputs, inputs), random(outputs) if biased else None
    layer = packed(weight, bias)
    with torch.inference_mode():
        for tokens in (0, 1, 2, 16, 600):
            x = random(tokens, 2 * inputs)[:, :inputs]  # not its own memory's whole
            expected = x.double() @ weight.double().T + (bias.double() if biased else 0.0)
            got = layer(x)
            assert got.dtype == x.dtype
            assert got.shape == (tokens, outputs)
            error = EPSILON.get(dtype, 2**-10)
            torch.testing.assert_close(got.double(), expected, rtol=error, atol=error * inputs**0.5)
