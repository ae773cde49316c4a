"""exp for softmax. On the CPU MLX's own takes 12 to 19 ns per element, a polynomial 5."""

from functools import partial
from typing import Any

import mlx.core as mx

from ..platform import on_cpu

# 1 / n! for n = 7 ... 0.
COEFFICIENTS = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)


def exp(x: mx.array) -> mx.array:
    """exp(x) for x <= 0, with gradient; chooses the fastest form for the device."""
    if x.dtype == mx.float32 and on_cpu():
        y: Any = fast_exp(x)
        return y
    return mx.exp(x)


@partial(mx.compile, shapeless=True)
def _polynomial(x: mx.array) -> mx.array:
    y = mx.maximum(x, -40.0) * (1 / 64)
    p = COEFFICIENTS[0] * y + COEFFICIENTS[1]
    for coefficient in COEFFICIENTS[2:]:
        p = p * y + coefficient
    for _ in range(6):
        p = p * p
    return p


if on_cpu():
    # First traced within a gradient, it would be compiled for the size that it saw there.
    _polynomial(mx.zeros(2))


@mx.custom_function
def fast_exp(x: mx.array) -> mx.array:
    """exp(x) for x <= 0, float32, as exp(x / 64) ^ 64 with a polynomial of degree 7.

    Relative error up to 1e-5 above -20, 1e-4 down to -40; smaller values count as
    exp(-40), which no softmax can see.
    """
    y: mx.array = _polynomial(x.flatten())
    return y.reshape(x.shape)


@fast_exp.vjp
def _(primals: Any, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent * output
