"""The augmented model as mlx-lm's own: equal to the plain one, generating, quantized."""

import copy
import io
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import generate_step
from mlx_lm.models import gpt_neox, llama
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.sample_utils import make_sampler

import ahn_mlx
from ahn_mlx import AHNConfig, AHNError, augment
from ahn_mlx.hub import zoo
from ahn_mlx.model import guest
from ahn_mlx.model.augment import dtype_of, shape_of_attention
from ahn_mlx.model.names import is_memory

SIZES = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 100,
}

KV_AND_GATES = ((2, 16), (2, 16), (4, 2))  # heads, width


def tiny(seed=0, **ahn):
    """A plain llama and the same one augmented, its memory output not zero."""
    mx.random.seed(seed)
    plain, model = (llama.Model(llama.ModelArgs(**SIZES)) for _ in range(2))
    model.update(plain.parameters())
    augment(model, AHNConfig(**ahn))
    for layer in model.layers:
        if "ahn" in layer.self_attn:
            weight = layer.self_attn.ahn.o_proj.weight
            layer.self_attn.ahn.o_proj.weight = 0.3 * mx.random.normal(weight.shape)
    return plain, model


IDS = mx.array([[(7 * i * i + 3) % 100 for i in range(60)]])


def greedy(model, ids, n, cache=None):
    steps = generate_step(ids, model, max_tokens=n, prompt_cache=cache, prefill_step_size=16)
    return [token for token, _ in steps]


@pytest.mark.parametrize("memory", ["gated_deltanet", "deltanet", "mamba2"])
@pytest.mark.parametrize("sink_positions", ["absolute", "clamped"])
def test_any_chunking_gives_the_same_logits(memory, sink_positions):
    ahn = {"sink_positions": sink_positions, "router": True, "window_gain": True}
    _, model = tiny(memory=memory, window=10, sinks=3, **ahn)
    for layer in model.layers:
        router = layer.self_attn.router
        router.update({name: mx.random.normal(x.shape) for name, x in router.items()})
    model.eval()  # in training sinks count as part of the window
    expected = model(IDS)
    for step in (1, 4, 13, 25):
        cache = model.make_cache()
        parts = [model(IDS[:, i : i + step], cache=cache) for i in range(0, 60, step)]
        assert mx.abs(mx.concatenate(parts, axis=1) - expected).max() < 1e-4


def test_plain_up_to_window_and_sinks_then_not():
    plain, model = tiny(window=40, sinks=4)
    a, b = plain(IDS)[0], model(IDS)[0]
    assert mx.abs(a[:44] - b[:44]).max() < 1e-4
    assert mx.abs(a[44:] - b[44:]).max() > 1e-2


def test_clamped_sinks_do_not_see_the_gap():
    """Window-only logits far away equal those of the same text right behind the sinks."""
    _, model = tiny(window=10, sinks=3, sink_positions="clamped")
    for layer in model.layers:
        layer.self_attn.ahn.o_proj.weight = mx.zeros_like(layer.self_attn.ahn.o_proj.weight)
    text = IDS[:, 3:53]
    near = model(IDS[:, :53])[0, -1]
    gap = mx.concatenate([IDS[:, :3], mx.broadcast_to(IDS[:, 5:6], (1, 5000)), text], axis=1)
    assert mx.abs(model(gap)[0, -1] - near).max() < 1e-2
    absolute = tiny(window=10, sinks=3)[1]
    absolute.update(model.parameters())
    assert mx.abs(absolute(gap)[0, -1] - near).max() > 3e-2


def test_layers_kept_at_full_attention():
    plain, model = tiny(window=6, sinks=2, fa_layer_ids=(0, 2))
    kinds = [type(c).__name__ for c in model.make_cache()]
    assert kinds == ["FullCache", "AHNCache", "FullCache"]
    cache = model.make_cache()
    parts = [model(IDS[:, i : i + 7], cache=cache) for i in range(0, 60, 7)]
    assert mx.abs(mx.concatenate(parts, axis=1) - model(IDS)).max() < 1e-4
    everything = tiny(window=6, sinks=2, fa_layer_ids=(0, 1, 2))[1]
    assert mx.abs(everything(IDS) - plain(IDS)).max() < 1e-4
    assert all(isinstance(c, KVCache) for c in make_prompt_cache(everything))


def test_heads_are_those_of_the_first_memory_or_else_of_the_first_layer():
    model = tiny(window=6, fa_layer_ids=(0,))[1]
    assert shape_of_attention(model) is model.layers[1].self_attn.fit
    one = llama.Model(llama.ModelArgs(**{**SIZES, "num_hidden_layers": 1}))
    fit = shape_of_attention(augment(one, AHNConfig(window=6, fa_layer_ids=(0,))))
    assert (fit.n_heads, fit.n_kv_heads, fit.head_dim) == (4, 2, 16)


def test_generates_with_mlx_lm():
    _, model = tiny(window=10, sinks=3)
    expected, ids = [], IDS[0].tolist()
    for _ in range(8):
        expected.append(model(mx.array([ids]))[0, -1].argmax().item())
        ids.append(expected[-1])
    assert greedy(model, IDS[0], 8) == expected
    mx.random.seed(1)
    sampler = make_sampler(temp=0.9, top_p=0.9)
    sampled = [t for t, _ in generate_step(IDS[0], model, max_tokens=8, sampler=sampler)]
    assert len(sampled) == 8


def test_a_compiled_decoding_step_sees_new_weights_and_can_be_copied():
    _, model = tiny(window=10, sinks=3, sink_positions="clamped")

    def decoded(model):
        cache = model.make_cache()
        model(IDS[:, :-1], cache=cache)
        return model(IDS[:, -1:], cache=cache)[0, -1]

    first = decoded(model)  # compiles the step of each layer
    other = copy.deepcopy(model)
    assert mx.array_equal(decoded(other), first)
    for name in ("ahn.o_proj", "o_proj", "q_proj"):
        before = decoded(model)
        part = model.layers[1].self_attn
        for key in name.split("."):
            part = part[key]
        part.weight = 2 * part.weight
        assert mx.abs(decoded(model) - before).max() > 1e-3
        assert mx.abs(decoded(model) - model(IDS)[0, -1]).max() < 1e-4
    assert mx.array_equal(decoded(other), first)


def test_decoding_writes_into_the_window_in_place():
    _, model = tiny(window=20_000, sinks=4)
    cache = model.make_cache()
    for c in cache:
        c.update(*(mx.zeros((1, heads, 20_004, width)) for heads, width in KV_AND_GATES))
    mx.eval([c.state for c in cache])
    window = cache[0].nbytes
    for _ in range(2):
        mx.eval(model(IDS[:, :1], cache=cache))
    graph = io.StringIO()
    mx.export_to_dot(graph, *cache[0].buffers)
    assert "SliceUpdate" not in graph.getvalue()  # writes that nobody reads would pile up
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    for i in range(4):
        mx.eval(model(IDS[:, i : i + 1], cache=cache))
    assert mx.get_peak_memory() - held < 0.4 * window  # scores take that much


def test_filling_the_window_writes_in_place():
    _, model = tiny(window=20_000, sinks=4)
    cache = model.make_cache()
    for c in cache:
        c.update(*(mx.zeros((1, heads, 19_990, width)) for heads, width in KV_AND_GATES))
    mx.eval([c.state for c in cache])
    mx.eval(model(IDS[:, :1], cache=cache))
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    for i in range(4):
        mx.eval(model(IDS[:, i : i + 1], cache=cache))
    assert mx.get_peak_memory() - held < 0.4 * cache[0].nbytes


def test_quantizing_leaves_the_memory_alone():
    _, model = tiny(window=10, sinks=3)
    before = model(IDS)
    nn.quantize(model, group_size=32, bits=8)
    names = {name for name, _ in tree_flatten(model.parameters()) if name.endswith(".scales")}
    assert "model.layers.0.self_attn.q_proj.scales" in names
    assert not any(".ahn." in name for name in names)
    assert 0 < mx.abs(model(IDS) - before).max() < 0.5


def test_scales_of_another_dtype_are_not_what_flows_through_the_base():
    _, model = tiny(window=10, sinks=3)
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=32, bits=8)
    packed = tree_flatten(model.parameters())
    scales = [(name, x) for name, x in packed if name.endswith((".scales", ".biases"))]
    model.load_weights([(name, x.astype(mx.float16)) for name, x in scales], strict=False)
    assert dtype_of(model) == mx.bfloat16


def test_what_ends_a_program_of_mlx_lms_is_one_line_if_we_know_it(capsys, monkeypatch):
    others = []
    monkeypatch.setattr(sys, "__excepthook__", lambda *given: others.append(given[1]))
    for error, said in (
        (AHNError("damaged; fetch it again"), "error: damaged; fetch it again\n"),
        (ValueError("Speculative decoding requires a trimmable cache"), "--draft-model\n"),
        (ValueError("something else"), ""),
        (RuntimeError("Speculative decoding"), ""),
    ):
        guest._one_line(type(error), error, None)
        assert capsys.readouterr().err.endswith(said) and bool(said) == (error not in others)
    assert len(others) == 2
    assert ahn_mlx.model.ModelArgs and ahn_mlx.model.build
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ahn_mlx.model.nothing  # noqa: B018


def test_refusals_name_what_is_wrong():
    args = gpt_neox.ModelArgs(
        **{k: v for k, v in SIZES.items() if k in ("vocab_size", "hidden_size")},
        **{"model_type": "gpt_neox", "max_position_embeddings": 64, "num_attention_heads": 4},
        **{"num_hidden_layers": 1, "layer_norm_eps": 1e-5, "rotary_emb_base": 1, "rotary_pct": 1.0},
    )
    with pytest.raises(AHNError, match=r"'gpt_neox' is not supported: it has no model.layers"):
        augment(gpt_neox.Model(args), AHNConfig(window=8))
    plain, model = tiny(window=8)
    with pytest.raises(AHNError, match="already"):
        augment(model, AHNConfig(window=8))
    with pytest.raises(AHNError, match="layer 3"):
        augment(plain, AHNConfig(window=8, fa_layer_ids=(3,)))
    for bad in ({"window": 0}, {"sinks": -1}, {"window": True}, {"memory": "lstm"}):
        with pytest.raises(AHNError, match=next(iter(bad))):
            AHNConfig(**bad)


@pytest.mark.slow
def test_smollm2_equals_plain_mlx_lm_in_the_window():
    model, tokenizer = zoo.load(zoo.DEFAULT, window=1024, sinks=64, dtype="float32")
    plain = llama.Model(model.args)
    base = [(k, v) for k, v in tree_flatten(model.parameters()) if not is_memory(k)]
    plain.load_weights(base)
    text = (Path(ahn_mlx.__file__).parent / "demo" / "pride-and-prejudice.txt").read_text("utf-8")
    ids = mx.array(tokenizer.encode(text[:2000]))
    assert ids.size > 400
    assert mx.abs(model(ids[None]) - plain(ids[None])).max() < 1e-3
    assert greedy(model, ids, 32) == greedy(plain, ids, 32)


@pytest.mark.parametrize("wrong_from", [0, 1000])
def test_a_rope_that_needs_numbers_is_refused_wherever_it_differs(wrong_from):
    """An array of positions must mean what a number does, near and far."""

    class Rope(nn.RoPE):
        def __call__(self, x, offset=0):
            if isinstance(offset, mx.array):
                offset = mx.minimum(offset, wrong_from)
            return super().__call__(x, offset=offset)

    args = llama.ModelArgs("llama", 32, 1, 32, 4, rms_norm_eps=1e-5, vocab_size=64)
    model = llama.Model(args)
    model.layers[0].self_attn.rope = Rope(8)
    with pytest.raises(AHNError, match="cannot run here, it needs positions as numbers"):
        augment(model, AHNConfig(window=8, sinks=2))


def test_parameters_that_are_changed_in_place_count_from_the_next_text_on():
    _, model = tiny(window=10, sinks=3)
    model.eval()
    before = model(IDS)
    for layer in model.layers:
        weight = layer.self_attn.ahn.b_proj.weight
        weight[:] = weight + 1
    after = model(IDS)
    assert mx.abs(after - before).max() > 1e-3
    copies = {name: mx.array(x) for name, x in tree_flatten(model.parameters())}
    model.update(tree_unflatten(list(copies.items())))
    assert mx.allclose(model(IDS), after, atol=1e-5)


@pytest.mark.parametrize("name", ["window", "sinks"])
def test_settings_are_what_int32_counts(name):
    assert getattr(AHNConfig(**{"window": 8, name: 1 << 30}), name) == 1 << 30
    with pytest.raises(AHNError, match=f"{name} must be at most 1,073,741,824"):
        AHNConfig(**{"window": 8, name: (1 << 30) + 1})
