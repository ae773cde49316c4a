"""Rows of a batch at places of their own, against each row alone."""

import copy
from dataclasses import replace
from functools import lru_cache

import mlx.core as mx
import pytest
from checkpoints import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import batch_generate
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_lm.models.llama import Model, ModelArgs

from ahn_mlx import AHNConfig, AHNError, augment, load_model
from ahn_mlx.checkpoints.convert import convert
from ahn_mlx.model.augment import memory_layers
from ahn_mlx.model.cache import AHNCache, BatchAHNCache
from ahn_mlx.ops.ring import place, place_of, slot_of

VARIANTS = sorted(p.name for p in GOLDEN.glob("qwen*"))


@pytest.fixture(scope="module", params=VARIANTS)
def golden_model(request, tmp_path_factory):
    folder, out = GOLDEN / request.param, tmp_path_factory.mktemp(request.param) / "model"
    convert(folder / "base", folder / "ahn_only", out) if (folder / "base").is_dir() else convert(
        None, folder / "merged", out
    )
    return load_model(out, dtype="float32")[0]


@lru_cache
def tiny(memory="gated_deltanet", positions="clamped", **options):
    """A model whose memory is loud, window 5 and 2 sinks."""
    mx.random.seed(1)
    args = ModelArgs("llama", 32, 2, 32, 4, rms_norm_eps=1e-5, vocab_size=64, num_key_value_heads=2)
    config = AHNConfig(memory=memory, window=5, sinks=2, sink_positions=positions, **options)
    return loud(augment(Model(args), config))


def loud(model):
    """With a memory that is heard, in use: a router in training counts otherwise."""
    model.eval()
    for _, attention in memory_layers(model):
        weight = attention.ahn.o_proj.weight
        attention.ahn.o_proj.weight = mx.random.normal(weight.shape) * 0.3
        if "router" in attention:
            router = attention.router
            router.update({name: mx.random.normal(x.shape) for name, x in router.items()})
    mx.eval(model.parameters())
    return model


def ids(row, first, n):
    """Tokens first ... first + n - 1 of a row; every row says something else."""
    return [(row * 31 + t * 7 + t * t) % 61 for t in range(first, first + n)]


def alone(model, row, n, caches=None):
    """Logits of the next n tokens of a row by itself."""
    logits = model(mx.array([ids(row, caches[0].offset, n)]), cache=caches)
    mx.eval(logits, [c.state for c in caches])
    return logits[0]


def merge(rows):
    return [layer[0].merge(list(layer)) for layer in zip(*rows, strict=True)]


def forward(model, batch, names, lengths, L):
    """The next lengths[b] tokens of each row, padded to L as mlx-lm does. Logits by row."""
    at = batch[0].offsets
    padded = any(n < L for n in lengths)
    tokens = [ids(row, t, n) + [63] * (L - n) for row, t, n in zip(names, at, lengths, strict=True)]
    if padded:
        for c in batch:
            c.prepare(lengths=lengths, right_padding=[L - n for n in lengths])
    logits = model(mx.array(tokens), cache=batch)
    mx.eval(logits, [c.state for c in batch])
    if padded:
        for c in batch:
            c.finalize()
    return [logits[b, :n] for b, n in enumerate(lengths)]


def close(found, expected, bound=1e-4):
    assert found.shape == expected.shape
    assert mx.abs(found - expected).max().item() < bound * max(1, mx.abs(expected).max().item())
    assert mx.array_equal(found.argmax(axis=-1), expected.argmax(axis=-1))


@pytest.mark.parametrize("positions", ["absolute", "clamped"])
def test_twelve_rows_anywhere_are_as_each_alone(golden_model, positions):
    """Filling, just full, wrapping; chunks of 1, 3, 7 and 12, ragged, and single tokens."""
    model = copy.deepcopy(golden_model)
    for layer in model.layers:
        layer.self_attn.config = replace(layer.self_attn.config, sink_positions=positions)
    model.ahn = replace(model.ahn, sink_positions=positions)
    starts = [0, 1, 3, 4, 5, 11, 12, 15, 16, 17, 29, 50]
    rows = [model.make_cache() for _ in starts]
    for row, (cache, n) in enumerate(zip(rows, starts, strict=True)):
        if n:
            alone(model, row, n, cache)
    batch, names = merge(rows), list(range(len(rows)))
    for step, L in enumerate((1, 3, 1, 7, 12, 1, 1)):
        lengths = [1 if L == 1 else (row * 5 + step) % (L + 1) for row in names]
        for row, found in enumerate(forward(model, batch, names, lengths, L)):
            if lengths[row]:
                close(found, alone(model, row, lengths[row], rows[row]))
    for layer, caches in zip(batch, zip(*rows, strict=True), strict=True):
        for row, cache in enumerate(caches):
            assert layer.offsets[row] == cache.offset
            if cache.memory is not None:
                assert mx.abs(layer.rows.memory[row] - cache.memory[0]).max() < 1e-4


moves = st.one_of(
    st.tuples(st.just("read"), st.integers(1, 9), st.integers(0, 2**16)),
    st.tuples(st.just("step"), st.integers(1, 4), st.just(0)),
    st.tuples(st.just("join"), st.integers(0, 20), st.just(0)),
    st.tuples(st.just("leave"), st.integers(0, 99), st.just(0)),
    st.tuples(st.just("snapshot"), st.integers(0, 99), st.integers(0, 5)),
)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["gated_deltanet", "deltanet", "mamba2"]),
    st.sampled_from(["absolute", "clamped"]),
    st.lists(moves, min_size=3, max_size=10),
)
def test_joins_leaves_and_snapshots_disturb_no_one(memory, positions, script):
    model = tiny(memory, positions, router=True, window_gain=True)
    names = [0, 1]
    rows = {n: model.make_cache() for n in names}
    batch = merge([model.make_cache() for _ in names])
    for kind, a, b in script:
        if kind == "read":
            lengths = [(b >> 2 * i) % (a + 1) for i in range(len(names))]
            lengths[b % len(names)] = a
            found = forward(model, batch, names, lengths, a)
            for name, n, logits in zip(names, lengths, found, strict=True):
                if n:
                    close(logits, alone(model, name, n, rows[name]))
        elif kind == "step":
            for _ in range(a):
                found = forward(model, batch, names, [1] * len(names), 1)
                for name, logits in zip(names, found, strict=True):
                    close(logits, alone(model, name, 1, rows[name]))
        elif kind == "join":
            name = max(rows) + 1
            new = model.make_cache()
            if a:
                alone(model, name, a, new)
            rows[name] = [copy.copy(c) for c in new]
            for ours, theirs in zip(batch, merge([new]), strict=True):
                ours.extend(theirs)
            names.append(name)
        elif kind == "leave" and len(names) > 1:
            gone = names[a % len(names)]
            keep = [i for i, name in enumerate(names) if name != gone]
            for c in batch:
                c.filter(keep)
            names.remove(gone)
        elif kind == "snapshot":
            i = a % len(names)
            taken = [c.extract(i) for c in batch]
            assert all(type(c) is AHNCache and c.offset == batch[0].offsets[i] for c in taken)
            one, other = [copy.copy(c) for c in rows[names[i]]], taken
            close(alone(model, names[i], b + 1, other), alone(model, names[i], b + 1, one))


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(0, 4),
    st.data(),
)
@settings(deadline=None)
def test_places_are_those_of_a_list_of_tokens(at, window, sinks, data):
    L = data.draw(st.integers(1, window))
    count = data.draw(st.none() | st.lists(st.integers(0, L), min_size=len(at), max_size=len(at)))
    held = window + sinks
    found = place_of(tuple(at), count and tuple(count), L, held, window, sinks)
    arrays = [None if x is None else mx.array(x) for x in (at, count)]
    pure = place(arrays[0], arrays[1], L, held, window, sinks)
    for b, t0 in enumerate(at):
        n = L if count is None else count[b]
        assert found.following[b].item() == slot_of(t0 + n, window, sinks)
        # Who sits where before the chunk.
        there = {slot_of(t, window, sinks): t for t in range(t0)}
        for i in range(n):
            t = t0 + i
            assert found.slots[b, i].item() == slot_of(t, window, sinks)
            assert found.near[b, i].item() == min(t, held)
            assert found.evicted[b, i].item() == max(1, t + 1 - held)
            visible = [j for j in range(t + 1) if j < sinks or t - j < window]
            if L == 1 and count is None:
                expected = [s for s in range(held) if s < min(t0 + 1, held)]
                assert found.filled[b].item() == len(visible) == len(expected)
            else:
                old = [s for s, token in there.items() if token in visible]
                expected = sorted(old) + [held + j for j in range(i + 1)]
            if found.seen is not None:
                seen = found.seen[b, 0, i].tolist()
                assert [k for k, yes in enumerate(seen) if yes] == expected
            else:
                assert len(expected) == held
    for name, x, y in zip(found._fields, found, pure, strict=True):
        if name != "seen" or x is not None:
            assert (x is None) == (y is None) and (x is None or mx.array_equal(x, y))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_window(bits):
    args = ModelArgs("llama", 128, 2, 32, 2, rms_norm_eps=1e-5, vocab_size=64)
    model = loud(augment(Model(args), AHNConfig(window=5, sinks=2)))
    rows = [[c.to_quantized(64, bits) for c in model.make_cache()] for _ in range(3)]
    for row, n in enumerate((1, 6, 20)):
        alone(model, row, n, rows[row])
    batch = merge(rows)
    for lengths, L in (([1, 1, 1], 1), ([0, 4, 2], 4), ([1, 1, 1], 1)):
        for row, found in enumerate(forward(model, batch, [0, 1, 2], lengths, L)):
            if lengths[row]:
                # A number that rounds the other way is a step of the quantization off.
                close(found, alone(model, row, lengths[row], rows[row]), 5e-3)
    taken = [c.extract(1) for c in batch]
    assert all(c.bits == bits and len(c.buffers) == 7 for c in taken)


def test_batch_generate_with_ragged_prompts():
    """mlx-lm's own generator: eight prompts, each with the tokens that it has alone."""
    model = tiny()

    class Tokenizer:
        eos_token_ids = (62,)
        eos_token_id = 62

        @property
        def detokenizer(self):
            raise AssertionError("not used")

        def decode(self, tokens):
            return " ".join(map(str, tokens))

    prompts = [ids(row, 0, 1 + 3 * row) for row in range(8)]
    together = batch_generate(model, Tokenizer(), prompts, max_tokens=12).texts
    for prompt, text in zip(prompts, together, strict=True):
        caches, said = model.make_cache(), []
        logits = model(mx.array([prompt]), cache=caches)
        while len(said) < 12:
            token = logits[0, -1].argmax().item()
            if token == 62:
                break
            said.append(token)
            logits = model(mx.array([[token]]), cache=caches)
        assert text == " ".join(map(str, said))


def test_rows_leave_in_the_middle_of_their_prompts():
    model = tiny()
    rows = {n: model.make_cache() for n in (0, 1, 2)}
    batch, lengths = merge([model.make_cache() for _ in rows]), [9, 5, 7]
    tokens = mx.array([ids(n, 0, length) + [63] * (9 - length) for n, length in enumerate(lengths)])
    for c in batch:
        c.prepare(lengths=lengths, right_padding=[9 - n for n in lengths])
    model(tokens[:, :4], cache=batch)
    for c in batch:
        c.filter([2, 0])
    logits = model(tokens[mx.array([2, 0]), 4:], cache=batch)
    for c in batch:
        c.finalize()
    assert batch[0].offsets == [7, 9]
    for name, found in ((2, logits[0, :3]), (0, logits[1, :5])):
        close(found, alone(model, name, lengths[name], rows[name])[4:])
    for name, found in zip((2, 0), forward(model, batch, [2, 0], [1, 1], 1), strict=True):
        close(found, alone(model, name, 1, rows[name]))


@pytest.mark.parametrize("n", [254, 255, 256])
def test_the_last_slot_before_more_are_made(n):
    args = ModelArgs("llama", 32, 1, 32, 4, rms_norm_eps=1e-5, vocab_size=64, num_key_value_heads=2)
    model = loud(augment(Model(args), AHNConfig(window=600, sinks=8)))
    rows = [model.make_cache() for _ in range(2)]
    batch = merge([model.make_cache() for _ in rows])
    for lengths, L in (([n, 3], n), ([1, 1], 1), ([1, 1], 1), ([1, 1], 1)):
        for row, found in enumerate(forward(model, batch, [0, 1], lengths, L)):
            close(found, alone(model, row, lengths[row], rows[row]))


def test_slots_grow_with_the_longest_row_only():
    config = AHNConfig(window=3000, sinks=8)
    args = ModelArgs("llama", 32, 1, 32, 4, rms_norm_eps=1e-5, vocab_size=64, num_key_value_heads=2)
    model = augment(Model(args), config)
    batch = merge([model.make_cache() for _ in range(2)])
    forward(model, batch, [0, 1], [3, 5], 5)
    held = batch[0].rows.buffers[0].shape[2]
    assert held < 600
    forward(model, batch, [0, 1], [0, 900], 900)
    assert 905 < batch[0].rows.buffers[0].shape[2] < 2000
    assert batch[0].extract(0).nbytes < batch[0].nbytes / 3


def test_slots_double_so_that_few_steps_copy_them():
    args = ModelArgs("llama", 32, 1, 32, 4, rms_norm_eps=1e-5, vocab_size=64, num_key_value_heads=2)
    model = augment(Model(args), AHNConfig(window=3000, sinks=8))
    batch, held = merge([model.make_cache() for _ in range(2)]), []
    for _ in range(26):
        forward(model, batch, [0, 1], [64, 64], 64)
        held.append(batch[0].rows.buffers[0].shape[2])
    assert sorted(set(held)) == [256, 512, 1024, 2048]


def test_rows_that_have_read_nothing_take_the_type_of_the_others():
    args = ModelArgs("llama", 32, 1, 32, 4, rms_norm_eps=1e-5, vocab_size=64, num_key_value_heads=2)
    model = augment(Model(args), AHNConfig(window=40, sinks=3))
    model.set_dtype(mx.bfloat16)
    read, fresh = model.make_cache(), model.make_cache()
    alone(model, 0, 9, read)
    for batch in (merge([read, fresh]), merge([fresh, read])):
        assert {x.dtype for x in batch[0].rows.buffers[:2]} == {mx.bfloat16}
    none = merge([model.make_cache(), model.make_cache()])
    forward(model, none, [0, 1], [3, 9], 9)
    assert {x.dtype for x in none[0].rows.buffers} == {mx.bfloat16}


@pytest.mark.parametrize("lengths", [(5, 700), (700, 5), (300, 43), (9, 9)])
def test_rows_that_are_put_together_keep_all_their_slots(lengths):
    args = ModelArgs("llama", 32, 1, 32, 4, rms_norm_eps=1e-5, vocab_size=64, num_key_value_heads=2)
    for window in (40, 3000):
        model = loud(augment(Model(args), AHNConfig(window=window, sinks=3)))
        rows = [model.make_cache() for _ in lengths]
        for row, n in enumerate(lengths):
            alone(model, row, n, rows[row])
        batch = merge(rows)
        for _ in range(3):
            for row, found in enumerate(forward(model, batch, [0, 1], [1, 1], 1)):
                close(found, alone(model, row, 1, rows[row]))
    empty = BatchAHNCache(40, 3, None, 64, [0, 0])
    assert (empty.nbytes, empty.empty(), empty.size()) == (0, True, 0)


def test_a_memory_that_was_changed_in_place_is_seen_by_the_next_text():
    model = tiny("mamba2")
    forward(model, merge([model.make_cache() for _ in range(2)]), [0, 1], [9, 9], 9)
    model = copy.deepcopy(model)
    (_, first), *_ = memory_layers(model)
    forward(model, merge([model.make_cache()]), [0], [9], 9)
    name, x = next((n, x) for n, x in first.ahn.items() if "A" in n and isinstance(x, mx.array))
    first.ahn[name] *= 1.5  # as an optimizer does
    found = forward(model, merge([model.make_cache()]), [0], [9], 9)[0]
    fresh = copy.deepcopy(model)
    assert mx.allclose(found, alone(fresh, 0, 9, fresh.make_cache()), atol=1e-5)


def test_a_step_writes_in_place():
    """Eight rows of 4 MB: what one more token takes is a small part of them."""
    args = ModelArgs("llama", 64, 1, 32, 1, rms_norm_eps=1e-5, vocab_size=64)
    model = augment(Model(args), AHNConfig(window=8192, sinks=8))
    batch = merge([model.make_cache() for _ in range(8)])
    forward(model, batch, list(range(8)), [700 + 10 * n for n in range(8)], 770)
    batch[0].offsets = [8200 + n for n in range(8)]  # as after a long text
    batch[0].turn()
    mx.eval(batch[0].state)
    for _ in range(3):
        forward(model, batch, list(range(8)), [1] * 8, 1)
    window = batch[0].rows.buffers[0].nbytes
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(3):
        forward(model, batch, list(range(8)), [1] * 8, 1)
    assert window > 16 << 20 and mx.get_peak_memory() - before < window / 2


def test_rows_that_do_not_fit_are_named():
    a, b = AHNCache(8, 2), AHNCache(9, 2)
    with pytest.raises(AHNError, match="rows of one batch differ: window 8 and 9"):
        a.merge([a, b])
    with pytest.raises(AHNError, match="bits None and 8"):
        a.merge([a, AHNCache(8, 2, bits=8)])
    with pytest.raises(AHNError, match="sinks 2 and 3"):
        a.merge([a]).extend(BatchAHNCache.of([AHNCache(8, 3)]))
    with pytest.raises(AHNError, match="pad on the right"):
        a.merge([a]).prepare(left_padding=[1])


def test_full_attention_layers_are_not_batched():
    mixed = make_prompt_cache(tiny(fa_layer_ids=(0,)))
    assert [hasattr(c, "merge") for c in mixed] == [False, True]


@pytest.mark.parametrize("full", [(), (1,)])
def test_a_saved_prompt_cache_goes_on(full, tmp_path):
    model = tiny(fa_layer_ids=full)
    caches = model.make_cache()
    alone(model, 0, 17, caches)
    file = str(tmp_path / "cache.safetensors")
    save_prompt_cache(file, caches)
    again = load_prompt_cache(file)
    for _ in range(3):
        assert mx.array_equal(alone(model, 0, 1, again), alone(model, 0, 1, caches))
    assert mx.array_equal(alone(model, 0, 9, again), alone(model, 0, 9, caches))


@pytest.mark.parametrize(
    ("at", "count", "L", "every"),
    [
        *(((13,), None, 1, True), ((12,), None, 1, False), ((13, 40), None, 1, True)),
        *(((40, 12), None, 1, False), ((40,), None, 2, False), ((40, 41), (1, 1), 1, False)),
    ],
)
def test_single_tokens_behind_full_windows_see_every_slot(at, count, L, every):
    """Else a query sees what is within 10 tokens, or among the first 4."""
    found = place_of(at, count, L, 14, 10, 4)
    assert (found.seen is None) is every
    rows, counts = (None if x is None else mx.array(x) for x in (at, count))
    whole = place(rows, counts, L, 14, 10, 4)
    for mine, other in zip(found[:-1], whole[:-1], strict=True):
        assert (mine is None and other is None) or mx.array_equal(mine, other)
    if every:
        assert mx.all(whole.seen)
    else:
        assert mx.array_equal(found.seen, whole.seen) and not mx.all(found.seen)
