"""States that follow from one another by a linear map: M_{n+1} = A_n M_n + B_n.

Its gradient runs the same way backwards, so it is written down instead of traced: MLX would make
five launches of each step.
"""

from typing import Any

import mlx.core as mx

from .chunks import each


def states(A: mx.array, B: mx.array, M: mx.array) -> tuple[mx.array, mx.array]:
    """A [b, Hkv, G, N, D, D], B likewise, M [b, Hkv, G, D, D] -> the states before each of the
    N steps, as B, and the last one."""
    found: Any = _states(A, B, M)
    before, last = found
    return before, last


@mx.custom_function
def _states(A: mx.array, B: mx.array, M: mx.array) -> tuple[mx.array, mx.array]:
    before = []
    for a, b in zip(each(A), each(B), strict=True):
        before.append(M)
        M = mx.addmm(b, a, M)
    return mx.stack(before, axis=3), M


@_states.vjp
def _(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
    of_before, after = cotangents
    turned = each(primals[0].swapaxes(-1, -2))
    found = []
    for a, own in zip(reversed(turned), reversed(each(of_before)), strict=True):
        found.append(after)
        after = mx.addmm(own, a, after)
    # Of each state after a step.
    of_B = mx.stack(found[::-1], axis=3)
    return of_B @ outputs[0].swapaxes(-1, -2), of_B, after
