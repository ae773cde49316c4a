"""The two linear maps of a memory. Not nn.Linear: nn.quantize leaves them alone."""

import math

import mlx.core as mx
import mlx.nn as nn


class GateProjection(nn.Module):
    """h [B, L, C] -> one number per head [B, L, H]."""

    def __init__(self, hidden: int, heads: int, bias: bool = False):
        super().__init__()
        bound = hidden**-0.5
        self.weight = mx.random.uniform(-bound, bound, (heads, hidden))
        if bias:
            self.bias = mx.zeros((heads,))

    def __call__(self, h: mx.array) -> mx.array:
        y = h @ self.weight.T
        return y + self.bias if "bias" in self else y


class HeadProjection(nn.Module):
    """x [B, H, T, D] -> x_h @ weight[h] for each head; heads do not mix."""

    def __init__(self, heads: int, width_in: int, width_out: int):
        super().__init__()
        # Zero, as in the paper's release: a fresh memory changes nothing.
        self.weight = mx.zeros((heads, width_in, width_out))

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.weight


class Scale(nn.Module):
    """The learned weight of an output norm."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = mx.ones((width,))


def decay_init(heads: int) -> tuple[mx.array, mx.array]:
    """A_log and dt_bias [heads]: rates from 1 to 16, steps from 0.001 to 0.1."""
    rates = mx.linspace(1.0, 16.0, heads)
    steps = mx.exp(mx.linspace(math.log(1e-3), math.log(1e-1), heads))
    # The inverse of softplus, so that softplus(dt_bias) is the step.
    return mx.log(rates), mx.log(mx.expm1(steps))
