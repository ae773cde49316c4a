"""States that follow from one another by a linear map: M_{n+1} = A_n M_n + B_n.

Two steps are one such map, so that of N of them half are left, and so on: as many launches as N has
binary digits, not as N is. The gradient runs the same way backwards.
"""

from typing import Any

import mlx.core as mx


def states(A: mx.array, B: mx.array, M: mx.array) -> tuple[mx.array, mx.array]:
    """A [b, Hkv, G, N, D, D], B likewise, M [b, Hkv, G, D, D] -> the states before each of the
    N steps, as B, and the last one."""
    found: Any = _states(A, B, M)
    before, last = found
    return before, last


@mx.custom_function
def _states(A: mx.array, B: mx.array, M: mx.array) -> tuple[mx.array, mx.array]:
    before = _before(A, B, M)
    return before, mx.addmm(B[:, :, :, -1], A[:, :, :, -1], before[:, :, :, -1])


@_states.vjp
def _(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
    turned, (of_before, of_last) = primals[0].swapaxes(-1, -2), cotangents
    # Of each state after a step; the last comes first.
    after = _back(_before(_back(turned), _back(of_before), of_last))
    of_first = mx.addmm(of_before[:, :, :, 0], turned[:, :, :, 0], after[:, :, :, 0])
    return after @ outputs[0].swapaxes(-1, -2), after, of_first


def _back(x: mx.array) -> mx.array:
    """Steps in the other order."""
    return x[:, :, :, ::-1]


def _before(A: mx.array, B: mx.array, M: mx.array) -> mx.array:
    """The states before each step."""
    N = A.shape[3]
    if N == 1:
        return M[:, :, :, None]
    if N % 2:
        A, B = (mx.pad(x, [(0, 0)] * 3 + [(0, 1), (0, 0), (0, 0)]) for x in (A, B))
    (a, then_a), (b, then_b) = (_pairs(x) for x in (A, B))
    even = _before(then_a @ a, mx.addmm(then_b, then_a, b), M)
    odd = mx.addmm(b, a, even)
    return mx.stack([even, odd], axis=4).reshape(B.shape)[:, :, :, :N]


def _pairs(x: mx.array) -> list[mx.array]:
    """The first and the second of every two steps."""
    x = x.reshape(*x.shape[:3], -1, 2, *x.shape[4:])
    return [x[:, :, :, :, n] for n in (0, 1)]
