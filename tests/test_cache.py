"""The ring against a list of tokens, and windowed attention against one query at a time."""

import copy
import subprocess
import sys
from unittest import mock

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import CacheList

from ahn_mlx.model.cache import AHNCache
from ahn_mlx.model.slots import Rows, pack, unpack
from ahn_mlx.ops import window as ops
from ahn_mlx.ops.exp import fast_exp
from ahn_mlx.ops.ring import read_slots, stay, write_slots
from ahn_mlx.ops.window import split
from ahn_mlx.platform import on_cpu
from ahn_mlx.reading.caches import fork

chunks = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def tokens(first, n, heads, width):
    """Token t is the number t, everywhere."""
    t = mx.arange(first, first + n, dtype=mx.float32)[None, None, :, None]
    return mx.broadcast_to(t, (1, heads, n, width))


def times(x):
    return x[0, 0, :, 0].tolist()


def update(cache, *new):
    """As the attention layer does it. Returns keys and values seen, and keys, values and
    gates evicted or None."""
    if new[0].shape[2] == 1 and not cache.full:
        return *cache.fill(*new), None
    if new[0].shape[2] > 1:
        out = cache.update(*new)
        return *out.seen(), out.evicted() if out.evicts else None
    before, place = cache.turn()
    buffers = write_slots(before.buffers, pack(*new, cache.bits, cache.group_size), place.slots)
    cache.turned(Rows(buffers, read_slots(buffers, place.following), before.memory))
    return *split(*buffers[:-1]), unpack(before.leaving, cache.bits, cache.group_size)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 20), st.integers(0, 6), chunks)
def test_ring_equals_a_list(window, sinks, lengths):
    cache, kept, read, t = AHNCache(window, sinks), [], [], 0
    for n in lengths:
        new = list(range(t, t + n))
        before, evicted = list(kept), []
        for token in new:
            kept.append(token)
            if len(kept) > window + sinks:
                evicted.append(kept.pop(sinks))
        keys, values, out = update(
            cache, tokens(t, n, 2, 4), tokens(t, n, 2, 4), tokens(t, n, 3, 2)
        )
        t += n
        if n == 1:
            assert sorted(times(keys)) == kept
        else:
            assert times(keys) == before + new
        assert times(keys) == times(values)
        if evicted:
            for part, heads in zip(out, (2, 2, 3), strict=True):
                assert part.shape[1] == heads and times(part) == evicted
        else:
            assert out is None
        read += evicted
        assert cache.offset == t and cache.size() == len(kept)
    assert read == list(range(sinks, sinks + len(read)))


def test_flat_memory_and_honest_bytes():
    cache = AHNCache(32, 4)
    for t in range(0, 400, 25):
        cache.update(tokens(t, 25, 2, 8), tokens(t, 25, 2, 8), tokens(t, 25, 4, 2))
        if t == 50:
            full = cache.nbytes
    assert cache.nbytes == full == 36 * (2 * 2 * 8 + 4 * 2) * 4
    cache.memory = mx.zeros((1, 4, 8, 8))
    assert cache.nbytes == full + 4 * 8 * 8 * 4


def test_bytes_are_of_all_that_is_held_and_nothing_can_be_taken_back():
    cache, gates, D = AHNCache(3, 1), 2, 8
    slot = 4 * (2 * D * 2 + gates * 2)
    for n in range(1, 8):
        update(cache, tokens(n, 1, 2, D), tokens(n, 1, 2, D), tokens(n, 1, 2, gates))
        # Once a token has left, what leaves next is held beside its slot.
        assert cache.nbytes == slot * (min(cache.capacity, len(cache.buffers[0][0, 0])) + (n > 4))
        assert cache.size() == min(n, 4) and not cache.is_trimmable() and not cache.empty()
    cache.memory = mx.zeros((1, 2, D, D))
    assert cache.nbytes == slot * 5 + 4 * 2 * D * D
    assert AHNCache(3, 1).empty() and not AHNCache(3, 1).is_trimmable()


def test_a_row_that_has_filled_no_window_has_no_memory():
    rows = [AHNCache(3, 1) for _ in range(2)]
    for cache, n in zip(rows, (2, 9), strict=True):
        update(cache, tokens(0, n, 2, 8), tokens(0, n, 2, 8), tokens(0, n, 2, 2))
    rows[1].memory = mx.ones((1, 2, 8, 8))
    batch = rows[0].merge(rows)
    few, many = batch.extract(0), batch.extract(1)
    assert few.memory is None and mx.array_equal(many.memory, rows[1].memory)
    assert (few.offset, many.offset) == (2, 9)


def test_copy_and_state():
    cache = AHNCache(8, 2)
    assert cache.empty() and cache.nbytes == 0
    cache.update(tokens(0, 9, 1, 2), tokens(0, 9, 1, 2), tokens(0, 9, 1, 1))
    other = copy.deepcopy(cache)
    again = AHNCache.from_state(cache.state)
    for c in (cache, other, again):
        # Past the boundary one by one: the copy read in advance must not be stale.
        out = [update(c, *(tokens(t, 1, 1, w) for w in (2, 2, 1))) for t in range(9, 14)]
        assert [times(gone[0])[0] for *_, gone in out if gone] == [2, 3, 4, 5]
        assert c.offset == 14


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(0, 6),
    st.lists(st.integers(1, 60), min_size=1, max_size=3),
    st.integers(1, 2),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from([mx.cpu, mx.gpu]),
    st.integers(0, 2**31),
)
def test_window_attention(window, sinks, lengths, Hkv, G, clamped, device, seed):
    """By the forms of either device, computed on what there is."""
    keys = mx.random.split(mx.random.key(seed), 4)
    n, D = sum(lengths), 8
    k, v = (2 * mx.random.normal((1, Hkv, n, D), key=key) for key in keys[:2])
    q, q_sink = (2 * mx.random.normal((1, Hkv * G, n, D), key=key) for key in keys[2:])
    cache, t = AHNCache(window, sinks), 0
    options = {"window": window, "sinks": sinks, "scale": D**-0.5}
    for L in lengths:
        part = slice(t, t + L)
        keys, values, _ = update(cache, k[:, :, part], v[:, :, part], tokens(t, L, 1, 1))
        second = q_sink[:, :, part] if clamped else None
        before = max(0, min(L, window + sinks - t))
        if second is not None:  # up to the boundary both queries are the same
            second = mx.concatenate([q[:, :, t : t + before], second[:, :, before:]], axis=2)
        expected = ops.sequential(q[:, :, part], k, v, offset=t, q_sink=second, **options)
        with mock.patch.object(mx, "default_device", lambda: mx.Device(device)):
            if L == 1:
                full = second if t >= window + sinks else None
                found = ops.attend(q[:, :, part], keys, values, D**-0.5, None, full, sinks)
            else:
                found = ops.tiled(
                    q[:, :, part], keys, values, offset=t, q_sink=second, tile=16, **options
                )
        assert mx.abs(found - expected).max() < 1e-4
        t += L


def test_fast_exp():
    x = -mx.linspace(0, 20, 10_001)
    assert (mx.abs(fast_exp(x) - mx.exp(x)) / mx.exp(x)).max() < 1e-5
    assert fast_exp(mx.array([-1e38, -90.0])).max() < 1e-17
    gradient = mx.grad(lambda x: fast_exp(x).sum())(x)
    assert (mx.abs(gradient - mx.exp(x)) / mx.exp(x)).max() < 1e-5


@pytest.mark.skipif(not on_cpu(), reason="a GPU has an exp of its own")
def test_fast_exp_first_used_within_a_gradient():
    program = (
        "import ahn_mlx, mlx.core as mx; from ahn_mlx.ops.exp import fast_exp; "
        "value = lambda w: (w * fast_exp(mx.zeros((1, n))).sum()).sum(); n = 8; "
        "mx.grad(value)(mx.zeros(1)); n = 4; print(mx.grad(value)(mx.zeros(1)).item())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "4.0\n", done.stderr


def test_forks_of_caches_in_a_list_part_too():
    inner = [AHNCache(4, 1), AHNCache(4, 1)]
    whole = [CacheList(*inner)]
    other = fork(whole)
    for cache in other[0].caches:
        cache.update(tokens(0, 3, 1, 2), tokens(0, 3, 1, 2), tokens(0, 3, 1, 1))
    assert [c.offset for c in other[0].caches] == [3, 3] and [c.offset for c in inner] == [0, 0]
    assert all(c.empty() for c in whole[0].caches)


@given(
    first=st.integers(0, 40),
    length=st.integers(0, 40),
    window=st.integers(1, 12),
    sinks=st.integers(0, 6),
)
def test_what_stays_of_some_tokens_are_sinks_and_those_within_the_window(
    first, length, window, sinks
):
    end = first + length
    wanted = [t for t in range(first, end) if t < sinks or t >= end - window]
    assert stay(first, end, window, sinks) == wanted
