"""The prefill kernel of attention against one query at a time, on the emulator."""

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from metal_strict import check_strictly

from ahn_mlx.ops import kernels, window, window_kernels
from ahn_mlx.ops.ring import Update, slot_of

pytest_plugins = ["emulator.plugin"]


@pytest.fixture(autouse=True)
def fresh_kernels():
    kernels.kernel.cache_clear()
    yield
    kernels.kernel.cache_clear()


def case(offset, L, window, sinks, B=1, Hkv=1, G=2, D=64, dtype=mx.float32, seed=0, far=True):
    """Queries, an update in the middle of a document, and all keys and values in time."""
    mx.random.seed(seed)
    n = offset + L
    k, v = (mx.random.normal((B, Hkv, n, D)).astype(dtype) for _ in range(2))
    q, q_sink = (2 * mx.random.normal((B, Hkv * G, L, D)).astype(dtype) for _ in range(2))
    ring = None
    if offset:
        kept = [t for t in range(offset) if t < sinks or t >= offset - window]
        order = mx.array(sorted(kept, key=lambda t: slot_of(t, window, sinks)))
        ring = (k[:, :, order], v[:, :, order])
    update = Update(ring, (k[:, :, offset:], v[:, :, offset:]), offset, window, sinks)
    # Up to the boundary both queries are the same.
    near = mx.arange(offset, n)[:, None] < window + sinks
    return q, update, mx.where(near, q, q_sink) if far else None, k, v


def oracle(q, update, q_sink, k, v):
    wide = [None if x is None else x.astype(mx.float32) for x in (q, k, v, q_sink)]
    return window.sequential(
        *wide[:3],
        offset=update.offset,
        window=update.window,
        sinks=update.sinks,
        scale=q.shape[-1] ** -0.5,
        q_sink=wide[3],
    )


def check(tolerance=1e-5, **shape):
    q, update, q_sink, k, v = case(**shape)
    found = window_kernels.prefill(q, update, q.shape[-1] ** -0.5, q_sink)
    expected = oracle(q, update, q_sink, k, v)
    assert found.shape == expected.shape and found.dtype == q.dtype
    assert mx.abs(found - expected).max() <= tolerance * mx.abs(expected).max()


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    offset=st.integers(0, 60),
    L=st.integers(1, 45),
    window=st.sampled_from([1, 7, 20, 33]),
    sinks=st.sampled_from([0, 3, 18]),
    far=st.booleans(),
    B=st.integers(1, 2),
    Hkv=st.integers(1, 2),
    G=st.sampled_from([1, 2]),
    D=st.sampled_from([16, 32, 64]),
    seed=st.integers(0, 1000),
)
def test_equals_one_query_at_a_time(any_metal, **shape):
    check(**shape)


@pytest.mark.parametrize("offset", range(10, 19))
def test_every_rotation(any_metal, offset):
    check(offset=offset, L=3, window=8, sinks=2)


def test_rows_at_places_of_their_own(any_metal):
    """Each row of one launch as alone, whatever row 0 is doing; free slots are never seen."""
    offsets, W, S = (5, 41, 22, 0), 9, 3
    alone = [case(offset=o, L=35, window=W, sinks=S, Hkv=2, seed=o) for o in offsets]
    rings = []
    for _, update, *_ in alone:
        held = update.ring or tuple(x[:, :, :0] for x in update.chunk)
        free = [(0, 0), (0, 0), (0, W + S - held[0].shape[2]), (0, 0)]
        rings.append([mx.pad(x, free, constant_values=mx.array(1e4)) for x in held])
    chunks = [update.chunk for _, update, *_ in alone]
    ring, chunk = (
        tuple(map(mx.concatenate, map(list, zip(*part, strict=True)))) for part in (rings, chunks)
    )
    q, q_sink = (mx.concatenate([row[i] for row in alone]) for i in (0, 2))
    update = alone[0][1]._replace(ring=ring, chunk=chunk)
    found = window_kernels.prefill(q, update, 64**-0.5, q_sink, mx.array(offsets))
    for row, args in enumerate(alone):
        expected = oracle(*args)
        assert mx.abs(found[row] - expected[0]).max() <= 1e-5 * mx.abs(expected).max()


def test_fewer_tokens_than_sinks(any_metal):
    check(offset=0, L=5, window=7, sinks=18)
    check(offset=3, L=5, window=7, sinks=18)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_wide_heads(any_metal, dtype):
    tolerance = 1e-5 if dtype == mx.float32 else 1e-2
    check(tolerance, offset=30, L=34, window=20, sinks=3, D=128, dtype=dtype)


def test_traffic(emulated_metal):
    """No key or value outside sinks and window, each once for 32 queries of a head."""
    emulated_metal.mode = "count"
    W, S, L, D, H = 24, 4, 64, 128, 2
    q, update, q_sink, _, _ = case(offset=100, L=L, window=W, sinks=S, D=D)
    mx.eval(window_kernels.prefill(q, update, 0.1, q_sink))
    c = emulated_metal.last.counters
    for name in ("k", "v"):
        read = sum(c.buffers[f"{place}_{name}"].read_per_threadgroup for place in ("ring", "chunk"))
        assert read == H * (L // 32) * (S + W - 1 + 32) * D * 4


@pytest.mark.parametrize(("dtype", "limit"), [(mx.float32, 27.0), (mx.bfloat16, 15.0)])
def test_threadgroup_memory(emulated_metal, dtype, limit):
    """Tokens of 16 bits are staged in 16 bits."""
    emulated_metal.mode = "count"
    q, update, q_sink, _, _ = case(offset=9, L=2, window=7, sinks=2, D=128, dtype=dtype)
    mx.eval(window_kernels.prefill(q, update, 0.1, q_sink))
    assert emulated_metal.last.counters.threadgroup_memory <= 1024 * limit


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("D", [64, 128])
def test_strict(needs_strict, monkeypatch, dtype, D):
    q, update, q_sink, _, _ = case(offset=12, L=5, window=6, sinks=2, D=D, dtype=dtype)
    check_strictly(monkeypatch, ("offset", "scale"))
    window_kernels.prefill(q, update, 0.1, q_sink)
