"""The memories' prefill kernel against the oracles, on the emulator."""

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from metal_strict import check_strictly

from ahn_mlx.ops import delta, kernels, mamba2, memory_kernels
from ahn_mlx.ops.ring import Update, slot_of

pytest_plugins = ["emulator.plugin"]

KINDS = ("gated_deltanet", "deltanet", "mamba2")


@pytest.fixture(autouse=True)
def fresh_kernels():
    kernels.kernel.cache_clear()
    yield
    kernels.kernel.cache_clear()


def case(
    kind, offset, L, window, sinks, B=1, Hkv=1, G=2, D=64, decay=0.3, dtype=mx.float32, seed=0
):
    """An update in the middle of a document, and all of its tokens in order of time."""
    mx.random.seed(seed)
    H, n, gates = Hkv * G, offset + L, 2 if kind == "gated_deltanet" else 1
    k, v = (mx.random.normal((B, Hkv, n, D)).astype(dtype) for _ in range(2))
    g = mx.random.uniform(shape=(B, H, n, gates))
    if kind == "gated_deltanet":
        g = g * mx.array([1.0, -decay])
    tokens = (k, v, g.astype(dtype))
    # Slots that nothing was written to hold a number that would show.
    slots = min(offset, window + sinks)
    ring = None
    if offset:
        kept = [t for t in range(offset) if t < sinks or t >= offset - window]
        order = sorted(kept, key=lambda t: slot_of(t, window, sinks))
        ring = tuple(x[:, :, mx.array(order)] for x in tokens)
        assert ring[0].shape[2] == slots
    update = Update(ring, tuple(x[:, :, offset:] for x in tokens), offset, window, sinks)
    q = mx.random.normal((B, H, update.evicts, D)).astype(dtype)
    state = mx.random.normal((B, H, D, D))
    rates = -decay * mx.linspace(0.5, 1.0, H) if kind == "mamba2" else None
    return tokens, update, q, state, rates


def oracle(kind, tokens, update, q, state, rates):
    first = update.end - update.evicts - update.window
    k, v, g = (x[:, :, first : first + update.evicts].swapaxes(1, 2) for x in tokens)
    q = q.swapaxes(1, 2)
    if kind == "mamba2":
        return mamba2.sequential(q, k, v, g[..., 0], rates, state)
    log_decay = g[..., 1].astype(mx.float32) if kind == "gated_deltanet" else None
    return delta.sequential(q, k, v, log_decay, g[..., 0], state)


def close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert mx.abs(a - b).max() <= tolerance * mx.abs(b).max()


def check(kind, splits=None, tolerance=1e-5, **shape):
    tokens, update, q, state, rates = case(kind, **shape)
    found = memory_kernels.scan(kind, q, update, state, rates, splits)
    close(found, oracle(kind, tokens, update, q, state, rates), tolerance)


@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    offset=st.integers(0, 40),
    more=st.integers(1, 35),
    window=st.sampled_from([1, 7, 16]),
    sinks=st.sampled_from([0, 3]),
    B=st.integers(1, 2),
    Hkv=st.integers(1, 2),
    G=st.integers(1, 2),
    shape=st.sampled_from([(16, 1), (32, 2), (64, 1), (64, 2), (64, 4), (128, 4)]),
    decay=st.sampled_from([1e-3, 0.3, 80.0]),
    seed=st.integers(0, 1000),
)
def test_equals_the_oracle(any_metal, kind, offset, more, window, sinks, shape, **rest):
    D, splits = shape
    L = more + max(0, window + sinks - offset)  # some token leaves
    check(kind, splits, offset=offset, L=L, window=window, sinks=sinks, D=D, **rest)


@pytest.mark.parametrize("offset", range(9, 18))
def test_every_rotation_and_one_token(any_metal, offset):
    check("gated_deltanet", offset=offset, L=1, window=6, sinks=3)
    check("gated_deltanet", offset=offset, L=14, window=6, sinks=3, Hkv=2, G=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_wide_heads(any_metal, kind, dtype):
    tolerance = 1e-5 if dtype == mx.float32 else 1e-2
    check(kind, tolerance=tolerance, offset=20, L=18, window=9, sinks=2, D=128, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_at_places_of_their_own(any_metal, kind):
    """Each row of one launch as alone, whatever row 0 is doing."""
    offsets, L = (11, 26, 9), 12
    alone = [case(kind, offset=o, L=L, window=7, sinks=2, Hkv=2, seed=o) for o in offsets]
    tokens, updates, queries, states, rates = zip(*alone, strict=True)
    assert {u.evicts for u in updates} == {L}
    parts = [[u.ring for u in updates], [u.chunk for u in updates]]
    joined = [tuple(map(mx.concatenate, map(list, zip(*part, strict=True)))) for part in parts]
    update = updates[0]._replace(ring=joined[0], chunk=joined[1])
    q, state = mx.concatenate(list(queries)), mx.concatenate(list(states))
    found = memory_kernels.scan(kind, q, update, state, rates[0], offsets=offsets)
    for row, args in enumerate(zip(tokens, updates, queries, states, rates, strict=True)):
        close([x[row : row + 1] for x in found], oracle(kind, *args), 1e-5)


def test_zero_keys(any_metal):
    for kind in KINDS:
        tokens, update, q, state, rates = case(kind, offset=12, L=5, window=6, sinks=2)
        tokens = (mx.zeros_like(tokens[0]), *tokens[1:])
        ring, chunk = ((mx.zeros_like(x[0]), *x[1:]) for x in (update.ring, update.chunk))
        update = update._replace(ring=ring, chunk=chunk)
        expected = oracle(kind, tokens, update, 0 * q, state, rates)
        close(memory_kernels.scan(kind, 0 * q, update, state, rates)[1:], expected[1:], 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("splits", [1, 4])
def test_traffic(emulated_metal, kind, splits):
    """Per token and head P (q + k) + v + gates, and at most 64 shuffles."""
    emulated_metal.mode = "count"
    D, T, H = 128, 32, 2
    _, update, q, state, rates = case(kind, offset=40, L=T, window=16, sinks=2, D=D)
    mx.eval(memory_kernels.scan(kind, q, update, state, rates, splits))
    c = emulated_metal.last.counters
    read = c.total("read_per_threadgroup", without=["state"]) / (T * H)
    assert read <= 1.05 * 4 * (splits * 2 * D + D + 2)
    assert c.shuffles / (T * H) <= 64
    assert c.buffers["state"].read_per_threadgroup == H * D * D * 4
    assert c.buffers["new_state"].written_per_threadgroup == H * D * D * 4


@pytest.mark.parametrize(
    ("kv_heads", "D", "splits"), [(1, 16, 1), (1, 32, 2), (1, 128, 4), (16, 64, 2), (32, 64, 1)]
)
def test_a_head_is_split_until_there_is_work_for_a_gpu(emulated_metal, kv_heads, D, splits):
    """Each part reads all queries of its head."""
    emulated_metal.mode = "count"
    _, update, q, state, _ = case("deltanet", offset=9, L=3, window=4, sinks=2, Hkv=kv_heads, D=D)
    mx.eval(memory_kernels.scan("deltanet", q, update, state, None))
    read = emulated_metal.last.counters.buffers["q"].read_per_threadgroup
    assert read == splits * q.size * 4


@pytest.mark.parametrize(("dtype", "limit"), [(mx.float32, 28.5), (mx.bfloat16, 16.5)])
def test_threadgroup_memory(emulated_metal, dtype, limit):
    """Tokens of 16 bits are staged in 16 bits."""
    emulated_metal.mode = "count"
    _, update, q, state, rates = case(
        "mamba2", offset=9, L=2, window=7, sinks=2, D=128, dtype=dtype
    )
    mx.eval(memory_kernels.scan("mamba2", q, update, state, rates, 1))
    assert emulated_metal.last.counters.threadgroup_memory <= 1024 * limit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("D", [64, 128])
def test_strict(needs_strict, monkeypatch, kind, dtype, D):
    _, update, q, state, rates = case(kind, offset=12, L=5, window=6, sinks=2, D=D, dtype=dtype)
    check_strictly(monkeypatch, ("ring_gates", "chunk_gates", "first", "offset", "rates"))
    memory_kernels.scan(kind, q, update, state, rates)
