"""Operations and memories against their equations, written again in float64 with NumPy: bounds
at both sides, sizes that all differ, 16-bit numbers, and windows longer than a tile."""

import math
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_model import IDS, tiny

import ahn_mlx
from ahn_mlx import AHNConfig, AHNError
from ahn_mlx.memory import MEMORIES, Router, forms
from ahn_mlx.memory.layers import Kept, decay_init
from ahn_mlx.model.division import heads_of_each, layers_of_each, rows_of_each
from ahn_mlx.ops import band, chunks, delta, mamba2, window
from ahn_mlx.ops.exp import exp, fast_exp
from ahn_mlx.ops.kernels import Sizes

METAL = Path(ahn_mlx.__file__).parent.parent / "metal"
B, T, HKV, G, D = 2, 37, 3, 2, 8
H = HKV * G


def delta_rule(q, k, v, g, beta, M):
    """kn = k / sqrt(|k|^2 + 1e-6); M <- exp(g) M; M <- M + kn (beta (v - M^T kn))^T."""
    q, k, v, g, beta, M = (np.array(x, dtype=np.float64) for x in (q, k, v, g, beta, M))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    k, q = (x / np.sqrt((x**2).sum(axis=-1, keepdims=True) + 1e-6) for x in (k, q))
    read = []
    for t in range(q.shape[1]):
        M = np.exp(g[:, t])[..., None, None] * M
        change = beta[:, t][..., None] * (v[:, t] - np.einsum("bhkv,bhk->bhv", M, k[:, t]))
        M = M + k[:, t][..., None] * change[..., None, :]
        read.append(np.einsum("bhkv,bhk->bhv", M, q[:, t]) / np.sqrt(q.shape[-1]))
    return np.stack(read, axis=1), M


def ssd(q, k, v, dt, A, M):
    """kn = k / max(|k|, 1e-12); M <- exp(dt A) M + dt v kn^T."""
    q, k, v, dt, A, M = (np.array(x, dtype=np.float64) for x in (q, k, v, dt, A, M))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    k, q = (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (k, q))
    read = []
    for t in range(q.shape[1]):
        M = np.exp(dt[:, t] * A)[..., None, None] * M
        M = M + (dt[:, t][..., None] * v[:, t])[..., None] * k[:, t][..., None, :]
        read.append(np.einsum("bhvk,bhk->bhv", M, q[:, t]))
    return np.stack(read, axis=1), M


def close(found, expected, tolerance=2e-5):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == mx.float32 and a.shape == b.shape
        assert np.abs(np.array(a) - b).max() <= tolerance * np.abs(b).max()


def drawn(length=T, size=1.0):
    """Keys and queries of about that length, and all else."""
    q, k = (size * D**-0.5 * mx.random.normal((B, length, h, D)) for h in (H, HKV))
    v, M = mx.random.normal((B, length, HKV, D)), mx.random.normal((B, H, D, D))
    gate, decay = (mx.random.uniform(shape=(B, length, H)) for _ in range(2))
    return q, k, v, -0.2 * decay, gate, M


# From where nothing but the epsilon counts to where it counts no more.
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("length", [1, 9, T])
def test_delta_rules_are_their_equation(size, length):
    q, k, v, g, beta, M = drawn(length, size)
    expected = delta_rule(q, k, v, g, beta, M)
    close(delta.gated_delta_rule(q, k, v, g, beta, M), expected)
    close(delta.sequential(q, k, v, g, beta, M), expected)
    close(delta.at_once(q, k, v, g, beta, M, 8), expected)
    close(delta.mlx_fast(q, k, v, g, beta, M), expected)
    expected = delta_rule(q, k, v, 0 * g, beta, M)
    close(delta.delta_rule(q, k, v, beta, M), expected)
    close(delta.sequential(q, k, v, None, beta, M), expected)


@pytest.mark.parametrize("size", [1e-8, 1e-3, 1.0])
@pytest.mark.parametrize("length", [1, 9, T])
def test_mamba2_is_its_equation(size, length):
    q, k, v, _, dt, M = drawn(length, size)
    A = -mx.linspace(0.1, 3.0, H)
    expected = ssd(q, k, v, dt, A, M)
    close(mamba2.ssd(q, k, v, dt, A, M), expected)
    close(mamba2.sequential(q, k, v, dt, A, M), expected)
    close(mamba2.at_once(q, k, v, dt, A, M, 8), expected)


@pytest.mark.parametrize("length", [1, 9])
def test_nothing_is_learned_from_a_key_of_zeros_or_said_to_such_a_query(length):
    q, k, v, g, gate, M = drawn(length)
    A = -mx.ones(H)
    for rule in (
        lambda q, k, M: mamba2.ssd(q, k, v, gate, A, M),
        lambda q, k, M: mamba2.sequential(q, k, v, gate, A, M),
        lambda q, k, M: delta.delta_rule(q, k, v, gate, M),
        lambda q, k, M: delta.gated_delta_rule(q, k, v, g, gate, M),
        lambda q, k, M: delta.sequential(q, k, v, g, gate, M),
    ):
        assert not mx.any(rule(q, 0 * k, 0 * M)[1])
        said, state = rule(0 * q, k, M)
        assert not mx.any(said) and mx.array_equal(state, rule(q, k, M)[1])
    assert mx.array_equal(delta.delta_rule(q, 0 * k, v, gate, M)[1], M)


@pytest.mark.parametrize("length", [1, 2, T])
def test_16_bits_come_in_and_32_go_out(length):
    q, k, v, g, beta, M = drawn(length)
    half = [x.astype(mx.bfloat16) for x in (q, k, v, g, beta)]
    close(delta.gated_delta_rule(*half, M), delta_rule(*(x.astype(mx.float32) for x in half), M))
    dt, A = half[4], -mx.linspace(0.1, 3.0, H)
    expected = ssd(*(x.astype(mx.float32) for x in (*half[:3], dt)), A, M)
    close(mamba2.ssd(*half[:3], dt, A, M), expected)


def attention(q, k, v, W, S, scale, near=None):
    """Token t of the last ones sees j <= t with j < S or t - j < W; sinks by `near`."""
    q, k, v, near = (np.array(x, dtype=np.float64) for x in (q, k, v, q if near is None else near))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    L, K = q.shape[2], k.shape[2]
    t, j = np.arange(K - L, K)[:, None], np.arange(K)[None]
    far, sinks = (np.einsum("bhld,bhkd->bhlk", x, k) * scale for x in (q, near))
    scores = np.where((j < S) & (t >= W + S), sinks, far)
    scores = np.where((j <= t) & ((j < S) | (t - j < W)), scores, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bhlk,bhkd->bhld", p / p.sum(axis=-1, keepdims=True), v)


@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize(
    ("W", "S", "L"), [(1, 0, 70), (63, 1, 130), (64, 0, 200), (65, 70, 300), (200, 5, 333)]
)
def test_windows_longer_than_a_tile_are_their_equation(W, S, L, clamped):
    q, far = (2 * mx.random.normal((2, 6, L, 8)) for _ in range(2))
    k, v = (2 * mx.random.normal((2, 3, L, 8)) for _ in range(2))
    near = mx.where(mx.arange(L)[:, None] < W + S, q, far) if clamped else None
    expected = attention(q, k, v, W, S, 0.3, near)
    of = {"window": W, "sinks": S, "scale": 0.3, "q_sink": near}
    forms = [window.tiled(q, k, v, offset=0, **of), band.banded(q, k, v, tile=64, **of)]
    if L < 100:
        forms.append(window.sequential(q, k, v, offset=0, **of))
    for found in forms:
        assert found.dtype == mx.float32
        assert np.abs(np.array(found) - expected).max() < 2e-4


@pytest.mark.parametrize("length", [1, 7])
def test_attention_by_two_queries_with_a_mask(length):
    q, near = (mx.random.normal((2, 6, length, 8)) for _ in range(2))
    k, v = (mx.random.normal((2, 3, 50, 8)) for _ in range(2))
    mask = np.arange(50)[None] >= np.arange(length)[:, None]
    keys, values = (np.repeat(np.array(x), 2, axis=1) for x in (k, v))
    scores = np.einsum("bhld,bhkd->bhlk", np.array(q), keys)
    scores[..., :4] = np.einsum("bhld,bhkd->bhlk", np.array(near), keys[:, :, :4])
    p = np.exp(0.5 * scores) * mask
    expected = np.einsum("bhlk,bhkd->bhld", p / p.sum(axis=-1, keepdims=True), values)
    for form in (window.attend, window.few_launches):
        found = form(q, k, v, 0.5, mx.array(mask), near, 4)
        assert np.abs(np.array(found) - expected).max() < 1e-5
        # In 16 bits nothing is summed in 16 bits.
        half = [x.astype(mx.bfloat16) for x in (q, k, v)]
        found = form(*half, 0.5, mx.array(mask), near.astype(mx.bfloat16), 4)
        assert found.dtype == mx.bfloat16
        assert np.abs(np.array(found.astype(mx.float32)) - expected).max() < 0.06


def test_exp_to_its_bounds():
    x = -mx.array([0.0, 1e-6, 0.5, 1.0, 19.9, 30.0, 39.9])
    relative = np.abs(np.array(fast_exp(x)) / np.exp(np.array(x, dtype=np.float64)) - 1)
    assert relative[:5].max() < 1e-5 and relative.max() < 1e-4
    least = fast_exp(mx.array([-40.0, -40.1, -50.0, -mx.inf])).tolist()
    assert len(set(least)) == 1
    half = exp(x.astype(mx.bfloat16))
    assert half.dtype == mx.bfloat16
    given = np.array(x.astype(mx.bfloat16).astype(mx.float32))
    assert np.allclose(np.array(half.astype(mx.float32)), np.exp(given), rtol=0.01, atol=0)
    # exp itself may be of either kind.
    assert np.allclose(np.array(exp(x)), np.exp(np.array(x)), rtol=1e-4, atol=0)


def test_chunks_are_powers_of_two_from_eight_on():
    sizes = {T: chunks.chunk_size(T, 64) for T in (1, 7, 8, 9, 16, 17, 32, 33, 64, 65, 1000)}
    assert sizes == {
        **{1: 8, 7: 8, 8: 8, 9: 16, 16: 16, 17: 32, 32: 32, 33: 64, 64: 64, 65: 64, 1000: 64}
    }
    x = mx.random.normal((2, 9, 6, 5)).astype(mx.bfloat16)
    cut = chunks.to_chunks(x, 2, 8)
    assert cut.shape == (2, 3, 2, 2, 8, 5) and cut.dtype == mx.float32
    assert mx.array_equal(cut[1, 2, 1, 1, 0], x[1, 8, 5].astype(mx.float32))
    assert not mx.any(cut[:, :, :, 1, 1:])
    assert mx.array_equal(chunks.from_chunks(cut, 9), x.astype(mx.float32))


@pytest.mark.parametrize("n", [1, 3, 10, 11, 23])
def test_pieces_are_the_whole_in_order(n):
    x = mx.arange(4 * n - 1)[None]
    parts = chunks.pieces(x, 4, 1)
    assert [p.shape[1] for p in parts] == [4] * (n - 1) + [3]
    assert mx.array_equal(mx.concatenate(parts, axis=1), x)


def softplus(x):
    return np.log1p(np.exp(x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("kind", list(MEMORIES))
@pytest.mark.parametrize("number", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("own", [mx.float32, mx.bfloat16])
def test_gates_are_their_equation_in_the_dtype_of_the_text(kind, number, own):
    """Also where the memory itself is float32, as in training."""
    heads, width = 3, 10
    memory = MEMORIES[kind](width, heads, 4)
    for name in ("a_proj", "b_proj", "dt_proj", "g_proj"):
        if name in memory:
            memory[name].weight = mx.random.normal((heads, width))
            if "bias" in memory[name]:
                memory[name].bias = mx.random.normal((heads,))
    memory.set_dtype(own)
    h = mx.random.normal((2, 5, width)).astype(number)
    gates, z = memory.project(h, memory.derive())
    assert gates.dtype == number
    assert z.dtype == (number if own == number else mx.float32)
    memory.set_dtype(mx.float32)
    x = np.array(h.astype(mx.float32), dtype=np.float64)

    def linear(name):
        part = {k: np.array(v, dtype=np.float64) for k, v in memory[name].parameters().items()}
        return x @ part["weight"].T + part.get("bias", 0.0)

    if kind == "mamba2":
        expected = [softplus(linear("dt_proj") + np.array(memory.dt_bias))]
    else:
        expected = [sigmoid(linear("b_proj"))]
    if kind == "gated_deltanet":
        steps = softplus(linear("a_proj") + np.array(memory.dt_bias))
        expected.append(-np.exp(np.array(memory.A_log)) * steps)
    expected = np.stack(expected, axis=-1)
    most = 1e-5 if number == own == mx.float32 else 0.03
    assert gates.shape == expected.shape == (2, 5, heads, memory.gate_count)
    assert np.allclose(np.array(gates.astype(mx.float32)), expected, rtol=most, atol=most)
    assert np.allclose(np.array(z.astype(mx.float32)), linear("g_proj"), rtol=most, atol=2 * most)


@pytest.mark.parametrize("kind", list(MEMORIES))
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("group", [None, mx.distributed.init()])
def test_what_is_read_is_normed_and_gated(kind, length, group):
    """Delta rules by the head, then the gate; Mamba2 gates, then norms all heads together. Also
    as one rank of one."""
    memory = MEMORIES[kind](10, 3, 4)
    memory.group = group
    memory[("norm" if kind == "mamba2" else "o_norm")].weight = mx.random.normal(
        (12 if kind == "mamba2" else 4,)
    )
    o, z = 0.01 * mx.random.normal((2, length, 3, 4)), mx.random.normal((2, length, 3))
    x, gate = np.array(o, dtype=np.float64), np.array(z, dtype=np.float64)[..., None]
    gate, weight = gate * sigmoid(gate), np.array(memory.norm_weight)
    if kind == "mamba2":
        x = (x * gate).reshape(2, length, 12)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * weight
    x = x.reshape(2, length, 3, 4) if kind == "mamba2" else x * gate
    found = memory.gated(o, z, mx.float32)
    assert np.allclose(np.array(found), x.swapaxes(1, 2), rtol=1e-4, atol=1e-5)
    assert memory.gated(o, z, mx.bfloat16).dtype == mx.bfloat16


def test_a_fresh_memory_decays_from_slow_to_fast():
    """Rates from 1 to 16, steps from 0.001 to 0.1, each head its own."""
    rates, steps = decay_init(5)
    assert np.allclose(np.exp(np.array(rates)), np.linspace(1, 16, 5), rtol=1e-5)
    assert np.allclose(softplus(np.array(steps)), np.geomspace(1e-3, 0.1, 5), rtol=1e-4)


def test_a_router_is_its_equation():
    router = Router(3)
    router.alpha, router.beta = mx.array([0.5, -1.0, 2.0]), mx.array([0.1, 0.2, -0.3])
    n = np.array([1, 16, 100, 5000])
    found = router(mx.array(n), 16)
    ratio = np.log(n / 16)
    for head, (a, b) in enumerate(zip((0.5, -1.0, 2.0), (0.1, 0.2, -0.3), strict=True)):
        assert np.allclose(np.array(found[head, :, 0]), sigmoid(a * ratio + b), rtol=1e-5)
    assert found.shape == (3, 4, 1)
    assert router(mx.array(n[:, None]), 16).shape == (4, 3, 1, 1)


def test_a_gain_by_window_is_its_equation():
    """None at 256, and in float32 also where the parameters are not."""
    router = Router(3, window_gain=True)
    alpha, beta, gamma = (0.5, -1.0, 2.0), (0.125, 0.25, -0.375), (-0.5, 0.75, 0.0)
    router.alpha, router.beta, router.gamma = map(mx.array, (alpha, beta, gamma))
    router.set_dtype(mx.bfloat16)
    n = np.array([1, 16, 5000])
    for W in (16, 256, 2048):
        found = router(mx.array(n), W)
        for head, (a, b, c) in enumerate(zip(alpha, beta, gamma, strict=True)):
            z = a * np.log(n / W) + b + c * np.log(W / 256)
            assert np.allclose(np.array(found[head, :, 0]), sigmoid(z), rtol=1e-5)


@pytest.mark.parametrize("with_gain", [False, True])
def test_a_router_begins_at_one_half_everywhere(with_gain):
    router = Router(3, with_gain)
    assert set(router.parameters()) == {"alpha", "beta"} | ({"gamma"} if with_gain else set())
    assert not any(mx.any(x) for x in router.parameters().values())
    found = router(mx.array([[1, 9, 10**6]]), 64)
    assert found.shape == (1, 3, 3, 1) and mx.all(found == 0.5)


@pytest.mark.parametrize("memory", list(MEMORIES))
def test_a_model_of_16_bits_keeps_16_bits(memory):
    """Window, gates and logits; the state alone has 32."""
    _, model = tiny(memory=memory, window=10, sinks=3, router=True)
    model.set_dtype(mx.bfloat16)
    cache = model.make_cache()
    for part in (IDS[:, :40], IDS[:, 40:41], IDS[:, 41:50]):
        assert model(part, cache=cache).dtype == mx.bfloat16
        for layer in cache:
            assert [x.dtype for x in layer.buffers] == 3 * [mx.bfloat16]
            assert layer.memory.dtype == mx.float32


@pytest.mark.parametrize("memory", list(MEMORIES))
def test_a_router_counts_sinks_in_training_alone(memory):
    """With beta 0 and alpha 1 it is n / (n + W), of the window in use and of all in training."""
    _, model = tiny(memory=memory, window=10, sinks=6, router=True)
    attention = model.layers[0].self_attn
    attention.router.alpha = mx.ones(4)
    heads = {}
    for training in (False, True):
        model.train(training)
        x = mx.random.normal((1, 40, 64), key=mx.random.key(0))
        heads[training] = attention.heads(x, model.make_cache()[0])
    attention.ahn.o_proj.weight = mx.zeros_like(attention.ahn.o_proj.weight)
    alone = attention.heads(x, model.make_cache()[0])
    n = mx.arange(1, 25).reshape(1, 1, -1, 1)
    used, trained = ((heads[t] - alone)[:, :, 16:] for t in (False, True))
    assert mx.allclose(used * (n + 10), trained * (n + 16), rtol=1e-3, atol=1e-4)
    assert mx.abs(used).max() > 1e-2


def test_parts_of_a_divided_model():
    assert [rows_of_each(100, n) for n in (1, 3, 100, 101)] == [100, 34, 1, 1]
    assert [heads_of_each(12, n) for n in (1, 3, 12)] == [12, 4, 1]
    assert layers_of_each(3, 3) == [range(2, 3), range(1, 2), range(0, 1)]
    assert layers_of_each(7, 2) == [range(3, 7), range(0, 3)]


def test_settings_at_their_bounds():
    assert (AHNConfig(window=1, sinks=0).window, AHNConfig(window=1, sinks=0).sinks) == (1, 0)


def test_a_gain_by_window_is_said_where_there_is_one_and_is_a_routers():
    """Versions before it refuse what they do not know, and know a model by what is said."""
    gains = AHNConfig(router=True, window_gain=True)
    assert "window_gain" not in AHNConfig(router=True).to_dict()
    assert AHNConfig.from_dict({"ahn": gains.to_dict()}) == gains
    with pytest.raises(AHNError, match="window_gain is a router's, and router is false"):
        AHNConfig(window_gain=True)
    with pytest.raises(AHNError, match="window_gain must be true or false, not 1"):
        AHNConfig(router=True, window_gain=1)


def test_settings_that_a_release_does_not_say_are_the_papers():
    said = AHNConfig.from_dict({"_ahn_implementation": "DeltaNet"})
    assert said == AHNConfig(memory="deltanet")
    assert (said.window, said.sinks, said.sink_positions) == (32640, 128, "absolute")
    given = {"sliding_window": 7, "num_attn_sinks": 0, "fa_layer_ids": "3,1"}
    found = AHNConfig.from_dict({"_ahn_implementation": "Mamba2", **given})
    assert found == AHNConfig(memory="mamba2", window=7, sinks=0, fa_layer_ids=(1, 3))
    given = {"use_ahn_router": True, "use_q_proj": True, "fa_layer_ids": None}
    found = AHNConfig.from_dict({"_ahn_implementation": "GatedDeltaNet", **given})
    assert found == AHNConfig(router=True, query_projection=True)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"ahn": 5}, "'ahn' in config.json must be an object, not 5"),
        ({"ahn": {"windows": 5}}, "unknown setting 'windows' under 'ahn'"),
        ({"ahn": {"fa_layer_ids": [-1, 2]}}, "fa_layer_ids must not be negative"),
        ({"ahn": {"fa_layer_ids": [1.5]}}, "fa_layer_ids must be layer numbers"),
        ({"ahn": {"router": "yes"}}, "router must be true or false, not 'yes'"),
        ({"ahn": {"window": (1 << 30) + 1}}, "window must be at most"),
        ({"_ahn_implementation": "DeltaNet", "sliding_window": 0}, "window must be a whole number"),
        ({"_ahn_implementation": "LSTM"}, "must be one of GatedDeltaNet"),
        ({}, "config.json has no AHN fields"),
    ],
)
def test_settings_that_are_none(config, said):
    with pytest.raises(AHNError, match=said):
        AHNConfig.from_dict(config)


def test_a_query_projection_begins_as_none():
    """With heads that divide the width: what it reads by is the raw query."""
    memory = MEMORIES["gated_deltanet"](20, 4, 3, query_projection=True)
    assert memory.q_proj.weight.shape == (4, 3, 5)
    assert mx.array_equal(memory.q_proj.weight[2], mx.eye(3, 5))
    (_, plain), (_, projected) = (
        tiny(window=10, sinks=3, query_projection=with_it) for with_it in (False, True)
    )
    assert "q_proj" in projected.layers[1].self_attn.ahn
    for mine, other in zip(projected.layers, plain.layers, strict=True):
        weights = {"o_proj": {"weight": other.self_attn.ahn.o_proj.weight}}
        rest = ("a_proj", "b_proj", "g_proj")
        weights |= {name: other.self_attn.ahn[name].parameters() for name in rest}
        mine.self_attn.ahn.update(weights)
    assert mx.allclose(projected(IDS), plain(IDS), atol=1e-4)
    assert all(x.dtype == mx.float32 for x in (memory.q_proj.weight, plain(IDS)))


@pytest.mark.parametrize("name", ["b_proj", "g_proj"])
def test_a_bias_of_one_projection_alone(name):
    memory = MEMORIES["deltanet"](10, 3, 4)
    memory[name].bias = mx.ones(3)
    assert memory.derive().bias.tolist() == [n == name for n in ("b_proj", "g_proj") for _ in "012"]


def test_what_follows_from_parameters_is_made_once_while_they_stay():
    """In each thread of its own: what one has not computed yet another cannot."""
    memory, kept = MEMORIES["mamba2"](10, 3, 4), Kept()
    first = kept.of(memory)
    assert kept.of(memory) is first
    memory.A_log = memory.A_log + 1
    second = kept.of(memory)
    assert second is not first and kept.of(memory) is second
    assert mx.allclose(second.rates, math.e * first.rates)
    memory.g_proj.bias = mx.ones(3)
    third = kept.of(memory)
    assert third is not second and third.bias.tolist() == [0, 0, 0, 1, 1, 1]
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.append(kept.of(memory)))
    thread.start()
    thread.join()
    assert elsewhere[0] is not third and kept.of(memory) is not elsewhere[0]
    last = kept.of(memory)
    kept.drop()
    assert kept.of(memory) is not last


def test_a_kernel_begins_with_a_state_of_32_bits_and_goes_on_from_another():
    q = mx.zeros((2, 3, 1, 4), dtype=mx.bfloat16)
    empty = forms._or_empty(None, q)
    assert (empty.shape, empty.dtype) == ((2, 3, 4, 4), mx.float32) and not mx.any(empty)
    assert forms._or_empty(empty, q) is empty


@pytest.mark.parametrize("kind", list(MEMORIES))
def test_a_kernel_runs_where_it_is_chosen_for_heads_of_one_process(kind, monkeypatch):
    """One token is written by one of them, but not where the norm spans ranks; a chunk by another,
    but not for gradients."""
    took, asked = [], []
    for name in ("_step_kernel", "_step_ops", "_scan_kernel", "_scan_ops"):
        monkeypatch.setattr(forms, name, lambda *given, name=name: took.append((name, given)))
    sizes = Sizes(4, mx.float32, heads=4, kv_heads=2, window=5, sinks=2, chunk=6)
    memory, q, *rest = forms._step_example(kind, sizes, 0)
    evicted, (_, update, state, rates) = rest[0], forms._scan_example(kind, sizes, 9)[1:]
    two = mx.repeat(q, 2, axis=2)
    for there in (True, False):
        chosen = lambda *given, there=there: asked.append(given) or there  # noqa: E731
        monkeypatch.setattr(forms, "chosen", chosen)
        memory.group = None
        forms.step(memory, q, *rest)
        assert asked.pop() == (forms.STEPS[kind], Sizes.of(q, evicted[0]))
        forms.step(memory, two, *rest)
        memory.group = mx.distributed.init()
        forms.step(memory, q, *rest)
        assert asked == []
        memory.group = None
        forms.scan(memory, two, update, state, rates, False)
        found = Sizes(4, mx.float32, heads=4, kv_heads=2, window=5, sinks=2, chunk=2)
        assert asked.pop() == (forms.SCANS[kind], found)
        forms.scan(memory, two, update, state, rates, True)
        assert asked == []
    names = [name for name, _ in took]
    assert names[:5] == ["_step_kernel", "_step_ops", "_step_ops", "_scan_kernel", "_scan_ops"]
    assert names[5:] == ["_step_ops"] * 3 + ["_scan_ops"] * 2
    assert took[0][1] == (memory, q, *rest) and took[3][1] == (memory, two, update, state, rates)
    assert took[4][1][-1] is True and took[8][1][-1] is False
    evicted, state, local, *others = rest
    # What a kernel has left in shares is one again.
    monkeypatch.setattr(forms, "merge", lambda *given: given)
    shares = forms.whole(local)
    forms.step(memory, q, evicted, state, shares, *others)
    assert took[-1][0] == "_step_ops" and took[-1][1][4] == (shares, q.dtype)


@pytest.mark.parametrize("kind", list(MEMORIES))
@pytest.mark.parametrize("number", [mx.float32, mx.bfloat16])
def test_examples_for_kernels_are_what_a_layer_gives_them(kind, number):
    """A window that fills and one that has turned; a memory that says something."""
    sizes = Sizes(4, number, heads=6, kv_heads=2, window=5, sinks=2, chunk=6)
    for before, evicts in ((3, 2), (7, 6), (40, 6)):
        memory, q, update, state, rates = forms._scan_example(kind, sizes, before)
        assert (update.evicts, update.end) == (evicts, before + 6)
        assert (update.window, update.sinks) == (5, 2)
        assert [x.shape for x in update.ring[:2]] == [(1, 2, min(before, 7), 4)] * 2
        assert [x.shape for x in update.chunk[:2]] == [(1, 2, 6, 4)] * 2
        assert update.chunk[2].shape == (1, 6, 6, memory.gate_count)
        assert {x.dtype for x in (q, *update.ring, *update.chunk)} == {number}
        assert (q.shape, state.shape, rates.shape) == ((1, 6, evicts, 4), (1, 6, 4, 4), (6,))
        assert state.dtype == mx.float32
        o, after = forms._scan_ops(memory, q, update, state, rates)
        assert o.shape == (1, evicts, 6, 4) and not mx.array_equal(after, state)
    memory, q, token, state, local, z, rates, loudness = forms._step_example(kind, sizes, 0)
    k, v, gates = token
    assert (k.shape, v.shape) == ((1, 2, 1, 4), (1, 2, 1, 4))
    assert gates.shape == (1, 6, 1, memory.gate_count)
    assert (q.shape, local.shape, z.shape) == ((1, 6, 1, 4), (1, 6, 1, 4), (1, 1, 6))
    assert {x.dtype for x in (q, k, v, gates, local, z, memory.norm_weight)} == {number}
    assert loudness.shape == (1, 6, 1, 1) and 0 < loudness[0, 0, 0, 0].item() < 1
    arrays = [q, local, k, v, state, *memory.o_proj.weight]
    assert all(0.2 < x.astype(mx.float32).std().item() < 2 for x in arrays)
    heads, after = forms._step_ops(memory, q, token, state, local, z, rates, loudness)
    assert heads.shape == local.shape and not mx.array_equal(heads, local)
    assert not mx.array_equal(after, state)


def test_each_kernel_has_its_sources():
    for checks in (forms.SCANS, forms.STEPS):
        for kind, check in checks.items():
            assert check.name.endswith(f" {kind}")
            assert (
                check.dispatches
                == len(check.files)
                == (2 if "mamba2_finish" in str(check.files) else 1)
            )
            assert all((METAL / file).is_file() for file in check.files)
            assert ("mamba2" in str(check.files)) == (kind == "mamba2" and checks is forms.STEPS)


def test_a_fresh_memory_writes_a_little_and_says_nothing():
    mx.random.seed(2)
    for kind, make in MEMORIES.items():
        memory = make(64, 5, 4)
        gates = [name for name in memory if name.endswith("_proj") and name != "o_proj"]
        assert len(gates) == memory.gate_count + 1
        for name in gates:
            weight = memory[name].weight
            assert weight.shape == (5, 64) and abs(weight.mean().item()) < 0.02
            assert 0.115 < mx.abs(weight).max().item() <= 0.125  # of 1 / sqrt(64)
            biased = kind == "mamba2"
            assert ("bias" in memory[name]) == biased and (
                not biased or not memory[name].bias.any()
            )
        assert memory.o_proj.weight.shape == (5, 4, 4) and not memory.o_proj.weight.any()
        assert memory.norm_weight.tolist() == [1.0] * (20 if kind == "mamba2" else 4)
        assert "q_proj" not in memory
        memory.freeze()
        assert not tree_flatten(memory.trainable_parameters())
