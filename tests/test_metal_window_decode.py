"""The decoding kernel of attention against plain softmax, on the emulator."""

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from metal_strict import check_strictly

from ahn_mlx.ops import kernels, window_kernels

pytest_plugins = ["emulator.plugin"]


@pytest.fixture(autouse=True)
def fresh_kernels(monkeypatch):
    monkeypatch.setattr(window_kernels, "SHARE", 16)  # several threadgroups for few slots
    kernels.kernel.cache_clear()
    yield
    kernels.kernel.cache_clear()


def case(slots, B=1, Hkv=1, G=2, D=64, dtype=mx.float32, seed=0, far=True):
    mx.random.seed(seed)
    q, q_sink = (2 * mx.random.normal((B, Hkv * G, 1, D)) for _ in range(2))
    k, v = (mx.random.normal((B, Hkv, slots, D)) for _ in range(2))
    arrays = [x.astype(dtype) for x in (q, k, v, q_sink)]
    return arrays if far else [*arrays[:3], None]


def oracle(q, k, v, filled, scale, q_sink, sinks):
    """One row and head at a time."""
    q_sink = q if q_sink is None else q_sink
    group = q.shape[1] // k.shape[1]
    rows = []
    for b, n in enumerate(filled):
        for h in range(q.shape[1]):
            keys, values = (x[b, h // group, :n].astype(mx.float32) for x in (k, v))
            s = keys @ q[b, h, 0].astype(mx.float32)
            s[:sinks] = keys[:sinks] @ q_sink[b, h, 0].astype(mx.float32)
            rows.append(mx.softmax(scale * s) @ values)
    return mx.stack(rows).reshape(q.shape)


def decode(q, k, v, filled, scale, q_sink=None, sinks=0, following=None, width=2):
    """Merged heads; what is copied of the slots that follow, by default in no order, is right."""
    B, H, slots = q.shape[0], q.shape[1], k.shape[2]
    gates = mx.random.normal((B, H, slots, width)).astype(k.dtype)
    if following is None:
        following = [(7 * b + 3) % slots for b in range(B)]
    found, leaving = window_kernels.decode(
        q,
        (k, v, gates),
        mx.array(filled, mx.int32),
        mx.array(following, mx.int32)[:, None],
        scale,
        q_sink,
        sinks,
    )
    for copy, held in zip(leaving, (k, v, gates), strict=True):
        expected = mx.stack([x[:, n : n + 1] for x, n in zip(held, following, strict=True)])
        assert copy.dtype == held.dtype and mx.array_equal(copy, expected)
    return window_kernels.merge(found, q.dtype)


def check(filled, sinks=0, tolerance=1e-5, far=True, following=None, width=2, **shape):
    q, k, v, q_sink = case(far=far, **shape)
    filled = [min(n, k.shape[2]) for n in filled]
    following = None if following is None else [n % k.shape[2] for n in following]
    scale = q.shape[-1] ** -0.5
    found = decode(q, k, v, filled, scale, q_sink, sinks, following, width)
    expected = oracle(q, k, v, filled, scale, q_sink, sinks)
    assert found.shape == expected.shape and found.dtype == q.dtype
    assert mx.abs(found - expected).max() <= tolerance * mx.abs(expected).max()


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    slots=st.sampled_from([1, 15, 16, 17, 50]),
    filled=st.integers(1, 50),
    other=st.integers(1, 50),
    sinks=st.sampled_from([0, 3, 20]),
    far=st.booleans(),
    B=st.integers(1, 2),
    Hkv=st.integers(1, 2),
    G=st.sampled_from([1, 2, 4]),
    D=st.sampled_from([16, 32, 64]),
    width=st.integers(1, 2),
    slot=st.integers(0, 49),
    seed=st.integers(0, 1000),
)
def test_equals_softmax(any_metal, filled, other, slot, B, **shape):
    check([filled, other][:B], B=B, following=[slot, slot + 17][:B], **shape)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("G", [1, 7])
def test_wide_heads(any_metal, dtype, G):
    tolerance = 1e-5 if dtype == mx.float32 else 1e-2
    check([40], sinks=4, tolerance=tolerance, slots=40, D=128, G=G, dtype=dtype)


def test_scores_that_overflow_exp(any_metal):
    q, k, v, _ = case(40)
    found = decode(100 * q, k, v, [40], 1.0)
    expected = oracle(100 * q, k, v, [40], 1.0, None, 0)
    assert mx.abs(found - expected).max() <= 1e-5 * mx.abs(expected).max()


def test_traffic(emulated_metal):
    """Each visible key and value once per key/value head, and nothing else of the window but
    the slot that is copied."""
    emulated_metal.mode = "count"
    q, k, v, q_sink = case(64, Hkv=2, G=4, D=128)
    mx.eval(decode(q, k, v, [50], 0.1, q_sink, 4))
    c = emulated_metal.calls[0][1].counters
    for name in ("k", "v"):
        assert c.buffers[name].read_per_threadgroup == 2 * 50 * 128 * 4
        assert c.buffers[name].read_per_simdgroup <= 2 * 51 * 128 * 4
        assert c.buffers[f"next_{name}"].written_per_threadgroup == 2 * 128 * 4
    assert c.buffers["gates"].read_per_threadgroup == 8 * 2 * 4
    assert len(emulated_metal.calls) == 2


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("D", [64, 128])
def test_strict(needs_strict, monkeypatch, dtype, D):
    q, k, v, q_sink = case(20, D=D, dtype=dtype)
    small = ("filled", "following", "gates", "scale", "stats")
    check_strictly(monkeypatch, small)
    where = mx.array([20], mx.int32), mx.array([[3]], mx.int32)
    gates = mx.zeros((1, q.shape[1], 20, 1), dtype=dtype)
    found, _ = window_kernels.decode(q, (k, v, gates), *where, 0.1, q_sink, 4)
    window_kernels.merge(found, dtype)
