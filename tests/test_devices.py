"""Both ways that operations take, a CPU's and a GPU's, against the same equations."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from test_equations import close, delta_rule, drawn, ssd
from test_model import IDS, tiny

from ahn_mlx.memory import MEMORIES
from ahn_mlx.model import fit
from ahn_mlx.ops import delta, mamba2, window
from ahn_mlx.ops.ring import Update
from ahn_mlx.ops.window import Logits
from ahn_mlx.train.layerwise import _without_common_key as without_common_key


@pytest.fixture(params=["cpu", "gpu"])
def way(request, monkeypatch):
    for module in (delta, mamba2, window):
        monkeypatch.setattr(module, "on_cpu", lambda: request.param == "cpu")
    return request.param


@pytest.mark.parametrize("length", [1, 9, 37])
def test_recurrences(way, length):
    q, k, v, g, beta, M = drawn(length)
    close(delta.gated_delta_rule(q, k, v, g, beta, M), delta_rule(q, k, v, g, beta, M))
    close(delta.delta_rule(q, k, v, beta, M), delta_rule(q, k, v, 0 * g, beta, M))
    A = -mx.linspace(0.1, 3.0, q.shape[2])
    close(mamba2.ssd(q, k, v, beta, A, M), ssd(q, k, v, beta, A, M))


def scores(q, k, near, far_from, cap):
    """[B, H, L, K] in float64: of `near` for the first keys, capped."""
    q, k, near = (np.array(x, dtype=np.float64) for x in (q, k, near))
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    s = np.einsum("bhld,bhkd->bhlk", q, k)
    s[..., :far_from] = np.einsum("bhld,bhkd->bhlk", near, k[:, :, :far_from])
    s *= 0.5
    return s if cap is None else cap * np.tanh(s / cap)


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("near", [False, True])
def test_attention_with_capped_scores_and_heads_that_look_away(way, length, cap, away, near):
    """A logit of its own takes part of a head's attention and gives nothing."""
    q, other = (mx.random.normal((2, 6, length, 8)) for _ in range(2))
    k, v = (mx.random.normal((2, 3, 50, 8)) for _ in range(2))
    mask = np.arange(50)[None] <= np.arange(length)[:, None] + 42
    own = mx.random.normal((6,)) if away else None
    s = np.where(mask, scores(q, k, other, 4 if near else 0, cap), -np.inf)
    p = np.exp(s)
    total = p.sum(axis=-1, keepdims=True) + (
        np.exp(np.array(own, dtype=np.float64))[:, None, None] if away else 0
    )
    expected = np.einsum("bhlk,bhkd->bhld", p / total, np.repeat(np.array(v), 2, axis=1))
    logits = Logits(cap, own) if cap is not None or away else None
    asked = (other, 4) if near else (None, 0)
    found = window.attend(q, k, v, 0.5, mx.array(mask), *asked, logits=logits)
    assert np.abs(np.array(found) - expected).max() < 1e-5


@pytest.mark.parametrize("capped", [False, True])
def test_a_chunk_behind_a_window(way, capped):
    """Token t of the chunk sees t - 9 to t, and the first four."""
    k, v = (mx.random.normal((1, 2, 60, 8)) for _ in range(2))
    q, near = (mx.random.normal((1, 4, 25, 8)) for _ in range(2))
    t, j = np.arange(35, 60)[:, None], np.arange(60)[None]
    mask = (j <= t) & ((j < 4) | (t - j < 10))
    cap = 2.0 if capped else None
    p = np.exp(np.where(mask, scores(q, k, near, 4, cap), -np.inf))
    p /= p.sum(axis=-1, keepdims=True)
    expected = np.einsum("bhlk,bhkd->bhld", p, np.repeat(np.array(v), 2, axis=1))
    slots = [*range(4), *([0] * 10)]
    for t in range(25, 35):
        slots[4 + (t - 4) % 10] = t
    ring = tuple(x[:, :, mx.array(slots)] for x in (k, v))
    chunk = tuple(x[:, :, 35:] for x in (k, v))
    update = Update(ring, chunk, 35, 10, 4)
    logits = Logits(cap, None) if capped else None
    found = window.window_attention(q, update, 0.5, near, False, logits)
    assert np.abs(np.array(found) - expected).max() < 1e-5


@pytest.mark.parametrize("memory", list(MEMORIES))
def test_a_whole_model_is_the_same_either_way(memory, monkeypatch):
    said = []
    for cpu in (True, False):
        for module in (delta, mamba2, window):
            monkeypatch.setattr(module, "on_cpu", lambda cpu=cpu: cpu)
        _, model = tiny(memory=memory, window=10, sinks=3, sink_positions="clamped")
        cache = model.make_cache()
        parts = [model(ids, cache=cache) for ids in (IDS[:, :7], IDS[:, 7:40], IDS[:, 40:41])]
        said.append(mx.concatenate(parts, axis=1))
    assert mx.allclose(*said, atol=1e-4)


def test_what_is_turned_has_bytes_of_its_own(monkeypatch):
    """With CUDA, MLX writes what RoPE makes of a view of the same numbers to the same bytes."""
    seen = []

    class Recording(nn.RoPE):
        def __call__(self, x, offset=0):
            mx.eval(x)
            about = memoryview(x)
            seen.append(all(s for n, s in zip(about.shape, about.strides, strict=True) if n > 1))
            return super().__call__(x, offset)

    monkeypatch.setattr(nn, "RoPE", Recording)
    monkeypatch.setattr(fit, "on_cuda", lambda: True)
    mx.disable_compile()
    try:
        _, model = tiny(window=10, sinks=3, sink_positions="clamped", query_projection=True)
        looked = len(seen)
        assert looked  # that it turns rows apart
        cache = model.make_cache()
        for ids in (IDS[:, :20], *(IDS[:, n : n + 1] for n in range(20, 24))):
            mx.eval(model(ids, cache=cache))
        normed = [mx.random.normal((1, 40, model.args.hidden_size))]
        without_common_key(model.layers[0].self_attn, normed, 10)
    finally:
        mx.enable_compile()
    assert len(seen) > looked + 4 and all(seen)


@pytest.mark.parametrize("gated", [True, False])
def test_no_loop_over_tokens_with_cuda(monkeypatch, gated):
    """MLX's own delta rule has no kernel there: it is as many launches as tokens, times ten."""
    used = []
    theirs = mx.fast.gated_delta_update
    monkeypatch.setattr(
        mx.fast, "gated_delta_update", lambda *args: used.append(args) or theirs(*args)
    )
    monkeypatch.setattr(delta, "on_cpu", lambda: False)
    q, k, v, g, beta, M = drawn(70)
    expected = delta_rule(q, k, v, g if gated else 0 * g, beta, M)
    for cuda in (False, True):
        monkeypatch.setattr(delta, "on_cuda", lambda cuda=cuda: cuda)
        if gated:
            close(delta.gated_delta_rule(q, k, v, g, beta, M), expected)
        else:
            close(delta.delta_rule(q, k, v, beta, M), expected)
        assert len(used) == 1  # with Metal alone
