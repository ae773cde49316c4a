"""Every fast form of a recurrence against its sequential oracle, over random shapes."""

import math
from functools import partial

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ahn_mlx.ops import delta, mamba2

shapes = st.fixed_dictionaries(
    {
        "B": st.integers(1, 2),
        "T": st.integers(1, 140),
        "Hkv": st.integers(1, 2),
        "G": st.integers(1, 3),
        "D": st.sampled_from([8, 16, 32]),
        "decay": st.sampled_from([1e-3, 0.3, 5.0, 80.0]),
        "seed": st.integers(0, 2**31),
    }
)


def inputs(B, T, Hkv, G, D, decay, seed):
    keys = mx.random.split(mx.random.key(seed), 6)
    q = mx.random.normal((B, T, Hkv * G, D), key=keys[0])
    k, v = (mx.random.normal((B, T, Hkv, D), key=key) for key in keys[1:3])
    g = -decay * mx.random.uniform(shape=(B, T, Hkv * G), key=keys[3])
    beta = mx.random.uniform(shape=(B, T, Hkv * G), key=keys[4])
    state = mx.random.normal((B, Hkv * G, D, D), key=keys[5])
    return q, k, v, g, beta, state


def close(found, expected, tolerance=2e-5):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert mx.abs(a - b).max() <= tolerance * (mx.abs(b).max() + 1e-4)


@settings(max_examples=40, deadline=None)
@given(shapes, st.booleans())
def test_delta_rule(shape, gated):
    """Chunks of a CPU and of a GPU, MLX's own form, and the one that is chosen."""
    q, k, v, g, beta, state = inputs(**shape)
    args = (q, k, v, g if gated else None, beta, state)
    expected = delta.sequential(*args)
    close(delta.chunked(*args), expected)
    close(delta.mlx_fast(*args), expected)
    for gradients in (False, True):
        close(delta._choose(*args, gradients), expected)
    close(delta.chunked(*args, 128), expected)
    close(delta.at_once(*args, 32), expected)


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_ssd(shape):
    q, k, v, g, beta, state = inputs(**shape)
    rates = -shape["decay"] * mx.linspace(0.5, 1.0, q.shape[2])
    args = (q, k, v, beta, rates, state)
    expected = mamba2.sequential(*args)
    close(mamba2.chunked(*args), expected)
    close(mamba2.ssd(*args), expected)
    close(mamba2.chunked(*args, 128), expected)
    close(mamba2.at_once(*args, 32), expected)


def test_one_token_forms_and_zero_state():
    q, k, v, g, beta, _ = inputs(2, 1, 2, 3, 16, 0.3, 0)
    zero = mx.zeros((2, 6, 16, 16))
    close(delta.gated_delta_rule(q, k, v, g, beta), delta.sequential(q, k, v, g, beta, zero))
    close(delta.delta_rule(q, k, v, beta), delta.sequential(q, k, v, None, beta, zero))
    rates = -mx.ones((6,))
    close(mamba2.ssd(q, k, v, beta, rates), mamba2.sequential(q, k, v, beta, rates, zero))


def test_repeated_keys_do_not_cancel():
    q, k, v, g, _, state = inputs(1, 64, 1, 1, 16, 1e-3, 1)
    k = mx.broadcast_to(k[:, :1], k.shape)
    args = (q, k, v, g, mx.ones_like(g), state)
    close(delta.chunked(*args), delta.sequential(*args))


def test_small_decays_after_a_strong_one_keep_their_precision():
    q, k, v, g, beta, state = inputs(1, 32, 1, 1, 16, 1e-3, 2)
    g[:, 3] = -5000.0
    args = (q, k, v, g, beta, state)
    close(delta.chunked(*args), delta.sequential(*args), 2e-6)


def test_oracles_read_as_the_equations():
    """One head, one token, by hand."""
    q, k, v = ([3.0, 4.0], [0.0, 2.0], [1.0, -1.0])
    tensors = [mx.array(x).reshape(1, 1, 1, 2) for x in (q, k, v)]
    beta, g = mx.array([[[0.5]]]), mx.array([[[math.log(0.5)]]])
    M = mx.array([[2.0, 0.0], [4.0, 6.0]])[None, None]  # [key, value]
    o, state = delta.sequential(*tensors, g, beta, M)
    # Decayed [[1, 0], [2, 3]]; kn = [0, 1] recalls [2, 3]; 0.5 (v - [2, 3]) = [-0.5, -2].
    assert mx.allclose(state[0, 0], mx.array([[1.0, 0.0], [1.5, 1.0]]), atol=1e-5)
    qn = mx.array([0.6, 0.8]) / math.sqrt(2)
    assert mx.allclose(o[0, 0, 0], qn @ state[0, 0], atol=1e-5)
    o, state = mamba2.sequential(*tensors, beta, mx.array([-2.0]), M)  # [value, key]
    expected = math.exp(-1) * M[0, 0] + 0.5 * mx.array([[0.0, 1.0], [0.0, -1.0]])
    assert mx.allclose(state[0, 0], expected, atol=1e-5)
    assert mx.allclose(o[0, 0, 0], state[0, 0] @ mx.array([0.6, 0.8]), atol=1e-5)


@pytest.mark.parametrize("decay", [0.3, 80.0])
def test_gradients_match_the_oracle(decay):
    q, k, v, g, beta, state = inputs(1, 40, 1, 2, 8, decay, 3)
    rates = -mx.ones((2,))

    def loss(form):
        def total(*args):
            o, M = form(*args)
            return (o * mx.cos(mx.arange(o.size).reshape(o.shape))).sum() + (M * M).sum()

        return mx.grad(total, argnums=tuple(range(6)))

    for fast, oracle, args in (
        (delta.chunked, delta.sequential, (q, k, v, g, beta, state)),
        (mamba2.chunked, mamba2.sequential, (q, k, v, beta, rates, state)),
        (partial(delta.at_once, chunk=8), delta.sequential, (q, k, v, g, beta, state)),
        (partial(mamba2.at_once, chunk=8), mamba2.sequential, (q, k, v, beta, rates, state)),
    ):
        close(loss(fast)(*args), loss(oracle)(*args), 1e-4)
