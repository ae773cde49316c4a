"""Families of mlx-lm with a memory, each as a tiny random model of its own.

The oracles are mlx-lm's: the plain model, and its attention layer alone, called token by token
with the keys that a window and sinks leave it.
"""

import hashlib
import json
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import numpy as np
import pytest
from checkpoints import byte_tokenizer, same
from click.testing import CliRunner
from engines import finish, running, small, start
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import llama
from mlx_lm.models.cache import CacheList, make_prompt_cache

import ahn_mlx
from ahn_mlx.checkpoints.convert import convert
from ahn_mlx.checkpoints.export import export_pytorch, release_config
from ahn_mlx.checkpoints.formats import describe
from ahn_mlx.checkpoints.load import fit, load_model
from ahn_mlx.checkpoints.tokenizer import load_tokenizer
from ahn_mlx.cli import cli
from ahn_mlx.errors import AHNError
from ahn_mlx.measure.cost import cache_bytes, flops, idle_bytes, shape_of
from ahn_mlx.model.augment import augment, build_base, hidden_states, memory_layers
from ahn_mlx.model.cache import AHNCache
from ahn_mlx.model.families import BY_FAMILY, families, judge, tiny_config
from ahn_mlx.model.fit import fit_of
from ahn_mlx.model.names import published_name
from ahn_mlx.model.pure import initial_state
from ahn_mlx.model.together import Together
from ahn_mlx.reading.generate import Run, make_prompt
from ahn_mlx.reading.memoryfile import verify
from ahn_mlx.reading.session import Session
from ahn_mlx.serve.budget import row_bytes
from ahn_mlx.train.streams import install, study, teach, trainable

# With a memory in each layer; and with one in those layers alone that see all tokens.
PLAIN = (
    *("Klear", "apertus", "cohere", "deepseek", "dots1", "ernie4_5", "ernie4_5_moe", "gemma"),
    *("gemma2", "glm", "glm4", "glm4_moe", "granite", "granitemoe", "helium", "hunyuan_v1_dense"),
    *("internlm3", "llama", "mimo", "minicpm", "minimax", "mixtral", "nanbeige", "nemotron"),
    *("olmo2", "olmoe", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    *("seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "telechat3"),
    "nemotron-nas",
)
MIXED = (
    *("afmoe", "cohere2", "exaone4", "gemma3_text", "gpt_oss", "granitemoehybrid", "jamba"),
    *("exaone_moe", "falcon_h1", "gear", "lfm2", "lfm2_moe", "mellum", "olmo3", "olmo_hybrid"),
    *("qwen3_next", "step3p5"),
)
# One of each shape is always tried; the others, which are no other shape, are slow together.
SHAPES = (
    *("afmoe", "cohere", "gemma2", "glm4", "gpt_oss", "hunyuan_v1_dense", "lfm2", "llama", "olmo2"),
    *("phi3", "qwen3_next", "smollm3"),
)
EACH = [
    pytest.param(name, marks=() if name in SHAPES else pytest.mark.slow) for name in PLAIN + MIXED
]
WINDOW, SINKS = 8, 2
IDS = mx.array([[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28, 84, 19]])


def close(a, b, tolerance=1e-4):
    off = mx.abs(a - b).max() / mx.maximum(mx.abs(b).max(), 1)
    assert off.item() < tolerance, off.item()


def random(model):
    """All parameters, those that begin as ones and zeros too."""
    mx.random.seed(5)

    def other(x):
        if not mx.issubdtype(x.dtype, mx.floating):
            return x
        noise = mx.random.normal(x.shape)
        return 1 + 0.2 * noise if x.ndim < 2 else noise * (1.5 / x.shape[-1]) ** 0.5

    model.update(tree_map(other, model.parameters()))
    mx.eval(model.parameters())
    return model


def base(family, **settings):
    model = random(build_base({**tiny_config(family), **settings}))
    model.eval()
    return model


def remember(model):
    """Memories that say something."""
    for _, attention in memory_layers(model):
        shape = attention.ahn.o_proj.weight.shape
        attention.ahn.o_proj.weight = 0.3 * mx.random.normal(shape)
    return model


def chunked(model, sizes, ids=IDS):
    cache, at, parts = model.make_cache(), 0, []
    for n in sizes:
        parts.append(model(ids[:, at : at + n], cache=cache))
        mx.eval(parts[-1], [c.state for c in cache])
        at += n
    return mx.concatenate(parts, axis=1)


def greedy(model, cache, steps=4):
    ids, said = IDS, []
    for _ in range(steps):
        ids = model(ids, cache=cache)[:, -1:].argmax(axis=-1)
        said.append(ids.item())
    return said


@pytest.mark.parametrize("family", PLAIN + MIXED)
def test_a_window_that_nothing_leaves_is_the_plain_model(family):
    model = base(family)
    wanted, said = (
        model(IDS, cache=make_prompt_cache(model)),
        greedy(model, make_prompt_cache(model)),
    )
    mx.eval(wanted)
    augment(model, ahn_mlx.AHNConfig(window=40, sinks=SINKS))
    close(model(IDS, cache=model.make_cache()), wanted)
    assert greedy(model, model.make_cache()) == said
    assert bool(model.own_layers) == (family in MIXED)


class Shown:
    """Notes keys and values; or gives a query those that it is to see."""

    def __init__(self, offset, keys=None, values=None):
        self.offset, self.keys, self.values = offset, keys, values

    def update_and_fetch(self, keys, values):
        if self.keys is not None:
            return self.keys, self.values
        self.keys, self.values = keys, values
        return keys, values


def alone(attention, x, clamped, remembered=None):
    """mlx-lm's own layer, one query at a time: sinks, then the window. Clamped: as if the query
    stood right behind a full window, and all of the window with it. remembered: [L, H, D], what is
    added to its heads."""

    def at(j, position):
        shown = Shown(position)
        attention(x[:, j : j + 1], None, shown)
        return shown.keys, shown.values

    out = []
    for t in range(x.shape[1]):
        seen = [j for j in range(t + 1) if j < SINKS or t - j < WINDOW]
        stands = min(t, WINDOW + SINKS) if clamped else t
        pairs = [at(j, j if j < SINKS else j - t + stands) for j in seen]
        keys, values = (mx.concatenate(x, axis=2) for x in zip(*pairs, strict=True))
        with nullcontext() if remembered is None else asking(attention, remembered[t]):
            out.append(attention(x[:, t : t + 1], None, Shown(stands, keys, values)))
    return mx.concatenate(out, axis=1)


def late_alone(attention, x, remembered):
    """mlx-lm's own queries, keys and values, each at its own place, and a query that looks at the
    sinks from right behind a full window: one softmax over both."""
    out = []
    for t in range(x.shape[1]):
        asked, pairs = [], []
        for position in (min(t, WINDOW + SINKS), t):
            with asking(attention) as queries:
                attention(x[:, t : t + 1], None, Shown(position))
            asked.append(np.array(queries[0][0, :, 0]))
        for j in (j for j in range(t + 1) if j < SINKS or t - j < WINDOW):
            shown = Shown(j)
            attention(x[:, j : j + 1], None, shown)
            k, v = (
                np.array(y[0, :, 0]).repeat(len(asked[0]) // y.shape[1], axis=0)
                for y in (shown.keys, shown.values)
            )
            pairs.append(((asked[j >= SINKS] * k).sum(-1) * attention.scale, v))
        shares = np.exp(np.stack([score for score, _ in pairs]))  # [seen, H]
        told = sum(w[:, None] * v for w, (_, v) in zip(shares, pairs, strict=True))
        heads = told / shares.sum(0)[:, None] + remembered[t]
        with asking(attention, told=mx.array(heads)[None, :, None]):
            out.append(attention(x[:, t : t + 1], None, Shown(t)))
    return mx.concatenate(out, axis=1)


@contextmanager
def asking(attention, more=None, told=None):
    """What the layer's heads ask with, noted; more [H, D], added to what they are told, or what
    they are told [1, H, 1, D]."""
    module, asked = sys.modules[type(attention).__module__], []
    theirs = module.scaled_dot_product_attention

    def ours(queries, *rest, **options):
        asked.append(queries)
        y = theirs(queries, *rest, **options) if told is None else told
        return y if more is None else y + mx.array(more)[None, :, None].astype(y.dtype)

    module.scaled_dot_product_attention = ours
    try:
        yield asked
    finally:
        module.scaled_dot_product_attention = theirs


def recalled(attention, memory, x):
    """[L, H, D], what a gated delta rule says after each token: the equations, one by one."""
    x_of = np.array(x[0], dtype=np.float64)
    weights = {name: np.array(w, np.float64) for name, w in tree_flatten(memory.parameters())}
    H, D, _ = weights["o_proj.weight"].shape
    states, said = np.zeros((H, D, D)), np.zeros((x.shape[1], H, D))

    def at(t):
        shown = Shown(t)
        with asking(attention) as asked:
            attention(x[:, t : t + 1], None, shown)
        q, k, v = (np.array(y[0, :, 0], np.float64) for y in (asked[0], shown.keys, shown.values))
        return q, *(np.repeat(y, H // len(y), axis=0) for y in (k, v))

    for t in range(WINDOW + SINKS, x.shape[1]):
        gone = x_of[t - WINDOW]
        _, k, v = at(t - WINDOW)
        write = 1 / (1 + np.exp(-weights["b_proj.weight"] @ gone))
        grown = np.logaddexp(0, weights["a_proj.weight"] @ gone + weights["dt_bias"])
        stays = np.exp(-np.exp(weights["A_log"]) * grown)
        z = weights["g_proj.weight"] @ x_of[t]
        for h in range(H):
            q = at(t)[0][h]
            key, query = k[h] / np.sqrt(k[h] @ k[h] + 1e-6), q / np.sqrt((q @ q + 1e-6) * D)
            states[h] *= stays[h]
            states[h] += np.outer(key, write[h] * (v[h] - states[h].T @ key))
            told = states[h].T @ query
            told *= weights["o_norm.weight"] / np.sqrt((told**2).mean() + 1e-5)
            said[t, h] = told * z[h] / (1 + np.exp(-z[h])) @ weights["o_proj.weight"][h]
    return said.astype(np.float32)


@pytest.mark.parametrize("family", EACH)
def test_a_layer_past_its_window_is_its_own_attention_on_what_is_left_and_a_memory(family):
    for sinks in ("clamped", "absolute"):
        model = base(family)
        theirs = [getattr(layer, "self_attn", None) for layer in model.layers]
        config = ahn_mlx.AHNConfig(window=WINDOW, sinks=SINKS, sink_positions=sinks)
        remember(augment(model, config))
        i, ours = list(memory_layers(model))[-1]
        x, not_far = mx.random.normal((1, 14, model.args.hidden_size)), sinks == "clamped"
        if family == "gemma2":  # its attention is no function that could be listened to
            ours.ahn.o_proj.weight = mx.zeros_like(ours.ahn.o_proj.weight)
            wanted = alone(theirs[i], x, not_far)
        else:
            said = recalled(theirs[i], ours.ahn, x)
            assert np.abs(said[WINDOW + SINKS :]).max() > 0.01
            # What is normed after RoPE does not depend on distances alone.
            late = ours.fit.late_norm and sinks == "clamped"
            wanted = late_alone(theirs[i], x, said) if late else alone(theirs[i], x, not_far, said)
        close(ours(x, None, AHNCache(WINDOW, SINKS)), wanted)
        cache = AHNCache(WINDOW, SINKS)
        steps = [ours(x[:, t : t + 1], None, cache) for t in range(14)]
        close(mx.concatenate(steps, axis=1), wanted)


@pytest.mark.parametrize("family", EACH)
def test_any_chunking_and_rows_are_one(family):
    config = ahn_mlx.AHNConfig(window=WINDOW, sinks=SINKS)
    model = remember(augment(base(family), config))
    wanted = chunked(model, [20])
    close(chunked(model, [3, 9, 8]), wanted)
    close(chunked(model, [12] + [1] * 8), wanted)
    both = mx.concatenate([IDS, (IDS * 7 + 1) % 100])
    close(chunked(model, [13, 1, 6], both)[:1], wanted)
    rows = [model.make_cache() for _ in range(2)]
    model(IDS[:, :12], cache=rows[0])
    model(IDS[:, :5], cache=rows[1])
    batch = [a.merge([a, b]) for a, b in zip(*rows, strict=True)]
    step = model(mx.concatenate([IDS[:, 12:13], IDS[:, 5:6]]), cache=batch)
    close(step, mx.concatenate([wanted[:, 12:13], wanted[:, 5:6]]))


@pytest.mark.parametrize("family", EACH)
def test_a_quantized_base(family):
    def fits(name, module):
        # Some model files transpose their embedding as a head, which is their own fault.
        if "embed_tokens" in name:
            return False
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0

    plain = base(family)
    nn.quantize(plain, group_size=32, bits=8, class_predicate=fits)
    wanted = plain(IDS, cache=make_prompt_cache(plain))
    mx.eval(wanted)
    before = augment(plain, ahn_mlx.AHNConfig(window=40))
    close(before(IDS, cache=before.make_cache()), wanted)
    after = augment(base(family), ahn_mlx.AHNConfig(window=40))
    nn.quantize(after, group_size=32, bits=8, class_predicate=fits)
    close(after(IDS, cache=after.make_cache()), wanted)


@pytest.mark.parametrize("family", EACH)
def test_training_reaches_every_parameter_of_a_memory(family):
    model = base(family)
    wanted = hidden_states(model, IDS)
    mx.eval(wanted)
    model = remember(augment(model, ahn_mlx.AHNConfig(window=WINDOW, sinks=SINKS)))
    taught = teach(model, IDS)
    close(taught.hidden, wanted)
    parameters = trainable(model)

    def loss(parameters, checkpoint):
        install(model, parameters)
        hidden = study(model, IDS, WINDOW, SINKS, checkpoint=checkpoint).hidden
        return (hidden - taught.hidden).square().sum()

    found = [mx.grad(loss)(parameters, checkpoint) for checkpoint in (False, True)]
    for name, gradient in found[0].items():
        assert mx.isfinite(gradient).all().item() and mx.abs(gradient).max().item() > 0, name
        close(found[1][name], gradient, 1e-3)


@pytest.mark.parametrize("family", [f for f in EACH if f.values[0] in PLAIN])
def test_served_rows_are_each_alone(family):
    model = remember(augment(base(family), ahn_mlx.AHNConfig(window=WINDOW, sinks=SINKS)))
    wanted = chunked(model, [20])
    rows = [model.make_cache() for _ in range(2)]
    for caches, n in zip(rows, (12, 5), strict=True):
        model(IDS[:, :n], cache=caches)
    together = Together()
    for step in range(2):
        at = [12 + step, 5 + step]
        ids = mx.concatenate([IDS[:, n : n + 1] for n in (*at, 0)])
        order, layers = together.layers(rows, 3)
        said = model(mx.stack([ids[i] for i in (*order, 2)]), cache=layers)
        for i, row in zip(order, said, strict=False):
            close(row[0], wanted[0, at[i]])


def talking(family, tmp_path, **settings):
    """A model with memories that speak, and a tokenizer for it."""
    config = ahn_mlx.AHNConfig(window=WINDOW, sinks=SINKS)
    model = remember(augment(base(family, vocab_size=256, **settings), config))
    mx.eval(model.parameters())
    return model, load_tokenizer(byte_tokenizer(tmp_path / "bytes"), {})


def contents(session):
    """All arrays of its caches and all numbers beside them."""
    state = dict(tree_flatten([c.state for c in session.caches]))
    return {k: v.tolist() if isinstance(v, mx.array) else v for k, v in state.items()}


SAVED = [
    pytest.param(name, marks=() if name in ("phi3", "gpt_oss", "qwen3_next") else pytest.mark.slow)
    for name in ("gemma2", "olmo2", "phi3", "stablelm", *MIXED)
]


@pytest.mark.parametrize("family", SAVED)
def test_a_digested_text_comes_back(family, tmp_path):
    model, tokenizer = talking(family, tmp_path)
    session = Session(model, tokenizer, step=5)
    for n, ids in enumerate((range(33), range(40, 44), range(60, 66), range(1))):
        session.read_ids(list(ids))  # a tail of 3, 2, 3 and 4
        session.save(tmp_path / f"{n}.ahn")
        verify(tmp_path / f"{n}.ahn")
        again = Session.load(tmp_path / f"{n}.ahn", model, tokenizer)
        assert contents(session) == contents(again)
        said = [[*s.fork().ask("Why?", max_tokens=3)] for s in (session, again)]
        assert said[0] == said[1]
        assert contents(session) == contents(again)  # what forks do is theirs
        session = again
    whole = Session(model, tokenizer, step=5)
    whole.read_ids([*range(33), *range(40, 44), *range(60, 66), 0])
    assert contents(whole) == contents(session)
    answered = []
    for s in (session, whole):
        [*s.ask("Why?", max_tokens=9)]
        s.save(tmp_path / "answered.ahn")
        s = Session.load(tmp_path / "answered.ahn", model, tokenizer)
        s.read_ids([9, 8, 7])
        answered.append(contents(s))
    assert answered[0] == answered[1]
    with (tmp_path / "0.ahn").open("rb") as f:
        assert (b'"version\\": 3' in f.read(1 << 16)) == (family in MIXED)


def damaged(change, file, out):
    """The file with other facts and arrays, and a checksum that fits."""
    arrays, metadata = mx.load(str(file), format="safetensors", return_metadata=True)
    facts = json.loads(metadata["ahn"])
    change(facts, arrays)
    text = json.dumps(facts, sort_keys=True)
    found = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        x = arrays[name]
        found.update(f"{name} {x.dtype} {x.shape}".encode())
        found.update(np.array(x).tobytes())
    metadata = {"format": "mlx", "ahn": text, "sha256": found.hexdigest()}
    mx.save_safetensors(str(out.with_suffix(".safetensors")), arrays, metadata)
    out.with_suffix(".safetensors").rename(out)


def place(at, value, layer=0):
    def change(facts, arrays):
        facts["layers"][layer][at] = value

    return change


def said(**more):
    return lambda facts, arrays: facts.update(more)


def arrays(**more):
    """name: how an array is changed, or one that was not there."""

    def change(facts, arrays):
        for name, x in more.items():
            arrays[name] = x(arrays[name]) if callable(x) else x

    return change


def first(x):
    return x[:, :1]


OTHER = "not this model's"
LIES = {
    "a window of another size": ("gpt_oss", place(2, 7), OTHER),
    "that keeps its first tokens": ("gpt_oss", place(3, 1), OTHER),
    "a slot that is not there": ("gpt_oss", place(4, 99), "at slot 99"),
    "a slot before the first": ("gpt_oss", place(4, 0), "at slot 0"),
    "another after the tail": ("gpt_oss", place(5, 90), "at slot 90"),
    "another number of tokens": ("gpt_oss", place(1, 29), "where .*30.* is right"),
    "a name for a kind": ("gpt_oss", place(0, "turning"), "its layers is"),
    "no kind": ("gpt_oss", place(0, None), "its layers is"),
    "a list for a kind": ("gpt_oss", place(0, []), "its layers is"),
    "another kind": ("gpt_oss", lambda f, _: f["layers"].__setitem__(0, ["states", 30, 2]), OTHER),
    "an earlier version": ("gpt_oss", said(version=2), "not of version 2"),
    "too many slots": ("gpt_oss", arrays(**{"layers.0.0": mx.zeros((1, 2, 99, 16))}), "0.0 is"),
    "fewer heads": ("gpt_oss", arrays(**{"layers.0.1": first}), "layers.0.1 is"),
    "an array too many": ("gpt_oss", arrays(**{"layers.0.2": mx.zeros(1)}), "belongs to no"),
    "one too few": ("gpt_oss", lambda _, arrays: arrays.pop("layers.0.tail.1"), "is missing"),
    "numbers that are none": ("gpt_oss", arrays(**{"layers.0.1": lambda x: x * mx.inf}), "NaN or"),
    "more states": ("qwen3_next", place(2, 3), OTHER),
    "very many states": ("qwen3_next", place(2, 1 << 29), "its layers is"),
    "states of another shape": ("qwen3_next", arrays(**{"layers.0.1": first}), "layers.0.1 is"),
    "a later version": ("qwen3_next", said(version=4), "version 4, this program reads 3; upgrade"),
}


@pytest.mark.parametrize("slot", [0, 99])
def test_a_ring_goes_on_at_one_of_its_own_slots(slot, tmp_path):
    model, tokenizer = talking("gpt_oss", tmp_path)
    session = Session(model, tokenizer, step=1)  # so that nothing but the ring is there
    session.read_ids(list(range(33)))
    session.save(tmp_path / "a.ahn")
    assert contents(Session.load(tmp_path / "a.ahn", model, tokenizer)) == contents(session)
    damaged(place(4, slot), tmp_path / "a.ahn", tmp_path / "b.ahn")
    with pytest.raises(AHNError, match=f"at slot {slot}"):
        Session.load(tmp_path / "b.ahn", model, tokenizer)


def test_a_ring_goes_on_from_any_length(tmp_path):
    model, tokenizer = talking("gpt_oss", tmp_path)
    for n in (2, 5, 7, 13, 33):
        session = Session(model, tokenizer, step=5)
        session.read_ids(list(range(n)))
        session.save(tmp_path / "a.ahn")
        assert contents(Session.load(tmp_path / "a.ahn", model, tokenizer)) == contents(session)


@pytest.mark.parametrize("lie", LIES)
def test_what_is_false_of_an_own_cache_is_refused_in_one_line(lie, tmp_path):
    family, change, message = LIES[lie]
    model, tokenizer = talking(family, tmp_path)
    session = Session(model, tokenizer, step=5)
    session.read_ids(list(range(33)))
    session.save(tmp_path / "a.ahn")
    damaged(lambda facts, arrays: None, tmp_path / "a.ahn", tmp_path / "b.ahn")
    assert contents(Session.load(tmp_path / "b.ahn", model, tokenizer)) == contents(session)
    damaged(change, tmp_path / "a.ahn", tmp_path / "b.ahn")
    with pytest.raises(AHNError, match=message) as refused:
        Session.load(tmp_path / "b.ahn", model, tokenizer)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "family",
    ["gpt_oss", *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen3_next", "falcon_h1"))],
)
def test_a_server_answers_each_as_if_it_were_alone(family, tmp_path):
    model, tokenizer = talking(family, tmp_path)

    def alone(ids, n):
        caches, found = model.make_cache(), []
        for at in range(0, len(ids) - 1, 16):
            model(mx.array([ids[at : min(at + 16, len(ids) - 1)]]), cache=caches)
        for token in [ids[-1]] * (n > 0):
            while len(found) < n:
                token = model(mx.array([[token]]), cache=caches)[0, -1].argmax().item()
                found.append(token)
        return found

    prompts = [[(7 * i + n) % 256 for i in range(n)] for n in (5, 1, 70)]
    with running(model, tokenizer, rows=3) as engine:
        session = small(engine)
        told = [start(engine, session, ids, max_tokens=9)[1] for ids in prompts]
        done = [finish(one) for one in told]
        row = row_bytes(engine, session)
    for ids, (tokens, ends) in zip(prompts, done, strict=True):
        assert [t for t, _ in tokens[0]] == alone(ids, 9)
        assert ends[0].session.nbytes <= row


@pytest.mark.slow
def test_commands_with_an_own_window(tmp_path):
    config = {**tiny_config("gpt_oss"), "vocab_size": 256}
    model = base("gpt_oss", vocab_size=256)
    tensors = write_base(model, config, byte_tokenizer(tmp_path / "base"))
    write_memory(model, tensors, config, tmp_path / "ahn")
    convert(tmp_path / "base", tmp_path / "ahn", tmp_path / "model")
    (tmp_path / "book.txt").write_text("It was the best of times, it was the worst of times. " * 9)

    def run(command, *words):
        done = CliRunner().invoke(cli, [command, *map(str, words)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    book, memory = tmp_path / "book.txt", tmp_path / "book.ahn"
    run("digest", "--model", tmp_path / "model", "--prompt-file", book, "-o", memory)
    info = json.loads(run("memory", "info", memory, "--json"))
    assert (info["version"], info["tokens"], info["window_bits"]) == (3, info["tail"], None)
    assert "sound" in run("memory", "verify", memory)
    run("ask", "--memory", memory, "Why?", "--max-tokens", "3")
    run("digest", "--prompt-file", book, "-o", memory, "--append")
    assert json.loads(run("memory", "info", memory, "--json"))["tokens"] == 2 * info["tokens"]
    run("inspect", "--memory", memory, "-o", tmp_path / "page.html")


def test_an_app_steps_no_cache_of_another_kind():
    model = augment(base("gpt_oss"), ahn_mlx.AHNConfig(window=WINDOW))
    with pytest.raises(AHNError, match="layers 0, 2 have a cache of mlx-lm's own"):
        initial_state(model)


def write_base(model, config, place):
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    tensors = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(place / "model.safetensors"), tensors, {"format": "mlx"})
    return tensors


def write_memory(plain, tensors, config, place):
    """Augments the model, and writes what it has gained as the release does."""
    settings = ahn_mlx.AHNConfig(window=WINDOW, sinks=SINKS)
    model = remember(augment(plain, settings))
    memory = {k: v for k, v in tree_flatten(model.parameters()) if k not in tensors}
    released = {published_name(name): x for name, x in memory.items()}
    assert memory and not set(released) & set(memory)
    place.mkdir()
    mx.save_safetensors(str(place / "model.safetensors"), released, {"format": "pt"})
    (place / "config.json").write_text(json.dumps(release_config(config, settings, "ahn-only")))
    return released, memory


@pytest.mark.parametrize("family", EACH)
def test_convert_load_export_is_bit_exact(family, tmp_path):
    model, config = base(family), tiny_config(family)
    tensors = write_base(model, config, tmp_path / "base")
    released, memory = write_memory(model, tensors, config, tmp_path / "ahn")
    wanted = chunked(model, [20])
    convert(tmp_path / "base", tmp_path / "ahn", tmp_path / "model")
    loaded, _ = load_model(tmp_path / "model", dtype="float32")
    assert same(dict(tree_flatten(loaded.parameters())), tensors | memory)
    assert mx.array_equal(chunked(loaded, [20]), wanted)
    export_pytorch(tmp_path / "model", tmp_path / "out", "ahn-only")
    assert same(mx.load(str(tmp_path / "out/model.safetensors")), released)
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == family
    export_pytorch(tmp_path / "model", tmp_path / "whole", "merged")
    assert same(mx.load(str(tmp_path / "whole/model.safetensors")), tensors | released)
    assert json.loads((tmp_path / "whole/config.json").read_text())["sliding_window"] == WINDOW
    convert(None, tmp_path / "whole", tmp_path / "again")
    configs = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("model", "again"))
    assert next(configs).keys() == next(configs).keys()
    again, _ = load_model(tmp_path / "again", dtype="float32")
    assert mx.array_equal(chunked(again, [20]), wanted)


def test_experts_that_mlx_lm_would_stack_are_refused(tmp_path):
    model, config = base("mixtral"), tiny_config("mixtral")
    tensors = write_base(model, config, tmp_path / "base")
    assert loaded_base(tmp_path / "base").keys() == tensors.keys()
    apart = {}
    for name, x in tensors.items():
        if ".switch_mlp." not in name:
            apart[name] = x
            continue
        stem, _, rest = name.partition(".switch_mlp.")
        part = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[rest.split(".")[0]]
        apart |= {f"{stem}.experts.{e}.{part}.weight": x[e] for e in range(len(x))}
    mx.save_safetensors(str(tmp_path / "base/model.safetensors"), apart, {"format": "pt"})
    with pytest.raises(AHNError, match=r"base: mlx_lm rearranges .* mixtral .*mlx_lm.convert"):
        loaded_base(tmp_path / "base")


def loaded_base(place):
    config, sources = describe(place)
    return fit(build_base(config), config, sources, place, place)


@pytest.mark.parametrize("name", ["mistral", "iquestcoder", "xverse"])
def test_remapped_names_are_what_mlx_lm_runs_them_as(name, tmp_path):
    config = {**tiny_config("llama"), "model_type": name, "sliding_window": None}
    model = random(build_base(config))
    write_base(model, config, tmp_path / "base")
    config, _ = describe(tmp_path / "base")
    assert config["model_type"] == name
    assert type(build_base(config)) is llama.Model
    same_ones = base("llama")
    assert mx.array_equal(model(IDS), same_ones(IDS))


# A model file of each, in a folder of its own.
TOMORROW = {
    "dawn": {"temperature": 0.3, "intermediate_size": 96},
    "dusk": {"head_dim": 12, "sliding_window": 6, "softcap": 3.0},
}
READ = {
    "dawn": "everything (groups kvq), norm per head",
    "dusk": "soft cap, learned sinks",
}


@pytest.mark.parametrize("name", ["dawn", pytest.param("dusk", marks=pytest.mark.slow)])
def test_a_family_of_tomorrow_needs_no_line_here(name, tmp_path, monkeypatch):
    tomorrow = str(Path(__file__).parent / "tomorrow")
    monkeypatch.setattr(mlx_lm.models, "__path__", [*mlx_lm.models.__path__, tomorrow])
    config = {
        **{"model_type": name, "hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 256},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, **TOMORROW[name]},
    }
    plain = random(build_base(config))
    ids = IDS % 256
    wanted, said = (
        plain(ids, cache=make_prompt_cache(plain)),
        greedy(plain, make_prompt_cache(plain)),
    )
    mx.eval(wanted)
    byte_tokenizer(tmp_path / "base")
    tensors = write_base(plain, config, tmp_path / "base")
    released, _ = write_memory(plain, tensors, config, tmp_path / "ahn")
    _, attention = next(memory_layers(plain))
    assert attention.fit.describe() == READ[name]

    wide, _ = ahn_mlx.load(tmp_path / "base", ahn=tmp_path / "ahn", window=40, dtype="float32")
    close(wide(ids, cache=wide.make_cache()), wanted)
    assert greedy(wide, wide.make_cache()) == said
    close(chunked(plain, [12] + [1] * 8), chunked(plain, [20]))

    convert(tmp_path / "base", tmp_path / "ahn", tmp_path / "model")
    model, tokenizer = ahn_mlx.load(tmp_path / "model", dtype="float32")
    assert mx.array_equal(chunked(model, [20]), chunked(plain, [20]))
    document = "It was the best of times, it was the worst of times."
    answers = [
        "".join(Run(m, tokenizer, make_prompt(tokenizer, document, "Why?"), step=7))
        for m in (model, plain)
    ]
    assert answers[0] == answers[1] != ""
    export_pytorch(tmp_path / "model", tmp_path / "out", "ahn-only")
    assert same(mx.load(str(tmp_path / "out/model.safetensors")), released)


class Gained(llama.Attention):
    """With norms after RoPE."""

    def __init__(self, args):
        super().__init__(args)
        D = args.hidden_size // args.num_attention_heads
        self.q_norm, self.k_norm = nn.RMSNorm(D), nn.RMSNorm(D)

    def heads(self, x, cache):
        B, L, _ = x.shape
        q, k, v = (
            part(x).reshape(B, L, -1, self.q_norm.weight.size).swapaxes(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        offset = 0 if cache is None else cache.offset
        q, k = (self.rope(part, offset=offset) for part in (q, k))
        q, k = self.q_norm(q), self.k_norm(k)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        return q, k, v

    def __call__(self, x, mask=None, cache=None):
        q, k, v = self.heads(x, cache)
        mask = mask if q.shape[2] > 1 else None
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale, mask=mask)
        return self.o_proj(y.swapaxes(1, 2).flatten(2))


class Biased(Gained):
    """With something that no reading has: what is far counts less."""

    def __call__(self, x, mask=None, cache=None):
        q, k, v = self.heads(x, cache)
        L, K = q.shape[2], k.shape[2]
        far = mx.arange(K - L, K)[:, None] - mx.arange(K)
        bias = mx.where(far >= 0, -0.2 * far, -1e9)
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale, mask=bias)
        return self.o_proj(y.swapaxes(1, 2).flatten(2))


def test_norms_after_rope_are_read_as_such(monkeypatch):
    monkeypatch.setattr(llama, "Attention", Gained)
    model = base("llama")
    wanted = model(IDS)
    mx.eval(wanted)
    augment(model, ahn_mlx.AHNConfig(window=40, sinks=SINKS))
    _, attention = next(memory_layers(model))
    assert attention.fit.describe() == "norm per head after RoPE"
    close(model(IDS, cache=model.make_cache()), wanted)
    model = remember(augment(base("llama"), ahn_mlx.AHNConfig(window=WINDOW, sinks=SINKS)))
    close(chunked(model, [12] + [1] * 8), chunked(model, [20]))


class Named(llama.Attention):
    """That knows by the names of our methods what is a number there."""

    def __init__(self, args):
        super().__init__(args)
        self.heads, self.gates, self.merge = self.n_heads, 0, "no"


def test_what_a_layer_knows_of_itself_hides_nothing_of_ours(monkeypatch):
    monkeypatch.setattr(llama, "Attention", Named)
    model = base("llama")
    wanted = model(IDS)
    mx.eval(wanted)
    augment(model, ahn_mlx.AHNConfig(window=40, sinks=SINKS))
    close(model(IDS, cache=model.make_cache()), wanted)


class Shaped(llama.Attention):
    """Heads of any number and size, part of which is turned."""

    heads = (4, 2, 16, 16)

    def __init__(self, args):
        nn.Module.__init__(self)
        H, G, D, turned = type(self).heads
        C = args.hidden_size
        self.n_heads, self.n_kv_heads, self.scale = H, G, D**-0.5
        self.q_proj, self.k_proj = nn.Linear(C, H * D), nn.Linear(C, G * D)
        self.v_proj, self.o_proj = nn.Linear(C, G * D), nn.Linear(H * D, C)
        self.rope = nn.RoPE(turned)


@pytest.mark.parametrize("heads", [(4, 1, 16, 16), (3, 1, 7, 6), (4, 2, 10, 10), (3, 3, 2, 2)])
def test_heads_of_any_number_and_size(heads, monkeypatch):
    monkeypatch.setattr(Shaped, "heads", heads)
    monkeypatch.setattr(llama, "Attention", Shaped)
    model = base("llama")
    wanted = model(IDS)
    mx.eval(wanted)
    augment(model, ahn_mlx.AHNConfig(window=40, sinks=SINKS))
    close(model(IDS, cache=model.make_cache()), wanted)
    model = remember(augment(base("llama"), ahn_mlx.AHNConfig(window=WINDOW, sinks=SINKS)))
    close(chunked(model, [12] + [1] * 8), chunked(model, [20]))


def test_attention_that_does_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(llama, "Attention", Biased)
    with pytest.raises(AHNError, match="layer 0 of model family 'llama' does not fit: its atten"):
        augment(base("llama"), ahn_mlx.AHNConfig(window=WINDOW))


def test_scores_that_grow_with_the_position_are_refused():
    with pytest.raises(AHNError, match=r"llama4_text.*something that is not known"):
        augment(base("llama4_text"), ahn_mlx.AHNConfig(window=WINDOW))


def test_what_does_not_fit_says_what_is_missing():
    said = {name: judge(name) for name in ("deepseek_v3", "mamba", "qwen2_vl", "gpt2", "qwen3")}
    assert "latent" in said["deepseek_v3"].words
    assert "text_config" in said["qwen2_vl"].words
    assert [name for name, verdict in said.items() if verdict.fits] == ["qwen3"]


# By what their tiny models have of their own.
SAID = {
    **{"afm7": "no args.hidden_size", "dbrx": "no args.hidden_size"},
    **{"openelm": "no args.hidden_size", "deepseek_v2": "latent", "kimi_linear": "latent"},
    **{"minicpm3": "latent", "gemma4_text": "returns tuple", "hunyuan": "returns tuple"},
    **{"glm_moe_dsa": "no layer with a key/value cache", "recurrent_gemma": "only ArraysCache"},
    **{"mimo_v2_flash": "values are 2 of 8 and its keys 2 of 16", "nemotron_h": "no model.layers"},
    **{"spark2_5": "no model.embed_tokens", "ministral3": "mask and cache alone"},
}
READ_AS = {
    **dict.fromkeys(("llama", "smollm3", "helium", "minicpm", "nemotron", "nemotron-nas"), ""),
    **{"granitemoehybrid": "2 of 4 layers keep ArraysCache", "phi3": "qkv_proj (blocks)"},
    **dict.fromkeys(("lfm2", "lfm2_moe"), "norm per head; 2 of 4 layers keep ArraysCache"),
    "olmo_hybrid": "norm over all heads; 2 of 4 layers keep ArraysCache",
    "exaone4": "norm per head, no RoPE; 2 of 4 layers keep RotatingKVCache",
    "mellum": "norm per head; 2 of 4 layers keep RotatingKVCache",
    "step3p5": "norm per head, head gate; 2 of 4 layers keep RotatingKVCache",
    "stablelm": "norm per head",
}


def test_families_with_values_of_their_own_are_judged_by_their_attention():
    assert SAID.keys() | READ_AS.keys() | {"olmo"} == BY_FAMILY.keys()
    for family, words in SAID.items():
        said = judge(family)
        assert said.fits is False and words in said.words, said
    for family, words in READ_AS.items():
        assert judge(family) == (family, True, words)


def test_olmo_is_no_plain_decoder(monkeypatch):
    # mlx-lm's file asks whether this package is there, and uses nothing of it.
    monkeypatch.setitem(sys.modules, "hf_olmo", ModuleType("hf_olmo"))
    monkeypatch.delitem(sys.modules, "mlx_lm.models.olmo", raising=False)
    said = judge("olmo")
    assert said.fits is False and "has no args.hidden_size" in said.words


@pytest.mark.slow
def test_each_family_that_fits_is_tested_here():
    said = {name: judge(name) for name in families()}
    assert {name for name, verdict in said.items() if verdict.fits} == set(PLAIN + MIXED)
    # Of a package that is not installed, mlx-lm's own file cannot be read.
    assert {name for name, verdict in said.items() if verdict.fits is None} <= {"olmo"}


class Swapped(llama.Attention):
    """Keys for values."""

    def __call__(self, x, mask=None, cache=None):
        self.k_proj, self.v_proj = self.v_proj, self.k_proj
        try:
            return super().__call__(x, mask, cache)
        finally:
            self.k_proj, self.v_proj = self.v_proj, self.k_proj


def test_keys_for_values_are_seen(monkeypatch):
    monkeypatch.setattr(llama, "Attention", Swapped)
    with pytest.raises(AHNError, match="does something that is not known"):
        augment(base("llama"), ahn_mlx.AHNConfig(window=WINDOW))


def test_the_proof_leaves_parameters_and_random_numbers_alone():
    model = base("llama", hidden_size=48, head_dim=12)
    before = dict(tree_flatten(model.parameters()))
    mx.random.seed(7)
    fit_of(model.layers[0].self_attn, 48)
    after = dict(tree_flatten(model.parameters()))
    assert all(after[name] is x for name, x in before.items())
    drawn = mx.random.normal((3,))
    mx.random.seed(7)
    assert mx.array_equal(drawn, mx.random.normal((3,)))


def bytes_of(caches):
    """Of all arrays, but for what a step leaves to the next."""
    parts = [part for c in caches for part in (c.caches if isinstance(c, CacheList) else [c])]
    arrays = dict(tree_flatten([c.state for c in parts]))
    return sum(x.nbytes for x in arrays.values() if isinstance(x, mx.array))


@pytest.mark.parametrize("family", EACH)
def test_bytes_are_those_of_real_arrays(family):
    settings = ahn_mlx.AHNConfig(window=WINDOW, sinks=SINKS)
    shape = shape_of({**tiny_config(family), "ahn": settings.to_dict()})
    model = base(family)
    weights = dict(tree_flatten(model.parameters()))
    assert shape.parameters - shape.memory_parameters == sum(x.size for x in weights.values())
    # The last token alone: what came as a chunk has seen more than it keeps.
    full = make_prompt_cache(model)
    for ids in (IDS[:, :19], IDS[:, 19:]):
        model(ids, cache=full)
    assert sum(cache_bytes(shape, "full", 20, number=4).values()) == bytes_of(full)
    augment(model, settings)
    caches = model.make_cache()
    for ids in (IDS[:, :19], IDS[:, 19:]):
        model(ids, cache=caches)
    assert sum(cache_bytes(shape, "ahn", 20, number=4).values()) == bytes_of(caches)
    memory = sum(x.size for x in dict(tree_flatten(model.parameters())).values())
    assert shape.parameters == memory


def test_a_token_takes_some_experts_and_sees_an_own_window():
    def counted(family, **more):
        ahn = ahn_mlx.AHNConfig(window=WINDOW, sinks=SINKS).to_dict()
        return shape_of({**tiny_config(family), **more, "ahn": ahn})

    moe = counted("mixtral")  # 2 of 4 experts of three maps in each of four layers
    assert (moe.experts, moe.taken) == (4 * 4 * 3 * 64 * 96, 4 * 2 * 3 * 64 * 96)
    assert moe.mlp == 4 * 4 * 64  # which experts
    assert flops(moe, "full", 10)["mlp"] == 2 * 10 * (moe.mlp + moe.taken)
    assert idle_bytes(moe, 16) == 2 * 4 * 2 * 3 * 64 * 96
    windows = counted("gpt_oss", sliding_window=6)
    seen = 2 * (6 * 7 // 2 + 14 * 6)  # of 20 tokens in the two layers that see 6
    everything = 2 * (20 * 21 // 2)
    heads = windows.heads * windows.head_dim
    assert flops(windows, "full", 20)["attention"] == 4 * heads * (seen + everything)
    assert windows.layers == windows.memory_layers == 2
    assert windows.beside.windows == ((6, 2 * 2 * 16),) * 2
    recurrent = counted("qwen3_next")
    assert recurrent.beside.states > recurrent.beside.wide > 0
    model = augment(base("qwen3_next"), ahn_mlx.AHNConfig(window=WINDOW, sinks=SINKS))
    model.set_dtype(mx.bfloat16)
    caches = model.make_cache()
    model(IDS[:, :1], cache=caches)
    own = [c.state for c in caches if not isinstance(c, AHNCache)]
    states = [x for _, x in tree_flatten(own) if isinstance(x, mx.array)]
    assert recurrent.beside.wide == sum(x.size for x in states if x.dtype == mx.float32)
    assert counted("phi3").beside == counted("mixtral").beside
