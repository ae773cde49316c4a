"""What is read, kept and described, each rule by itself: caches of layers of their own, shapes in a
file, prompts, closing lines, limits of sampling."""

import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
import serving
from checkpoints import CHATML, chat_tokenizer
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache, RotatingKVCache

from ahn_mlx import AHNError
from ahn_mlx.model.cache import AHNCache
from ahn_mlx.reading import inspect as pages
from ahn_mlx.reading import memoryfile, own, shapes
from ahn_mlx.reading.caches import each, fork, held, make_caches, most_bytes
from ahn_mlx.reading.generate import Run, make_prompt
from ahn_mlx.reading.sampling import Sampling
from ahn_mlx.reading.session import Session


def ring(tokens: int, size: int = 8, keep: int = 2) -> RotatingKVCache:
    cache = RotatingKVCache(size, keep)
    for n in range(tokens):
        x = mx.full((1, 2, 1, 4), n, dtype=mx.float32)
        cache.update_and_fetch(x, x)
    return cache


def states(*arrays: mx.array | None) -> ArraysCache:
    cache = ArraysCache(len(arrays))
    cache.cache = list(arrays)
    return cache


# Caches


def test_what_a_cache_of_its_own_may_hold_at_most() -> None:
    one = ring(1)
    row = sum(x.nbytes // x.shape[2] for x in (one.keys, one.values))
    assert row == 2 * 2 * 4 * 4  # keys and values of two heads of four, float32
    for step in (1, 16):
        assert most_bytes(one, step) == row * (8 + step)
    kept = states(mx.zeros((1, 3)), None, mx.zeros((1, 5), mx.float16))
    assert most_bytes(kept, 1) == most_bytes(kept, 512) == 3 * 4 + 5 * 2


def test_what_a_cache_holds() -> None:
    a, b = mx.zeros((1, 3)), mx.ones((1, 5))
    assert [x.shape for x in held(states(a, None, b))] == [(1, 3), (1, 5)]
    assert held(KVCache()) == held(RotatingKVCache(8, 2)) == held(AHNCache(4, 2)) == ()
    assert len(held(ring(3))) == 2


def test_a_fork_changes_nothing_of_what_it_is_of() -> None:
    plain, turned, kept = KVCache(), ring(3), states(mx.zeros((1, 3)), None)
    plain.update_and_fetch(mx.ones((1, 1, 2, 4)), mx.ones((1, 1, 2, 4)))
    several = [CacheList(plain, turned), kept]
    (pair, forked) = fork(several)
    assert isinstance(pair, CacheList) and pair is not several[0]
    for cache in each([pair]):
        cache.update_and_fetch(
            mx.full((1, cache.keys.shape[1], 1, 4), 9.0), mx.zeros((1, cache.keys.shape[1], 1, 4))
        )
    forked.cache[0] = mx.ones((1, 3))
    assert (plain.offset, turned.offset) == (2, 3) and [c.offset for c in each([pair])] == [3, 4]
    assert kept.cache[0].sum().item() == 0 and forked.cache[1] is None
    assert not (plain.keys[..., :2, :] == 9).any().item()


def model_of(*caches: Any, ranks: Any = None, own_layers: bool = False) -> Any:
    return SimpleNamespace(
        make_cache=lambda: list(caches),
        args=SimpleNamespace(model_type="strange"),
        ranks=ranks,
        own_layers=own_layers,
    )


def test_caches_that_no_file_can_have_are_named() -> None:
    with pytest.raises(AHNError, match=r"strange model has caches \(ChunkedKVCache\) that cannot"):
        make_caches(model_of(KVCache(), CacheList(KVCache(), ChunkedKVCache(8))))
    with pytest.raises(AHNError, match="strange model has caches of mlx-lm's own, which several"):
        make_caches(model_of(ring(0), ranks=object(), own_layers=True))
    for ranks, own_layers in ((None, True), (object(), False)):
        assert len(make_caches(model_of(ring(0), ranks=ranks, own_layers=own_layers))) == 1


def test_windows_alone_are_quantized() -> None:
    window, full, pair = AHNCache(8, 2), KVCache(), CacheList(AHNCache(8, 2), ring(0))
    found = make_caches(model_of(window, full, pair), 8, 32)
    assert (found[0].bits, found[0].group_size) == (8, 32) and found[1] is full
    assert found[2].caches[0].bits == 8 and found[2].caches[1] is pair.caches[1]
    assert make_caches(model_of(window))[0] is window


# Caches of layers of their own, in a file


def test_entries_of_a_file() -> None:
    assert own.entry(ring(11), 11) == ["rotating", 11, 8, 2, ring(11)._idx]
    assert own.entry(ring(3), 3, ring(5)) == ["rotating", 3, 8, 2, 3, 5]
    assert own.entry(states(mx.zeros(1), None), 7) == ["states", 7, 2]
    assert (own.kind_of(ring(0)), own.kind_of(states(None))) == ("rotating", "states")
    assert own.kind_of(KVCache()) is None


@pytest.mark.parametrize(
    ("entry", "fits"),
    [
        *((["rotating", 1, 8, 2, 1], True), (["rotating", 1, 8, 2, 1, 2], True)),
        *((["rotating", 1, 8, 2], False), (["rotating", 1, 8, 2, 1, 2, 3], False)),
        *((["states", 1, 1], True), (["states", 1, 8], True), (["states", 1, 9], False)),
        *((["states", 1, 0], False), (["states", 1], False), (["states", 1, 1, 1], False)),
        *((["other", 1, 8, 2, 1], False), ([5, 1, 8, 2, 1], False)),
        *((["states", -1, 1], False), (["states", True, 1], False), (["states", 1.0, 1], False)),
        *((["states", 1 << 30, 1], True), (["states", (1 << 30) + 1, 1], False)),
    ],
)
def test_what_an_entry_may_be(entry: list[Any], fits: bool) -> None:
    assert own.is_entry(entry) is fits


def test_numbers_of_an_entry_that_follow_from_others() -> None:
    assert own.right(["states", 5, 2], 9, 0) == ["states", 9, 2]
    assert own.right(["rotating", 5, 0, 2, 3], 9, 0) == ["rotating", 9, 1, 2, 3]
    assert own.right(["rotating", 5, 8, 2, 3], 9, 4) == ["rotating", 9, 8, 2, 3, 0]
    assert own.right(["rotating", 5, 8, 2, 3, 6], 9, 4) == ["rotating", 9, 8, 2, 3, 6]
    assert own.right(["rotating", 5, 8, 2, 3, 6], 9, 0) == ["rotating", 9, 8, 2, 3]


def test_arrays_of_an_entry() -> None:
    one = own.of_one_token(ring(1))
    assert [(w.dtypes, [len(r) for r in w.shape or ()]) for w in one] == [(("F32",), [1] * 4)] * 2
    with pytest.raises(ValueError, match="states that one token does not begin"):
        own.of_one_token(states(mx.zeros(1), None))
    assert len(own.of_one_token(states(mx.zeros(1), mx.zeros(2)))) == 2
    known = own.of_any(["rotating", 1, 8, 2, 1])
    assert len(known) == 2 and known[0].shape and known[0].shape[0] == range(1, 2)
    assert [w.shape for w in own.of_any(["states", 1, 3])] == [None] * 3
    for tokens, slots in ((1, (1, 23)), (8, (8, 23)), (99, (8, 23))):
        found = own.arrays("layers.0.", ["rotating", tokens, 8, 2, 1], one, tokens, 16)
        assert found.keys() == {"layers.0.0", "layers.0.1"}
        sizes = (found["layers.0.0"].shape or ())[2]
        assert (sizes[0], sizes[-1]) == slots
    assert own.arrays("x", ["rotating", 0, 8, 2, 0], one, 0, 16) == {}
    as_they_are = own.arrays("x", ["states", 5, 2], one, 5, 16)
    assert as_they_are == {"x0": one[0], "x1": one[1]}


@pytest.mark.parametrize(
    ("tokens", "slots", "place", "fits"),
    [
        *((0, 8, 0, True), (0, 8, 1, False), (5, 8, 5, True), (5, 8, 4, False), (5, 9, 5, False)),
        *((8, 8, 8, True), (8, 8, 3, True), (8, 8, 0, False), (99, 8, 8, True), (99, 8, 9, False)),
        *((99, 20, 20, True), (99, 20, 7, False), (99, 7, 1, True)),
    ],
)
def test_where_a_ring_may_stand(tokens: int, slots: int, place: int, fits: bool) -> None:
    arrays = {"layers.1.0": ("F32", (1, 2, slots, 4))}
    layer: list[Any] = ["rotating", tokens, 8, 2, place]
    if fits:
        own.check_place("layers.1.", layer, place, tokens, arrays)
        return
    with pytest.raises(ValueError, match=rf"^layers\.1 is at slot {place}, which it has not$"):
        own.check_place("layers.1.", layer, place, tokens, arrays)


def test_a_cache_from_its_entry() -> None:
    arrays = tuple(x + 0 for x in held(ring(5)))
    found = own.restored(["rotating", 5, 8, 2, 5], 5, arrays)
    assert isinstance(found, RotatingKVCache)
    assert (found.max_size, found.keep, found.offset, found._idx) == (8, 2, 5, 5)
    assert own.restored(["rotating", 5, 8, 2, 5, 3], 7, arrays, 3)._idx == 3  # type: ignore[union-attr]
    empty = own.restored(["rotating", 0, 8, 2, 0], 0, ())
    assert empty.empty() and len(own.restored(["states", 0, 3], 0, ()).cache) == 3  # type: ignore[union-attr]
    assert len(held(own.restored(["states", 4, 2], 4, arrays))) == 2


# Shapes


def test_arrays_are_named_with_what_they_should_be() -> None:
    wanted = shapes.Wanted(("F32", "BF16"), (shapes.exactly(2), range(1, 4)))
    assert str(wanted) == "F32 or BF16 [2, 1 to 3]"
    assert str(shapes.Wanted(("F16",), None)) == "F16"
    for fits in (("F32", (2, 1)), ("BF16", (2, 3))):
        shapes.compare("a", {"a": fits}, wanted)
    for bad in (
        ("F16", (2, 1)),
        ("F32", (2, 4)),
        ("F32", (1, 1)),
        ("F32", (2,)),
        ("F32", (2, 1, 1)),
    ):
        said = f"array a is {bad[0]} {list(bad[1])}, not {wanted}"
        with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
            shapes.compare("a", {"a": bad}, wanted)
    with pytest.raises(ValueError, match="array a is missing"):
        shapes.compare("a", {"b": ("F32", (2, 1))}, wanted)
    shapes.compare("a", {"a": ("F16", (9, 9, 9))}, shapes.Wanted(("F16",), None))


# Prompts, and what is said of them


def test_a_prompt_of_nothing() -> None:
    words = chat_tokenizer()
    for document, question in (("", ""), ("\n\n", "  "), (" ", "\n")):
        with pytest.raises(AHNError, match="the prompt is empty; give a text to read or --prompt"):
            make_prompt(words, document, question)
    with pytest.raises(AHNError, match="--system-prompt needs the chat template"):
        make_prompt(words, "x", system="Be brief.", chat_template=False)
    both = words.decode(make_prompt(words, "Once.\n\n", "Why?"))
    assert "user\nOnce.\n\nWhy?<|im_end|>" in both
    assert words.decode(make_prompt(words, "Once.\n", "", chat_template=False)) == "Once."
    assert words.decode(make_prompt(words, " ", "Why?", chat_template=False)) == "Why?"


def test_the_closing_line_of_a_run() -> None:
    run = Run(serving.model(window=8), chat_tokenizer(), [1, 2, 3], Sampling(max_tokens=2), step=16)
    assert run.summary().startswith("prompt 0 tokens, 0.0 tokens/s | generation 0 tokens, 0.0")
    list(run)
    assert "full at 12 tokens" in run.summary() and "prompt 3 tokens" in run.summary()
    run._times = [10.0, 12.0, 16.0]
    run.read, run.generated = 1000, 2
    assert (
        "prompt 1,000 tokens, 500.0 tokens/s | generation 2 tokens, 0.5 tokens/s" in run.summary()
    )
    for read, said in ((10, "full at 12 tokens"), (11, "full attention ")):
        run.read = read
        assert f" MB, {said}" in run.summary()


def test_a_run_keeps_its_window_in_so_many_bits() -> None:
    run = Run(serving.model(), chat_tokenizer(), [1], kv_bits=8, kv_group_size=32)
    assert {(c.bits, c.group_size) for c in run.cache} == {(8, 32)}
    assert {c.bits for c in Run(serving.model(), chat_tokenizer(), [1]).cache} == {None}


def test_full_attention_would_hold_what_layers_of_their_own_do() -> None:
    run = Run(serving.model(window=8), chat_tokenizer(), [1], step=16)
    run.read = 100
    both = run.full_attention_bytes
    assert both == 2 * 2 * 100 * 64 * 4  # keys and values of two layers, 64 wide, float32
    run.cache[1] = states(mx.zeros((1, 5)))
    assert run.full_attention_bytes == both // 2 + 5 * 4


def test_a_session_is_named(tmp_path: Path) -> None:
    session = Session(serving.model(), chat_tokenizer(CHATML), step=16)
    assert repr(session) == "<Session of a model without a name: 0 tokens, turn 'start'>"
    with pytest.raises(AHNError, match="the text is empty; give a text to read"):
        session.read("")
    session.read("It was the best of times.")
    session.origin = {**session.origin, "name": "tiny"}
    assert repr(session) == f"<Session of tiny: {session.tokens} tokens, turn 'read'>"


# Files that are none


def test_what_is_no_memory_is_named_by_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "dir.ahn").mkdir()
    os.mkfifo(tmp_path / "pipe.ahn")
    (tmp_path / "page.ahn").write_text("<html>" * 9)
    for name, said in (
        *(("dir.ahn", "is a directory, not a memory"), ("pipe.ahn", "is not a regular file")),
        *(("page.ahn", "is not a memory"), ("none.ahn", "no such file")),
    ):
        with pytest.raises(
            AHNError, match=rf"{re.escape(name)}: {said}.*; ahn-mlx digest writes one"
        ):
            memoryfile.read_facts(tmp_path / name)


def test_a_page_of_ours_is_told_by_its_begin(tmp_path: Path) -> None:
    for before, ours in (
        (0, True),
        (1000 - len(pages.MARK), True),
        (1001 - len(pages.MARK), False),
    ):
        (tmp_path / "a.html").write_text(" " * before + pages.MARK)
        assert pages.is_page(tmp_path / "a.html") is ours


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("max_tokens", 0, "must be at least 1, not 0"),
        ("top_k", -1, "must be at least 0, not -1"),
        ("seed", 2**64, r"must be from 0 to 2\*\*64 - 1, not 18446744073709551616"),
        ("max_tokens", 1.0, "must be a whole number, not 1.0"),
        ("temp", "x", "must be a number, not 'x'"),
        ("repetition_context_size", -1, "must be at least 0, not -1"),
    ],
)
def test_limits_of_sampling_are_said(name: str, value: Any, said: str) -> None:
    with pytest.raises(AHNError, match=f"^{name} {said}$"):
        replace(Sampling(), **{name: value})
