"""A quantized window: the same tokens, rounded once, however the prompt was cut."""

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache
from test_cache import update

from ahn_mlx.errors import AHNError
from ahn_mlx.model.cache import AHNCache
from ahn_mlx.model.trace import Trace
from ahn_mlx.ops.window import attend

D = 64


def rounded(x, bits, group_size):
    packed, scales, biases = mx.quantize(x, group_size=group_size, bits=bits)
    return mx.dequantize(packed, scales, biases, group_size=group_size, bits=bits)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(0, 6),
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.sampled_from([8, 4]),
    st.sampled_from([32, 64]),
    st.integers(0, 2**31),
)
def test_equals_a_plain_window_of_rounded_tokens(window, sinks, lengths, bits, group_size, seed):
    n = sum(lengths)
    key = mx.random.split(mx.random.key(seed), 5)
    k, v = (mx.random.normal((1, 2, n, D), key=key[i]) for i in (0, 1))
    gates = mx.random.normal((1, 4, n, 2), key=key[2])
    q, q_sink = (mx.random.normal((1, 4, 1, D), key=key[i]) for i in (3, 4))
    quantized = AHNCache(window, sinks, bits, group_size)
    plain = AHNCache(window, sinks)
    kr, vr = (rounded(x, bits, group_size) for x in (k, v))
    t = 0
    for L in lengths:
        part = slice(t, t + L)
        a = update(quantized, k[:, :, part], v[:, :, part], gates[:, :, part])
        b = update(plain, kr[:, :, part], vr[:, :, part], gates[:, :, part])
        assert (a[2] is None) == (b[2] is None)
        for x, y in zip(a[2] or (), b[2] or (), strict=True):
            assert mx.array_equal(x, y)
        if isinstance(a[0], mx.array):
            assert mx.array_equal(a[0], b[0]) and mx.array_equal(a[1], b[1])
        else:
            for second in (None, q_sink) if t >= window + sinks else (None,):
                found, expected = (
                    attend(q, u[0], u[1], D**-0.5, None, second, sinks) for u in (a, b)
                )
                assert mx.abs(found - expected).max() < 1e-4
        t += L


def test_to_quantized_keeps_what_was_read():
    k, v, gates = (mx.random.normal((1, 2, 20, w)) for w in (D, D, 1))
    cache = AHNCache(8, 2)
    cache.update(k, v, gates)
    cache.memory = mx.ones((1, 2, D, D))
    packed = cache.to_quantized(group_size=64, bits=8)
    again = AHNCache.from_state(packed.state)
    new = [mx.random.normal((1, 2, 1, w)) for w in (D, D, 1)]
    for c in (packed, again):
        *_, evicted = update(c, *new)
        assert mx.array_equal(evicted[0], rounded(k[:, :, 12:13], 8, 64))
        assert mx.array_equal(evicted[2], gates[:, :, 12:13])
        assert c.offset == 21 and mx.array_equal(c.memory, cache.memory)
    state = cache.memory.nbytes
    assert packed.nbytes - state < 0.4 * (cache.nbytes - state)


def test_group_size_must_divide_the_head_size():
    tokens = [mx.zeros((1, 1, 1, w)) for w in (48, 48, 1)]
    with pytest.raises(AHNError, match="group size of 64 does not divide the head size 48"):
        AHNCache(8, 2, bits=8).update(*tokens)


@pytest.mark.parametrize(
    "bits, bound",
    [(None, 0.285), (8, 0.165), (4, 0.10)],
)
def test_bytes_of_qwen_3b_at_128k(bits, bound):
    """One of 36 equal layers: 16 heads, 2 for keys and values, 128 wide, bfloat16."""
    tokens, step = 128_000, 8_000
    full, ours = KVCache(), AHNCache(32_640, 128, bits)
    for _ in range(0, tokens, step):
        kv = mx.zeros((1, 2, step, 128), mx.bfloat16)
        full.update_and_fetch(kv, kv)
        ours.update(kv, kv, mx.zeros((1, 16, step, 2), mx.bfloat16))
        mx.eval(full.state, ours.state)
    update(ours, *(x[:, :, :1] for x in (kv, kv, mx.zeros((1, 16, 1, 2), mx.bfloat16))))
    ours.memory = mx.zeros((1, 16, 128, 128))
    held = [x for x in ours.state if isinstance(x, mx.array)]
    assert sum(x.nbytes for x in held) <= ours.nbytes  # nothing is left out
    assert ours.nbytes <= bound * full.nbytes


def test_what_the_memory_did_is_still_known_and_mlx_lm_may_ask_again():
    cache = AHNCache(8, 2)
    cache.update(*(mx.random.normal((1, 1, 20, w)) for w in (64, 64, 1)))
    cache.trace = Trace.start(1)
    packed = cache.to_quantized(group_size=64, bits=8)
    assert packed.trace is cache.trace and packed.offset == 20
    assert packed.to_quantized(group_size=64, bits=8) is packed
    with pytest.raises(AHNError, match="8 bits in groups of 64 already"):
        packed.to_quantized(group_size=64, bits=4)
    with pytest.raises(AHNError, match="cannot become 8 bits in groups of 32"):
        packed.to_quantized(group_size=32, bits=8)
