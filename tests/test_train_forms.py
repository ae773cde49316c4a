"""The forms that gradients on a GPU take, on any machine: what they say, and their gradients."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ahn_mlx.ops import band, delta, linear, mamba2, window


def normal(*shape: int) -> mx.array:
    return mx.random.normal(shape)


def close(a: mx.array, b: mx.array, most: float = 2e-5) -> bool:
    """In units of the larger's length."""
    size = mx.linalg.norm(b.astype(mx.float32).flatten()).item()
    return mx.linalg.norm((a - b).flatten()).item() <= most * size + 1e-7


def check(ours, theirs, arrays, most=2e-5):
    """Both say the same, and so do their gradients in a random direction."""
    outputs = [f(*arrays) for f in (ours, theirs)]
    assert all(close(a, b, most) for a, b in zip(*outputs, strict=True))
    directions = [normal(*x.shape) for x in outputs[1]]

    def along(f):
        return lambda *given: sum((x * d).sum() for x, d in zip(f(*given), directions, strict=True))

    which = list(range(len(arrays)))
    found, expected = (mx.grad(along(f), argnums=which)(*arrays) for f in (ours, theirs))
    for n, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape and close(a, b, 10 * most), n


@pytest.mark.parametrize("decays", [True, False])
@pytest.mark.parametrize(("T", "chunk", "Hkv"), [(37, 8, 2), (33, 16, 1), (16, 16, 4), (5, 8, 2)])
def test_the_delta_rule_at_once(decays, T, chunk, Hkv):
    mx.random.seed(T)
    B, H, D = 2, 4, 8
    q, k, v = normal(B, T, H, D), normal(B, T, Hkv, D), normal(B, T, Hkv, D)
    beta, state = mx.sigmoid(normal(B, T, H)), normal(B, H, D, D)
    g = -mx.abs(normal(B, T, H)) if decays else None
    arrays = (q, k, v, beta, state, *([g] if decays else []))

    def ours(q, k, v, beta, state, g=None):
        return delta.at_once(q, k, v, g, beta, state, chunk)

    def theirs(q, k, v, beta, state, g=None):
        return delta.sequential(q, k, v, g, beta, state)

    check(ours, theirs, arrays)


@pytest.mark.parametrize(("T", "chunk", "Hkv"), [(37, 8, 2), (33, 16, 1), (16, 16, 4), (5, 8, 2)])
def test_mamba2_at_once(T, chunk, Hkv):
    mx.random.seed(T)
    B, H, D = 2, 4, 8
    q, k, v = normal(B, T, H, D), normal(B, T, Hkv, D), normal(B, T, Hkv, D)
    dt, A, state = mx.abs(normal(B, T, H)), -mx.abs(normal(H)), normal(B, H, D, D)
    check(lambda *a: mamba2.at_once(*a, chunk), mamba2.sequential, (q, k, v, dt, A, state))


@pytest.mark.parametrize("N", [1, 2, 5, 8, 14])
def test_states_that_follow_by_linear_maps(N):
    mx.random.seed(N)
    A, B, M = normal(2, 1, 3, N, 4, 4) * 0.3, normal(2, 1, 3, N, 4, 4), normal(2, 1, 3, 4, 4)

    def loop(A, B, M):
        before = []
        for n in range(A.shape[3]):
            before.append(M)
            M = A[:, :, :, n] @ M + B[:, :, :, n]
        return mx.stack(before, axis=3), M

    check(linear.states, loop, (A, B, M))


@pytest.mark.parametrize("form", [delta.halved_inverse, delta.joined_inverse])
@pytest.mark.parametrize("C", [1, 2, 8, 16, 32, 128])
def test_the_inverse_of_a_chunk(form, C):
    """Also where keys repeat: every number is nearly 1."""
    mx.random.seed(C)
    for A in (normal(3, C, C) * 0.3, mx.full((1, C, C), 0.99)):
        A = mx.tril(A, -1)
        expected = np.linalg.inv(np.eye(C) + np.array(A).astype(np.float64))
        found = np.array(form(A))
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_gradient_of_the_inverse():
    mx.random.seed(0)
    A, direction = mx.tril(normal(2, 16, 16), -1) * 0.3, normal(2, 16, 16)

    def along(inverse):
        return lambda A: (inverse(mx.tril(A, -1)) * direction).sum()

    found = mx.grad(along(delta.unit_lower_inverse))(A)
    assert close(found, mx.grad(along(delta.halved_inverse))(A))
    assert close(found, mx.grad(along(delta.joined_inverse))(A))


@settings(deadline=None, max_examples=25)
@given(
    L=st.integers(1, 40),
    window_=st.integers(1, 24),
    sinks=st.integers(0, 9),
    tile=st.sampled_from([1, 4, 8, 64]),
    clamped=st.booleans(),
)
def test_a_band_sees_what_a_window_sees(L, window_, sinks, tile, clamped):
    mx.random.seed(L)
    q, far, k, v = normal(2, 4, L, 8), normal(2, 4, L, 8), normal(2, 2, L, 8), normal(2, 2, L, 8)
    # Up to window and sinks both queries are one, as the layer has it.
    near = mx.where(mx.arange(L)[:, None] < window_ + sinks, q, far) if clamped else None
    of = {"window": window_, "sinks": sinks, "scale": 0.4, "q_sink": near}
    found = band.banded(q, k, v, tile=tile, **of)
    expected = window.sequential(q, k, v, offset=0, **of)
    assert mx.abs(found - expected).max() < 2e-5


@pytest.mark.parametrize(("sinks", "clamped"), [(0, False), (3, False), (3, True)])
def test_the_gradients_of_a_band(sinks, clamped):
    mx.random.seed(sinks)
    arrays = (normal(2, 4, 21, 8), normal(2, 2, 21, 8), normal(2, 2, 21, 8), normal(2, 4, 21, 8))

    def run(form, **place):
        def call(q, k, v, far):
            near = mx.where(mx.arange(21)[:, None] < 6 + sinks, q, far)
            near = {"q_sink": near if clamped else None}
            return [form(q, k, v, window=6, sinks=sinks, scale=0.4, **near, **place)]

        return call

    check(run(band.banded, tile=4), run(window.sequential, offset=0), arrays)
