"""The linear maps of a memory, and what is made of them once for many tokens. Not nn.Linear:
nn.quantize leaves them alone."""

import math
from operator import is_
from threading import get_ident
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn


class GateProjection(nn.Module):
    """Of h [B, L, C], one number per head [B, L, H]; derive and project compute it."""

    def __init__(self, hidden: int, heads: int, bias: bool = False):
        super().__init__()
        bound = hidden**-0.5
        self.weight = mx.random.uniform(-bound, bound, (heads, hidden))
        if bias:
            self.bias = mx.zeros((heads,))


class Derived(NamedTuple):
    """What follows from a memory's parameters alone, made once for many tokens.

    weight: [(G + 1) H, C], all that is projected from h in one product; bias: [(G + 1) H] or
    None. rates: [H], what log decays are multiples of; 0 if nothing decays.
    """

    weight: mx.array
    bias: mx.array | None
    rates: mx.array


class Kept:
    """What was derived from the parameters of one memory, while these stay the same arrays."""

    def __init__(self) -> None:
        self._sources: list[mx.array] = []
        self._thread = 0
        self._derived: Derived | None = None

    def of(self, memory: Any) -> Derived:
        parts = [p.values() if isinstance(p, dict) else (p,) for p in memory.values()]
        sources = [x for part in parts for x in part]
        same = len(sources) == len(self._sources) and all(map(is_, sources, self._sources))
        # What is not computed yet cannot be computed in another thread.
        if self._derived is None or not same or self._thread != get_ident():
            self._sources, self._thread = sources, get_ident()
            self._derived = memory.derive()
        return self._derived

    def drop(self) -> None:
        """Forget: an array may also have been changed in place."""
        self._derived = None


def derive(gates: list[GateProjection], output: GateProjection, rates: mx.array) -> Derived:
    """gates: G of them; those of one head stand together."""
    weight = _join([p.weight for p in gates], output.weight)
    if not any("bias" in p for p in (*gates, output)):
        return Derived(weight, None, rates)
    *inner, last = (p.get("bias", mx.zeros_like(p.weight[:, 0])) for p in (*gates, output))
    return Derived(weight, _join(inner, last), rates)


def _join(gates: list[mx.array], output: mx.array) -> mx.array:
    """G of [H, ...] and another -> [(G + 1) H, ...]."""
    return mx.concatenate([mx.stack(gates, axis=1).flatten(0, 1), output])


def project(h: mx.array, derived: Derived, heads: int) -> tuple[mx.array, mx.array]:
    """h [B, L, C] -> [B, L, H, G] and [B, L, H], gates and output gate as yet linear."""
    weight = derived.weight.T
    y = h @ weight if derived.bias is None else mx.addmm(derived.bias, h, weight)
    inner, z = mx.split(y, [y.shape[-1] - heads], axis=-1)
    return inner.reshape(*h.shape[:2], heads, -1), z


def silu(z: mx.array) -> mx.array:
    """z [B, T, H] -> [B, T, H, 1] float32."""
    # Of one token it costs less for each number of a head than as an operation of its own.
    if z.shape[1] == 1:
        return nn.silu(z[..., None].astype(mx.float32))
    return nn.silu(z.astype(mx.float32))[..., None]


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
