"""The counter of launches, and how many a layer may need."""

import copy

import mlx.core as mx
import pytest
from launches import counting, step, training
from mlx.utils import tree_flatten
from test_batch import ids, tiny

from ahn_mlx.model.augment import memory_layers
from ahn_mlx.ops import window

KINDS = ("gated_deltanet", "deltanet", "mamba2")

PLAIN = 17  # of a layer of mlx-lm's with RotatingKVCache, one token


def found(build, *arrays, gradients=False, ours=False):
    mx.eval(arrays)
    with counting(ours, gradients) as counter:
        return dict(counter.count(build(*arrays)))


def test_what_counts():
    x, n = mx.ones((4, 6)), mx.array([1])
    assert found(lambda x: x.reshape(6, 4).T[None, 1:], x) == {}
    assert found(lambda x: mx.exp(x) + 1, x) == {"Exp": 1, "Add": 1}
    assert found(mx.compile(lambda x: mx.exp(x) + 1), x) == {"Compiled": 1}
    assert found(lambda x: mx.concatenate([x, x, x]), x) == {"Concatenate": 3}
    assert found(lambda x: mx.fast.rms_norm(x, None, 1e-5), x) == {"rms_norm": 1}
    assert found(lambda x: mx.softmax(x, axis=-1) @ x.T, x) == {"softmax": 1, "Matmul": 1}
    assert found(lambda x, n: mx.slice_update(x, x[:1], n, (0,)), x, n) == {"DynamicSliceUpdate": 2}
    assert found(lambda x: mx.zeros((2, 2)) + x[:2, :2], x) == {"Full": 1, "Add": 1}


def test_the_gradient_of_what_is_fused_counts_too():
    def loss(x, w):
        return mx.fast.rms_norm(x, w, 1e-5).sum()

    forward = {"rms_norm": 1, "Sum": 1}
    x, w = mx.ones((4, 6)), mx.ones(6)
    assert found(loss, x, w, gradients=True) == forward
    counted = found(mx.value_and_grad(loss, argnums=(0, 1)), x, w, gradients=True)
    assert counted == forward | {"rms_normVJP": 1}


def test_what_was_compiled_while_counting_does_not_serve_afterwards():
    norm = mx.compile(lambda x: 2 * mx.fast.rms_norm(x, None, 1e-5))
    x = mx.random.normal((4, 6))
    assert found(norm, x) == {"rms_norm": 1, "Compiled": 1}
    assert mx.allclose(norm(x), 2 * x * mx.rsqrt(x.square().mean(axis=-1, keepdims=True) + 1e-5))


def test_a_plain_layer():
    assert sum(step(None, "", False, 1).values()) == PLAIN


@pytest.mark.parametrize("sinks", ["absolute", "clamped"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_decoded_token(kind, sinks):
    """With our kernels at most 1.25 times a plain layer, and 1.3 for Mamba2."""
    ours = step(kind, sinks, True, 1)
    assert sum(ours.values()) <= (1.3 if kind == "mamba2" else 1.25) * PLAIN
    assert ours["ahn_window_decode"] == 1 and not ours["ahn_window_decode_merge"]
    theirs = step(kind, sinks, False, 1)
    assert not any(name.startswith("ahn_") for name in theirs)
    most = {"gated_deltanet": 33, "deltanet": 32, "mamba2": 35}[kind]
    assert sum(theirs.values()) <= (most + 4 if sinks == "clamped" else most)
    # Nothing is made anew that could be kept.
    assert not {"Full", "Arange", "Concatenate", "Pad"} & (ours | theirs).keys()


def test_a_decoded_token_of_an_8_bit_window():
    assert sum(step("gated_deltanet", "clamped", True, 1, bits=8).values()) <= 40


@pytest.mark.parametrize(("kind", "most"), [*zip(KINDS, (31, 32, 35), strict=True)])
def test_prefill(kind, most):
    """2,048 tokens behind a full window; a plain layer takes 27."""
    assert sum(step(kind, "clamped", True, 2048).values()) <= most
    assert sum(step(kind, "clamped", False, 2048).values()) <= 260


@pytest.mark.parametrize(("kind", "most"), [*zip(KINDS, (12_800, 10_700, 9_400), strict=True)])
def test_training(kind, most):
    """A step of 30 layers on 2,048 tokens; chunk by chunk and tile by tile it was 39,260, 33,157
    and 29,907. Eight sequences at once take as many, and some for the rows of their logits."""
    one, eight = (training(kind, "clamped", batch).total() for batch in (1, 8))
    assert one <= most and one <= eight <= one + 250


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize(("L", "sinks"), [(1, 0), (1, 3), (5, 0), (5, 3)])
def test_attention_in_few_launches(L, sinks, bits):
    """Equals what a CPU computes, for rows that see different slots, quantized or not."""
    mx.random.seed(L + sinks)
    q, near = mx.random.normal((2, 2, 4, L, 32))
    held = k, v = tuple(mx.random.normal((2, 2, 2, 19, 32)))
    seen = mx.arange(19) < mx.array([[11], [19]])
    seen = mx.broadcast_to(seen[:, None, None], (2, 1, L, 19))
    if bits:
        held = [mx.quantize(x, group_size=32, bits=bits) for x in held]
        k, v = (mx.dequantize(*x, group_size=32, bits=bits) for x in held)
    for mask in (None, seen):
        arguments = 0.2, mask, near, sinks
        expected = window.attend(q, k, v, *arguments)
        assert mx.abs(window.few_launches(q, *held, *arguments) - expected).max() < 1e-5


def decoded(model, n=3):
    cache = model.make_cache()
    model(mx.array([ids(0, 0, 11)]), cache=cache)
    return mx.stack([model(mx.array([ids(0, 11 + t, 1)]), cache=cache)[0, 0] for t in range(n)])


def halve(model, in_place):
    for _, attention in memory_layers(model):
        for gate in (attention.ahn.b_proj, attention.ahn.g_proj):
            if in_place:
                gate.weight[:] = gate.weight * 0.5
            else:
                gate.weight = gate.weight * 0.5


def pair():
    models = copy.deepcopy(tiny()), copy.deepcopy(tiny())
    for model in models:
        model.eval()
    return models


@pytest.mark.parametrize("in_place", [False, True])
def test_parameters_that_change_are_noticed(in_place):
    """What was made of them once for all tokens is made again."""
    model, other = pair()
    before = decoded(model)
    for changed in (model, other):
        halve(changed, in_place)
    after = decoded(model)
    assert mx.abs(after - before).max() > 1e-3
    assert mx.array_equal(after, decoded(other))


def test_parameters_loaded_between_two_tokens_are_noticed():
    model, halved = pair()
    halve(halved, False)
    caches = model.make_cache(), halved.make_cache()
    for m, cache in zip((model, halved), caches, strict=True):
        mx.eval(m(mx.array([ids(0, 0, 11)]), cache=cache), [c.state for c in cache])
    for one, two in zip(*caches, strict=True):  # from now on the same past
        two.state = one.state
    model(mx.array([ids(0, 11, 1)]), cache=caches[0])
    halved(mx.array([ids(0, 11, 1)]), cache=caches[1])
    for one, two in zip(*caches, strict=True):
        two.state = one.state
    model.load_weights(tree_flatten(halved.parameters()))
    logits = [
        m(mx.array([ids(0, 12, 1)]), cache=c) for m, c in zip((model, halved), caches, strict=True)
    ]
    assert mx.array_equal(*logits)


def test_names_and_parameters_stay_those_of_the_checkpoint():
    model, _ = pair()
    names = [name for name, _ in tree_flatten(model.parameters())]
    decoded(model)
    assert [name for name, _ in tree_flatten(model.parameters())] == names
