"""The memories' decoding kernels against the oracles, on the emulator."""

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from metal_strict import check_strictly

from ahn_mlx.memory import MEMORIES, forms
from ahn_mlx.ops import delta, kernels, mamba2, memory_kernels
from ahn_mlx.ops.window_kernels import Shares, whole

pytest_plugins = ["emulator.plugin"]

KINDS = ("gated_deltanet", "deltanet", "mamba2")


@pytest.fixture(autouse=True)
def fresh_kernels():
    kernels.kernel.cache_clear()
    yield
    kernels.kernel.cache_clear()


def case(kind, B=1, Hkv=1, G=2, D=64, slots=3, decay=0.3, dtype=mx.float32, seed=0, shares=1):
    """A memory with random parameters, and what a step takes."""
    mx.random.seed(seed)
    H = Hkv * G
    memory = MEMORIES[kind](32, H, D)
    memory.o_proj.weight = 0.2 * mx.random.normal((H, D, D)).astype(dtype)
    norm = memory.norm if kind == "mamba2" else memory.o_norm
    norm.weight = (1 + 0.3 * mx.random.normal(norm.weight.shape)).astype(dtype)
    q, k, v = (
        mx.random.normal((B, h, n, D)).astype(dtype)
        for h, n in ((H, 1), (Hkv, slots), (Hkv, slots))
    )
    top, mass = mx.random.normal((B, H, shares, 1)), mx.random.uniform(1, 2, (B, H, shares, 1))
    stats = mx.concatenate([8 * top, mass], axis=-1)
    local = Shares(mx.random.normal((B, H, shares, D)), stats)
    gates = mx.random.uniform(shape=(B, H, slots, memory.gate_count))
    if kind == "gated_deltanet":
        gates = gates * mx.array([1.0, -decay])
    h = mx.random.normal((B, 1, 32)).astype(dtype)
    memory.g_proj.weight = memory.g_proj.weight.astype(dtype)
    state = mx.random.normal((B, H, D, D))
    slot = mx.array([(seed + b) % slots for b in range(B)], dtype=mx.int32)
    router = mx.random.uniform(shape=(B, H)) if seed % 2 else None
    rates = -decay * mx.linspace(0.5, 1.0, H)
    return memory, (q, k, v, gates.astype(dtype), slot, state, local, h, rates, router)


def oracle(kind, memory, q, k, v, gates, slot, state, local, h, rates, router):
    rows = mx.arange(q.shape[0])
    k, v, gates = (x[rows, :, slot][:, None] for x in (k, v, gates))
    q = q.swapaxes(1, 2)
    if kind == "mamba2":
        o, state = mamba2.sequential(q, k, v, gates[..., 0], rates, state)
    else:
        g = gates[..., 1].astype(mx.float32) if kind == "gated_deltanet" else None
        o, state = delta.sequential(q, k, v, g, gates[..., 0], state)
    m = memory.o_proj(memory.gated(o, h @ memory.g_proj.weight.T, h.dtype)).astype(mx.float32)
    return together(local) + (m if router is None else m * router[..., None, None]), state


def together(local):
    """Softmax over shares, each with its own largest score."""
    weights = mx.exp(local.stats[..., :1] - local.stats[..., :1].max(axis=2, keepdims=True))
    total = (weights * local.stats[..., 1:]).sum(axis=2, keepdims=True)
    return (weights * local.parts).sum(axis=2, keepdims=True) / total


def kernel(kind, memory, q, k, v, gates, slot, state, local, h, rates, router):
    z, projection = h @ memory.g_proj.weight.T, memory.o_proj.weight
    evicted = (k, v, gates)
    if kind == "mamba2":
        norm = memory.norm.weight
        return memory_kernels.mamba2_step(
            q, evicted, slot, state, local, z, norm, projection, rates, router
        )
    norm = memory.o_norm.weight
    return memory_kernels.delta_step(q, evicted, slot, state, local, z, norm, projection, router)


def close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert mx.abs(a - b).max() <= tolerance * mx.abs(b).max()


@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    B=st.integers(1, 2),
    Hkv=st.integers(1, 2),
    G=st.integers(1, 2),
    D=st.sampled_from([16, 32, 64, 128]),
    slots=st.integers(1, 5),
    shares=st.integers(1, 3),
    decay=st.sampled_from([1e-3, 0.3, 80.0]),
    seed=st.integers(0, 1000),
)
def test_equals_the_oracle(any_metal, kind, **shape):
    memory, args = case(kind, **shape)
    close(kernel(kind, memory, *args), oracle(kind, memory, *args), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision(any_metal, kind, dtype):
    memory, args = case(kind, D=128, dtype=dtype, seed=1)
    found, expected = kernel(kind, memory, *args), oracle(kind, memory, *args)
    assert found[0].dtype == dtype and found[1].dtype == mx.float32
    close(found, expected, 1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_keys_and_queries(any_metal, kind):
    memory, args = case(kind)
    q, k, *rest = args
    args = (mx.zeros_like(q), mx.zeros_like(k), *rest)
    close(kernel(kind, memory, *args), oracle(kind, memory, *args), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_are_whole(any_metal, kind):
    memory, (*first, local, h, rates, router) = case(kind, dtype=mx.bfloat16, shares=2)
    heads = together(local).astype(mx.bfloat16)
    expected = oracle(kind, memory, *first, local, h, rates, router)
    found = kernel(kind, memory, *first, whole(heads), h, rates, router)
    close(found, expected, 1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("routed", [False, True])
def test_a_step_is_the_same_without_the_kernel(any_metal, kind, routed):
    """Of more rows than heads, before there is a state and after."""
    memory, (q, k, v, gates, _, state, local, h, _, _) = case(kind, B=3, G=1, D=32, slots=1)
    z, rates = h @ memory.g_proj.weight.T, memory.derive().rates
    loudness = mx.random.uniform(shape=(3, 1, 1, 1)) if routed else None
    for before in (None, state):
        options = (memory, q, (k, v, gates), before)
        expected = forms._step_ops(*options, together(local), z, rates, loudness)
        close(forms._step_kernel(*options, local, z, rates, loudness), expected, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_traffic(emulated_metal, kind):
    """The state once in and once out, the projection once, all else at most 4 KB a head, and
    1 KB that passes between two dispatches."""
    emulated_metal.mode = "count"
    memory, args = case(kind, Hkv=2, G=2, D=128)
    H, state = 4, 4 * 128 * 128
    mx.eval(kernel(kind, memory, *args))
    assert len(emulated_metal.calls) == (2 if kind == "mamba2" else 1)
    result = emulated_metal.calls[0][1]
    c = result.counters
    assert c.buffers["state"].read_per_threadgroup == H * state
    assert c.buffers["state"].read_per_simdgroup == H * state
    assert c.buffers["new_state"].written_per_threadgroup == H * state
    assert c.buffers["projection"].read_per_simdgroup == H * state
    large = ("state", "projection", "new_state")
    rest = c.total("read_per_threadgroup", without=large)
    rest += c.total("written_per_threadgroup", without=large)
    for _, second in emulated_metal.calls[1:]:
        rest += second.counters.total("read_per_threadgroup")
        rest += second.counters.total("written_per_threadgroup")
    assert rest <= (4096 + 1024 * (len(emulated_metal.calls) - 1)) * H


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("D", [64, 128])
def test_strict(needs_strict, monkeypatch, kind, dtype, D):
    check_strictly(monkeypatch, ("gates", "slot", "z", "router", "rates", "stats", "squares"))
    memory, args = case(kind, D=D, dtype=dtype, Hkv=2, G=2, slots=3)
    kernel(kind, memory, *args)
